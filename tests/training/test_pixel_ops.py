"""The batched operations against torchvision on Pillow images, with the same parameters."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from training import pixel_ops
from training.bench import photograph
from training.config import ViewsConfig
from training.pixel_ops import resized_crop_by_matrices, resized_crop_one_by_one
from training.views import STYLES, MultiCrop, Views

TOLERANCE = 0.5  # mean absolute difference on the 0..255 scale


@pytest.fixture(scope="module", params=[28, 64, 150])
def images(request: pytest.FixtureRequest, sample_images: list[Image.Image]) -> list[Image.Image]:
    photographs = [photograph(seed, request.param) for seed in range(6)]
    if request.param != 28:
        return photographs
    return [*photographs, *sample_images[:6]]


def batch(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() for i in images])


def mean_difference(ours: torch.Tensor, theirs: list[Image.Image]) -> float:
    return float((ours - batch(theirs)).abs().mean())


@pytest.mark.parametrize("crop", [resized_crop_one_by_one, resized_crop_by_matrices])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [16, 32, 96])
def test_resized_crop(images: list[Image.Image], size: int, interpolation, crop) -> None:
    """What a CPU does and what a GPU does, both against Pillow."""
    side = images[0].width
    rng = np.random.default_rng(size)
    height, width = rng.integers(5, side + 1, (2, len(images)))
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    boxes = torch.tensor(np.stack([top, left, height, width], axis=1)).float()
    ours = crop(batch(images).byte(), boxes, size, interpolation)
    assert torch.equal(ours, ours.round().clamp(0, 255))
    theirs = [
        F.resized_crop(
            image, *(int(v) for v in box), [size, size], InterpolationMode(interpolation)
        )
        for image, box in zip(images, boxes, strict=True)
    ]
    # Equal to the byte but where Pillow shrinks the rows before it widens the columns.
    assert mean_difference(ours, theirs) <= TOLERANCE


def test_flip_and_rotate(images: list[Image.Image]) -> None:
    angle = torch.linspace(-90, 90, len(images)) + 0.37
    angle[1] = 0.0
    chosen = torch.arange(len(images)) % 2 == 0
    ours = batch(images)
    pixel_ops.flip_(ours, chosen)
    turned = pixel_ops.rotate(ours, angle)
    theirs = [
        F.rotate(F.hflip(image) if c else image, float(a))
        for image, a, c in zip(images, angle, chosen, strict=True)
    ]
    assert mean_difference(turned, theirs) <= 0.05
    pixel_ops.rotate_(ours, angle)
    assert torch.equal(ours, turned)


@pytest.mark.parametrize(
    ("operation_", "theirs", "low", "high"),
    [
        (pixel_ops.brightness_, F.adjust_brightness, 0.6, 1.4),
        (pixel_ops.contrast_, F.adjust_contrast, 0.6, 1.4),
        (pixel_ops.saturation_, F.adjust_saturation, 0.6, 1.4),
        (pixel_ops.hue_, F.adjust_hue, -0.1, 0.1),
        (pixel_ops.hue_, F.adjust_hue, -0.5, 0.5),
    ],
)
def test_color_operations(images: list[Image.Image], operation_, theirs, low, high) -> None:
    factor = torch.linspace(low, high, len(images))
    expected = [theirs(image, float(f)) for image, f in zip(images, factor, strict=True)]
    ours = batch(images)
    operation_(ours, factor)
    assert mean_difference(ours, expected) <= 0.05


def test_hue_of_every_kind_of_color() -> None:
    """A grid over the whole cube, the primary and grey colours included."""
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    image = Image.fromarray(cube.reshape(len(levels) ** 2, len(levels), 3))
    for shift in (-0.1, 0.0, 0.07):
        ours = batch([image])
        pixel_ops.hue_(ours, torch.tensor([shift]))
        difference = (ours - batch([F.adjust_hue(image, shift)])).abs()
        assert (difference > 0).float().mean() < 0.005
        assert difference.max() <= 6  # a step of the hue byte at the brightest colour


def test_color_jitter_follows_each_order(images: list[Image.Image]) -> None:
    rng = np.random.default_rng(3)
    order = np.argsort(rng.random((len(images), 4)), axis=1)
    factors = np.stack([rng.uniform(a, b, len(images)) for a, b in
                        [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]], axis=1)  # fmt: skip
    chosen = torch.arange(len(images)) != 1
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    expected = []
    for i, image in enumerate(images):
        for operation in order[i] if chosen[i] else []:
            image = operations[operation](image, float(np.float32(factors[i, operation])))
        expected.append(image)
    ours = batch(images)
    pixel_ops.color_jitter_(
        ours, torch.from_numpy(order), torch.from_numpy(factors).float(), chosen
    )
    assert mean_difference(ours, expected) <= TOLERANCE


def test_grayscale_and_solarize(images: list[Image.Image]) -> None:
    everyone = torch.ones(len(images), dtype=torch.bool)
    expected = [F.rgb_to_grayscale(image, 3) for image in images]
    ours = batch(images)
    pixel_ops.grayscale_(ours, everyone)
    assert mean_difference(ours, expected) <= 0.01
    expected = [F.solarize(image, 128) for image in images]
    ours = batch(images)
    pixel_ops.solarize_(ours, everyone)
    assert mean_difference(ours, expected) == 0


def test_operations_leave_other_images_alone(images: list[Image.Image]) -> None:
    chosen = torch.arange(len(images)) % 3 == 1
    factors = torch.tensor([0.7, 1.3, 0.8, 0.1]).expand(len(images), 4)
    order = torch.arange(4).expand(len(images), 4)
    before, after = batch(images), batch(images)
    pixel_ops.flip_(after, chosen)
    pixel_ops.color_jitter_(after, order, factors, chosen)
    pixel_ops.gaussian_blur_(after, chosen * 1.5)
    pixel_ops.grayscale_(after, chosen)
    pixel_ops.solarize_(after, chosen)
    assert torch.equal(after[~chosen], before[~chosen])
    assert (after[chosen] != before[chosen]).flatten(1).any(1).all()


def test_circular_mask() -> None:
    masked = pixel_ops.circular_mask(torch.ones(1, 3, 64, 64))
    assert abs(float(masked.mean()) - np.pi / 4) < 0.01
    assert torch.equal(masked, masked.flip(-1))
    assert torch.equal(masked, masked.transpose(2, 3))


def test_gaussian_blur(images: list[Image.Image]) -> None:
    sigma = torch.linspace(0.1, 2.0, len(images))
    sigma[1] = 0.0
    expected = [
        image.filter(ImageFilter.GaussianBlur(float(s))) if s else image
        for image, s in zip(images, sigma, strict=True)
    ]
    ours = batch(images)
    pixel_ops.gaussian_blur_(ours, sigma)
    assert mean_difference(ours, expected) <= 0.05


def test_elastic(images: list[Image.Image]) -> None:
    side = images[0].width
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(images), 2, side, side, generator=generator) * 2 - 1
    expected = []
    for image, field in zip(images, noise, strict=True):
        smooth = [
            F.gaussian_blur(axis[None, None], [41, 41], [5.0, 5.0]) * 100 / side for axis in field
        ]
        displacement = torch.cat(smooth, dim=1).permute(0, 2, 3, 1)
        expected.append(F.elastic_transform(image, displacement, InterpolationMode.BILINEAR, [0.0]))
    assert mean_difference(pixel_ops.elastic(batch(images), noise), expected) <= 0.05


def both_pipelines(images: list[Image.Image], **settings) -> list[Views]:
    """The same views from either pipeline, as bytes."""
    bytes_ = batch(images).byte()
    zero, unit = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
    return [
        MultiCrop(ViewsConfig(pipeline=pipeline, **settings), zero, unit, seed=4)(
            bytes_, np.arange(len(images)), epoch=2
        )
        for pipeline in ("batched", "reference")
    ]


def assert_parity(views: list[Views]) -> None:
    ours, theirs = views
    for mine, other in zip(ours.pixels, theirs.pixels, strict=True):
        assert float((mine - other).abs().mean()) <= TOLERANCE
    for mine, other in zip(ours.parameters, theirs.parameters, strict=True):
        assert torch.equal(mine.factors, other.factors)


@pytest.mark.parametrize("disc_mask", [False, True])
@pytest.mark.parametrize("strength", ["baug", "caug", "caug_plus"])
@pytest.mark.parametrize("style", ["dino", "simsiam"])
def test_whole_views(images: list[Image.Image], style, strength, disc_mask) -> None:
    """Every role of both styles, through torchvision and Pillow in the paper's order."""
    views = both_pipelines(
        images,
        style=style,
        strength=strength,
        disc_mask=disc_mask,
        global_size_px=96 if images[0].width == 150 else 32,
        local_size_px=24,
        local_views=2 if style == "dino" else 0,
    )
    assert_parity(views)
    assert bool((views[0].pixels[0][..., 0, 0] == 0).all()) or not disc_mask


