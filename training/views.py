"""The views of baug, caug and caug_plus: parameters drawn per sample, pixels made per batch.

The order is that of the authors' code: crop, flip, rotation, elastic, jitter, grayscale,
blur, solarise; every operation keeps the semantics of torchvision on Pillow images.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training import pixel_ops
from training.streams import uniforms

Strength = Literal["baug", "caug", "caug_plus"]
Role = Literal["global_1", "global_2", "local"]

MAX_ANGLE_DEG = 90.0
ELASTIC_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.8
JITTER_LOW = (0.6, 0.6, 0.8, -0.1)
JITTER_HIGH = (1.4, 1.4, 1.2, 0.1)
GRAYSCALE_PROBABILITY = 0.2
BLUR_PROBABILITY: dict[Role, float] = {"global_1": 1.0, "global_2": 0.1, "local": 0.5}
BLUR_SIGMA_PX = (0.1, 2.0)
SOLARIZE_PROBABILITY: dict[Role, float] = {"global_1": 0.0, "global_2": 0.2, "local": 0.0}
ASPECT_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10

_FIXED_DRAWS = 2 * CROP_ATTEMPTS + 20  # every number of a view but its elastic noise


@dataclass(frozen=True)
class ViewParameters:
    """What one view does to each image of a batch; every field has B rows.

    `top`, `left`, `height`, `width` in pixels of the source; `angle` in degrees counter-
    clockwise; `order` and `factors` (B, 4) of the colour jitter; `blur_sigma` in pixels of the
    view, 0 for none; `noise` (B, 2, size, size) in [-1, 1] of the elastic rows, else None.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    angle: Tensor
    elastic: Tensor
    jitter: Tensor
    order: Tensor
    factors: Tensor
    grayscale: Tensor
    blur_sigma: Tensor
    solarize: Tensor
    noise: Tensor | None

    def to(self, device: torch.device | str) -> "ViewParameters":
        """The same parameters on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return ViewParameters(**{k: None if v is None else v.to(device) for k, v in moved.items()})


def _crop_boxes(
    u: NDArray[np.float64], image_size: tuple[int, int], scale: tuple[float, float]
) -> NDArray[np.float64]:
    """(4, B): top, left, height, width of torchvision's RandomResizedCrop."""
    image_h, image_w = image_size
    area = image_h * image_w * (scale[0] + u[:, :CROP_ATTEMPTS] * (scale[1] - scale[0]))
    low, high = (math.log(r) for r in ASPECT_RATIO)
    aspect = np.exp(low + u[:, CROP_ATTEMPTS : 2 * CROP_ATTEMPTS] * (high - low))
    width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (width > 0) & (width <= image_w) & (height > 0) & (height <= image_h)
    attempt = fits.argmax(1)
    rows = np.arange(len(u))
    width, height = width[rows, attempt], height[rows, attempt]
    top = np.floor(u[:, -2] * (image_h - height + 1))
    left = np.floor(u[:, -1] * (image_w - width + 1))
    # No attempt fitted: the largest central box whose aspect ratio is allowed.
    whole_h = min(image_h, round(image_w / ASPECT_RATIO[0]))
    whole_w = min(image_w, round(image_h * ASPECT_RATIO[1]))
    central = [(image_h - whole_h) // 2, (image_w - whole_w) // 2, whole_h, whole_w]
    boxes = np.stack([top, left, height, width])
    return np.where(fits.any(1), boxes, np.array(central, dtype=float)[:, None])


def draw_parameters(
    role: Role,
    view: int,
    samples: NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    strength: Strength,
    image_size: tuple[int, int],
    scale: tuple[float, float],
    size: int,
) -> ViewParameters:
    """Draw what view number `view` does to each of `samples`.

    Args:
        role: Which of the three pipelines; it sets the blur and solarise probabilities.
        view: Index of the view in the list of views, part of the stream's key.
        samples: Index of each image in the data set, (B,).
        seed, epoch: The rest of the stream's key.
        strength: baug (no geometry beyond crop and flip), caug (+ rotation), caug_plus (+ elastic).
        image_size: Height and width of the source images, pixels.
        scale: Least and greatest share of the source's area that a crop covers.
        size: Side of the view, pixels.

    Source: paper section on augmentation; probabilities as in the authors' released script.
    """
    u = uniforms(seed, epoch, samples, view, _FIXED_DRAWS)
    crop = 2 * CROP_ATTEMPTS
    boxes = _crop_boxes(u[:, : crop + 2], image_size, scale)
    flip, turn, warp, jitter, gray, blur, sigma, solarize = u[:, crop + 2 : crop + 10].T
    order, factors = u[:, crop + 10 : crop + 14], u[:, crop + 14 : crop + 18]
    angle = (2 * turn - 1) * MAX_ANGLE_DEG if strength != "baug" else np.zeros_like(turn)
    elastic = (warp < ELASTIC_PROBABILITY) & (strength == "caug_plus")
    low, high = np.array(JITTER_LOW), np.array(JITTER_HIGH)
    noise = None
    if strength == "caug_plus":
        flat = uniforms(seed, epoch, samples[elastic], view, 2 * size * size, first=_FIXED_DRAWS)
        noise = torch.from_numpy(2 * flat - 1).float().view(-1, 2, size, size)
    sigma_px = BLUR_SIGMA_PX[0] + sigma * (BLUR_SIGMA_PX[1] - BLUR_SIGMA_PX[0])
    top, left, height, width = torch.from_numpy(boxes).float()
    return ViewParameters(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=torch.from_numpy(flip < 0.5),
        angle=torch.from_numpy(angle).float(),
        elastic=torch.from_numpy(elastic),
        jitter=torch.from_numpy(jitter < JITTER_PROBABILITY),
        order=torch.from_numpy(order.argsort(1)),
        factors=torch.from_numpy(low + factors * (high - low)).float(),
        grayscale=torch.from_numpy(gray < GRAYSCALE_PROBABILITY),
        blur_sigma=torch.from_numpy(np.where(blur < BLUR_PROBABILITY[role], sigma_px, 0)).float(),
        solarize=torch.from_numpy(solarize < SOLARIZE_PROBABILITY[role]),
        noise=noise,
    )


def render_view(images: Tensor, parameters: ViewParameters, size: int) -> Tensor:
    """Make one view of each image.

    Args:
        images: (B, 3, H, W) float, whole numbers 0..255.
        parameters: From `draw_parameters`, on the device of `images`.
        size: Side of the view, pixels.

    Returns:
        (B, 3, size, size) float, whole numbers 0..255.
    """
    p = parameters
    x = pixel_ops.resized_crop(images, p.top, p.left, p.height, p.width, size)
    x = pixel_ops.flip(x, p.flip)
    if p.angle.any():
        x = pixel_ops.rotate(x, p.angle)
    if p.noise is not None and len(p.noise):
        x[p.elastic] = pixel_ops.elastic(x[p.elastic], p.noise)
    x = pixel_ops.color_jitter(x, p.order, p.factors, p.jitter)
    x = pixel_ops.grayscale(x, p.grayscale)
    x = pixel_ops.gaussian_blur(x, p.blur_sigma)
    return pixel_ops.solarize(x, p.solarize)


class Views(NamedTuple):
    """All views of a batch, each (B, 3, size, size), normalised; and what was done to each."""

    pixels: list[Tensor]
    parameters: list[ViewParameters]


@dataclass(frozen=True)
class MultiCrop:
    """The list of views of one run: two global ones, then the local ones.

    Call it with a batch to get the views, each (B, 3, size, size), normalised.
    """

    strength: Strength
    global_size_px: int
    local_size_px: int
    local_views: int
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    seed: int

    def __call__(self, images: Tensor, samples: NDArray[np.integer], epoch: int) -> Views:
        """Make all views of a batch.

        Args:
            images: (B, C, H, W) uint8 with C = 1 or 3, on the training device.
            samples: Index of each image in the data set, (B,).
            epoch: Epoch, 0-based.
        """
        pixels = images.float().expand(-1, 3, -1, -1)
        mean, std = (
            torch.tensor(v, device=images.device).view(3, 1, 1) * 255 for v in (self.mean, self.std)
        )
        views = Views([], [])
        for view in range(2 + self.local_views):
            role: Role = ("global_1", "global_2")[view] if view < 2 else "local"
            size = self.global_size_px if view < 2 else self.local_size_px
            parameters = draw_parameters(
                role,
                view,
                samples,
                seed=self.seed,
                epoch=epoch,
                strength=self.strength,
                image_size=(images.shape[-2], images.shape[-1]),
                scale=self.global_scale if view < 2 else self.local_scale,
                size=size,
            ).to(images.device)
            views.pixels.append((render_view(pixels, parameters, size) - mean) / std)
            views.parameters.append(parameters)
        return views
