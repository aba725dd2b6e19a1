"""Video segmentation: the files, the propagation, both scores, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

import clever_zoo
from clever_zoo.errors import CleverZooError, DataError, NonFiniteError, ShapeError
from clever_zoo.records import Record
from tests import oracles
from training import pretrain
from training.config import load_recipe
from training.data import TrainImages, load_fashion_mnist
from training.evaluate import segmentation
from training.evaluate.dense import patch_grid
from training.evaluate.inputs import load_encoder
from training.evaluate.segmentation import (
    boundary_agreement,
    evaluate_segmentation,
    frame_pixels,
    mask_boundary,
    palette,
    patch_window,
    propagate_labels,
    read_davis,
    read_mask,
    region_overlap,
    score_sequence,
    segment,
    write_mask,
)
from training.runs import load_run

HEIGHT, WIDTH, FRAMES = 64, 128, 10


def scene(step: int) -> tuple[np.ndarray, np.ndarray]:
    """A red square going right and a green one going down on blue, and their mask."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[16:40, 8 + 4 * step : 32 + 4 * step] = 1
    mask[2 * step : 24 + 2 * step, 96:120] = 2
    colors = np.array([(20, 20, 200), (220, 20, 20), (20, 220, 20)], np.uint8)
    return colors[mask], mask


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """Two videos in the official layout."""
    root = tmp_path / "DAVIS"
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("squares\nbriefly\n")
    for name, count in (("squares", FRAMES), ("briefly", 4)):
        frames = root / "JPEGImages/480p" / name
        frames.mkdir(parents=True)
        for step in range(count):
            picture, mask = scene(step)
            Image.fromarray(picture).save(frames / f"{step:05d}.jpg", quality=95)
            write_mask(root / "Annotations/480p" / name / f"{step:05d}.png", mask)
    return root


def color_features(pixels: Tensor) -> Tensor:
    """(3, H, W) -> (H / 4, W / 4, 3): the mean colour of each patch."""
    return F.avg_pool2d(pixels[None], 4)[0].permute(1, 2, 0)


def test_propagation_matches_the_naive_vote(rng) -> None:
    height, width = 5, 7
    target, sources = rng.normal(size=(35, 6)), rng.normal(size=(3, 35, 6))
    labels = rng.uniform(size=(3, 2, 35))
    expected = oracles.propagate_labels(target, sources, labels, width, 2, 5, 0.1)
    tensors = (torch.from_numpy(x) for x in (target, sources, labels))
    actual = propagate_labels(*tensors, patch_window(height, width, 2).double())
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9)


def test_propagation_in_pieces_is_the_same(rng, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.from_numpy(rng.normal(size=s)) for s in ((35, 6), (3, 35, 6), (3, 2, 35))]
    window = patch_window(5, 7, 2).double()
    whole = propagate_labels(*tensors, window)
    monkeypatch.setattr(segmentation, "_TARGETS_AT_ONCE", 8)
    torch.testing.assert_close(propagate_labels(*tensors, window), whole)


def test_masks_follow_what_the_features_tell_apart(davis: Path) -> None:
    spec = clever_zoo.create_encoder("resnet18").spec
    sequence = read_davis(davis)[0]
    truth = np.stack([read_mask(path) for path in sequence.masks])
    frames = [frame_pixels(path, spec, HEIGHT) for path in sequence.frames]
    assert frames[0].shape == (3, HEIGHT, WIDTH)
    predicted = np.stack(list(segment(color_features, frames, truth[0])))
    assert np.array_equal(predicted[0], truth[0])
    scores = score_sequence("squares", predicted, truth)
    assert [s.object_id for s in scores] == [1, 2]
    assert min(s.j_mean for s in scores) > 0.9
    assert min(s.f_mean for s in scores) > 0.9
    assert {s.j_recall for s in scores} == {1.0}
    # Features that tell nothing apart must not follow.
    blind = np.stack(list(segment(lambda x: color_features(x) * 0 + 1, frames, truth[0])))
    assert score_sequence("squares", blind, truth)[0].j_mean < 0.6


