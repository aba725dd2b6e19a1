"""The views of one run: parameters drawn per sample, pixels made by one of two pipelines.

`STYLES` says what a kind of training does to a view and in which order. `draw_parameters` draws
what one view does to each image; `render_view` makes the pixels of a whole batch ("batched"),
`reference_views.render_view` the same image by image with torchvision and Pillow ("reference").
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clever_zoo.errors import ShapeError
from training import pixel_ops, reference_views
from training.streams import uniforms

if TYPE_CHECKING:
    from training.config import ViewsConfig

Strength = Literal["baug", "caug", "caug_plus"]
StyleName = Literal["dino", "simsiam"]
Pipeline = Literal["batched", "reference"]
Role = Literal["global_1", "global_2", "local", "global"]
Operation = Literal["flip", "rotate", "elastic", "jitter", "grayscale", "blur", "solarize"]

MAX_ANGLE_DEG = 90.0
ELASTIC_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.8
GRAYSCALE_PROBABILITY = 0.2
BLUR_SIGMA_PX = (0.1, 2.0)
ASPECT_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
CROP_DRAWS = 2 * CROP_ATTEMPTS + 2  # uniform numbers of one box
FULL_SCALE = (0.08, 1.0)  # of crop_and_flip: torchvision's default

_FIXED_DRAWS = CROP_DRAWS + 18  # every number of a view but its elastic noise
# Values of a chunk of the batch on a CPU: large enough that images with the same jitter operation
# go together, small enough for the last-level cache.
_CHUNK_VALUES = 2_400_000


@dataclass(frozen=True)
class Style:
    """What a kind of training does to its views.

    `roles` of the two global views and `local_role` of the others, None where there are none;
    `jitter` factor ranges of brightness, contrast, saturation and hue; probabilities of blur
    and solarising per role; `order` of the operations after the crop.
    """

    roles: tuple[Role, Role]
    local_role: Role | None
    interpolation: pixel_ops.Interpolation
    jitter: tuple[tuple[float, float], ...]
    blur: Mapping[Role, float]
    solarize: Mapping[Role, float]
    order: tuple[Operation, ...]


STYLES: Mapping[StyleName, Style] = {
    # Source: the authors' main_dino.py.
    "dino": Style(
        roles=("global_1", "global_2"),
        local_role="local",
        interpolation="bicubic",
        jitter=((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)),
        blur={"global_1": 1.0, "global_2": 0.1, "local": 0.5},
        solarize={"global_1": 0.0, "global_2": 0.2, "local": 0.0},
        order=("flip", "rotate", "elastic", "jitter", "grayscale", "blur", "solarize"),
    ),
    # Source: the authors' DDCL, which turns and warps last.
    "simsiam": Style(
        roles=("global", "global"),
        local_role=None,
        interpolation="bilinear",
        jitter=((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)),
        blur={"global": 0.5},
        solarize={"global": 0.0},
        order=("jitter", "grayscale", "blur", "flip", "rotate", "elastic"),
    ),
}


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

    @property
    def boxes(self) -> Tensor:
        """(B, 4): top, left, height, width."""
        return torch.stack([self.top, self.left, self.height, self.width], dim=1)

    @classmethod
    def joined(cls, parts: Sequence["ViewParameters"]) -> "ViewParameters":
        """The parameters of several views of one size, one after the other."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        return cls(**{k: None if v[0] is None else torch.cat(v) for k, v in columns.items()})

    def _map(self, change: Callable[[Tensor], Tensor]) -> "ViewParameters":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return ViewParameters(**{k: None if v is None else change(v) for k, v in values.items()})

    def rows(self, start: int, stop: int) -> "ViewParameters":
        """The parameters of the images `start` to `stop`, exclusive."""
        chosen = replace(self, noise=None)._map(lambda value: value[start:stop])
        if self.noise is None:
            return chosen
        first, last = (int(self.elastic[:n].sum()) for n in (start, stop))
        return replace(chosen, noise=self.noise[first:last])


