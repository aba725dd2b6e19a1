"""The batched operations against torchvision on Pillow images, with the same parameters."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from training import pixel_ops
from training.views import draw_parameters, render_view

TOLERANCE = 0.5  # mean absolute difference on the 0..255 scale


def photograph(seed: int, size: int) -> Image.Image:
    """Smooth colour gradients, edges and grain, which is what photographs are made of."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(float)
    y, x = np.mgrid[:size, :size] / size
    pixels[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06] *= 0.5
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


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


@pytest.mark.parametrize("size", [16, 32, 96])
def test_resized_crop(images: list[Image.Image], size: int) -> None:
    side = images[0].width
    rng = np.random.default_rng(size)
    height, width = rng.integers(5, side + 1, (2, len(images)))
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    boxes = torch.tensor(np.stack([top, left, height, width])).float()
    ours = pixel_ops.resized_crop(batch(images), *boxes, size)
    theirs = [
        F.resized_crop(image, *(int(v) for v in box), [size, size], InterpolationMode.BICUBIC)
        for image, box in zip(images, boxes.T, strict=True)
    ]
    # Equal to the byte but where Pillow shrinks the rows before it widens the columns.
    assert mean_difference(ours, theirs) <= TOLERANCE


def test_flip_and_rotate(images: list[Image.Image]) -> None:
    angle = torch.linspace(-90, 90, len(images)) + 0.37
    chosen = torch.arange(len(images)) % 2 == 0
    ours = pixel_ops.rotate(pixel_ops.flip(batch(images), chosen), angle)
    theirs = [
        F.rotate(F.hflip(image) if c else image, float(a))
        for image, a, c in zip(images, angle, chosen, strict=True)
    ]
    assert mean_difference(ours, theirs) <= 0.05


@pytest.mark.parametrize(
    ("operation", "theirs", "low", "high"),
    [
        (pixel_ops.brightness, F.adjust_brightness, 0.6, 1.4),
        (pixel_ops.contrast, F.adjust_contrast, 0.6, 1.4),
        (pixel_ops.saturation, F.adjust_saturation, 0.8, 1.2),
        (pixel_ops.hue, F.adjust_hue, -0.1, 0.1),
    ],
)
def test_color_operations(images: list[Image.Image], operation, theirs, low, high) -> None:
    factor = torch.linspace(low, high, len(images))
    expected = [theirs(image, float(f)) for image, f in zip(images, factor, strict=True)]
    assert mean_difference(operation(batch(images), factor), expected) <= 0.05


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
    ours = pixel_ops.color_jitter(
        batch(images), torch.from_numpy(order), torch.from_numpy(factors).float(), chosen
    )
    assert mean_difference(ours, expected) <= TOLERANCE


def test_grayscale_and_solarize(images: list[Image.Image]) -> None:
    everyone = torch.ones(len(images), dtype=torch.bool)
    expected = [F.rgb_to_grayscale(image, 3) for image in images]
    assert mean_difference(pixel_ops.grayscale(batch(images), everyone), expected) <= 0.01
    expected = [F.solarize(image, 128) for image in images]
    assert mean_difference(pixel_ops.solarize(batch(images), everyone), expected) == 0


def test_gaussian_blur(images: list[Image.Image]) -> None:
    sigma = torch.linspace(0.1, 2.0, len(images))
    sigma[1] = 0.0
    expected = [
        image.filter(ImageFilter.GaussianBlur(float(s))) if s else image
        for image, s in zip(images, sigma, strict=True)
    ]
    assert mean_difference(pixel_ops.gaussian_blur(batch(images), sigma), expected) <= 0.05


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


@pytest.mark.parametrize("role", ["global_1", "global_2", "local"])
@pytest.mark.parametrize("strength", ["baug", "caug"])
def test_whole_views(images: list[Image.Image], role, strength) -> None:
    """The drawn parameters through torchvision and Pillow, in the reference's order."""
    size = 96 if images[0].width == 150 else 32
    samples = np.arange(len(images))
    p = draw_parameters(
        role, 1, samples, seed=4, epoch=2, strength=strength, size=size, scale=(0.2, 1.0),
        image_size=(images[0].height, images[0].width),
    )  # fmt: skip
    jitter = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    expected = []
    for i, image in enumerate(images):
        box = [int(side[i]) for side in (p.top, p.left, p.height, p.width)]
        view = F.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC)
        view = F.hflip(view) if p.flip[i] else view
        view = F.rotate(view, float(p.angle[i]))
        for operation in p.order[i] if p.jitter[i] else []:
            view = jitter[operation](view, float(p.factors[i, operation]))
        view = F.rgb_to_grayscale(view, 3) if p.grayscale[i] else view
        if p.blur_sigma[i]:
            view = view.filter(ImageFilter.GaussianBlur(float(p.blur_sigma[i])))
        expected.append(F.solarize(view, 128) if p.solarize[i] else view)
    assert mean_difference(render_view(batch(images), p, size), expected) <= TOLERANCE
