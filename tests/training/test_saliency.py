"""TokenCut: the cut, the scores against plain counting, the layouts, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import clever_zoo
from clever_zoo.encoder import Encoder
from clever_zoo.errors import DataError, NonFiniteError, ShapeError
from clever_zoo.records import Record
from tests import oracles
from training.evaluate import saliency
from training.evaluate.saliency import (
    BETA_SQUARED,
    LAYOUTS,
    SaliencyData,
    evaluate_saliency,
    key_grid,
    read_saliency,
    saliency_mask,
    saliency_pixels,
    score_saliency,
    token_cut,
)

WIDTH, HEIGHT = 64, 48


def bright_square() -> tuple[Image.Image, np.ndarray]:
    """A bright square on a dark ground, on the borders of 8 px patches, and its mask."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[16:40, 24:48] = True
    picture = np.where(mask[..., None], 230, 20).astype(np.uint8).repeat(3, axis=2)
    return Image.fromarray(picture), mask


def write_data(root: Path, dataset: SaliencyData, count: int = 2) -> Path:
    image_folder, mask_folder = (root / name for name in LAYOUTS[dataset])
    image_folder.mkdir(parents=True)
    mask_folder.mkdir()
    picture, mask = bright_square()
    for i in range(count):
        picture.save(image_folder / f"{i:04d}.jpg")
        Image.fromarray(mask).save(mask_folder / f"{i:04d}.png")
    return root


@pytest.fixture
def vit() -> Encoder:
    torch.manual_seed(0)
    return clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8).eval()


def test_hand_made_keys_cut_out_the_square_exactly(vit: Encoder, monkeypatch) -> None:
    picture, mask = bright_square()

    def keys(_encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        bright = torch.nn.functional.avg_pool2d(pixels, 8).mean(1) > 0
        return torch.stack([bright, ~bright], dim=-1).float() + 0.01

    monkeypatch.setattr(saliency, "key_grid", keys)
    assert np.array_equal(saliency_mask(vit, picture), mask)


def test_only_the_component_of_the_seed_is_kept() -> None:
    components = np.zeros((3, 6, 10), bool)
    components[0, 1:4, 1:4] = True
    components[1, 4, 4] = True  # touches the first by a corner alone
    components[2, 4:, 8] = True
    bright = components.any(0)
    found = token_cut(np.stack([bright, ~bright], axis=-1).astype(float))
    assert any(np.array_equal(found, component) for component in components)


def test_the_eigenvector_solves_the_normalised_cut(rng) -> None:
    keys = rng.normal(size=(4, 5, 3))
    rows = keys.reshape(20, 3) / np.linalg.norm(keys.reshape(20, 3), axis=1)[:, None]
    weights = np.array([[1.0 if a @ b > 0.2 else 1e-5 for b in rows] for a in rows])
    root = np.diag(weights.sum(1) ** -0.5)
    _, vectors = np.linalg.eigh(np.eye(20) - root @ weights @ root)
    vector = root @ vectors[:, 1]
    seed = np.abs(vector).argmax()
    foreground = ((vector > vector.mean()) == (vector > vector.mean())[seed]).reshape(4, 5)
    found = token_cut(keys)
    assert found.flat[seed]
    assert not (found & ~foreground).any()


def test_keys_are_those_of_the_last_attention(vit: Encoder) -> None:
    pixels = torch.randn(2, 3, 16, 24)
    before: list[torch.Tensor] = []
    block = vit.backbone.blocks[-1]
    handle = block.attn.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    vit(pixels)
    handle.remove()
    width = 192
    weight, bias = block.attn.qkv.weight[width : 2 * width], block.attn.qkv.bias[width : 2 * width]
    expected = before[0] @ weight.T + bias
    keys = key_grid(vit, pixels)
    torch.testing.assert_close(keys, expected[:, 1:].unflatten(1, (2, 3)))
    assert not block.attn.qkv._forward_hooks


def test_pictures_are_resized_to_the_nearest_multiple_of_the_patch(vit: Encoder) -> None:
    assert saliency_pixels(Image.new("RGB", (30, 45)), vit).shape == (1, 3, 48, 32)
    assert saliency_pixels(Image.new("RGB", (2, 9)), vit).shape == (1, 3, 8, 8)


def test_scores_match_plain_counting(rng) -> None:
    predictions = [rng.integers(0, 256, size) / 255 for size in ((9, 7), (5, 11), (4, 4))]
    predictions.append((predictions[0] > 0.4).astype(float))
    truths = [rng.random(p.shape) > 0.6 for p in predictions]
    truths[2][:] = False
    thresholds = [k / 255 for k in range(255)]
    expected = oracles.saliency_scores(predictions, truths, thresholds, BETA_SQUARED)
    assert score_saliency(zip(predictions, truths, strict=True)) == pytest.approx(expected)


def test_perfect_and_inverted_masks() -> None:
    _, mask = bright_square()
    assert score_saliency([(mask, mask)]) == (1, 1, 1)
    assert score_saliency([(~mask, mask)]) == (0, 0, 0)


@pytest.mark.parametrize("dataset", SaliencyData)
def test_official_layouts_are_read(tmp_path: Path, vit: Encoder, dataset: SaliencyData) -> None:
    pairs = read_saliency(write_data(tmp_path, dataset), dataset)
    assert [pair.image.name for pair in pairs] == ["0000.jpg", "0001.jpg"]
    scores = evaluate_saliency(vit, pairs, dataset)
    assert (scores.images, scores.dataset) == (2, dataset.value)
    assert all(0 <= value <= 1 for value in (scores.max_f, scores.iou, scores.accuracy))
    assert scores.seconds > 0


def test_the_command_prints_and_writes_the_scores(tmp_path: Path, vit: Encoder) -> None:
    vit.save_pretrained(tmp_path / "vit")
    data = write_data(tmp_path / "ECSSD", SaliencyData.ecssd)
    app = saliency.typer.Typer()
    app.command()(saliency.main)
    arguments = [f"local-dir:{tmp_path / 'vit'}", "--dataset", "ecssd", "--data", str(data)]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "scores")])
    assert result.exit_code == 0, result.output
    record = Record.read(tmp_path / "scores/results.json")
    means = {r.metric: r.mean for r in record.results}
    for name, metric in (("maxF", "max_f"), ("IoU", "iou"), ("accuracy", "accuracy")):
        assert f"{name} {means.pop(metric):.3f}" in result.output
    assert not means
    assert {(r.part, r.split, r.n) for r in record.results} == {("full", "test", 2)}
    assert (record.dataset, record.images) == ("ecssd", {"test": 2})
    assert "halves do not exist" in record.tasks["saliency"]
    saved = clever_zoo.from_pretrained(f"local-dir:{tmp_path / 'vit'}").spec
    assert record.networks[0].sha256 == saved.weights.sha256
    (data / "ground_truth_mask/0001.png").unlink()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "IoU" not in result.output


