"""Pillow's image operations on whole batches, each image with its own parameters.

Images are float tensors of shape (B, 3, H, W) that hold whole numbers 0..255: every operation
rounds where Pillow stores bytes, which is what keeps the batched views equal to the
reference's Pillow pipeline (tests/training/test_pixel_ops.py compares them).

Functions whose name ends in an underscore change their first argument, as torch's do; the others
return a new tensor. Parameters have one row per image and stay on the CPU: which images an
operation touches is then known without waiting for the device that holds the pixels.

Time goes into memory traffic, so masks are floats made by arithmetic: comparisons and
`torch.where` cost several times as much on a CPU.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Interpolation = Literal["bicubic", "bilinear"]

_BLOCK_VALUES = 300_000  # about a megabyte


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) on the device of the pixels, which is not waited for."""
    return values.to(x.device, x.dtype, non_blocking=True)[:, None, None, None]


def _chosen(mask: Tensor) -> list[int]:
    return [i for i, chosen in enumerate(mask.tolist()) if chosen]


def _change_rows_(
    x: Tensor, rows: list[int], change_: Callable[..., None], *parameters: Tensor
) -> None:
    """Apply an in-place operation to some images, each with its row of the parameters.

    A CPU takes them in blocks whose temporaries stay in its cache, any other device all at once.
    """
    on_cpu = x.device.type == "cpu"
    block = max(1, _BLOCK_VALUES // x[0].numel()) if on_cpu else len(x)
    for start in range(0, len(rows), block):
        chosen = rows[start : start + block]
        first, end = chosen[0], chosen[-1] + 1
        if end - first == len(chosen):  # neighbours need no copy
            change_(x[first:end], *(p[first:end] for p in parameters))
            continue
        index = torch.tensor(chosen)
        part = x.index_select(0, index.to(x.device, non_blocking=True))
        change_(part, *(p.index_select(0, index) for p in parameters))
        if on_cpu:  # several times as fast as index_copy_
            for i, image in zip(chosen, part, strict=True):
                x[i].copy_(image)
        else:
            x.index_copy_(0, index.to(x.device, non_blocking=True), part)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


_KERNELS = {"bicubic": (_cubic, 2), "bilinear": (_triangle, 1)}  # and half their width


def _resize_matrix(
    start: Tensor, length: Tensor, size: int, out_size: int, interpolation: Interpolation
) -> Tensor:
    """(B, out_size, size): antialiased weights of `length` pixels from `start` on."""
    kernel, support = _KERNELS[interpolation]
    scale = (length / out_size)[:, None, None]
    stretch = scale.clamp(min=1)
    center = (torch.arange(out_size, device=start.device)[None, :, None] + 0.5) * scale
    first = (center - support * stretch + 0.5).floor().clamp(min=0)
    last = torch.minimum((center + support * stretch + 0.5).floor(), length[:, None, None])
    pixel = torch.arange(size, device=start.device)[None, None, :] - start[:, None, None]
    weight = kernel((pixel - center + 0.5) / stretch) * ((pixel >= first) & (pixel < last))
    return weight / weight.sum(-1, keepdim=True)


def resized_crop_by_matrices(
    x: Tensor, boxes: Tensor, size: int, interpolation: Interpolation
) -> Tensor:
    """`resized_crop` as two matrix products: a few launches for the whole batch."""
    top, left, height, width = boxes.to(x.device, non_blocking=True).unbind(1)
    rows = _resize_matrix(top, height, x.shape[-2], size, interpolation)
    columns = _resize_matrix(left, width, x.shape[-1], size, interpolation)
    x = (x.float() @ columns.transpose(1, 2).unsqueeze(1)).round_().clamp_(0, 255)
    return (rows.unsqueeze(1) @ x).round_().clamp_(0, 255)


def resized_crop_one_by_one(
    x: Tensor, boxes: Tensor, size: int, interpolation: Interpolation
) -> Tensor:
    """`resized_crop` with torch's byte kernel, the fastest on a CPU; it takes one box at a time."""
    out = torch.empty(*x.shape[:2], size, size, device=x.device)
    for image, result, box in zip(x.split(1), out.split(1), boxes.int().tolist(), strict=True):
        top, left, height, width = box
        region = image[..., top : top + height, left : left + width]
        result.copy_(F.interpolate(region, (size, size), mode=interpolation, antialias=True))
    return out


def resized_crop(x: Tensor, boxes: Tensor, size: int, interpolation: Interpolation) -> Tensor:
    """Cut a box out of each image and resize it with antialiasing.

    Args:
        x: (B, C, H, W) uint8; on a CPU, channels-last memory saves a third of the time.
        boxes: (B, 4): top, left, height, width in whole pixels, float.
        size: Side of the square result, pixels.
        interpolation: "bicubic" or "bilinear".

    Returns:
        (B, C, size, size) float, whole numbers 0..255.
    """
    on_cpu = x.device.type == "cpu"
    crop = resized_crop_one_by_one if on_cpu else resized_crop_by_matrices
    return crop(x, boxes, size, interpolation)


def flip_(x: Tensor, chosen: Tensor) -> None:
    """Mirror left-right the images where `chosen` (B,) is true."""
    _change_rows_(x, _chosen(chosen), lambda part: part.copy_(part.flip(-1)))


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate (B, 3, H, W) counter-clockwise about the centre: nearest pixel, black corners.

    Args:
        angle: (B,) degrees.
    """
    b, _, h, w = x.shape
    radians = _beside(angle * (-math.pi / 180), x).squeeze(1)
    cos, sin = radians.cos(), radians.sin()
    across = torch.arange(w, device=x.device) + 0.5 - w / 2
    down = (torch.arange(h, device=x.device) + 0.5 - h / 2)[:, None]
    # A border of one black pixel takes what comes from outside.
    column = (cos * across + (sin * down + (w / 2 + 1))).floor_().clamp_(0, w + 1)
    row = (cos * down - (sin * across - (h / 2 + 1))).floor_().clamp_(0, h + 1)
    first = torch.arange(b, dtype=torch.int32, device=x.device)[:, None, None] * (h + 2) * (w + 2)
    index = torch.add(column, row, alpha=w + 2).int().add_(first)
    # Three bytes fit into a float32 exactly, so that each pixel is fetched once.
    red, green, blue = x.unbind(1)
    packed = F.pad(red.add(green, alpha=256).add_(blue, alpha=65536), (1, 1, 1, 1))
    pixels = packed.flatten().index_select(0, index.flatten()).view(b, h, w)
    out = torch.empty_like(x)
    red, green, blue = out.unbind(1)
    torch.mul(pixels, 1 / 65536, out=blue).floor_()
    pixels.sub_(blue, alpha=65536)
    torch.mul(pixels, 1 / 256, out=green).floor_()
    torch.sub(pixels, green, alpha=256, out=red)
    return out


def rotate_(x: Tensor, angle: Tensor) -> None:
    """`rotate` in place; images whose angle is 0 are left alone."""
    _change_rows_(x, _chosen(angle != 0), lambda part, a: part.copy_(rotate(part, a)), angle)


def _smoothing_matrix(size: int, sigma: float, device: torch.device) -> Tensor:
    """(size, size): a Gaussian of width 8 sigma + 1, borders reflected repeatedly."""
    taps = int(8 * sigma + 1) | 1
    offset = torch.arange(taps, device=device, dtype=torch.float64) - taps // 2
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    position = torch.arange(size, device=device)[:, None] + offset.long()
    period = max(2 * (size - 1), 1)
    position = position.remainder(period)
    position = torch.minimum(position, period - position)
    matrix = torch.zeros(size, size, device=device, dtype=torch.float64)
    matrix.scatter_add_(1, position, (kernel / kernel.sum()).expand(size, -1))
    return matrix.float()


def elastic(x: Tensor, noise: Tensor, *, alpha: float = 100.0, sigma: float = 5.0) -> Tensor:
    """Move pixels along a smooth random field, bilinear, black outside.

    Args:
        x: (B, C, H, W).
        noise: (B, 2, H, W) in [-1, 1], the raw horizontal and vertical field.
        alpha: Strength, in pixels before smoothing.
        sigma: Standard deviation of the smoothing, pixels.

    Source: torchvision's ElasticTransform. Its reflected border fails on images of 20 pixels
    and less; here the border reflects again and again.
    """
    h, w = x.shape[-2:]
    rows, columns = (_smoothing_matrix(n, sigma, x.device) for n in (h, w))
    field = rows @ noise @ columns.T * alpha
    field = torch.stack([field[:, 0] / w, field[:, 1] / h], dim=1)
    grid_x = (torch.arange(w, device=x.device) * 2 + 1) / w - 1
    grid_y = (torch.arange(h, device=x.device) * 2 + 1) / h - 1
    grid = torch.stack([grid_x.expand(h, w), grid_y[:, None].expand(h, w)], dim=-1)
    warped = F.grid_sample(
        torch.cat([x, torch.ones_like(x[:, :1])], dim=1),
        grid + field.permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    # The reference fades by a warped mask of ones although the padding is black already.
    return (warped[:, :-1] * warped[:, -1:]).round().clamp(0, 255)


def luma(x: Tensor) -> Tensor:
    """(B, 1, H, W): ITU-R 601 grey value in Pillow's fixed-point arithmetic."""
    r, g, b = x.split(1, dim=1)
    # Weights in 2^-16 and sums below 2^8: float32 holds every one of them exactly.
    weighted = (r * (19595 / 65536)).add_(g, alpha=38470 / 65536).add_(b, alpha=7471 / 65536)
    return weighted.add_(0.5).floor_()


def brightness_(x: Tensor, factor: Tensor) -> None:
    """Scale each image towards or away from black; `factor` (B,), 1 leaves it."""
    x.mul_(_beside(factor, x)).clamp_(0, 255).floor_()


def contrast_(x: Tensor, factor: Tensor) -> None:
    """Move each image from its mean grey; `factor` (B,), 1 leaves it."""
    mean = (luma(x).mean((2, 3), keepdim=True) + 0.5).floor_()
    x.sub_(mean).mul_(_beside(factor, x)).add_(mean).clamp_(0, 255).floor_()


def saturation_(x: Tensor, factor: Tensor) -> None:
    """Move each image from its grey version; `factor` (B,), 1 leaves it."""
    torch.lerp(luma(x), x, _beside(factor, x), out=x).clamp_(0, 255).floor_()


# Less than the distance of a hue or saturation to the next byte, more than float32's rounding.
_TIE = 5e-4


def hue_(x: Tensor, shift: Tensor) -> None:
    """Turn the hue by `shift` (B,) of a full circle, in Pillow's byte-valued HSV."""
    r, g, b = x.unbind(1)
    value = torch.maximum(r, g).maximum(b)
    chroma = value - torch.minimum(r, g).minimum(b)
    not_red, not_green = (value - r).clamp_(max=1), (value - g).clamp_(max=1)  # 0 or 1
    from_green = (b - r).add_(chroma, alpha=2)
    from_blue = (r - g).add_(chroma, alpha=4)
    sector = (g - b).lerp_(from_green.lerp_(from_blue, not_green), not_red)
    tie = torch.full((), _TIE, device=x.device)
    hue = torch.addcdiv(tie, sector, chroma.clamp(min=1), value=255 / 6).floor_()
    # Bytes wrap at 256 although the circle has 255 steps: -1 is 254 here, and 256 is 0.
    hue.add_(hue.clamp(-1, 0)).add_(_beside((shift * 255).trunc(), x).squeeze(1))
    hue.sub_((hue * (1 / 256)).floor_(), alpha=256).mul_(6 / 255)
    saturation = torch.addcdiv(tie, chroma, value.clamp(min=1), value=255).floor_()
    depth = saturation.mul_(value)  # times 255: how far the least channel lies below the greatest
    # How much of that depth a channel has, by the place on the circle of six.
    red = (hue - 3).abs_().neg_().add_(2).clamp_(0, 1)
    green = (hue - 2).abs_().sub_(1).clamp_(0, 1)
    blue = hue.sub_(4).abs_().sub_(1).clamp_(0, 1)
    for channel, share in zip((r, g, b), (red, green, blue), strict=True):
        torch.addcmul(value, share, depth, value=-1 / 255, out=channel).round_()


_JITTER = (brightness_, contrast_, saturation_, hue_)


def color_jitter_(x: Tensor, order: Tensor, factors: Tensor, chosen: Tensor) -> None:
    """Brightness, contrast, saturation and hue in an order of its own for each image.

    Args:
        x: (B, 3, H, W).
        order: (B, 4) permutations of 0..3, which operation comes at which turn.
        factors: (B, 4), parameter of each operation (column 3 is the hue shift).
        chosen: (B,), the images to change.
    """
    rows, orders = _chosen(chosen), order.tolist()
    for turn in range(4):
        for operation, change_ in enumerate(_JITTER):
            turns = [i for i in rows if orders[i][turn] == operation]
            _change_rows_(x, turns, change_, factors[:, operation])


def grayscale_(x: Tensor, chosen: Tensor) -> None:
    """Replace the images where `chosen` (B,) is true by their grey version."""
    _change_rows_(x, _chosen(chosen), lambda part: part.copy_(luma(part)))


_BLUR_PASSES = 3


def _box_taps(sigma: Tensor) -> Tensor:
    """(B, n + 1): weights at distance 0..n of the box that, passed three times, has `sigma`.

    The ends of the box are fractional: it is 2 r + 1 wide with a real number r.
    """
    variance = sigma.square() / _BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    radius = whole + part / (6 * (variance - (whole + 1) ** 2))
    distance = torch.arange(int(radius.max().ceil()) + 1)
    return (radius[:, None] + 1 - distance).clamp(0, 1) / (2 * radius[:, None] + 1)


def _blur_(x: Tensor, taps: Tensor) -> None:
    taps = taps[:, : int((taps > 0).any(0).sum())]
    reach = taps.shape[1] - 1
    middle_weight, *weights = (_beside(tap, x).flatten(1) for tap in taps.unbind(1))
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    # In flat memory both axes are shifts, and what wraps round an edge falls into the border.
    flat = padded.flatten(1)
    scratch = torch.empty_like(flat), torch.empty_like(flat)
    for axis, step in ((3, 1), (2, padded.shape[3])):
        end, length = padded.shape[axis] - reach, flat.shape[1] - 2 * reach * step
        total, pair = (buffer[:, :length] for buffer in scratch)
        shifted = [flat.narrow(1, k * step, length) for k in range(2 * reach + 1)]
        middle = shifted[reach]
        pairs = list(zip(reversed(shifted[:reach]), shifted[reach + 1 :], weights, strict=True))
        first, last = (padded.narrow(axis, k, 1) for k in (reach, end - 1))
        before, after = (padded.narrow(axis, k, reach) for k in (0, end))
        for _ in range(_BLUR_PASSES):
            torch.mul(middle, middle_weight, out=total)
            for left, right, weight in pairs:
                total.addcmul_(torch.add(left, right, out=pair), weight)
            torch.round(total, out=middle)
            before.copy_(first)
            after.copy_(last)
    x.copy_(padded[..., reach:-reach, reach:-reach])


def gaussian_blur_(x: Tensor, sigma: Tensor) -> None:
    """Pillow's GaussianBlur: three box passes along each axis; `sigma` (B,) in pixels, 0 leaves it.

    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended
    box filtering", with the border pixel repeated and bytes between passes.
    """
    if (sigma > 0).any():
        _change_rows_(x, _chosen(sigma > 0), _blur_, _box_taps(sigma))


def _invert_(x: Tensor) -> None:
    x.copy_(torch.where(x >= 128, 255 - x, x))


def solarize_(x: Tensor, chosen: Tensor) -> None:
    """Invert the bytes from 128 up in the images where `chosen` (B,) is true."""
    _change_rows_(x, _chosen(chosen), _invert_)


def circular_mask(x: Tensor) -> Tensor:
    """Black outside the inscribed circle, so that black corners tell nothing about an angle."""
    size = x.shape[-1]
    offset = torch.arange(size, device=x.device) + 0.5 - size / 2
    inside = offset.square() + offset.square()[:, None] <= (size / 2) ** 2
    return x * inside.to(x.dtype)
