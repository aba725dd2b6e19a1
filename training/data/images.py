"""Square images for training: held in memory, mapped from a cache file, or decoded on demand."""

import hashlib
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from clever_zoo.errors import DataError, ImageError
from clever_zoo.files import replacing, write_atomic
from clever_zoo.preprocess import crop_pixels
from training.data.sources import LISTED, ImageSource, sha256

logger = logging.getLogger(__name__)

_CHECK_EVERY = 1024  # images decoded between two looks at how many were bad


def _no_samples() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W) uint8 with C = 1 or 3, and their classes (N,) int64.

    Attributes:
        replaced: Indices (R,) int64 whose own image could not be read: another one and its class
            are there.
        file: Where `images` is mapped from, None if it is held in memory. Only the path goes to
            another process, which maps the same file.
        listing: With `file`, the digest of what the file was decoded from.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    replaced: Tensor = field(default_factory=_no_samples)
    file: Path | None = None
    listing: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"images": tuple(self.images.shape)} if self.file else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["file"]:
            state = state | {"images": _map_images(state["file"], state["images"])}
        self.__dict__.update(state)

    def take(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) of `samples` (B,), and which of these are replaced (R,)."""
        return self.images[samples], samples[torch.isin(samples, self.replaced)]

    def digest(self) -> str:
        """SHA-256 that names the data: of the pixels in memory, of the listing for a file."""
        if self.file:
            return self.listing
        return hashlib.sha256(self.images.contiguous().numpy().data).hexdigest()


class StreamedImages:
    """Decodes the wanted images of a source at each request.

    An image that cannot be read is replaced by the next one that can, the last by the first; it
    is reported once, and tried no more in this run.
    """

    def __init__(self, source: ImageSource, size_px: int, *, max_bad: int) -> None:
        """Decode nothing yet.

        Args:
            source: The images.
            size_px: Side of the squares: short side resized (bicubic), centre cut.
            max_bad: Unreadable images to put up with.
        """
        self.source, self.size_px, self.max_bad = source, size_px, max_bad
        self.labels, self.class_names = source.labels, source.class_names
        # Shared memory, so that all worker processes of all epochs count together.
        self._bad = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def square(self, index: int) -> NDArray[np.uint8]:
        """Decode one image, or the one that takes its place.

        Returns:
            (3, size_px, size_px) uint8.

        Raises:
            DataError: If there is no image to take its place, or too many had to be passed over.
        """
        for step in range(min(len(self), self.max_bad + LISTED)):  # on, to list some at once
            candidate = (index + step) % len(self)
            if self._bad[candidate]:
                continue
            try:
                pixels = self.source.read(candidate)
            except ImageError as error:
                self._bad[candidate] = True
                logger.warning("unreadable image %s: %s", error.source, error.reason)
            else:
                square = crop_pixels(Image.fromarray(pixels), self.size_px, self.size_px)
                return square.transpose(2, 0, 1)
        raise self._too_many_bad()

    def check(self) -> None:
        """Stop if too many images were bad.

        Raises:
            DataError: With the first of them and what is wrong with each.
        """
        if self._bad.sum() > self.max_bad:
            raise self._too_many_bad()

    def replaced(self) -> Tensor:
        """Indices (R,) of the images that could not be read so far, in any process."""
        return self._bad.nonzero().flatten()

    def reason(self, index: int) -> str:
        """What is wrong with an image, found by reading it once more."""
        try:
            self.source.read(index)
        except ImageError as error:
            return f"{error.source}: {error.reason}"
        return f"image {index} could not be read at first, but can now"

    def _too_many_bad(self) -> DataError:
        bad = self.replaced().tolist()
        reasons = [self.reason(index) for index in bad[:LISTED]]
        return _bad_images_error(len(bad), len(self), self.max_bad, reasons)

    def take(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) of `samples` (B,), and which of these are replaced (R,).

        Raises:
            DataError: If too many images were bad.
        """
        images = np.stack([self.square(index) for index in samples.tolist()])
        self.check()
        return torch.from_numpy(images), samples[self._bad[samples]]

    def digest(self) -> str:
        """SHA-256 of the listing and the size; equal to that of the same images on disk."""
        return _listing_digest(self.source, self.size_px)


