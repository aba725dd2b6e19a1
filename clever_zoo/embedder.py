"""Images to embeddings, whatever runs the network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from clever_zoo.ahead import usable_cores
from clever_zoo.embedding import Embedding, join_batches
from clever_zoo.preprocess import ImageInput, pixel_batches
from clever_zoo.spec import ModelSpec

Progress = Callable[[int], None]


class ImageEmbedder(ABC):
    """What `Encoder` (torch) and `OnnxEncoder` have in common.

    Attributes:
        spec: The frozen description of the model.
    """

    spec: ModelSpec

    @property
    def precision(self) -> str:
        """Type of the weights and of the arithmetic, such as "fp32" or "int8"."""
        return "fp32"

    @abstractmethod
    def embed_pixels(self, pixels: NDArray[np.uint8]) -> Embedding[NDArray[np.float32]]:
        """Embed resized and cropped squares, (B, size, size, 3) uint8 RGB.

        Raises:
            ShapeError: For another shape or type.
        """

    def digests(self) -> dict[str, str]:
        """SHA-256 of what the values come from; `sha256` is of the weights, empty if unknown."""
        return {"sha256": self.spec.weights.sha256 if self.spec.weights else ""}

    def embed(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 32,
        on_progress: Progress | None = None,
    ) -> Embedding[NDArray[np.float32]]:
        """Embed any number of images into two arrays, in order.

        Args:
            images: Paths, PIL images or (H, W, 3) uint8 arrays, mixed as you like.
            batch_size: Images per forward pass. It does not change the result, but for an int8
                graph of a ViT, whose ranges are each batch's own (see `export_onnx`).
            on_progress: Called after each batch with the number of images done.

        Returns:
            float32 `invariant` (N, invariant_dim) and `equivariant` (N, equivariant_dim).

        Raises:
            ImageError: For the first bad image, with its source and index.
            ShapeError: If `batch_size` is under 1.
        """
        batches = []
        done = 0
        for batch in self.embed_batches(images, batch_size=batch_size):
            batches.append(batch)
            done += len(batch.invariant)
            if on_progress is not None:
                on_progress(done)
        return join_batches(batches, self.spec.invariant_dim, self.spec.equivariant_dim)

    def embed_batches(
        self, images: Iterable[ImageInput], *, batch_size: int = 32
    ) -> Iterator[Embedding[NDArray[np.float32]]]:
        """Like `embed`, but yields batch after batch in constant memory.

        Images are loaded in threads, up to two batches ahead of the network.

        Raises:
            ImageError: For the first bad image, with its source and index.
            ShapeError: If `batch_size` is under 1.
        """
        preprocess = self.spec.preprocess
        for pixels in pixel_batches(images, preprocess, batch_size, threads=usable_cores()):
            yield self.embed_pixels(pixels)
