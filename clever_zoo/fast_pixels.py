"""Image -> pixels with simplejpeg's decoder and torch's resize: faster, a rounding apart."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from clever_zoo.errors import BackendMissingError
from clever_zoo.preprocess import (
    MAX_WHOLE_PX,
    MIN_SIDE_PX,
    ImageInput,
    crop_pixels,
    load_image,
    rows_first,
)
from clever_zoo.spec import PreprocessSpec

try:
    import torch
    from simplejpeg import decode_jpeg
    from torch import Tensor
except ImportError as error:
    raise BackendMissingError(
        f'the fast decoder needs {error.name}: pip install "clever-zoo[fast]"'
    ) from error

# EXIF orientation -> whether rows and columns change places, and which axes are turned round then.
_UPRIGHT: dict[int, tuple[bool, list[int]]] = {
    1: (False, []),
    2: (False, [1]),
    3: (False, [0, 1]),
    4: (False, [0]),
    5: (True, []),
    6: (True, [1]),
    7: (True, [0, 1]),
    8: (True, [0]),
}


def fast_image_pixels(
    source: ImageInput, spec: PreprocessSpec, index: int = 0
) -> NDArray[np.uint8]:
    """As `clever_zoo.preprocess.image_pixels`, 1.5 times as fast for JPEG files of 500 pixels.

    Pixels are up to 1 of 255 away from Pillow's, rarely 2, because torch's resize rounds its
    weights otherwise. Pillow decodes what is no grey or RGB JPEG file or damaged, and does all of
    it for an image that would be over 65,536 pixels long once resized.

    Raises:
        ImageError: See `clever_zoo.preprocess.load_image`.
    """
    decoded = _decode(source, spec) if isinstance(source, str | Path) else None
    if decoded is None:
        image = load_image(source, index)
        if not _resizable(image, spec):
            return crop_pixels(image, spec.resize_px, spec.input_size_px)
        decoded = torch.from_numpy(np.array(image))
    return _central_square(decoded, spec)


def _decode(path: str | Path, spec: PreprocessSpec) -> Tensor | None:
    """(H, W, 3) uint8 RGB, upright; None for what Pillow has to look at."""
    try:
        with Image.open(path, formats=["JPEG"]) as image:  # reads the header, and refuses bombs
            if image.format != "JPEG" or image.mode not in ("L", "RGB"):
                return None
            if min(image.size) < MIN_SIDE_PX or not _resizable(image, spec):
                return None
            swapped, turned = _UPRIGHT[image.getexif().get(ExifTags.Base.Orientation, 1)]
        decoded = torch.from_numpy(decode_jpeg(Path(path).read_bytes()))
    except Exception:  # noqa: BLE001, Pillow's way through the same file says what is wrong
        return None
    upright = decoded.transpose(0, 1) if swapped else decoded
    return upright.flip(turned) if turned else upright


def _resizable(image: Image.Image, spec: PreprocessSpec) -> bool:
    """Whether the whole image may be resized: torch resizes no part, so this bounds memory."""
    return max(image.size) * spec.resize_px <= MAX_WHOLE_PX * min(image.size)


def _central_square(image: Tensor, spec: PreprocessSpec) -> NDArray[np.uint8]:
    """Resize the short side of (H, W, 3) to `resize_px` and cut the square."""
    height, width = image.shape[:2]
    sides = [int(spec.resize_px * side / min(height, width)) for side in (height, width)]
    # torch resizes its last axis first, and what overshoots a byte is cut after each axis.
    swapped = rows_first((width, height), sides[::-1])
    if swapped:
        image, sides = image.transpose(0, 1), sides[::-1]
    # Channels last in memory: torch then has no copies to make.
    batch = image.contiguous()[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(batch, sides, mode="bicubic", antialias=True)
    size = spec.input_size_px
    top, left = (round((side - size) / 2) for side in sides)
    square = resized[0, :, top : top + size, left : left + size].permute(1, 2, 0)
    return (square.transpose(0, 1) if swapped else square).contiguous().numpy()
