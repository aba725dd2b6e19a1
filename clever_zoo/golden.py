"""golden.json: the first values of each half for one bundled picture, kept beside the weights.

Any runtime can check itself against it.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clever_zoo.embedder import ImageEmbedder
from clever_zoo.embedding import Embedding
from clever_zoo.errors import IntegrityError
from clever_zoo.locate import locate_model
from clever_zoo.samples import sample_paths
from clever_zoo.spec import read_json

GOLDEN_FILENAME = "golden.json"
VALUES = 8
TOLERANCE = 1e-4  # of the half's norm: room for other processors, none for other weights


def golden_values(encoder: ImageEmbedder) -> dict[str, Any]:
    """The content of golden.json: the picture's name and the first values of each half."""
    path = sample_paths()[0]
    embedding = encoder.embed([path])
    halves = {name: _first(half) for name, half in embedding._asdict().items()}
    return {"sample": path.name, "norms": _norms(embedding), **halves}


def _first(half: NDArray[np.float32]) -> list[float]:
    return [round(float(value), 6) for value in half[0, :VALUES]]


def _norms(embedding: Embedding[NDArray[np.float32]]) -> dict[str, float]:
    return {k: round(float(np.linalg.norm(v)), 6) for k, v in embedding._asdict().items()}


def check_golden(source: str | Path) -> float:
    """Load a model in torch and compare it with its golden.json; see `compare_golden`."""
    from clever_zoo.encoder import Encoder

    spec, weights = locate_model(source)
    return compare_golden(Encoder.load(spec, weights), weights.parent / GOLDEN_FILENAME)


def compare_golden(encoder: ImageEmbedder, path: Path) -> float:
    """Compare a model, in whatever runtime, with a golden.json.

    Returns:
        The greatest difference of a value, relative to the norm of its half.

    Raises:
        IntegrityError: If the file is missing or malformed, or a value is off by more than 1e-4
            of its half's norm.
    """
    if not path.is_file():
        raise IntegrityError(f"{path} does not exist, so the values cannot be checked")
    try:
        recorded = _flat(read_json(path))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:  # or a SpecError
        raise IntegrityError(f"{path} holds no golden values ({error!r})") from error
    actual = _flat(golden_values(encoder))
    if any(recorded[name].shape != actual[name].shape for name in actual):
        raise IntegrityError(f"{path} holds another number of values than {VALUES} of each half")
    scale = {name: max(values[0], 1e-12) for name, values in actual.items()}
    # np.max, because Python's max can lose a NaN.
    worst = float(np.max([np.abs(recorded[k] - actual[k]).max() / scale[k] for k in actual]))
    if not worst <= TOLERANCE:
        raise IntegrityError(
            f"{path}: embeddings differ by {worst:.1e} of their norm, allowed {TOLERANCE:.0e}"
        )
    return worst


def _flat(golden: dict[str, Any]) -> dict[str, NDArray[np.float64]]:
    """Each half's norm and first values in one array."""
    return {
        name: np.array([golden["norms"][name], *golden[name]], dtype=float)
        for name in Embedding._fields
    }