@pytest.mark.parametrize("strength", ["caug", "caug_plus"])
@pytest.mark.parametrize("style", ["dino", "simsiam"])
def test_whole_views_at_full_size(style, strength) -> None:
    local_views = 2 if style == "dino" else 0
    photographs = [photograph(seed, 256) for seed in range(4)]
    assert_parity(
        both_pipelines(photographs, style=style, strength=strength, local_views=local_views)
    )


def test_one_channel_gives_three_equal_ones(sample_images: list[Image.Image]) -> None:
    gray = [image.convert("L").convert("RGB") for image in sample_images[:4]]
    config = ViewsConfig(global_size_px=32, local_size_px=24, local_views=1)
    crop = MultiCrop(config, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), seed=0)
    from_rgb = crop(batch(gray).byte(), np.arange(4), epoch=0)
    from_gray = crop(batch(gray)[:, :1].byte(), np.arange(4), epoch=0)
    for a, b in zip(from_rgb.pixels, from_gray.pixels, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_simsiam_turns_after_the_jitter() -> None:
    """The order is part of the style: brightness leaves corners black only if rotation is last."""
    assert STYLES["simsiam"].order.index("rotate") > STYLES["simsiam"].order.index("blur")
    assert STYLES["dino"].order.index("rotate") < STYLES["dino"].order.index("jitter")
    white = [Image.new("RGB", (64, 64), "white")] * 8
    views = both_pipelines(white, style="simsiam", local_views=0, global_size_px=64)[0]
    p, pixels = views.parameters[0], views.pixels[0]
    turned = (p.angle.abs() > 20) & (p.angle.abs() < 70)
    assert turned.any()
    assert (pixels[turned][..., 0, 0] == 0).all()