def crop_boxes(
    u: NDArray[np.float64], image_size: tuple[int, int], scale: tuple[float, float]
) -> NDArray[np.float64]:
    """The boxes of torchvision's RandomResizedCrop.

    Args:
        u: Uniform numbers in [0, 1), (B, CROP_DRAWS).
        image_size: Height and width of the images, pixels.
        scale: Least and greatest share of the area that a box covers.

    Returns:
        (4, B): top, left, height, width, whole pixels.
    """
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
    style: StyleName,
    strength: Strength,
    image_size: tuple[int, int],
    scale: tuple[float, float],
    size: int,
) -> ViewParameters:
    """Draw what view number `view` does to each of `samples`.

    Args:
        role: Which kind of view of the style; it sets the blur and solarise probabilities.
        view: Index of the view in the list of views, part of the stream's key.
        samples: Index of each image in the data set, (B,).
        seed, epoch: The rest of the stream's key.
        style: Row of `STYLES`.
        strength: baug (no geometry beyond crop and flip), caug (+ rotation), caug_plus (+ elastic).
        image_size: Height and width of the source images, pixels.
        scale: Least and greatest share of the source's area that a crop covers.
        size: Side of the view, pixels.

    Returns:
        The parameters, on the CPU.

    Source: paper section on augmentation; probabilities as in the authors' released scripts.
    """
    recipe = STYLES[style]
    u = uniforms(seed, epoch, samples, view, _FIXED_DRAWS)
    boxes = crop_boxes(u[:, :CROP_DRAWS], image_size, scale)
    flip, turn, warp, jitter, gray, blur, sigma, solarize = u[:, CROP_DRAWS : CROP_DRAWS + 8].T
    order, factors = u[:, CROP_DRAWS + 8 : CROP_DRAWS + 12], u[:, CROP_DRAWS + 12 : CROP_DRAWS + 16]
    angle = (2 * turn - 1) * MAX_ANGLE_DEG if strength != "baug" else np.zeros_like(turn)
    elastic = (warp < ELASTIC_PROBABILITY) & (strength == "caug_plus")
    low, high = np.array(recipe.jitter).T
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
        blur_sigma=torch.from_numpy(np.where(blur < recipe.blur[role], sigma_px, 0)).float(),
        solarize=torch.from_numpy(solarize < recipe.solarize[role]),
        noise=noise,
    )


def _elastic_(x: Tensor, p: ViewParameters) -> None:
    if p.noise is not None and len(p.noise):
        rows = p.elastic.nonzero().squeeze(1).to(x.device, non_blocking=True)
        noise = p.noise.to(x.device, non_blocking=True)
        x.index_copy_(0, rows, pixel_ops.elastic(x.index_select(0, rows), noise))


_OPERATIONS: Mapping[Operation, Callable[[Tensor, ViewParameters], None]] = {
    "flip": lambda x, p: pixel_ops.flip_(x, p.flip),
    "rotate": lambda x, p: pixel_ops.rotate_(x, p.angle),
    "elastic": _elastic_,
    "jitter": lambda x, p: pixel_ops.color_jitter_(x, p.order, p.factors, p.jitter),
    "grayscale": lambda x, p: pixel_ops.grayscale_(x, p.grayscale),
    "blur": lambda x, p: pixel_ops.gaussian_blur_(x, p.blur_sigma),
    "solarize": lambda x, p: pixel_ops.solarize_(x, p.solarize),
}


