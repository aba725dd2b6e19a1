"""View parameters against their stated probabilities and ranges, by counts."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop, RandomRotation
from torchvision.transforms import functional as F

from clever_zoo.errors import RecipeError, ShapeError
from training import reference_views
from training.config import ViewsConfig, parse_recipe
from training.streams import uniforms
from training.views import (
    ASPECT_RATIO,
    STYLES,
    MultiCrop,
    crop_and_flip,
    draw_parameters,
    render_view,
)

COUNT = 20_000
SAMPLES = np.arange(COUNT)


def parameters(
    role="local", style="dino", strength="caug_plus", size=16, scale=(0.05, 0.4), **overrides
):
    keys = {"view": 2, "samples": SAMPLES, "seed": 0, "epoch": 0, "image_size": (28, 28)}
    fixed = {"style": style, "strength": strength, "size": size, "scale": scale}
    return draw_parameters(role, **fixed, **{**keys, **overrides})


def share(mask: torch.Tensor) -> float:
    return float(mask.float().mean())


def assert_share(mask: torch.Tensor, probability: float) -> None:
    """Within four standard errors of the stated probability."""
    error = (probability * (1 - probability) / len(mask)) ** 0.5
    assert abs(share(mask) - probability) <= 4 * error


@pytest.mark.parametrize(
    ("style", "role", "blur", "solarize"),
    [
        ("dino", "global_1", 1.0, 0),
        ("dino", "global_2", 0.1, 0.2),
        ("dino", "local", 0.5, 0),
        ("simsiam", "global", 0.5, 0),
    ],
)
def test_probabilities(style, role, blur, solarize) -> None:
    p = parameters(role, style)
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
    ("style", "role", "values", "low", "high"),
    [
        ("dino", "global_1", "angle", -90, 90),
        ("dino", "global_1", "blur_sigma", 0.1, 2.0),
        ("dino", "global_1", "brightness", 0.6, 1.4),
        ("dino", "global_1", "contrast", 0.6, 1.4),
        ("dino", "global_1", "saturation", 0.8, 1.2),
        ("dino", "global_1", "hue", -0.1, 0.1),
        ("simsiam", "global", "angle", -90, 90),
        ("simsiam", "global", "blur_sigma", 0.1, 2.0),
        ("simsiam", "global", "saturation", 0.6, 1.4),
        ("simsiam", "global", "hue", -0.1, 0.1),
    ],
)
def test_ranges_are_filled_evenly(style, role, values, low, high) -> None:
    p = parameters(role, style)
    names = ("brightness", "contrast", "saturation", "hue")
    drawn = p.factors[:, names.index(values)] if values in names else getattr(p, values)
    assert values == "blur_sigma" or low <= drawn.min()
    assert drawn.max() <= high
    if values == "blur_sigma":
        drawn = drawn[drawn > 0]
        assert low <= drawn.min()
    counts = torch.histc(drawn, bins=10, min=low, max=high)
    expected = len(drawn) / 10
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


@pytest.mark.parametrize("style", ["dino", "simsiam"])
def test_angle_and_jitter_have_torchvisions_distribution(style) -> None:
    p = parameters(STYLES[style].roles[0], style)
    saturation = 0.2 if style == "dino" else 0.4
    jitter = ColorJitter(0.4, 0.4, saturation, 0.1)
    torch.manual_seed(0)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    draws = [
        (*jitter.get_params(*ranges)[1:], RandomRotation.get_params([-90, 90])) for _ in range(4000)
    ]
    theirs = torch.tensor(draws)
    ours = torch.cat([p.factors, p.angle[:, None]], dim=1)
    spread = theirs.std(0)
    error = spread * (1 / 4000 + 1 / COUNT) ** 0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 4.5 * error).all()
    for quantile in (0.05, 0.5, 0.95):
        gap = (ours.quantile(quantile, 0) - theirs.quantile(quantile, 0)).abs()
        assert (gap <= 0.1 * spread).all()


def test_draws_of_the_released_models_are_unchanged() -> None:
    """Values of the generator that the released models were trained with."""
    p = parameters("global_2", view=1, samples=np.array([5, 77]), epoch=3, image_size=(256, 256))
    expected = {
        "top": [130.0, 88.0],
        "height": [106.0, 154.0],
        "angle": [-24.9879, -43.613],
        "factors": [[0.64379, 1.23901, 1.01496, 0.03499], [0.7357, 0.63296, 0.80111, -0.04348]],
        "order": [[0.0, 2.0, 1.0, 3.0], [1.0, 2.0, 3.0, 0.0]],
        "blur_sigma": [0.0, 1.21536],
    }
    for name, values in expected.items():
        torch.testing.assert_close(
            getattr(p, name).double(), torch.tensor(values).double(), rtol=0, atol=1e-5
        )


THIRD = (0.5, 0.5, 0.5)


def views(seed: int = 0, **settings) -> MultiCrop:
    sizes = {"global_size_px": 32, "local_size_px": 24, "local_views": 2}
    return MultiCrop(
        ViewsConfig(**{"strength": "caug_plus", **sizes, **settings}), THIRD, THIRD, seed
    )


@pytest.mark.parametrize("pipeline", ["batched", "reference"])
def test_a_view_depends_on_its_own_key_alone(rng, pipeline) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (6, 1, 28, 28), dtype=np.uint8))
    samples = np.array([4, 9, 2, 7, 30, 11])
    make = views(pipeline=pipeline)
    whole = make(images, samples, epoch=3)
    order = [5, 0, 3]
    part = make(images[order], samples[order], epoch=3)
    for a, b in zip(whole.pixels, part.pixels, strict=True):
        torch.testing.assert_close(a[order], b, rtol=0, atol=1e-5)
    others = (views(seed=1, pipeline=pipeline)(images, samples, 3), make(images, samples, epoch=4))
    for other in others:
        assert all((a != b).any() for a, b in zip(whole.pixels, other.pixels, strict=True))
    assert [tuple(v.shape) for v in whole.pixels] == [(6, 3, n, n) for n in (32, 32, 24, 24)]
    assert (whole.pixels[0] != whole.pixels[1]).any()


def test_chunks_of_views_change_nothing(rng, monkeypatch) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (7, 1, 28, 28), dtype=np.uint8))
    whole = views()(images, np.arange(7), epoch=0)
    monkeypatch.setattr("training.views._CHUNK_VALUES", 3 * 32 * 32)
    for a, b in zip(whole.pixels, views()(images, np.arange(7), epoch=0).pixels, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_styles_are_the_authors() -> None:
    order = ("flip", "rotate", "elastic", "jitter", "grayscale", "blur", "solarize")
    assert (STYLES["dino"].order, STYLES["dino"].interpolation) == (order, "bicubic")
    order = ("jitter", "grayscale", "blur", "flip", "rotate", "elastic")
    assert (STYLES["simsiam"].order, STYLES["simsiam"].interpolation) == (order, "bilinear")


def test_views_come_with_what_was_done(rng) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (5, 3, 40, 40), dtype=np.uint8))
    made = views()(images, np.arange(5), epoch=0)
    assert len(made.parameters) == len(made.pixels) == 4
    again = parameters("local", view=3, samples=np.arange(5), image_size=(40, 40), size=24)
    assert torch.equal(made.parameters[3].angle, again.angle)
    assert torch.equal(made.parameters[3].noise, again.noise)


@pytest.mark.parametrize("pipeline", ["batched", "reference"])
def test_views_made_together_are_those_made_alone(rng, pipeline) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (7, 3, 28, 28), dtype=np.uint8))
    make, samples = views(pipeline=pipeline), np.arange(7)
    together = make(images, samples, epoch=1)
    batched = pipeline == "batched"
    render = render_view if batched else reference_views.render_view
    source = images if batched else reference_views.to_pillow(images)
    scales = (torch.full((3, 1, 1), THIRD[0] * 255),) * 2
    for made, p in zip(together.pixels, together.parameters, strict=True):
        alone = render(source, p, made.shape[-1], STYLES["dino"], scales, disc_mask=False)
        torch.testing.assert_close(made, alone, rtol=0, atol=1e-5)


def test_rows_of_parameters_keep_their_noise() -> None:
    p = parameters(samples=np.arange(40))
    part = p.rows(11, 29)
    assert torch.equal(part.angle, p.angle[11:29])
    assert torch.equal(part.noise, p.noise[p.elastic.cumsum(0)[p.elastic] > p.elastic[:11].sum()][
        : int(part.elastic.sum())])  # fmt: skip


def test_wrong_images_are_named(rng) -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"torch.float32 \(2, 3, 32, 32\)"):
        views()(images.float(), np.arange(2), epoch=0)
    with pytest.raises(ShapeError, match=r"\(2, 2, 32, 32\)"):
        views()(images[:, :2], np.arange(2), epoch=0)
    with pytest.raises(ShapeError, match="2 images come with 3 sample"):
        views()(images, np.arange(3), epoch=0)


def test_config_refuses_what_a_style_or_pipeline_cannot_do() -> None:
    section = {"style": "simsiam", "pipeline": "reference", "strength": "caug_plus"}
    content = {
        "name": "x",
        "data": {"dataset": "fashion-mnist"},
        "backbone": {"name": "resnet18"},
        "views": section | {"local_views": 2, "global_size_px": 32, "local_size_px": 16},
    }
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content, "test")
    assert "local_views is 2" in str(caught.value)
    assert "needs 21" in str(caught.value)


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


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_flip_makes_torchvisions_pixels(rng, channels: int) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (12, channels, 40, 31), dtype=np.uint8))
    samples = np.arange(100, 112)
    actual = crop_and_flip(images, samples, seed=3, epoch=5, size=24)
    assert actual.shape == (12, 3, 24, 24)
    p = parameters(
        "global", "simsiam", "baug", 24, (0.08, 1.0),
        view=0, samples=samples, seed=3, epoch=5, image_size=(40, 31),
    )  # fmt: skip
    assert 0 < p.flip.sum() < 12
    for i, box in enumerate(p.boxes.int().tolist()):
        image = Image.fromarray(images[i].expand(3, -1, -1).permute(1, 2, 0).numpy())
        image = F.resized_crop(image, *box, [24, 24], F.InterpolationMode.BILINEAR)
        image = F.hflip(image) if p.flip[i] else image
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert (actual[i] - expected).abs().max() <= 1


def test_crop_and_flip_depends_on_seed_epoch_and_sample_alone(rng) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (1, 3, 32, 32), dtype=np.uint8)).repeat(
        4, 1, 1, 1
    )
    samples = np.array([4, 9, 2, 7])
    whole = crop_and_flip(images, samples, seed=0, epoch=1, size=16)
    part = crop_and_flip(images[:2], samples[[2, 1]], seed=0, epoch=1, size=16)
    assert torch.equal(part, whole[[2, 1]])
    assert not torch.equal(whole[0], whole[1])
    for other in ({"seed": 1, "epoch": 1}, {"seed": 0, "epoch": 2}):
        assert not torch.equal(crop_and_flip(images, samples, size=16, **other), whole)
