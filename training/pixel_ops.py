"""Pillow's image operations on whole batches, each image with its own parameters.

Images are float tensors of shape (B, 3, H, W) that hold whole numbers 0..255: every operation
rounds where Pillow stores bytes, which is what keeps the batched views equal to the
reference's Pillow pipeline (tests/training/test_pixel_ops.py compares them).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _to_byte(x: Tensor) -> Tensor:
    """Round half up and clip, as Pillow's resampling does."""
    return (x + 0.5).floor_().clamp_(0, 255)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))


def _resize_matrix(start: Tensor, length: Tensor, size: int, out_size: int) -> Tensor:
    """(B, out_size, size): antialiased bicubic weights of `length` pixels from `start` on."""
    scale = (length / out_size)[:, None, None]
    stretch = scale.clamp(min=1)
    center = (torch.arange(out_size, device=start.device)[None, :, None] + 0.5) * scale
    first = (center - 2 * stretch + 0.5).floor().clamp(min=0)
    last = torch.minimum((center + 2 * stretch + 0.5).floor(), length[:, None, None])
    pixel = torch.arange(size, device=start.device)[None, None, :] - start[:, None, None]
    weight = _cubic((pixel - center + 0.5) / stretch) * ((pixel >= first) & (pixel < last))
    return weight / weight.sum(-1, keepdim=True)


def resized_crop(
    x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: int
) -> Tensor:
    """Cut a box out of each image and resize it, bicubic with antialiasing.

    Args:
        x: (B, C, H, W).
        top, left, height, width: Box of each image in pixels, shape (B,), float.
        size: Side of the square result, pixels.
    """
    rows = _resize_matrix(top, height, x.shape[-2], size)
    columns = _resize_matrix(left, width, x.shape[-1], size)
    x = _to_byte(x @ columns.transpose(1, 2).unsqueeze(1))
    return _to_byte(rows.unsqueeze(1) @ x)


def flip(x: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left-right the images where `chosen` (B,) is true."""
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate counter-clockwise about the centre by `angle` (B,) degrees: nearest, black corners."""
    b, c, h, w = x.shape
    radians = -angle * (math.pi / 180)
    cos, sin = radians.cos()[:, None, None], radians.sin()[:, None, None]
    across = torch.arange(w, device=x.device, dtype=angle.dtype) + 0.5 - w / 2
    down = (torch.arange(h, device=x.device, dtype=angle.dtype) + 0.5 - h / 2)[:, None]
    column = (cos * across + sin * down + w / 2).floor().long()
    row = (cos * down - sin * across + h / 2).floor().long()
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    index = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).flatten(1)
    turned = x.flatten(2).gather(2, index[:, None].expand(-1, c, -1)).view(b, c, h, w)
    return turned * inside[:, None]


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
    field = rows @ noise @ columns.T * (alpha / torch.tensor([h, w], device=x.device).view(2, 1, 1))
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


def _blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Pillow's ImageEnhance: move from `degenerate` through `x`, cut to whole bytes."""
    return (degenerate + factor[:, None, None, None] * (x - degenerate)).clamp_(0, 255).floor_()


