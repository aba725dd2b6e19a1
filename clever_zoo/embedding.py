"""What encoders and classifiers return: the labelled pair, the split that makes it, predictions."""

from collections.abc import Iterable, Sequence
from typing import Generic, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from clever_zoo.errors import NonFiniteError, ShapeError

Array = TypeVar("Array")
Part = Literal["full", "invariant", "equivariant"]  # the attributes of an Embedding
NOT_FINITE = "the network gives it values that are not finite; run it in fp32, or verify the model"


class Embedding(NamedTuple, Generic[Array]):
    """Features in two labelled halves, as torch tensors or NumPy arrays.

    Shapes: `invariant` (B, invariant_dim), `equivariant` (B, equivariant_dim); raw float32
    values of any range. An encoder without a split has an empty (B, 0) equivariant half.
    """

    invariant: Array
    equivariant: Array

    @property
    def full(self) -> Array:
        """Both halves side by side, (B, D), the invariant one first."""
        if isinstance(self.invariant, np.ndarray):
            return np.concatenate([self.invariant, self.equivariant], axis=-1)  # type: ignore[return-value]
        import torch

        return torch.cat([self.invariant, self.equivariant], dim=-1)  # type: ignore[list-item, return-value]

    def normalized(self) -> "Embedding[Array]":
        """The same pair with every row of each half scaled to unit length (zero rows stay zero)."""
        return Embedding(unit_rows(self.invariant), unit_rows(self.equivariant))


class Predictions(NamedTuple):
    """What a classifier says of N images.

    Shapes: `classes` (N,) int64; `probabilities` (N, C) float32, rows sum to 1; `names` N names,
    None for a classifier without class names.
    """

    classes: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    names: tuple[str, ...] | None

    @classmethod
    def of(cls, logits: NDArray[np.float32], class_names: Sequence[str] | None) -> Self:
        """Read (N, C) logits: softmax, and the most probable class of each row.

        Raises:
            NonFiniteError: If a logit is not finite.
        """
        if not np.isfinite(logits).all():
            index = int(np.isfinite(logits).all(axis=1).argmin())
            raise NonFiniteError(f"image {index} has no class: {NOT_FINITE}")
        powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        classes = probabilities.argmax(axis=1)
        names = None if class_names is None else tuple(class_names[i] for i in classes)
        return cls(classes, probabilities, names)


def unit_rows(x: Array) -> Array:
    """Rows scaled to unit length, (..., D); zero rows stay zero."""
    if x.dtype.itemsize < 4:  # type: ignore[attr-defined]  # squares overflow in half precision
        if isinstance(x, np.ndarray):
            return unit_rows(x.astype(np.float32)).astype(x.dtype)  # type: ignore[return-value]
        return unit_rows(x.float()).to(x.dtype)  # type: ignore[attr-defined]
    # Clipped under the root, where a zero row still has a gradient.
    return x / (x * x).sum(-1, keepdims=True).clip(min=1e-24) ** 0.5  # type: ignore[operator]


def finite_rows(embedding: Embedding[NDArray[np.float32]]) -> NDArray[np.bool_]:
    """Whether all values of an image are finite, (B,)."""
    return np.asarray(np.isfinite(embedding.full).all(axis=1), dtype=np.bool_)


def join_batches(
    batches: Iterable[Embedding[NDArray[np.float32]]], invariant_dim: int, equivariant_dim: int
) -> Embedding[NDArray[np.float32]]:
    """Batches one below the other; without any, halves of no rows and the given widths."""
    empty = (np.zeros((0, width), dtype=np.float32) for width in (invariant_dim, equivariant_dim))
    halves = zip(Embedding(*empty), *batches, strict=True)
    return Embedding(*(np.concatenate(parts) for parts in halves))


def default_cut(feature_dim: int) -> int:
    """Width of the invariant half where none is given: int(0.8 D), as in the paper."""
    return int(0.8 * feature_dim)


def split_features(features: Array, invariant_dim: int) -> Embedding[Array]:
    """Cut features on their last axis: the first `invariant_dim` values, then the rest.

    Shapes: (..., D) -> (..., invariant_dim) and (..., D - invariant_dim), views of the input.

    Raises:
        ShapeError: If `invariant_dim` is not in 1..D.

    Source: paper section 3; the authors' code cuts at ``int(0.8 * D)``.
    """
    width = features.shape[-1]  # type: ignore[attr-defined]
    if not 0 < invariant_dim <= width:
        raise ShapeError(
            f"cannot split {width} features at {invariant_dim}: "
            f"invariant_dim must lie in 1..{width}; check the spec's invariant_dim"
        )
    return Embedding(features[..., :invariant_dim], features[..., invariant_dim:])  # type: ignore[index]
