"""Image files -> pixels, in threads of their own."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clever_zoo.ahead import usable_cores
from clever_zoo.errors import ImageError, RequestError
from clever_zoo.preprocess import crop_pixels, decode_image
from clever_zoo.serve.metrics import Metrics
from clever_zoo.spec import PreprocessSpec

Square = NDArray[np.uint8] | ImageError


class File(NamedTuple):
    """An uploaded file."""

    name: str
    content: bytes | bytearray


class Decoder:
    """Decodes the files of many requests, beside whatever else the process does.

    Belongs to one event loop.

    Args:
        preprocess: What becomes of the pictures.
        max_pixels: Largest picture that is decoded.
        max_files: Files that may be decoded or wait for it; more are refused.
        metrics: What to count in.
    """

    def __init__(
        self, preprocess: PreprocessSpec, *, max_pixels: int, max_files: int, metrics: Metrics
    ) -> None:
        self._preprocess, self._metrics = preprocess, metrics
        self._max_pixels, self._max_files = max_pixels, max_files
        self._files = 0
        self.pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="decode")

    def check_room(self, files: int = 1) -> None:
        """Refuse files for which there is no room.

        Raises:
            RequestError: Status 503, with Retry-After.
        """
        if self._files + files > self._max_files:
            raise RequestError(
                f"{self._files} files are being decoded, {self._max_files} may; try again in 1 s",
                503,
                {"Retry-After": "1"},
            )

    async def decode(self, files: Sequence[File]) -> list[Square]:
        """(size, size, 3) uint8 or the error of each; if cancelled, what waits is dropped.

        Raises:
            RequestError: See `check_room`.
        """
        self.check_room(len(files))
        self._count(len(files))
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.gather(
                *(loop.run_in_executor(self.pool, self._square, *item) for item in enumerate(files))
            )
        finally:
            self._count(-len(files))

    def _count(self, files: int) -> None:
        self._files += files
        self._metrics.decoding_files.set(self._files)

    def _square(self, index: int, file: File) -> Square:
        try:
            image = decode_image(file.content, file.name, index, max_pixels=self._max_pixels)
        except ImageError as error:
            return error
        return crop_pixels(image, self._preprocess.resize_px, self._preprocess.input_size_px)
