"""Plain slow versions of the formulas, written from their definitions."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(row: Array) -> Array:
    e = [math.exp(v - max(row)) for v in row]
    return np.array([v / sum(e) for v in e])


def view_pairs(teacher_views: int, student_views: int) -> list[tuple[int, int]]:
    return [(t, s) for t in range(teacher_views) for s in range(student_views) if s != t]


def dino_loss(
    teacher: Array, student: Array, center: Array, teacher_temp: float, student_temp: float
) -> float:
    pairs = view_pairs(len(teacher), len(student))
    total = 0.0
    for t, s in pairs:
        batch = 0.0
        for b in range(teacher.shape[1]):
            q = softmax((teacher[t, b] - center) / teacher_temp)
            p = softmax(student[s, b] / student_temp)
            batch += -sum(q[k] * math.log(p[k]) for k in range(len(q)))
        total += batch / teacher.shape[1]
    return total / len(pairs)


def cosine(a: Array, b: Array) -> float:
    return sum(a * b) / (math.sqrt(sum(a * a)) * math.sqrt(sum(b * b)))


def orthogonality_loss(
    teacher: Array, student: Array, center: Array, teacher_temp: float, student_temp: float
) -> float:
    pairs = view_pairs(len(teacher), len(student))
    total = 0.0
    for t, s in pairs:
        cosines = [
            cosine(
                softmax((teacher[t, b] - center) / teacher_temp),
                softmax(student[s, b] / student_temp),
            )
            for b in range(teacher.shape[1])
        ]
        total += abs(sum(cosines) / len(cosines))
    return total / len(pairs)


def embedding_orthogonality(target: Array, online: Array, reduction: str) -> float:
    pairs = view_pairs(len(target), len(online))
    table = [[cosine(target[t, b], online[s, b]) for b in range(target.shape[1])] for t, s in pairs]
    match reduction:
        case "mean_abs":
            return abs(float(np.mean(table)))
        case "abs_mean":
            return float(np.mean(np.abs(table)))
        case _:
            return float(np.mean(np.square(table)))


def knn_class(gallery: Array, labels: list[int], query: Array, k: int, temperature: float) -> int:
    similarity = [cosine(query, row) for row in gallery]
    nearest = sorted(range(len(gallery)), key=lambda i: -similarity[i])[:k]
    votes: dict[int, float] = {}
    for i in nearest:
        votes[labels[i]] = votes.get(labels[i], 0.0) + math.exp(similarity[i] / temperature)
    return max(sorted(votes), key=lambda c: votes[c])
