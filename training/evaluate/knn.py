"""Weighted k-nearest-neighbour classification, the protocol of DINO."""

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07


def knn_predict(
    gallery: Tensor, gallery_labels: Tensor, queries: Tensor, *, k: int, classes: int
) -> Tensor:
    """Class of each query by the votes of its k nearest gallery rows.

    Cosine similarity; a neighbour votes with weight ``exp(similarity / 0.07)``.

    Shapes: gallery (N, D), gallery_labels (N,), queries (M, D) -> (M,) int64.

    Source: Caron et al. 2021, ``eval_knn.py``.
    """
    gallery = F.normalize(gallery, dim=1).T
    predictions = []
    for chunk in F.normalize(queries, dim=1).split(1000):
        similarity, neighbor = (chunk @ gallery).topk(k, dim=1)
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        votes.scatter_add_(1, gallery_labels[neighbor], (similarity / TEMPERATURE).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def knn_accuracy(
    gallery: Tensor, gallery_labels: Tensor, queries: Tensor, query_labels: Tensor, *, k: int = 20
) -> float:
    """Top-1 accuracy in percent; see `knn_predict`."""
    classes = int(gallery_labels.max()) + 1
    predicted = knn_predict(gallery, gallery_labels, queries, k=k, classes=classes)
    return float((predicted == query_labels).float().mean() * 100)