def _bad_images_error(count: int, total: int, allowed: int, reasons: Sequence[str]) -> DataError:
    lines = "".join(f"\n  - {reason}" for reason in reasons[:LISTED])
    return DataError(
        f"{count} of the images read so far, out of {total}, cannot be used; at most {allowed} "
        "may be replaced. Repair them or take them out of the data set (training replaces up to "
        f"data.max_bad_images, evaluation none):{lines}"
    )


def _listing_digest(source: ImageSource, size_px: int) -> str:
    return sha256(source.digest().encode(), str(size_px).encode())


def cached(
    source: ImageSource,
    size_px: int,
    folder: Path | None,
    *,
    max_bad: int = 0,
    description: str = "decode",
) -> ImageSet:
    """Decode every image of a source once.

    Args:
        source: The images.
        size_px: Side of the squares.
        folder: Where the cache is, SIZEpx-LISTING.bin (the pixels) and .json (what they were made
            from), one set of images per folder; None keeps the pixels in memory. A cache that
            fits is mapped instead of decoding, one that is stale or damaged is made again;
            processes wait for each other.
        max_bad: Unreadable images to put up with; see `StreamedImages`.
        description: For the progress bar.

    Returns:
        Images (N, 3, size_px, size_px), to the bit those of `StreamedImages`.

    Raises:
        DataError: If too many images are bad, or the disk or memory is too small for them.
    """
    reader = StreamedImages(source, size_px, max_bad=max_bad)
    shape = (len(source), 3, size_px, size_px)
    if folder is None:
        _check_memory(math.prod(shape))
        pixels = np.empty(shape, dtype=np.uint8)
        _decode(reader, pixels, description)
        images = torch.from_numpy(pixels)
        replaced = reader.replaced()
        labels = _labels_of_squares(source.labels, replaced)
        return ImageSet(images, labels, source.class_names, replaced)
    listing = _listing_digest(source, size_px)
    # Named by its content, so that a worker can never map what another data set wrote since.
    file = folder / f"{size_px}px-{listing[:12]}.bin"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{size_px}px.lock"):
        record = _read_cache(file, listing, shape)
        if record is None:
            record = _write_cache(file, listing, shape, reader, description)
    if record.bad:
        logger.warning("%d images of %s are replaced: %s", len(record.bad), folder, record.bad)
    if len(record.bad) > max_bad:
        raise _bad_images_error(len(record.bad), len(source), max_bad, [*record.bad.values()])
    replaced = torch.tensor(list(record.bad), dtype=torch.int64)
    return ImageSet(
        images=_map_images(file, shape),
        labels=_labels_of_squares(source.labels, replaced),
        class_names=source.class_names,
        replaced=replaced,
        file=file,
        listing=listing,
    )


def _check_memory(size_bytes: int) -> None:
    """Refuse what this machine cannot hold; allocated, it would end the process much later."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size_bytes > memory_bytes:
        raise DataError(
            f"the decoded images need {size_bytes / 1e9:.1f} GB, this machine has "
            f'{memory_bytes / 1e9:.1f} GB of memory; use data.cache = "disk" or "stream", or a '
            "smaller data.image_size_px"
        )


def _labels_of_squares(labels: Tensor, replaced: Tensor) -> Tensor:
    """The class of what is at each index: for a replaced image that of its replacement."""
    good = torch.ones(len(labels), dtype=torch.bool)
    good[replaced] = False
    readable = good.nonzero().flatten()
    next_readable = torch.searchsorted(readable, torch.arange(len(labels))) % len(readable)
    return labels[readable[next_readable]]


class _CacheRecord(BaseModel):
    """What lies beside a cache file: what it was made from, and its bad images with reasons."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listing: str
    shape: tuple[int, ...]
    bad: dict[int, str]


