"""By how much one picture is turned against another, as the equivariant half tells it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

import clever_zoo
from clever_zoo.cli import app
from clever_zoo.embedder import ImageEmbedder
from clever_zoo.embedding import Embedding
from clever_zoo.errors import ImageError, NonFiniteError, SpecError
from clever_zoo.samples import sample_paths
from clever_zoo.turn import _fit, read_turn, turn_pictures, turned, wrapped
from training.pixel_ops import circular_mask, rotate

SIZE = 32
PICTURE = sample_paths()[1]


class Knows(ImageEmbedder):
    """Its equivariant half is a coarse picture: enough to read a turn from, and no weights."""

    def __init__(self) -> None:
        self.spec = clever_zoo.model_info("clever-resnet18")
        self.seen = 0

    def embed_pixels(self, pixels):
        self.seen += len(pixels)
        grey = pixels.mean(-1, dtype=np.float32).reshape(len(pixels), 8, 4, 8, 4).mean((2, 4))
        halves = grey.reshape(len(pixels), -1)
        return Embedding(halves, halves)


def turn_of(degrees: float, embedder: ImageEmbedder) -> clever_zoo.Turn:
    picture = Image.open(PICTURE).convert("RGB").resize((SIZE, SIZE))
    return read_turn(embedder, picture, picture.rotate(degrees))


def test_says_what_the_reading_is_worth() -> None:
    same, other = turn_of(0, Knows()), turn_of(40, Knows())
    assert same.degrees == 0
    assert same[1:] == other[1:]
    assert 55 < same.guess_deg < 75  # two angles uniform in ±90 are 60 apart on average
    assert same.error_deg < 0.75 * same.guess_deg


def test_there_and_back_are_opposite() -> None:
    picture = Image.open(PICTURE).convert("RGB").resize((SIZE, SIZE))
    there = read_turn(Knows(), picture, picture.rotate(50))
    back = read_turn(Knows(), picture.rotate(50), picture)
    assert there.degrees == pytest.approx(-back.degrees)


def test_progress_ends_at_the_number_of_pictures() -> None:
    embedder, done = Knows(), []
    read_turn(embedder, PICTURE, PICTURE, on_progress=done.append)
    assert done == sorted(done)
    assert done[-1] == embedder.seen == turn_pictures()


def test_copies_are_those_of_the_evaluation() -> None:
    squares = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    degrees = np.array([0.0, 90.0, -90.0, 180.0])
    ours = turned(squares, degrees)
    tensors = torch.from_numpy(squares).permute(0, 3, 1, 2).float()
    theirs = circular_mask(rotate(tensors, torch.from_numpy(degrees).float()))
    np.testing.assert_array_equal(ours, theirs.byte().permute(0, 2, 3, 1).numpy())


def test_the_fit_is_ridge_regression_of_standardised_features() -> None:
    rng = np.random.default_rng(0)
    features, degrees = rng.normal(3, 2, (50, 6)), rng.uniform(-90, 90, 50)
    features[:, 5] = 7.0  # tells nothing and must not divide by 0
    radians = np.deg2rad(degrees)
    targets = np.stack([np.sin(radians), np.cos(radians)], axis=1)
    scaler = StandardScaler().fit(features)
    sine, cosine = (
        Ridge(alpha=1.0)
        .fit(scaler.transform(features), targets)
        .predict(scaler.transform(features))
        .T
    )
    expected = np.rad2deg(np.arctan2(sine, cosine))
    np.testing.assert_allclose(_fit(features, degrees).degrees(features), expected, atol=1e-8)


def test_wrapped_angles() -> None:
    angles = np.array([0.0, 180.0, -180.0, 190.0, -190.0, 360.0, 540.0])
    np.testing.assert_array_equal(wrapped(angles), [0, 180, 180, -170, 170, 0, 180])


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no such file") as caught:
        read_turn(Knows(), PICTURE, tmp_path / "none.png")
    assert caught.value.index == 1
    whole = Knows()
    whole.spec = whole.spec.model_copy(update={"invariant_dim": 512})
    with pytest.raises(SpecError, match="has no equivariant half"):
        read_turn(whole, PICTURE, PICTURE)
    broken = Knows()
    broken.embed_pixels = lambda pixels: Embedding(*[np.full((len(pixels), 2), np.nan)] * 2)
    with pytest.raises(NonFiniteError, match="clever-zoo verify"):
        read_turn(broken, PICTURE, PICTURE)


def test_the_command_says_it_in_words_and_in_json() -> None:
    arguments = ["compare", str(PICTURE), str(PICTURE), "--turn", "-m", "clever-resnet18"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    line = result.stdout.splitlines()[2]
    assert line.startswith("turn: the second by 0° counter-clockwise against the first; ")
    record = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    turn = clever_zoo.Turn(**record["turn"])
    assert turn.degrees == 0
    assert f"{turn.error_deg:.0f}° off on average, the answer 0 is {turn.guess_deg:.0f}°" in line


def test_the_name_is_public_and_needs_no_torch_to_import() -> None:
    code = "import clever_zoo, sys; clever_zoo.read_turn; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_says_how_far_off_the_plus_model_is() -> None:
    plus = clever_zoo.from_pretrained("clever-resnet18.fmnist_plus")
    picture = Image.open(PICTURE).convert("RGB").resize((SIZE, SIZE))
    turn = read_turn(plus, picture, picture.rotate(40))
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert (
        f"it is {turn.error_deg:.0f}° off on average where a guess is {turn.guess_deg:.0f}°"
        in " ".join(readme.split())
    )
