"""From class scores to accuracies; linear probes and k-NN share it."""

import torch
from torch import Tensor

from clever_zoo.errors import DataError, NonFiniteError, ShapeError


def top_k(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of rows whose class is among the k highest scores, percent.

    Of equal scores the class with the lower number goes first, as `argmax` has it.

    Shapes: scores (N, C), labels (N,) int64.

    Raises:
        ShapeError: If the shapes do not fit.
        DataError: If k is not in 1..C, a label is not in 0..C-1 or there is no row.
        NonFiniteError: If a score is not finite.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ShapeError(
            f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)}; pass (N, C) and (N,)"
        )
    classes = scores.shape[1]
    if not 1 <= k <= classes:
        raise DataError(f"top-{k} of {classes} classes; use k in 1..{classes}")
    if not len(labels):
        raise DataError("an accuracy of no images; pass at least one")
    check_labels(labels, classes)
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).any(1).nonzero()[0])
        raise NonFiniteError(f"the class scores of row {row} are not finite; nothing is counted")
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(classes, device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return float((rank < k).double().mean() * 100)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels outside 0..classes-1.

    Raises:
        DataError: With the smallest and the largest one.
    """
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise DataError(
            f"labels lie in {low}..{high}, but there are {classes} classes; "
            f"number them 0..{classes - 1}, alike in both splits"
        )
