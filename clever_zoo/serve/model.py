"""What the service needs of a model, encoder or classifier, whatever its runtime."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clever_zoo.bulk import PixelEncoder
from clever_zoo.spec import PreprocessSpec

Outputs = Mapping[str, NDArray[np.float32]]


class ServedModel(NamedTuple):
    """A loaded model behind names and shapes.

    Attributes:
        name: Full name.
        alias: A second name it answers to, such as the one of the command line.
        sha256: Digest of its weights, empty if they were never saved.
        platform: What runs it, "onnxruntime" or "torch".
        preprocess: How a file becomes pixels.
        outputs: Name -> width.
        run: (B, size, size, 3) uint8 -> name -> (B, width) float32; called by one thread.
    """

    name: str
    alias: str
    sha256: str
    platform: str
    preprocess: PreprocessSpec
    outputs: Mapping[str, int]
    run: Callable[[NDArray[np.uint8]], Outputs]

    @classmethod
    def of_encoder(cls, encoder: PixelEncoder, alias: str, platform: str) -> "ServedModel":
        """An encoder with the outputs `invariant` and `equivariant`; an empty half is left out."""
        spec = encoder.spec
        widths = {"invariant": spec.invariant_dim, "equivariant": spec.equivariant_dim}

        def run(pixels: NDArray[np.uint8]) -> Outputs:
            return encoder.embed_pixels(pixels)._asdict()

        return cls(
            name=spec.name,
            alias=alias,
            sha256=spec.weights.sha256 if spec.weights else "",
            platform=platform,
            preprocess=spec.preprocess,
            outputs={name: width for name, width in widths.items() if width},
            run=run,
        )
