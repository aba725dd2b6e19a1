"""Image -> pixels, with Pillow and NumPy alone, so that every runtime sees the same numbers."""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from clever_zoo.ahead import map_ahead
from clever_zoo.errors import ImageError, ShapeError, check_choice
from clever_zoo.spec import PreprocessSpec

Item = TypeVar("Item")
ImageInput = str | Path | Image.Image | NDArray[np.uint8]
Decoder = Literal["pillow", "fast"]
PixelLoader = Callable[[ImageInput, PreprocessSpec, int], NDArray[np.uint8]]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What is opened: others start programs (EPS) or decode before the size can be checked (ICO).
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MIN_SIDE_PX = 2
# An axis that is made longer than this is resized in part, to bound memory.
MAX_WHOLE_PX = 1 << 16
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageInput, index: int = 0) -> Image.Image:
    """Open or convert one image to upright 8-bit RGB.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is divided by 257.

    Args:
        source: The path of a file in one of `IMAGE_FORMATS`, a PIL image of any common mode, or
            an (H, W, 3) uint8 RGB array.
        index: Position in the caller's batch, for the error message.

    Raises:
        ImageError: If it cannot be read, has no defined 8-bit meaning, or is under 2 pixels
            on a side.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, index)
    if isinstance(source, Image.Image):
        return _to_rgb(source, f"PIL image of mode {source.mode}", index)
    if not isinstance(source, str | Path):
        raise ImageError(
            type(source).__name__, index, "pass a path, a PIL image or an (H, W, 3) uint8 array"
        )
    return _open(source, str(source), index)


def decode_image(
    content: bytes | bytearray, name: str, index: int = 0, *, max_pixels: int | None = None
) -> Image.Image:
    """As `load_image`, for the content of an image file; `name` is for the error message.

    Raises:
        ImageError: See `load_image`; or if it has more than `max_pixels` pixels.
    """
    return _open(io.BytesIO(content), name, index, max_pixels)


def _open(
    file: str | Path | io.BytesIO, name: str, index: int, max_pixels: int | None = None
) -> Image.Image:
    with _image_errors(name, index), Image.open(file, formats=IMAGE_FORMATS) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ImageError(
                name,
                index,
                f"{image.width}x{image.height} pixels, at most {max_pixels} in all; shrink it",
            )
        return _to_rgb(image, name, index)


@contextmanager
def _image_errors(name: str, index: int) -> Iterator[None]:
    """What Pillow raises becomes an ImageError; of a damaged file that can be anything."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(name, index, "no such file") from error
    except UnidentifiedImageError as error:
        reason = f"cannot be read as an image: it is no valid {', '.join(IMAGE_FORMATS)}"
        raise ImageError(name, index, reason) from error
    except Exception as error:
        reason = f"cannot be read as an image: {str(error) or type(error).__name__}"
        raise ImageError(name, index, reason) from error


def _from_array(array: NDArray[np.uint8], index: int) -> Image.Image:
    description = f"array {array.shape} {array.dtype}"
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            description, index, "arrays must be (H, W, 3) RGB of dtype uint8 with values 0..255"
        )
    _check_size(array.shape[1], array.shape[0], description, index)
    return Image.fromarray(array)


def _check_size(width: int, height: int, description: str, index: int) -> None:
    if min(width, height) < MIN_SIDE_PX:
        raise ImageError(
            description, index, f"{width}x{height} pixels; each side needs at least {MIN_SIDE_PX}"
        )


def _to_rgb(image: Image.Image, description: str, index: int) -> Image.Image:
    _check_size(image.width, image.height, description, index)
    with _image_errors(description, index):
        image.load()  # turns a TIFF upright by itself
        upright = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        if upright is not None:
            image = image.transpose(upright)
        if image.mode.startswith("I;16"):
            wide = np.asarray(image).astype(np.uint32)
            image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ImageError(
                description, index, f"mode {image.mode} has no fixed range; convert it to L or RGB"
            )
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image if image.mode == "RGB" else image.convert("RGB")