def test_an_object_that_fills_the_picture_stays(rng) -> None:
    frames = [torch.from_numpy(rng.normal(size=(3, 32, 32))).float() for _ in range(3)]
    masks = list(segment(color_features, frames, np.full((40, 40), 1, np.uint8)))
    assert all((mask == 1).all() for mask in masks)
    assert masks[-1].shape == (40, 40)


def test_j_and_f_by_hand() -> None:
    truth, predicted = np.zeros((2, 12, 16), bool)
    truth[2:6, 2:8] = True
    predicted[4:8, 2:8] = True
    assert region_overlap(predicted, truth) == 12 / 36
    assert region_overlap(truth & False, truth & False) == 1
    # The boundary lies on the pixels before a change: rows 1 and 5, columns 1 and 7.
    boundary = np.zeros((12, 16), bool)
    boundary[1:6, 1:8] = True
    boundary[2:5, 2:7] = False
    assert np.array_equal(mask_boundary(truth), boundary)
    # 0.8 % of the diagonal of 20, rounded up, is one pixel. Of the 20 pixels these are met: rows
    # 2 to 5 of columns 1 and 7, and the pixels beside those columns in row 5.
    assert boundary_agreement(predicted, truth) == pytest.approx((2 * 4 + 2) / 20)
    assert boundary_agreement(truth, truth) == 1
    assert boundary_agreement(truth & False, truth) == 0
    assert boundary_agreement(truth & False, truth & False) == 1


