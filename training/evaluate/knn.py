"""Weighted k-nearest-neighbour classification, the protocol of DINO."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clever_zoo.errors import DataError
from training.evaluate.scores import check_labels

TEMPERATURE = 0.07
_CHUNK_ROWS = 1000


def knn_scores(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    *,
    ks: Sequence[int],
    classes: int,
    device: str | torch.device = "cpu",
) -> dict[int, Tensor]:
    """Votes of the k nearest gallery rows for each class, for several k at once.

    Cosine similarity; a neighbour votes with weight ``exp(similarity / 0.07)``. Computed on
    `device`; the votes come back to the CPU.

    Shapes: gallery (N, D), gallery_labels (N,) int64, queries (M, D) -> k: (M, classes).

    Raises:
        DataError: If a k is not in 1..N or a label not in 0..classes-1.

    Source: Caron et al. 2021, ``eval_knn.py``.
    """
    if not ks or min(ks) < 1 or max(ks) > len(gallery):
        raise DataError(
            f"k is {', '.join(map(str, ks))}, but the gallery has {len(gallery)} images; "
            f"use one or more k in 1..{len(gallery)}, or more images"
        )
    check_labels(gallery_labels, classes)
    columns, labels = F.normalize(gallery.to(device), dim=1).T, gallery_labels.to(device)
    chunks = [
        _votes(chunk @ columns, labels, ks, classes)
        for chunk in F.normalize(queries.to(device), dim=1).split(_CHUNK_ROWS)
    ]
    return {k: torch.cat([votes[k] for votes in chunks]).cpu() for k in ks}


def _votes(
    similarity: Tensor, labels: Tensor, ks: Sequence[int], classes: int
) -> dict[int, Tensor]:
    """Votes (B, classes) for each k from similarities (B, N)."""
    nearest, neighbor = similarity.topk(max(ks), dim=1)
    weight, voted = (nearest / TEMPERATURE).exp(), labels[neighbor]
    empty = weight.new_zeros(len(weight), classes)
    return {k: empty.scatter_add(1, voted[:, :k], weight[:, :k]) for k in ks}
