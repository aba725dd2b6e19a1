"""The views as the reference makes them: one image at a time, torchvision on Pillow images.

This is the peer of the batched pipeline (`views.render_view`): for the same parameters both give
the same pixels, up to rounding, and `python -m training.bench views` compares their speed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from training.pixel_ops import circular_mask

if TYPE_CHECKING:
    from training.views import Operation, Style, ViewParameters

ELASTIC_ALPHA = 100.0
ELASTIC_SIGMA_PX = 5.0
ELASTIC_TAPS = 41
# torchvision reflects the border of the elastic noise once, which needs more pixels than that.
ELASTIC_MIN_SIZE_PX = ELASTIC_TAPS // 2 + 1

_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def to_pillow(images: Tensor) -> list[Image.Image]:
    """RGB Pillow images of a (B, C, H, W) uint8 tensor, C = 1 or 3."""
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def _elastic(image: Image.Image, noise: Tensor) -> Image.Image:
    width, height = image.size
    kernel, sigma = [ELASTIC_TAPS, ELASTIC_TAPS], [ELASTIC_SIGMA_PX, ELASTIC_SIGMA_PX]
    across, down = F.gaussian_blur(noise[:, None], kernel, sigma) * ELASTIC_ALPHA
    displacement = torch.stack([across[0] / width, down[0] / height], dim=-1)[None]
    return F.elastic_transform(image, displacement, InterpolationMode.BILINEAR, [0.0])


def _jitter(image: Image.Image, order: list[int], factors: list[float]) -> Image.Image:
    for operation in order:
        image = _JITTER[operation](image, factors[operation])
    return image


# What each operation does to one image, given the row `p` of its parameters.
_OPERATIONS: Mapping["Operation", Callable[[Image.Image, dict[str, Any]], Image.Image]] = {
    "flip": lambda image, p: F.hflip(image) if p["flip"] else image,
    "rotate": lambda image, p: F.rotate(image, p["angle"]) if p["angle"] else image,
    "elastic": lambda image, p: _elastic(image, p["noise"]) if p["elastic"] else image,
    "jitter": lambda image, p: _jitter(image, p["order"], p["factors"]) if p["jitter"] else image,
    "grayscale": lambda image, p: F.rgb_to_grayscale(image, 3) if p["grayscale"] else image,
    "blur": lambda image, p: (
        image.filter(ImageFilter.GaussianBlur(p["blur_sigma"])) if p["blur_sigma"] else image
    ),
    "solarize": lambda image, p: F.solarize(image, 128) if p["solarize"] else image,
}


def render_view(
    images: Sequence[Image.Image],
    parameters: "ViewParameters",
    size: int,
    style: "Style",
    normalization: tuple[Tensor, Tensor],
    *,
    disc_mask: bool,
) -> Tensor:
    """Make one view of each image, one after the other.

    Args:
        images: RGB images.
        parameters: From `views.draw_parameters`, one row per image.
        size: Side of the view, pixels; with elastic rows at least `ELASTIC_MIN_SIZE_PX`.
        style: Row of `views.STYLES`.
        normalization: Mean and standard deviation on the scale 0..255, (3, 1, 1) each.
        disc_mask: Make everything outside the inscribed circle black in the end.

    Returns:
        (B, 3, size, size) float on the CPU, normalised.

    Source: the transforms of the authors' main_dino.py and DDCL; the random numbers are ours.
    """
    interpolation = InterpolationMode(style.interpolation)
    views = []
    for image, p in zip(images, _rows(parameters), strict=True):
        view = F.resized_crop(image, *p["box"], [size, size], interpolation)
        for operation in style.order:
            view = _OPERATIONS[operation](view, p)
        views.append(F.pil_to_tensor(view))
    pixels = torch.stack(views).float()
    mean, std = normalization
    return (circular_mask(pixels) if disc_mask else pixels).sub_(mean).div_(std)


def _rows(parameters: "ViewParameters") -> Iterator[dict[str, Any]]:
    """The parameters of one image after the other, as Python numbers."""
    p = parameters
    names = ("flip", "angle", "elastic", "jitter", "order", "factors", "grayscale", "blur_sigma")
    columns = {name: getattr(p, name).tolist() for name in (*names, "solarize")}
    columns["box"] = p.boxes.int().tolist()
    noise = iter(() if p.noise is None else p.noise)
    for i, elastic in enumerate(columns["elastic"]):
        row = {name: values[i] for name, values in columns.items()}
        yield row | {"noise": next(noise) if elastic else None}
