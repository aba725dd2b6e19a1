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


def negative_cosine(target: Array, online: Array) -> float:
    pairs = view_pairs(len(target), len(online))
    return -float(
        np.mean(
            [cosine(target[t, b], online[s, b]) for t, s in pairs for b in range(len(online[0]))]
        )
    )


def info_nce(keys: Array, queries: Array, temperature: float) -> float:
    total = []
    for t, s in view_pairs(len(keys), len(queries)):
        for b in range(len(queries[s])):
            scores = np.array([cosine(queries[s, b], key) for key in keys[t]]) / temperature
            total.append(-math.log(softmax(scores)[b]))
    return float(np.mean(total))


def nt_xent(projections: Array, temperature: float) -> float:
    _, batch, _ = projections.shape
    everyone = [(v, b) for v in range(2) for b in range(batch)]
    losses = []
    for v, b in everyone:
        others = [(w, c) for w, c in everyone if (w, c) != (v, b)]
        scores = [
            math.exp(cosine(projections[v, b], projections[w, c]) / temperature) for w, c in others
        ]
        losses.append(-math.log(scores[others.index((1 - v, b))] / sum(scores)))
    return float(np.mean(losses))


def barlow_twins(projections: Array, weight: float) -> float:
    views = []
    for view in projections:
        mean, variance = view.mean(0), view.var(0)
        views.append((view - mean) / np.sqrt(variance + 1e-5))
    total = 0.0
    for i in range(projections.shape[2]):
        for j in range(projections.shape[2]):
            c = sum(a[i] * b[j] for a, b in zip(*views, strict=True)) / projections.shape[1]
            total += (1 - c) ** 2 if i == j else weight * c**2
    return total


def vicreg(projections: Array, invariance: float, variance: float, covariance: float) -> float:
    first, second = projections
    batch, width = first.shape
    distance = sum(((a - b) ** 2).sum() for a, b in zip(first, second, strict=True))
    total = invariance * distance / (batch * width)
    for view in projections:
        spread = [math.sqrt(view[:, j].var(ddof=1) + 1e-4) for j in range(width)]
        total += variance * sum(max(0.0, 1 - s) for s in spread) / width / 2
        table = np.cov(view.T)
        total += (
            covariance
            * sum(table[i, j] ** 2 for i in range(width) for j in range(width) if i != j)
            / width
        )
    return float(total)


def propagate_labels(
    target: Array, sources: Array, labels: Array, width: int, radius: int, top: int, temp: float
) -> Array:
    """Soft labels (K, N) of a grid with rows of `width`, from sources (S, N, D), (S, K, N)."""
    result = np.zeros(labels.shape[1:])
    for i, patch in enumerate(target):
        votes = []
        for frame, label in zip(sources, labels, strict=True):
            for j, other in enumerate(frame):
                apart = max(abs(i // width - j // width), abs(i % width - j % width))
                if apart <= radius:
                    votes.append((math.exp(cosine(patch, other) / temp), label[:, j]))
        votes = sorted(votes, key=lambda vote: -vote[0])[:top]
        result[:, i] = sum(weight * label for weight, label in votes) / sum(v[0] for v in votes)
    return result


def boundary_agreement(predicted: Array, truth: Array, radius: float) -> float:
    def boundary(mask: Array) -> list[tuple[int, int]]:
        rows, columns = mask.shape
        return [
            (y, x)
            for y in range(rows)
            for x in range(columns)
            if any(
                mask[min(y + dy, rows - 1), min(x + dx, columns - 1)] != mask[y, x]
                for dy, dx in ((0, 1), (1, 0), (1, 1))
            )
        ]

    def met(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        return sum(any(math.dist(p, o) <= radius for o in others) for p in points) / len(points)

    ours, theirs = boundary(predicted), boundary(truth)
    precision, recall = met(ours, theirs), met(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def saliency_scores(
    predictions: list[Array], truths: list[Array], thresholds: list[float], beta_squared: float
) -> tuple[float, float, float]:
    """maxF, IoU, accuracy by counting pixels one by one."""
    curves, overlaps, accuracies = [], [], []
    for predicted, truth in zip(predictions, truths, strict=True):
        pixels = list(zip(predicted.ravel(), truth.ravel(), strict=True))
        curve = []
        for threshold in thresholds:
            hits = sum(p > threshold and t for p, t in pixels)
            marked, salient = sum(p > threshold for p, _ in pixels), sum(t for _, t in pixels)
            precision = hits / marked if marked else 1.0
            recall = hits / salient if salient else 1.0
            bottom = beta_squared * precision + recall
            curve.append((1 + beta_squared) * precision * recall / bottom if bottom else 0.0)
        curves.append(curve)
        either = sum(p > 0.5 or t for p, t in pixels)
        overlaps.append(sum(p > 0.5 and t for p, t in pixels) / either if either else 1.0)
        accuracies.append(sum((p > 0.5) == t for p, t in pixels) / len(pixels))
    best = max(sum(column) / len(curves) for column in zip(*curves, strict=True))
    return best, sum(overlaps) / len(overlaps), sum(accuracies) / len(accuracies)


def sgd_probe(
    weight: Array, batches: list[list[tuple[Array, NDArray[np.int64]]]], lr: float, momentum: float
) -> tuple[Array, Array]:
    """Weight and bias after softmax regression by SGD on batches (features, labels) per epoch."""
    weight, bias = weight.astype(np.float64), np.zeros(len(weight))
    speed_w, speed_b = np.zeros_like(weight), np.zeros_like(bias)
    for epoch, epoch_batches in enumerate(batches):
        rate = lr * (1 + math.cos(math.pi * epoch / len(batches))) / 2
        for features, labels in epoch_batches:
            slope_w, slope_b = np.zeros_like(weight), np.zeros_like(bias)
            for x, label in zip(features, labels, strict=True):
                error = softmax(weight @ x + bias)
                error[label] -= 1
                slope_w += np.outer(error, x) / len(labels)
                slope_b += error / len(labels)
            speed_w, speed_b = momentum * speed_w + slope_w, momentum * speed_b + slope_b
            weight, bias = weight - rate * speed_w, bias - rate * speed_b
    return weight, bias
