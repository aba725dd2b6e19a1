"""What the service needs of a model, encoder or classifier, whatever its runtime."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clever_zoo.embedder import ImageEmbedder
from clever_zoo.runtimes import Runtime, choose_runtime, load_encoder, open_graph
from clever_zoo.sources import (
    HubSource,
    LocalSource,
    ReleasedSource,
    is_onnx_path,
    parse_source,
)
from clever_zoo.spec import ModelSpec, PreprocessSpec

Outputs = Mapping[str, NDArray[np.float32]]


class ServedModel(NamedTuple):
    """A loaded model behind names and shapes.

    Attributes:
        spec: Of the encoder; the service goes by its name, and reports the digest of its weights.
        alias: A second name that it answers to, without slashes.
        platform: What runs it, "onnx" or "torch".
        outputs: Name -> width.
        run: (B, size, size, 3) uint8 -> name -> (B, width) float32; called by one thread.
    """

    spec: ModelSpec
    alias: str
    platform: str
    outputs: Mapping[str, int]
    run: Callable[[NDArray[np.uint8]], Outputs]

    @property
    def name(self) -> str:
        """Full name."""
        return self.spec.name

    @property
    def sha256(self) -> str:
        """Digest of the weights, empty if they were never saved."""
        return self.spec.weights.sha256 if self.spec.weights else ""

    @property
    def preprocess(self) -> PreprocessSpec:
        """How a file becomes pixels."""
        return self.spec.preprocess


def load_served_model(
    source: str, *, runtime: Runtime = "auto", device: str = "cpu", threads: int | None = None
) -> ServedModel:
    """Load an encoder, or a classifier that was exported to ONNX; see `load_encoder`.

    The alias is the name of the .onnx file, of the folder or of the Hub repository.

    Raises:
        CleverZooError: If it cannot be found or loaded.
    """
    alias = _alias(source)
    if choose_runtime(source, runtime) == "torch":
        encoder = load_encoder(source, runtime="torch", device=device, threads=threads)
        return served_encoder(encoder, alias, "torch")
    from clever_zoo.onnx_encoder import OnnxClassifier, OnnxEncoder

    graph = open_graph(source, device=device, threads=threads)
    if isinstance(graph.spec, ModelSpec):
        return served_encoder(OnnxEncoder(graph), alias, "onnx")
    classifier = OnnxClassifier(graph)

    def run(pixels: NDArray[np.uint8]) -> Outputs:
        return {"logits": classifier.logits(pixels)}

    widths = {"logits": classifier.spec.num_classes}
    return ServedModel(classifier.spec.encoder, alias, "onnx", widths, run)


def _alias(source: str) -> str:
    if is_onnx_path(source):
        return Path(source).stem
    match parse_source(source):
        case LocalSource(folder):
            return folder.resolve().name
        case HubSource(repo_id, _):
            return repo_id.rpartition("/")[2]
        case ReleasedSource(name):
            return name


def served_encoder(encoder: ImageEmbedder, alias: str, platform: str) -> ServedModel:
    """An encoder with the outputs `invariant` and `equivariant`; an empty half is left out."""
    spec = encoder.spec
    widths = {"invariant": spec.invariant_dim, "equivariant": spec.equivariant_dim}

    def run(pixels: NDArray[np.uint8]) -> Outputs:
        return encoder.embed_pixels(pixels)._asdict()

    present = {name: width for name, width in widths.items() if width}
    return ServedModel(spec, alias, platform, present, run)