def crop_pixels(
    image: Image.Image,
    resize_px: int,
    size_px: int,
    *,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> NDArray[np.uint8]:
    """Resize the short side to `resize_px` (antialiased) and cut the central square.

    Args:
        image: RGB.
        resize_px: Length of the short side after resizing.
        size_px: Side of the square.
        interpolation: Models are fed with "bicubic"; evaluations measure the gap to "bilinear".

    Returns:
        (size_px, size_px, 3) uint8.

    Source: the numbers of timm's evaluation transform on Pillow 13, which resizes the whole image,
    one axis after the other, and rounds to bytes in between. Here only what the square needs is
    resized, in the same order. Nearly all pixels are equal. Where Pillow rounds the ends of a part
    to float32, one in some thousands is 1 of 255 away; 2 away are a few in one of some hundred
    wide images that are made smaller, and none elsewhere.
    """
    resample = Image.Resampling[interpolation.upper()]
    sides = image.size
    resized = [int(resize_px * side / min(sides)) for side in sides]
    first, last = (1, 0) if rows_first(sides, resized) else (0, 1)
    part = _central_part(sides[last], resized[last], size_px)
    reach = 2 * max(1.0, sides[last] / resized[last]) + 1
    start = max(0, math.floor(part.start - reach))
    image = _cut(image, last, start, min(sides[last], math.ceil(part.stop + reach)))
    limit = MAX_WHOLE_PX if sides[first] < resized[first] else size_px * 5 // 4
    whole = _Part(resized[first], 0, sides[first], round((resized[first] - size_px) / 2))
    image = _resize_part(
        image,
        first,
        whole if whole.length <= limit else _central_part(sides[first], resized[first], size_px),
        size_px,
        resample,
    )
    part = part._replace(start=part.start - start, stop=part.stop - start)
    return np.array(_resize_part(image, last, part, size_px, resample))


def rows_first(sides: Sequence[int], resized: Sequence[int]) -> bool:
    """Whether Pillow 13 resizes the height before the width; both arguments are width, height."""
    lost_width, lost_height = (old - new for old, new in zip(sides, resized, strict=True))
    return lost_height > max(0, 2 * lost_width)


class _Part(NamedTuple):
    """A part of one axis to be resized.

    Attributes:
        length: In pixels of the resized image.
        start, stop: In pixels of the source.
        skipped: Pixels of the resized part that lie before the square.
    """

    length: int
    start: float
    stop: float
    skipped: int


def _central_part(side: int, resized: int, size_px: int) -> _Part:
    """The middle of an axis: at least what the square needs, at most 2 pixels more at each end.

    Both ends are as far from the middle, so that its pixels keep their exact ties, and where
    float32, in which Pillow takes them, is nearly exact.
    """
    margin = (resized - size_px) // 2
    step = float(np.spacing(np.float32(side)))

    def error(pixels: int) -> float:
        steps = pixels * side / resized / step
        return abs(steps - round(steps))

    outside = min(range(max(0, margin - 2), margin + 1), key=error)
    start = round(outside * side / resized / step) * step
    skipped = round((resized - size_px) / 2) - outside
    return _Part(resized - 2 * outside, start, side - start, skipped)


def _resize_part(
    image: Image.Image, axis: int, part: _Part, size_px: int, resample: Image.Resampling
) -> Image.Image:
    """Resize a part of one axis and keep the `size_px` pixels of the square."""
    length = list(image.size)
    length[axis] = part.length
    box = _box(image, axis, part.start, part.stop)
    resized = image.resize((length[0], length[1]), resample, box)
    return _cut(resized, axis, part.skipped, part.skipped + size_px)


def _cut(image: Image.Image, axis: int, start: int, stop: int) -> Image.Image:
    return image.crop(_box(image, axis, start, stop))


def _box(
    image: Image.Image, axis: int, start: float, stop: float
) -> tuple[float, float, float, float]:
    """All of the image between two places of one axis: left, top, right, bottom."""
    if axis == 0:
        return start, 0, stop, image.height
    return 0, start, image.width, stop


def image_pixels(source: ImageInput, spec: PreprocessSpec, index: int = 0) -> NDArray[np.uint8]:
    """One image as the (size, size, 3) uint8 square that a model with `spec` sees.

    Raises:
        ImageError: See `load_image`.
    """
    return crop_pixels(load_image(source, index), spec.resize_px, spec.input_size_px)


def pixel_loader(decoder: Decoder) -> PixelLoader:
    """`image_pixels`, or its faster twin `clever_zoo.fast_pixels.fast_image_pixels`.

    Raises:
        SpecError: For another decoder.
        BackendMissingError: If torch or simplejpeg is missing for "fast".
    """
    check_choice("decoder", decoder, get_args(Decoder))
    if decoder == "pillow":
        return image_pixels
    from clever_zoo.fast_pixels import fast_image_pixels

    return fast_image_pixels


def check_pixels(pixels: NDArray[np.uint8], spec: PreprocessSpec) -> None:
    """Raise a ShapeError unless pixels are what `image_pixels` makes, (B, size, size, 3) uint8."""
    size = spec.input_size_px
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
        raise ShapeError(
            f"pixels are {pixels.dtype} of shape {pixels.shape}; expected uint8 of shape "
            f"(B, {size}, {size}, 3), RGB, as clever_zoo.preprocess.image_pixels makes them"
        )


def normalize_pixels(pixels: NDArray[np.uint8], spec: PreprocessSpec) -> NDArray[np.float32]:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, (value / 255 - mean) / std per channel."""
    mean, std = (np.array(values, dtype=np.float32) for values in (spec.mean, spec.std))
    scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def pixel_batches(
    images: Iterable[ImageInput], spec: PreprocessSpec, batch_size: int, *, threads: int = 0
) -> Iterator[NDArray[np.uint8]]:
    """Load images lazily into (B, size, size, 3) uint8 batches; the last may be shorter.

    Args:
        images: See `load_image`.
        spec: What becomes of them.
        batch_size: Images per batch.
        threads: Threads that load paths, up to two batches ahead, while the caller works on one
            batch; arrays and PIL images become pixels as they are taken from `images`.

    Raises:
        ImageError: For a bad image, with its position in `images`; or if `images` is a single
            image and not a collection.
        ShapeError: If `batch_size` is under 1.
    """
    if isinstance(images, str | Path | Image.Image):
        raise ImageError(
            str(images), 0, "is a single image where a collection is expected; pass [image]"
        )

    def load(numbered: tuple[int, ImageInput]) -> NDArray[np.uint8]:
        index, image = numbered
        return image_pixels(image, spec, index)

    def may_change(numbered: tuple[int, ImageInput]) -> bool:
        """Before a thread would come to it: a buffer filled anew, a PIL image read on."""
        return not isinstance(numbered[1], str | Path)

    check_batch_size(batch_size)
    squares = map_ahead(
        load, enumerate(images), threads=threads, ahead=2 * batch_size, at_once=may_change
    )
    for chunk in batched(squares, batch_size):
        yield np.stack(chunk)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive lists of `size` items; the last may be shorter.

    Raises:
        ShapeError: If `size` is under 1.
    """
    check_batch_size(size)
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def check_batch_size(size: int) -> None:
    """Raise a ShapeError if `size` is under 1."""
    if size < 1:
        raise ShapeError(f"batch_size is {size}; use at least 1")