def test_damaged_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.jpg files; put the ecssd files into"):
        read_saliency(tmp_path, SaliencyData.ecssd)
    write_data(tmp_path, SaliencyData.ecssd)
    path = tmp_path / "ground_truth_mask/0001.png"
    Image.new("L", (WIDTH, 9)).save(path)
    with pytest.raises(DataError, match=r"0001\.png is 64x9, .* 64x48"):
        read_saliency(tmp_path, SaliencyData.ecssd)
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0001\.png cannot be read"):
        read_saliency(tmp_path, SaliencyData.ecssd)
    path.unlink()
    with pytest.raises(DataError, match="2 pictures and 1 masks, without a partner: 0001"):
        read_saliency(tmp_path, SaliencyData.ecssd)


def test_unusable_encoders_and_predictions_give_no_number(vit: Encoder) -> None:
    picture, mask = bright_square()
    with pytest.raises(ShapeError, match="resnet18 has no attention"):
        saliency_mask(clever_zoo.create_encoder("resnet18"), picture)
    with pytest.raises(ShapeError, match="one patch"):
        saliency_mask(vit, Image.new("RGB", (8, 8)))
    torch.nn.init.constant_(vit.backbone.blocks[-1].norm1.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="keys"):
        saliency_mask(vit, picture)
    with pytest.raises(DataError, match="outside"):
        score_saliency([(mask * float("nan"), mask)])
    with pytest.raises(DataError, match=r"\(48, 64\)"):
        score_saliency([(mask[1:], mask)])
    with pytest.raises(DataError, match="no pictures"):
        score_saliency([])