def _read_cache(file: Path, listing: str, shape: tuple[int, ...]) -> _CacheRecord | None:
    """The record of a cache that fits, else None."""
    facts = file.with_suffix(".json")
    if not (file.is_file() and facts.is_file()):
        return None
    try:
        record = _CacheRecord.model_validate_json(facts.read_bytes())
    except ValidationError:
        return None
    fits = (record.listing, record.shape) == (listing, shape)
    return record if fits and file.stat().st_size == np.prod(shape) else None


def _write_cache(
    file: Path, listing: str, shape: tuple[int, ...], reader: StreamedImages, description: str
) -> _CacheRecord:
    prefix = file.name.partition("-")[0]
    for stale in [*file.parent.glob(f"{prefix}-*"), *file.parent.glob(f".{prefix}-*.tmp")]:
        logger.warning("%s is removed: damaged, unfinished, or made from other images", stale)
        stale.unlink()
    size_bytes = int(np.prod(shape))
    with replacing(file) as temporary:
        _reserve(temporary, size_bytes)
        pixels = np.memmap(temporary, dtype=np.uint8, mode="r+", shape=shape)
        _decode(reader, pixels, description)
        pixels.flush()
    bad = {index: reader.reason(index) for index in reader.replaced().tolist()}
    record = _CacheRecord(listing=listing, shape=shape, bad=bad)
    write_atomic(file.with_suffix(".json"), record.model_dump_json(indent=2).encode())
    return record


def _reserve(file: Path, size_bytes: int) -> None:
    """Take the disk space at once: a mapped file that outgrows the disk ends the process."""
    with file.open("wb") as empty:
        try:
            os.posix_fallocate(empty.fileno(), 0, size_bytes)
        except OSError as error:
            raise DataError(
                f"the cache {file} needs {size_bytes / 1e9:.1f} GB: {error.strerror}; use another "
                'cache folder, a smaller data.image_size_px or cache = "stream"'
            ) from error


def _decode(reader: StreamedImages, out: NDArray[np.uint8], description: str) -> None:
    """Fill `out` (N, 3, S, S). Threads are enough: Pillow lets go of the interpreter's lock."""

    def place(index: int) -> None:
        out[index] = reader.square(index)

    with ThreadPoolExecutor() as pool:
        for start in track(range(0, len(reader), _CHECK_EVERY), description=description):
            list(pool.map(place, range(start, min(start + _CHECK_EVERY, len(reader)))))
            reader.check()


def _map_images(file: Path, shape: tuple[int, ...]) -> Tensor:
    # Copy-on-write: torch wants a writable array, and the file stays as it is.
    return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c", shape=shape))


class Batch(NamedTuple):
    """One batch of training images.

    Attributes:
        images: (B, C, H, W) uint8.
        samples: Index of each image in the data set, (B,) int64.
        replaced: Those of `samples` whose own image could not be read, (R,) int64.
    """

    images: Tensor
    samples: Tensor
    replaced: Tensor


class TrainImages(Dataset[Batch]):
    """What training reads: whole batches by index, from any worker process.

    For `torch.utils.data.DataLoader(data, batch_sampler=..., collate_fn=lambda batch: batch)`.
    Worker processes share the pixels, forked or spawned.
    """

    def __init__(self, images: ImageSet | StreamedImages) -> None:
        self._images = images
        self.labels, self.class_names = images.labels, images.class_names

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The images of these indices, in this order.

        Raises:
            DataError: If more images are unreadable than the recipe allows.
        """
        samples = torch.from_numpy(np.array(indices, dtype=np.int64))
        images, replaced = self._images.take(samples)
        return Batch(images, samples, replaced)

    def digest(self) -> str:
        """SHA-256 that names the data: of the pixels in memory, else of the listing."""
        return self._images.digest()
