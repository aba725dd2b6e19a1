"""Encoders and classifiers in ONNX Runtime; never imports torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from clever_zoo.ahead import usable_cores
from clever_zoo.embedder import ImageEmbedder
from clever_zoo.embedding import Embedding, Predictions
from clever_zoo.errors import SpecError
from clever_zoo.onnx_graph import OnnxGraph, Provider
from clever_zoo.preprocess import ImageInput, pixel_batches
from clever_zoo.spec import ClassifierSpec, ModelSpec


class OnnxEncoder(ImageEmbedder):
    """Pixels to embeddings in ONNX Runtime; `embed` and `embed_batches` as of `Encoder`.

    Args:
        graph: An opened encoder.

    Attributes:
        spec: The frozen description, from the file's metadata.
        graph: Session, kind of input and precision.

    Raises:
        SpecError: If the graph is a classifier's.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        if not isinstance(graph.spec, ModelSpec):
            raise SpecError(f"{graph.source} describes a classifier; open it with OnnxClassifier")
        self.spec = graph.spec
        self.graph = graph

    @property
    def precision(self) -> str:
        """Type of the weights and of the arithmetic: "fp32", "fp16" or "int8"."""
        return self.graph.info.precision

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        **hub: Any,
    ) -> Self:
        """Open an exported encoder.

        Args:
            source: The path of an .onnx file that `export_onnx` or ``clever-zoo export`` wrote,
                or what `clever_zoo.from_pretrained` takes, if onnx/model.onnx lies beside its
                config.json.
            providers, threads: See `OnnxGraph.open`.
            **hub: revision, cache_dir, local_files_only and token, as for
                `clever_zoo.from_pretrained`.

        Raises:
            UnknownModelError, SourceError, SpecError, DownloadError: If it cannot be found; the
                message says how to make the .onnx file.
            IntegrityError: If it is damaged, or of another model than the config.json beside it.
            BackendMissingError: If a named provider cannot be used here.
        """
        return cls(OnnxGraph.find(source, providers=providers, threads=threads, **hub))

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> Embedding[NDArray[np.float32]]:
        """Embed resized and cropped squares, (B, size, size, 3) uint8 RGB; thread-safe.

        Raises:
            ShapeError: For another shape or type.
        """
        halves = self.graph.run(pixels)
        if not self.spec.equivariant_dim:
            halves.append(np.zeros((len(pixels), 0), dtype=np.float32))
        return Embedding(*halves)

    def digests(self) -> dict[str, str]:
        """`sha256` of the weights it was made from, `graph_sha256` of the file."""
        return super().digests() | {"graph_sha256": self.graph.sha256}


class OnnxClassifier:
    """Images to classes in ONNX Runtime; `predict` as of `Classifier`.

    Args:
        graph: An opened classifier.

    Attributes:
        spec: The frozen description, from the file's metadata.
        graph: Session, kind of input and precision.

    Raises:
        SpecError: If the graph is an encoder's.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        if not isinstance(graph.spec, ClassifierSpec):
            raise SpecError(
                f"{graph.source} is an encoder's, it is no classifier; open it with OnnxEncoder"
            )
        self.spec = graph.spec
        self.graph = graph

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        **hub: Any,
    ) -> Self:
        """Open an exported classifier; arguments and errors as of `OnnxEncoder`."""
        return cls(OnnxGraph.find(source, providers=providers, threads=threads, **hub))

    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, C) for resized and cropped squares, (B, size, size, 3) uint8 RGB; thread-safe.

        Raises:
            ShapeError: For another shape or type.
        """
        (logits,) = self.graph.run(pixels)
        return logits

    def predict(self, images: Iterable[ImageInput], *, batch_size: int = 32) -> Predictions:
        """Classify any number of images, in order; see `Classifier.predict`.

        Raises:
            ImageError: For the first bad image, with its source and index.
            NonFiniteError: If a logit is not finite.
            ShapeError: If `batch_size` is under 1.
        """
        preprocess = self.spec.encoder.preprocess
        batches = pixel_batches(images, preprocess, batch_size, threads=usable_cores())
        empty = np.zeros((0, self.spec.num_classes), dtype=np.float32)
        logits = np.concatenate([empty, *map(self.logits, batches)])
        return Predictions.of(logits, self.spec.class_names)
