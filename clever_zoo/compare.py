"""How alike two pictures are in each half, with a scale to read the numbers by."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clever_zoo.embedder import ImageEmbedder
from clever_zoo.embedding import unit_rows
from clever_zoo.errors import NonFiniteError, SpecError
from clever_zoo.preprocess import ImageInput
from clever_zoo.samples import sample_paths
from clever_zoo.spec import ModelSpec

SAMPLE_STEP = 3  # every third bundled picture: 100 pictures, 4,950 pairs


class Likeness(NamedTuple):
    """How alike two pictures are in one half.

    Attributes:
        cosine: Of the two vectors, -1..1.
        percent_less_alike: Share of the pairs of different bundled pictures with a lower cosine.
    """

    cosine: float
    percent_less_alike: float


class Comparison(NamedTuple):
    """How alike two pictures are in each half, and how many pairs the shares are counted on."""

    invariant: Likeness
    equivariant: Likeness
    pairs: int


def compare_images(encoder: ImageEmbedder, a: ImageInput, b: ImageInput) -> Comparison:
    """How alike two pictures are in each half.

    Cosines of different encoders and halves have different ranges. The scale is the cosine of
    pairs of different bundled pictures (small grey pictures of clothes) in the same half: it says
    what unlike pictures score. What a half holds is measured in the model's card.

    Args:
        encoder: With a split.
        a, b: Paths, PIL images or (H, W, 3) uint8 arrays.

    Raises:
        ImageError: For an unreadable picture; its index is 0 for `a`, 1 for `b`.
        SpecError: If the encoder's features are not split.
        NonFiniteError: If a half of a picture has no direction: it is all 0 or not finite.
    """
    spec = encoder.spec
    check_split(spec)
    pictures = encoder.embed([a, b])
    others = encoder.embed(sample_paths()[::SAMPLE_STEP])
    invariant = _likeness(pictures.invariant, others.invariant, f"invariant half of {spec.name}")
    equivariant = _likeness(
        pictures.equivariant, others.equivariant, f"equivariant half of {spec.name}"
    )
    count = len(others.invariant)
    return Comparison(invariant, equivariant, count * (count - 1) // 2)


def check_split(spec: ModelSpec) -> None:
    """Refuse a model without an equivariant half.

    Raises:
        SpecError: If it has none.
    """
    if not spec.equivariant_dim:
        raise SpecError(
            f"{spec.name!r} has no equivariant half (invariant_dim {spec.invariant_dim} is all of "
            "its features); compare with a model that is split, such as 'clever-resnet18'"
        )


def _likeness(pictures: NDArray[np.float32], others: NDArray[np.float32], name: str) -> Likeness:
    """Of two rows (2, D), on the scale of all pairs of other rows (N, D)."""
    # Double precision, so that a picture and itself come out at 1 and not a little beside it.
    rows = np.concatenate([pictures, others]).astype(np.float64)
    if not (np.isfinite(rows).all() and rows.any(1).all()):
        raise NonFiniteError(
            f"a picture has no direction in the {name}: its values are all 0 or not finite; "
            "check the weights with clever-zoo verify"
        )
    rows = unit_rows(rows)
    cosine = float(np.clip(rows[0] @ rows[1], -1, 1))
    table = rows[2:] @ rows[2:].T
    pairs = table[np.triu_indices(len(table), k=1)]
    return Likeness(cosine, float((pairs < cosine).mean() * 100))