def luma(x: Tensor) -> Tensor:
    """(B, 1, H, W): ITU-R 601 grey value in Pillow's fixed-point arithmetic."""
    r, g, b = x.unbind(1)
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) / 65536).floor_().unsqueeze(1)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale each image towards or away from black; `factor` (B,), 1 leaves it."""
    return _blend(torch.zeros_like(x), x, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Move each image from its mean grey; `factor` (B,), 1 leaves it."""
    mean = (luma(x).mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(mean.expand_as(x), x, factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Move each image from its grey version; `factor` (B,), 1 leaves it."""
    return _blend(luma(x).expand_as(x), x, factor)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (B,) of a full circle, in Pillow's byte-valued HSV."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = chroma.clamp(min=1)
    rc, gc, bc = (value - r) / safe, (value - g) / safe, (value - b) / safe
    sector = torch.where(r == value, bc - gc, torch.where(g == value, 2 + rc - bc, 4 + gc - rc))
    h = ((sector / 6 + 1).fmod(1.0) * 255).floor().clamp(0, 255)
    h = torch.where(chroma == 0, torch.zeros_like(h), h)
    s = (chroma / value.clamp(min=1) * 255).floor().clamp(0, 255) / 255
    h = (h + (shift * 255).trunc()[:, None, None]).remainder(256) * 6 / 255
    fraction = h - h.floor()
    p = (value * (1 - s) + 0.5).floor()
    q = (value * (1 - s * fraction) + 0.5).floor()
    t = (value * (1 - s * (1 - fraction)) + 0.5).floor()
    choices = torch.stack([value, q, p, t], dim=1)
    # Which of (v, q, p, t) each channel takes in each sixth of the circle.
    table = torch.tensor(
        [[0, 3, 2], [1, 0, 2], [2, 0, 3], [2, 1, 0], [3, 2, 0], [0, 2, 1]], device=x.device
    )
    pick = table[h.floor().long() % 6].permute(0, 3, 1, 2)
    return choices.gather(1, pick).clamp_(0, 255)


_JITTER = (brightness, contrast, saturation, hue)


def color_jitter(x: Tensor, order: Tensor, factors: Tensor, chosen: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in an order of its own for each image.

    Args:
        x: (B, 3, H, W).
        order: (B, 4) permutations of 0..3, which operation comes at which turn.
        factors: (B, 4), parameter of each operation (column 3 is the hue shift).
        chosen: (B,), the images to change.
    """
    x = x.clone()
    for turn in range(4):
        for operation, apply in enumerate(_JITTER):
            rows = ((order[:, turn] == operation) & chosen).nonzero().squeeze(1)
            if len(rows):
                x[rows] = apply(x[rows], factors[rows, operation])
    return x


def grayscale(x: Tensor, chosen: Tensor) -> Tensor:
    """Replace the images where `chosen` (B,) is true by their grey version."""
    return torch.where(chosen[:, None, None, None], luma(x), x)


def _box_kernel(sigma: Tensor, passes: int) -> Tensor:
    """(B, 2n+1) taps of the box with fractional ends whose `passes`-fold repeat has `sigma`."""
    variance = sigma.square() / passes
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    radius = whole + part / (6 * (variance - (whole + 1) ** 2))
    reach = int(radius.max().ceil()) if len(radius) else 0
    offset = torch.arange(-reach, reach + 1, device=sigma.device).abs()
    return (radius[:, None] + 1 - offset).clamp(0, 1) / (2 * radius[:, None] + 1)


def gaussian_blur(x: Tensor, sigma: Tensor, *, passes: int = 3) -> Tensor:
    """Pillow's GaussianBlur: three box passes along each axis; `sigma` (B,) in pixels, 0 leaves it.

    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended
    box filtering", with the border pixel repeated and bytes between passes.
    """
    rows = (sigma > 0).nonzero().squeeze(1)
    blurred = x[rows]
    taps = _box_kernel(sigma[rows], passes)
    reach = taps.shape[1] // 2
    for _ in range(2 if len(rows) else 0):
        width = blurred.shape[-1]
        for _ in range(passes):
            padded = F.pad(blurred, (reach, reach, 0, 0), mode="replicate")
            total = sum(
                taps[:, k, None, None, None] * padded[..., k : k + width]
                for k in range(2 * reach + 1)
            )
            blurred = _to_byte(total)
        blurred = blurred.transpose(2, 3)
    x = x.clone()
    x[rows] = blurred
    return x


def solarize(x: Tensor, chosen: Tensor) -> Tensor:
    """Invert the bytes from 128 up in the images where `chosen` (B,) is true."""
    return torch.where(chosen[:, None, None, None] & (x >= 128), 255 - x, x)
