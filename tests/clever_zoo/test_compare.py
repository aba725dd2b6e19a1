"""Two pictures beside each other, in Python and on the command line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import clever_zoo
from clever_zoo.cli import app
from clever_zoo.compare import SAMPLE_STEP, compare_images
from clever_zoo.errors import ImageError, NonFiniteError, SpecError
from clever_zoo.samples import sample_class, sample_paths
from tests import oracles

runner = CliRunner()
MODEL = "clever-resnet18"


@pytest.fixture(scope="module")
def encoder() -> clever_zoo.Encoder:
    return clever_zoo.from_pretrained(MODEL)


@pytest.fixture
def turned(tmp_path: Path) -> tuple[Path, Path]:
    path = sample_paths()[1]
    Image.open(path).rotate(90).save(tmp_path / "turned.png")
    return path, tmp_path / "turned.png"


def test_cosines_are_those_of_a_plain_loop(encoder, turned) -> None:
    comparison = compare_images(encoder, *turned)
    embedding = encoder.embed(turned)
    for half in ("invariant", "equivariant"):
        expected = oracles.cosine(*getattr(embedding, half).astype(np.float64))
        assert getattr(comparison, half).cosine == pytest.approx(expected, abs=1e-4)
    assert comparison.pairs == math.comb(100, 2)


def test_the_scale_counts_every_pair_once(encoder) -> None:
    paths = sample_paths()[::SAMPLE_STEP]
    assert {sample_class(path) for path in paths} == {sample_class(p) for p in sample_paths()}
    comparison = compare_images(encoder, paths[0], paths[50])
    for half in ("invariant", "equivariant"):
        rows = getattr(encoder.embed(paths).normalized(), half).astype(np.float64)
        pairs = np.array([rows[i] @ rows[j] for i in range(100) for j in range(i)])
        cosine, percent = getattr(comparison, half)
        assert percent == pytest.approx(100 * float((pairs < cosine).mean()), abs=0.1)


def test_a_picture_and_itself_are_all_alike(encoder) -> None:
    path = sample_paths()[0]
    array = np.asarray(Image.open(path).convert("RGB"))
    for comparison in (compare_images(encoder, path, path), compare_images(encoder, path, array)):
        for likeness in comparison[:2]:
            assert likeness.cosine == pytest.approx(1, abs=1e-6)
            assert likeness.percent_less_alike == 100


def test_order_does_not_matter(encoder, turned) -> None:
    forth, back = compare_images(encoder, *turned), compare_images(encoder, *turned[::-1])
    assert forth.invariant.cosine == pytest.approx(back.invariant.cosine, abs=1e-6)


def test_what_cannot_be_compared_is_refused(encoder, tmp_path: Path) -> None:
    path = sample_paths()[0]
    with pytest.raises(ImageError, match="image 1"):
        compare_images(encoder, path, tmp_path / "none.png")
    whole = clever_zoo.create_encoder("resnet18", invariant_dim=512).eval()
    with pytest.raises(SpecError, match="no equivariant half"):
        compare_images(whole, path, path)
    for value in (0.0, math.nan):
        broken = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8).eval()
        torch.nn.init.constant_(broken.backbone.norm.weight, value)
        torch.nn.init.zeros_(broken.backbone.norm.bias)
        with pytest.raises(NonFiniteError, match="no direction in the invariant half"):
            compare_images(broken, path, path)


def test_the_command_says_it_in_words_and_in_json(encoder, turned) -> None:
    expected = compare_images(encoder, *turned)
    arguments = ["compare", *map(str, turned), "-m", MODEL]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line, half in zip(lines, ("invariant", "equivariant"), strict=True):
        likeness = getattr(expected, half)
        assert line == (
            f"{half}: cosine {likeness.cosine:.3f}, more alike than "
            f"{math.floor(likeness.percent_less_alike)} % of pairs of different bundled pictures"
        )
    record = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert record["model"] == encoder.spec.name
    assert record["images"] == [str(path) for path in turned]
    assert record["pairs"] == 4950
    assert record["invariant"] == pytest.approx(expected.invariant._asdict())
    assert record["equivariant"] == pytest.approx(expected.equivariant._asdict())


def test_the_command_takes_an_onnx_file(encoder, turned, onnx_models: Path) -> None:
    model = str(onnx_models / "resnet18.onnx")
    result = runner.invoke(app, ["compare", *map(str, turned), "-m", model, "--json"])
    assert result.exit_code == 0, result.output
    expected = compare_images(encoder, *turned).invariant._asdict()
    assert json.loads(result.stdout)["invariant"] == pytest.approx(expected, abs=1e-3)


def test_errors_of_the_command_are_one_message(tmp_path: Path) -> None:
    path = str(sample_paths()[0])
    for arguments, text in (
        ([path, str(tmp_path / "none.png")], "no such file"),
        ([path, path, "-m", "clever-resnet51"], "UnknownModelError"),
        ([path, path, "-m", str(tmp_path / "none.onnx")], "none.onnx"),
    ):
        result = runner.invoke(app, ["compare", *arguments])
        assert result.exit_code == 2
        assert text in " ".join(result.output.split())
        assert "Traceback" not in result.output


def test_the_help_promises_nothing_by_name() -> None:
    text = " ".join(runner.invoke(app, ["compare", "--help"]).output.split())
    for part in ("measured in the model's card", "does not promise", "Example: clever-zoo compare"):
        assert part in text


def test_the_name_is_public_and_needs_no_torch_to_import() -> None:
    code = "import clever_zoo, sys; clever_zoo.compare_images; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