@pytest.mark.parametrize("size", [(20, 30), (100, 130)])
def test_f_matches_the_naive_count(rng, size: tuple[int, int]) -> None:
    truth = np.kron(rng.integers(0, 2, (5, 5)), np.ones((size[0] // 5, size[1] // 5))) > 0
    predicted = np.roll(truth, (1, 2), axis=(0, 1))
    radius = np.ceil(0.008 * np.hypot(*size))
    expected = oracles.boundary_agreement(predicted, truth, radius)
    assert 0.2 < expected < 1
    assert boundary_agreement(predicted, truth) == pytest.approx(expected)


def test_first_and_last_frames_and_void_do_not_count() -> None:
    truth = np.zeros((4, 20, 20), np.uint8)
    truth[:, 5:10, 5:10] = 1
    truth[:, 15:, :] = 255
    predicted = np.where(truth == 255, 1, truth).astype(np.uint8)
    predicted[[0, 3]] = 0
    (score,) = score_sequence("void", predicted, truth)
    assert (score.j_mean, score.f_mean, score.j_recall, score.f_recall) == (1, 1, 1, 1)
    predicted[1] = 0
    (score,) = score_sequence("void", predicted, truth)
    assert (score.j_mean, score.j_recall) == (0.5, 0.5)


def test_an_object_nobody_predicts_scores_zero() -> None:
    truth = np.zeros((3, 20, 20), np.uint8)
    truth[:, :5], truth[:, 10:] = 1, 2
    scores = score_sequence("two", np.where(truth == 2, 0, truth), truth)
    assert [s.j_mean for s in scores] == [1, 0]


def test_objects_are_those_of_the_first_mask() -> None:
    truth = np.zeros((4, 20, 20), np.uint8)
    truth[:, :5] = 1
    truth[1:, 10:] = 2
    truth[0, 15:] = 255
    predicted = np.where(truth == 1, 1, 0).astype(np.uint8)
    scores = score_sequence("late", predicted, truth)
    assert [(s.object_id, s.j_mean) for s in scores] == [(1, 1)]
    with pytest.raises(DataError, match="'later' has no annotated object in its first mask"):
        score_sequence("later", predicted, np.where(truth == 2, truth, 0))


def test_the_palette_is_that_of_davis(tmp_path: Path) -> None:
    colors = np.array(palette()).reshape(256, 3)
    assert colors[[0, 1, 2, 3, 4, 8, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [64, 0, 0],
        [224, 224, 192],
    ]  # fmt: skip
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    write_mask(tmp_path / "mask.png", mask)
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert image.convert("RGB").getpixel((1, 0)) == (128, 0, 0)


def test_frames_are_sized_and_normalised_as_in_the_reference(tmp_path: Path) -> None:
    Image.new("RGB", (854, 480), (255, 0, 51)).save(tmp_path / "a.png")
    Image.new("RGB", (100, 210), (255, 0, 51)).save(tmp_path / "b.png")
    encoder = clever_zoo.create_encoder("vit_tiny")
    pixels = frame_pixels(tmp_path / "a.png", encoder.spec)
    assert pixels.shape == (3, 480, 832)
    expected = [(1 - 0.485) / 0.228, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    assert pixels[:, 7, 9].tolist() == pytest.approx(expected, abs=1e-5)
    assert frame_pixels(tmp_path / "b.png", encoder.spec).shape == (3, 960, 480)
    preprocess = encoder.spec.preprocess.model_copy(update={"std": (0.5, 0.5, 0.5)})
    other = encoder.spec.model_copy(update={"preprocess": preprocess})
    assert float(frame_pixels(tmp_path / "a.png", other)[0, 0, 0]) == pytest.approx(1.03)


@pytest.mark.parametrize("part", ["full", "invariant", "equivariant"])
def test_parts_of_any_backbone_are_scored(davis: Path, tmp_path: Path, part) -> None:
    torch.manual_seed(0)
    encoder = clever_zoo.create_encoder("resnet18").eval()
    videos = read_davis(davis)[1:]
    scores = evaluate_segmentation(encoder, videos, tmp_path, part=part, short_side_px=192)
    assert [(o.sequence, o.object_id) for o in scores.objects] == [("briefly", 1), ("briefly", 2)]
    assert scores.j_and_f == pytest.approx((scores.j_mean + scores.f_mean) / 2)
    assert scores.part == part
    assert scores.seconds > 0


def test_the_command_writes_masks_and_scores(davis: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    encoder.save_pretrained(tmp_path / "vit")
    app = segmentation.typer.Typer()
    app.command()(segmentation.main)
    arguments = [f"local-dir:{tmp_path / 'vit'}", "--data", str(davis), "-o", str(tmp_path / "o")]
    result = CliRunner().invoke(app, [*arguments, "--short-side-px", "64", "--part", "invariant"])
    assert result.exit_code == 0, result.output
    objects = json.loads((tmp_path / "o/scores.json").read_text())
    assert [(o["sequence"], o["object_id"]) for o in objects] == [
        ("squares", 1), ("squares", 2), ("briefly", 1), ("briefly", 2),
    ]  # fmt: skip
    record = Record.read(tmp_path / "o/results.json")
    means = {row.metric: row.mean for row in record.results}
    for metric in ("j_mean", "j_recall", "f_mean", "f_recall"):
        assert means[metric] == pytest.approx(np.mean([o[metric] for o in objects]))
    assert means["j_and_f"] == pytest.approx((means["j_mean"] + means["f_mean"]) / 2)
    assert len(means) == 5
    assert {(r.part, r.split, r.n) for r in record.results} == {("invariant", "val", 4)}
    assert (record.dataset, record.images) == ("davis-2017", {"val": FRAMES + 4})
    assert record.tasks["segmentation"].startswith(segmentation.PROTOCOL)
    assert "short side of 64 px" in record.tasks["segmentation"]
    saved = clever_zoo.from_pretrained(f"local-dir:{tmp_path / 'vit'}").spec
    assert record.networks[0].sha256 == saved.weights.sha256
    assert f"J&F {means['j_and_f']:.3f}" in result.output
    written = sorted((tmp_path / "o/squares").glob("*.png"))
    assert [p.name for p in written] == [f"{i:05d}.png" for i in range(FRAMES)]
    assert read_mask(written[-1]).shape == (HEIGHT, WIDTH)


def test_a_training_run_is_a_source_too(tmp_path: Path, fashion_mnist_folder: Path) -> None:
    small = ["epochs=1", "batch_size=16", "method.prototypes=64", "method.hidden_dim=64"]
    small += ["method.bottleneck_dim=32", "optimizer.warmup_epochs=0.25"]
    recipe = load_recipe("clever-resnet18.fmnist", small)
    data = TrainImages(load_fashion_mnist(fashion_mnist_folder, "train"))
    pretrain.train(recipe, data, tmp_path / "run", stop_at_step=1)
    encoder, _ = load_encoder(str(tmp_path / "run"))
    _, teacher, _ = load_run(tmp_path / "run")
    assert (encoder.spec.name, encoder.spec.invariant_dim) == ("clever-resnet18.fmnist", 409)
    assert encoder.spec.preprocess == clever_zoo.model_info("clever-resnet18").preprocess
    assert not encoder.training
    pixels = torch.randn(1, 3, 64, 96)
    # In the storage of a release, which rounds to float16.
    torch.testing.assert_close(encoder(pixels).full, teacher.eval()(pixels), atol=5e-3, rtol=0)
    grid = patch_grid(encoder, pixels, "equivariant")
    assert grid.shape == (1, 2, 3, 103)
    assert torch.equal(grid[0, 1, 2], encoder.features(pixels)[0][0, 409:, 1, 2])
    with pytest.raises(CleverZooError, match="looks like a path"):
        load_encoder(str(tmp_path / "elsewhere"))


def missing_frame(root: Path) -> None:
    (root / "JPEGImages/480p/squares/00004.jpg").unlink()


def missing_pair(root: Path) -> None:
    missing_frame(root)
    (root / "Annotations/480p/squares/00004.png").unlink()


def wrong_size(root: Path) -> None:
    path = root / "Annotations/480p/squares/00003.png"
    write_mask(path, np.zeros((HEIGHT, WIDTH // 2), np.uint8))


def no_list(root: Path) -> None:
    (root / "ImageSets/2017/val.txt").unlink()


def unknown_sequence(root: Path) -> None:
    (root / "ImageSets/2017/val.txt").write_text("elsewhere\n")


def broken_mask(root: Path) -> None:
    (root / "Annotations/480p/squares/00003.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_frame, "9 frames and 10 masks.*00004"),
        (missing_pair, "frames are missing: 00004"),
        (wrong_size, "00003.png is 64x64.*128x64"),
        (no_list, "val.txt does not exist; put the official"),
        (unknown_sequence, "'elsewhere' has 0 frames"),
        (broken_mask, "00003.png cannot be read"),
    ],
)
def test_damaged_data_are_refused(davis: Path, damage, message: str) -> None:
    damage(davis)
    with pytest.raises(DataError, match=message):
        read_davis(davis)


def test_unusable_masks_and_features_give_no_number(davis: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotated object"):
        score_sequence("empty", np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"\(3, 4, 4\).*\(3, 4, 5\)"):
        score_sequence("sizes", np.zeros((3, 4, 4), np.uint8), np.ones((3, 4, 5), np.uint8))
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8).eval()
    videos = read_davis(davis)
    with pytest.raises(ShapeError, match="do not divide"):
        evaluate_segmentation(encoder, videos, tmp_path / "o", short_side_px=65)
    torch.nn.init.constant_(encoder.backbone.norm.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="squares, features of frame 0"):
        evaluate_segmentation(encoder, videos, tmp_path / "o", short_side_px=64)
    unsplit = clever_zoo.create_encoder("resnet18", invariant_dim=512).eval()
    with pytest.raises(ShapeError, match="equivariant half is empty"):
        evaluate_segmentation(unsplit, videos, tmp_path / "o", part="equivariant")
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    with pytest.raises(DataError, match="mode RGB"):
        read_mask(tmp_path / "rgb.png")
    assert not (tmp_path / "o").exists()
