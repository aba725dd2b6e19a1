"""View parameters against their stated probabilities and ranges, by counts."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from training.streams import uniforms
from training.views import ASPECT_RATIO, MultiCrop, draw_parameters

COUNT = 20_000
SAMPLES = np.arange(COUNT)


def parameters(role="local", strength="caug_plus", size=16, scale=(0.05, 0.4), **overrides):
    keys = {"view": 2, "samples": SAMPLES, "seed": 0, "epoch": 0, "image_size": (28, 28)}
    return draw_parameters(role, strength=strength, size=size, scale=scale, **{**keys, **overrides})


def share(mask: torch.Tensor) -> float:
    return float(mask.float().mean())


def assert_share(mask: torch.Tensor, probability: float) -> None:
    """Within four standard errors of the stated probability."""
    error = (probability * (1 - probability) / len(mask)) ** 0.5
    assert abs(share(mask) - probability) <= 4 * error


@pytest.mark.parametrize(
    ("role", "blur", "solarize"), [("global_1", 1.0, 0), ("global_2", 0.1, 0.2), ("local", 0.5, 0)]
)
def test_probabilities(role, blur, solarize) -> None:
    p = parameters(role)
    assert_share(p.flip, 0.5)
    assert_share(p.elastic, 0.5)
    assert_share(p.jitter, 0.8)
    assert_share(p.grayscale, 0.2)
    assert_share(p.blur_sigma > 0, blur)
    assert_share(p.solarize, solarize)


def test_events_are_independent() -> None:
    p = parameters("global_2")
    events = [p.flip, p.elastic, p.jitter, p.grayscale, p.blur_sigma > 0, p.solarize, p.angle > 0]
    table = torch.corrcoef(torch.stack(events).float())
    assert (table - torch.eye(len(events))).abs().max() < 4 / COUNT**0.5


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ("angle", -90, 90),
        ("blur_sigma", 0.1, 2.0),
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ],
)
def test_ranges_are_filled_evenly(values, low, high) -> None:
    p = parameters("global_1")
    names = ("brightness", "contrast", "saturation", "hue")
    drawn = p.factors[:, names.index(values)] if values in names else getattr(p, values)
    assert low <= drawn.min()
    assert drawn.max() <= high
    counts = torch.histc(drawn, bins=10, min=low, max=high)
    expected = COUNT / 10
    assert float(((counts - expected) ** 2 / expected).sum()) < 33  # chi-square, 9 d.o.f., p = 1e-4


def test_every_order_of_the_jitter_is_equally_likely() -> None:
    codes = (parameters().order * torch.tensor([1000, 100, 10, 1])).sum(1)
    counts = codes.unique(return_counts=True)[1].float()
    assert len(counts) == 24
    expected = COUNT / 24
    assert float(((counts - expected) ** 2 / expected).sum()) < 60  # 23 d.o.f., p < 1e-4


def test_strengths_nest() -> None:
    plain, rotated, warped = (parameters(strength=s) for s in ("baug", "caug", "caug_plus"))
    assert not plain.angle.any()
    assert not plain.elastic.any()
    assert not rotated.elastic.any()
    assert rotated.noise is None
    assert warped.noise is not None
    assert warped.noise.shape == (int(warped.elastic.sum()), 2, 16, 16)
    assert warped.noise.abs().max() <= 1
    assert torch.equal(rotated.top, warped.top)


@pytest.mark.parametrize("image_size", [(28, 28), (200, 150), (64, 400)])
@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0)])
def test_crops_have_torchvisions_distribution(image_size, scale) -> None:
    p = parameters(image_size=image_size, scale=scale)
    boxes = torch.stack([p.top, p.left, p.height, p.width], 1)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= image_size[0]).all()
    assert (boxes[:, 1] + boxes[:, 3] <= image_size[1]).all()
    torch.manual_seed(0)
    blank = torch.zeros(1, *image_size)
    crop = RandomResizedCrop(1, scale=scale, ratio=ASPECT_RATIO)
    draws = [crop.get_params(blank, list(crop.scale), list(crop.ratio)) for _ in range(4000)]
    theirs = torch.tensor(draws).float()
    for quantile in (0.1, 0.5, 0.9):
        gap = boxes.quantile(quantile, 0) - theirs.quantile(quantile, 0)
        assert (gap.abs() <= 1 + 0.03 * max(image_size)).all()
    error = theirs.std(0) * (1 / 4000 + 1 / COUNT) ** 0.5
    assert ((boxes.mean(0) - theirs.mean(0)).abs() <= 4.5 * error).all()


def views(seed: int = 0) -> MultiCrop:
    third = (0.5, 0.5, 0.5)
    return MultiCrop("caug_plus", 32, 16, 2, (0.4, 1.0), (0.05, 0.4), third, third, seed)


def test_a_view_depends_on_its_own_key_alone(rng) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (6, 1, 28, 28), dtype=np.uint8))
    samples = np.array([4, 9, 2, 7, 30, 11])
    whole = views()(images, samples, epoch=3)
    order = [5, 0, 3]
    part = views()(images[order], samples[order], epoch=3)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[order], b, rtol=0, atol=1e-5)
    for other in (views(seed=1)(images, samples, epoch=3), views()(images, samples, epoch=4)):
        assert all((a != b).any() for a, b in zip(whole, other, strict=True))
    assert [v.shape[-1] for v in whole] == [32, 32, 16, 16]
    assert (whole[0] != whole[1]).any()


def test_streams_are_uniform_and_uncorrelated_across_keys() -> None:
    base = uniforms(0, 0, SAMPLES, 0, 4)
    assert ((base >= 0) & (base < 1)).all()
    assert np.array_equal(uniforms(0, 0, SAMPLES, 0, 2, first=2), base[:, 2:])
    neighbors = [uniforms(*key[:2], SAMPLES, key[2], 1)[:, 0] for key in
                 [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 40, 0, 0)]]  # fmt: skip
    columns = np.stack([*base.T, base[np.roll(SAMPLES, 1), 0], *neighbors])
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4.5 / COUNT**0.5
    counts = np.histogram(base, bins=20, range=(0, 1))[0]
    expected = base.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 52  # 19 d.o.f., p = 1e-4
