"""Equivariance: draws against torchvision and counts, read-outs of known quantities and noise."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from clever_zoo.errors import DataError, NonFiniteError
from clever_zoo.spec import PreprocessSpec
from training.data import ImageSet
from training.evaluate import equivariance
from training.evaluate.equivariance import (
    DRIFT_ANGLES_DEG,
    TASKS,
    Reading,
    angle_differences,
    angle_error,
    box_values,
    crop_images,
    draw_boxes,
    draw_flips,
    draw_pairs,
    draw_quarters,
    drift,
    flip_images,
    measure,
    read_class,
    read_linear_angle,
    read_relative_angle,
    read_values,
    turn_copy,
    turn_quarters,
)
from training.evaluate.inputs import EvaluationImages
from training.evaluate.perturb import circular_mask

SIZE = 32
SPEC = PreprocessSpec(input_size_px=SIZE, crop_pct=1.0)
DRAWS = (draw_quarters, draw_flips, draw_pairs, partial(draw_boxes, size_px=SIZE))


def sin_cos(degrees: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))], 1)


def mixed(values: np.ndarray, rng: np.random.Generator, width: int = 7) -> Tensor:
    """Features in which the values are linear."""
    return torch.from_numpy(values @ rng.normal(size=(values.shape[1], width)) + 3).float()


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_depend_on_seed_and_index_alone(draw) -> None:
    whole = draw(np.arange(50), 3)
    assert torch.equal(whole[[7, 40]], draw(np.array([7, 40]), 3))
    assert not torch.equal(whole, draw(np.arange(50), 4))


def test_draws_are_uniform_and_independent() -> None:
    samples = np.arange(20_000)
    counts = torch.bincount(draw_quarters(samples, 0), minlength=4)
    assert len(counts) == 4
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 16.3  # once in a thousand seeds
    assert abs(int(draw_flips(samples, 0).sum()) - 10_000) < 250
    pairs = draw_pairs(samples, 0)
    table = np.histogram2d(*pairs.numpy().T, bins=5, range=[(-90, 90)] * 2)[0]
    assert table.sum() == 20_000
    assert float(((table - 800) ** 2 / 800).sum()) < 51.2


def test_boxes_are_those_of_torchvision_in_distribution() -> None:
    top, left, height, width = draw_boxes(np.arange(20_000), 0, 224).numpy().T
    share = height * width / 224**2
    assert share.min() > 0.19
    assert share.max() <= 1
    torch.manual_seed(0)
    from torchvision.transforms import RandomResizedCrop

    picture = torch.empty(3, 224, 224)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, [0.2, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    for ours, column in zip((top, left, height, width), theirs.T, strict=True):
        spread = column.std() * math.sqrt(1 / 4000 + 1 / 20_000)
        assert abs(ours.mean() - column.mean()) < 4 * spread


def test_images_are_changed_as_drawn(rng) -> None:
    arrays = rng.integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8)
    pictures = [Image.fromarray(array) for array in arrays]
    x = torch.from_numpy(arrays).permute(0, 3, 1, 2).float()
    before, samples = x.clone(), np.arange(100, 108)

    def pixels(pictures: list[Image.Image]) -> Tensor:
        return torch.stack([F.pil_to_tensor(picture) for picture in pictures]).float()

    flips = draw_flips(samples, 2).tolist()
    assert set(flips) == {True, False}
    expected = [F.hflip(p) if flip else p for p, flip in zip(pictures, flips, strict=True)]
    assert torch.equal(flip_images(x, samples, 2), pixels(expected))

    quarters = draw_quarters(samples, 2).tolist()
    expected = [F.rotate(p, 90 * k) for p, k in zip(pictures, quarters, strict=True)]
    assert torch.equal(turn_quarters(x, samples, 2), circular_mask(pixels(expected)))

    pairs = draw_pairs(samples, 2)
    for copy in (0, 1):
        angles = pairs[:, copy].tolist()
        expected = [F.rotate(p, angle) for p, angle in zip(pictures, angles, strict=True)]
        difference = turn_copy(x, samples, 2, copy=copy) - circular_mask(pixels(expected))
        assert difference.abs().mean() <= 0.5

    boxes = draw_boxes(samples, 2, SIZE).int().tolist()
    expected = [
        F.resized_crop(p, *box, [SIZE, SIZE], F.InterpolationMode.BICUBIC)
        for p, box in zip(pictures, boxes, strict=True)
    ]
    assert (crop_images(x, samples, 2) - pixels(expected)).abs().max() <= 1
    assert torch.equal(x, before)


def test_targets_follow_from_the_draws() -> None:
    samples = np.arange(30)
    values = box_values(samples, 0, SIZE)
    for row, (top, left, height, width) in zip(
        values, draw_boxes(samples, 0, SIZE).tolist(), strict=True
    ):
        x, y = (left + width / 2) / SIZE, (top + height / 2) / SIZE
        assert row == pytest.approx([math.log(height * width / SIZE**2), x, y], abs=1e-5)
    pairs = draw_pairs(samples, 0).numpy()
    assert np.array_equal(angle_differences(samples, 0), pairs[:, 1] - pairs[:, 0])


def test_angle_error_is_the_mean_over_a_plain_loop(rng) -> None:
    degrees, guesses = rng.uniform(-180, 180, (2, 200))
    total = 0.0
    for guess, truth in zip(guesses, degrees, strict=True):
        apart = abs(guess - truth)
        total += min(apart, 360 - apart)
    assert angle_error(5 * sin_cos(guesses), degrees) == pytest.approx(total / 200)
    assert angle_error(sin_cos(np.array([179.0])), np.array([-179.0])) == pytest.approx(2)


def test_linear_readings_of_known_values_and_of_noise(rng) -> None:
    degrees = rng.uniform(-90, 90, 3000).astype(np.float32)
    values = rng.normal(size=(3000, 2))
    classes = rng.integers(0, 4, 3000)
    noise = torch.from_numpy(rng.normal(size=(3000, 7))).float()
    reads = {
        "angle": (read_linear_angle, degrees, mixed(sin_cos(degrees), rng)),
        "values": (partial(read_values, names=("a", "b")), values, mixed(values, rng)),
        "class": (partial(read_class, classes=4), classes, mixed(np.eye(4)[classes], rng)),
    }
    known, chance = (
        {
            name: read(x[:2000], y[:2000], x[2000:], y[2000:])
            for name, (read, y, told) in reads.items()
            for x in [told if informed else noise]
        }
        for informed in (True, False)
    )
    assert known["angle"]["r2"] > 0.999
    assert known["angle"]["mae_deg"] < 0.5
    assert set(known["values"]) == {"r2_a", "r2_b"}
    assert min(known["values"].values()) > 0.999
    assert known["class"]["top1"] == 100
    for score in (chance["angle"]["r2"], *chance["values"].values()):
        assert -0.05 < score < 0.05
    assert 35 < chance["angle"]["mae_deg"] < 55  # a quarter of 180
    assert 20 < chance["class"]["top1"] < 30


def test_the_relative_angle_is_learnt_from_both_angles(rng) -> None:
    count = 6000
    pairs = rng.uniform(-90, 90, (count, 2)).astype(np.float32)
    told = torch.cat([mixed(sin_cos(column), rng) for column in pairs.T], dim=1)
    difference = pairs[:, 1] - pairs[:, 0]
    cut = 5000
    score = read_relative_angle(told[:cut], difference[:cut], told[cut:], difference[cut:])
    assert score["r2"] > 0.9
    assert score["mae_deg"] < 10
    again = read_relative_angle(told[:cut], difference[:cut], told[cut:], difference[cut:])
    assert again == score


def test_drift_is_the_mean_over_a_plain_loop(rng) -> None:
    turned, upright = rng.normal(size=(2, 20, 5))
    ratios = [
        math.sqrt(sum((a - b) ** 2)) / math.sqrt(sum(b * b))
        for a, b in zip(turned, upright, strict=True)
    ]
    tensors = torch.from_numpy(turned), torch.from_numpy(upright)
    assert drift(*tensors) == pytest.approx(np.mean(ratios))
    upright[3] = 0
    with pytest.raises(NonFiniteError, match="image 3 are 0"):
        drift(*tensors)


ACROSS = (torch.arange(SIZE) + 0.5) / SIZE - 0.5
RAMP_X, RAMP_Y = ACROSS.expand(SIZE, SIZE), ACROSS[:, None].expand(SIZE, SIZE)


def ramps(count: int, split: str) -> EvaluationImages:
    """Copies of one picture: red grows to the right, green downwards, blue is level."""
    picture = torch.stack([128 + 200 * RAMP_X, 128 + 200 * RAMP_Y, torch.full((SIZE, SIZE), 90.0)])
    images = picture.round().byte().expand(count, -1, -1, -1).clone()
    labels = torch.arange(count) % 2
    return EvaluationImages(ImageSet(images, labels, ("a", "b")), SPEC, split)


class Telling:
    """Features whose invariant half (3) is noise and whose equivariant half tells everything."""

    def __init__(self) -> None:
        self.noise = torch.Generator().manual_seed(0)

    def __call__(self, pixels: Tensor) -> Tensor:
        red, green, _ = pixels.unbind(1)
        slopes = torch.stack(
            [(ramp * c).mean((1, 2)) for c in (red, green) for ramp in (RAMP_X, RAMP_Y)], 1
        )
        level = pixels.mean((2, 3))
        told = torch.cat([slopes, level, slopes.abs().clamp(min=1e-3).log()], dim=1)
        return torch.cat([torch.randn(len(pixels), 3, generator=self.noise), told], dim=1)


@pytest.fixture(scope="module")
def readings() -> list[Reading]:
    return measure(Telling(), 3, ramps(800, "train"), ramps(500, "test"))


def test_every_task_is_read_from_every_part(readings: list[Reading]) -> None:
    metrics = {
        "angle": ["r2", "mae_deg"],
        "rotation4": ["top1"],
        "relative_angle": ["r2", "mae_deg"],
        "crop": ["r2_scale", "r2_x", "r2_y"],
        "flip": ["top1"],
        "jitter": ["r2_brightness", "r2_contrast", "r2_saturation", "r2_hue"],
        "drift": ["ratio"],
    }
    assert list(metrics) == list(TASKS)
    expected = {(t, m, p) for t, ms in metrics.items() for m in ms
                for p in ("full", "invariant", "equivariant")}  # fmt: skip
    assert {r[:3] for r in readings} == expected
    assert all(math.isfinite(r.value) and r.n == 500 and r.seconds > 0 for r in readings)
    assert len(readings) == 13 * 3 + 3 * len(DRIFT_ANGLES_DEG)


def test_what_the_pixels_tell_is_read_from_the_half_that_holds_it(readings) -> None:
    values = {r[:3]: r.value for r in readings if r.at is None}
    for (task, metric), low in {
        ("angle", "r2"): 0.99,
        ("rotation4", "top1"): 100,
        ("flip", "top1"): 100,
        ("crop", "r2_scale"): 0.98,
        ("crop", "r2_x"): 0.99,
        ("crop", "r2_y"): 0.99,
        ("jitter", "r2_brightness"): 0.9,
    }.items():
        assert values[task, metric, "equivariant"] >= low, (task, metric)
        assert values[task, metric, "full"] >= low * 0.99, (task, metric)
        noise = values[task, metric, "invariant"]
        chance = {"rotation4": 25, "flip": 50}.get(task, 0)
        assert abs(noise - chance) < (8 if chance else 0.1), (task, metric)
    assert values["angle", "mae_deg", "equivariant"] < 2
    assert values["relative_angle", "r2", "equivariant"] > 0.7
    assert values["relative_angle", "r2", "invariant"] < 0.1


def test_the_drift_curve_starts_at_nothing(readings) -> None:
    curve = {r.at: r.value for r in readings if (r.task, r.part) == ("drift", "equivariant")}
    assert list(curve) == [float(angle) for angle in range(-180, 181, 15)]
    assert curve[0] == 0
    assert curve[180] == pytest.approx(curve[-180], rel=0.05)
    assert 0 < curve[15] < curve[90]


def test_raw_pixels_have_the_full_part_alone() -> None:
    features = lambda pixels: pixels.flatten(1)[:, ::50] / 255  # noqa: E731
    readings = measure(features, None, ramps(40, "train"), ramps(10, "test"))
    assert {r.part for r in readings} == {"full"}
    assert {r.n for r in readings} == {10}
    whole = measure(features, features(torch.zeros(1, 3, SIZE, SIZE)).shape[1],
                    ramps(40, "train"), ramps(10, "test"))  # fmt: skip
    assert {r.part for r in whole} == {"full"}
    assert [r.value for r in readings] == [r.value for r in whole]


def test_what_cannot_be_measured_is_refused() -> None:
    for train, test in ((19, 30), (40, 1)):
        with pytest.raises(DataError, match="at least 20 and 2"):
            measure(Telling(), 3, ramps(train, "train"), ramps(test, "test"))

    def broken(pixels: Tensor) -> Tensor:
        return torch.full((len(pixels), 5), math.nan)

    with pytest.raises(NonFiniteError, match=r"train image 0 \(angle\)"):
        measure(broken, 3, ramps(40, "train"), ramps(30, "test"))


def test_a_regression_without_its_minimum_is_refused(monkeypatch, rng) -> None:
    monkeypatch.setattr("training.evaluate.linear.MAX_STEPS", 1)
    x = torch.from_numpy(rng.normal(size=(60, 4))).float()
    classes = rng.integers(0, 2, 60)
    with pytest.raises(NonFiniteError, match="did not reach its minimum"):
        read_class(x, classes, x, classes, classes=2)


def test_both_splits_have_draws_of_their_own() -> None:
    assert equivariance.TRAIN_SEED != equivariance.TEST_SEED