def render_view(
    images: Tensor,
    parameters: ViewParameters,
    size: int,
    style: Style,
    normalization: tuple[Tensor, Tensor],
    *,
    disc_mask: bool,
) -> Tensor:
    """Make one view of each image, many at a time.

    Args:
        images: (B, C, H, W) uint8 with C = 1 or 3; channels-last memory is fastest on a CPU.
        parameters: From `draw_parameters`, on the CPU, so that the device is never waited for.
        size: Side of the view, pixels.
        style: Row of `STYLES`.
        normalization: Mean and standard deviation on the scale 0..255, (3, 1, 1) each.
        disc_mask: Make everything outside the inscribed circle black in the end.

    Returns:
        (B, 3, size, size) float on the device of `images`, normalised.
    """
    mean, std = (v.to(images.device, non_blocking=True) for v in normalization)
    count = len(images)
    on_cpu = images.device.type == "cpu"
    step = max(1, _CHUNK_VALUES // (3 * size * size)) if on_cpu else count
    out = torch.empty(count, 3, size, size, device=images.device)
    with torch.inference_mode():  # many small calls: half the overhead of each
        for start in range(0, count, step):
            p = parameters.rows(start, start + step)
            part = images[start : start + step]
            x = pixel_ops.resized_crop(part, p.boxes, size, style.interpolation)
            x = x.expand(-1, 3, -1, -1).contiguous()
            for operation in style.order:
                _OPERATIONS[operation](x, p)
            if disc_mask:
                x = pixel_ops.circular_mask(x)
            torch.addcmul(-mean / std, x, 1 / std, out=out[start : start + step])
    return out


def _check_images(images: Tensor, samples: NDArray[np.integer]) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(
            f"views are made from uint8 images of shape (B, 1 or 3, H, W); these are "
            f"{images.dtype} {tuple(images.shape)}. Pass bytes as they are decoded."
        )
    if len(samples) != len(images):
        raise ShapeError(
            f"{len(images)} images come with {len(samples)} sample indices; pass one for each"
        )


def crop_and_flip(
    images: Tensor, samples: NDArray[np.integer], *, seed: int, epoch: int, size: int
) -> Tensor:
    """The training transform of every probe and fine-tuning: random resized crop (bilinear), flip.

    Args:
        images: (B, C, H, W) uint8 with C = 1 or 3; channels-last memory is fastest on a CPU.
        samples: Index of each image in the data set, (B,).
        seed, epoch: With the sample, the key of what is drawn.
        size: Side of the result, pixels.

    Returns:
        (B, 3, size, size) float, whole numbers 0..255, on the device of `images`.

    Raises:
        ShapeError: If the images are of another type or shape, or not as many as samples.

    Source: torchvision's RandomResizedCrop and RandomHorizontalFlip at their defaults, which the
    authors' ``eval_linear.py`` uses.
    """
    _check_images(images, samples)
    parameters = draw_parameters(
        "global",
        0,
        samples,
        seed=seed,
        epoch=epoch,
        style="simsiam",
        strength="baug",
        image_size=(images.shape[-2], images.shape[-1]),
        scale=FULL_SCALE,
        size=size,
    )
    x = pixel_ops.resized_crop(images, parameters.boxes, size, "bilinear")
    x = x.expand(-1, 3, -1, -1).contiguous()
    pixel_ops.flip_(x, parameters.flip)
    return x


class Views(NamedTuple):
    """The views of a batch: normalised pixels and what was done to make them.

    `pixels`: one (B, 3, size, size) tensor per view, global ones first. `parameters`: one per
    view, on the CPU.
    """

    pixels: list[Tensor]
    parameters: list[ViewParameters]


@dataclass(frozen=True)
class MultiCrop:
    """The list of views of one run: two global ones, then the local ones.

    Call it with a batch to get its views. `mean` and `std` normalise pixels in 0..1.
    """

    config: "ViewsConfig"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    seed: int

    def __call__(self, images: Tensor, samples: NDArray[np.integer], epoch: int) -> Views:
        """Make all views of a batch.

        Args:
            images: (B, C, H, W) uint8 with C = 1 or 3, on the training device.
            samples: Index of each image in the data set, (B,).
            epoch: Epoch, 0-based.

        Raises:
            ShapeError: If the images are of another type or shape, or not as many as samples.
        """
        _check_images(images, samples)
        source: Tensor | list[Image.Image] = images
        if self.config.pipeline == "reference":
            source = reference_views.to_pillow(images)
        elif images.device.type == "cpu":  # channels last, several times as fast as .contiguous
            source = torch.stack(images.unbind(1), dim=-1).permute(0, 3, 1, 2)
        return self.views_of(source, samples, epoch, images.device)

    def views_of(
        self,
        source: Tensor | Sequence[Image.Image],
        samples: NDArray[np.integer],
        epoch: int,
        device: torch.device,
    ) -> Views:
        """`__call__` on images in the form that the configured pipeline reads.

        Args:
            source: A uint8 tensor as `render_view` takes it, or RGB Pillow images of one size.
            device: Where the views go.
        """
        config, style = self.config, STYLES[self.config.style]
        batched = isinstance(source, Tensor)
        render = render_view if batched else reference_views.render_view
        height, width = source.shape[-2:] if batched else source[0].size[::-1]
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (self.mean, self.std))
        roles = (*style.roles, *[style.local_role] * config.local_views)
        views = Views([], [])
        # Views of one size are made together: fewer operations, each on more images.
        for numbers, size, scale in (
            (range(2), config.global_size_px, config.global_scale),
            (range(2, len(roles)), config.local_size_px, config.local_scale),
        ):
            if not numbers:
                continue
            parameters = [
                draw_parameters(
                    roles[view],
                    view,
                    samples,
                    seed=self.seed,
                    epoch=epoch,
                    style=config.style,
                    strength=config.strength,
                    image_size=(height, width),
                    scale=scale,
                    size=size,
                )
                for view in numbers
            ]
            pixels = render(
                torch.cat([source] * len(numbers)) if batched else [*source] * len(numbers),
                ViewParameters.joined(parameters),
                size,
                style,
                (mean, std),
                disc_mask=config.disc_mask,
            )
            views.pixels.extend(pixels.to(device).chunk(len(numbers)))
            views.parameters.extend(parameters)
        return views
