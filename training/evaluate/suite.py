"""The released models' table: k-NN and angle readings of each part, beside its controls."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from clever_zoo.embedding import split_features
from clever_zoo.encoder import evaluating
from clever_zoo.preprocess import crop_pixels
from clever_zoo.spec import PreprocessSpec
from training.data import ImageSet
from training.evaluate.knn import TEMPERATURE, knn_accuracy
from training.evaluate.perturb import Perturbation, draw_angles, perturb
from training.evaluate.rotation import RIDGE, angle_r2

NEIGHBORS = 20
SEEDS = (0, 1, 2)
ANGLE_TRAIN_IMAGES = 20_000
BATCH_SIZE = 256

PROTOCOLS = {
    "knn": (
        f"weighted k-NN, k = {NEIGHBORS}, cosine, votes exp(similarity / {TEMPERATURE}); gallery: "
        "all training images, unperturbed; queries: all test images; parts sliced before "
        "normalising; top-1 in percent; perturbed: mean and population standard deviation over "
        f"perturbation seeds {SEEDS}"
    ),
    "clean": "evaluation transform only (bicubic)",
    "r": "evaluation transform, rotation uniform in [-90, 90] degrees (nearest, black corners)",
    "cj_r": "as r, then colour jitter (0.4, 0.4, 0.4, 0.1), always",
    "angle_r2": (
        "R^2 of ridge regression (penalty "
        f"{RIDGE}, standardised features) to (sin, cos) of the angle, uniform in [-90, 90] "
        f"degrees, circular mask; fitted on the first {ANGLE_TRAIN_IMAGES} training images, "
        "scored on all test images; seed 0"
    ),
}

Features = Callable[[Tensor], Tensor]


def evaluation_pixels(data: ImageSet, spec: PreprocessSpec) -> Tensor:
    """(N, 3, size, size) uint8: every image through the released model's resize and crop."""
    size = spec.input_size_px
    pixels = torch.empty(len(data), 3, size, size, dtype=torch.uint8)
    for i, image in enumerate(track(data.images, description="resize", transient=True)):
        array = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        square = crop_pixels(Image.fromarray(array), spec.resize_px, size)
        pixels[i] = torch.from_numpy(square).permute(2, 0, 1)
    return pixels


def backbone_features(backbone: nn.Module, spec: PreprocessSpec) -> Features:
    """Features of byte-valued pixels: (B, 3, s, s) float 0..255 -> (B, D)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (spec.mean, spec.std))

    def features(pixels: Tensor) -> Tensor:
        with evaluating(backbone), torch.inference_mode():
            device = next(backbone.parameters()).device
            return backbone(((pixels - mean) / std).to(device)).cpu()

    return features


def pixel_features(pixels: Tensor) -> Tensor:
    """The raw-pixel control: (B, 3, s, s) float 0..255 -> (B, 3 s s)."""
    return pixels.flatten(1) / 255


def _embed(features: Features, pixels: Tensor, kind: Perturbation, seed: int) -> Tensor:
    parts = []
    for start in range(0, len(pixels), BATCH_SIZE):
        batch = pixels[start : start + BATCH_SIZE].float()
        samples = np.arange(start, start + len(batch))
        parts.append(features(perturb(batch, samples, kind, seed)))
    return torch.cat(parts)


def _parts(features: Tensor, cut: int | None) -> dict[str, Tensor]:
    if cut is None:
        return {"full": features}
    halves = split_features(features, cut)
    return {"full": features, **halves._asdict()}


def _mean_std(values: list[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 2), "std": round(float(np.std(values)), 2)}


def evaluate_features(
    features: Features,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    cut: int | None,
    description: str,
) -> dict[str, Any]:
    """One column of the table; see `PROTOCOLS`.

    Args:
        features: From `backbone_features`, or `pixel_features`.
        train, test: Pixels (N, 3, s, s) uint8 and labels (N,).
        cut: Index at which the features are cut into halves, None for the full vector alone.
        description: For the progress bar.
    """
    (train_pixels, train_labels), (test_pixels, test_labels) = train, test
    gallery = _parts(_embed(features, train_pixels, "clean", 0), cut)
    jobs: list[tuple[Perturbation, int]] = [("clean", 0)]
    jobs += [(kind, seed) for kind in ("r", "cj_r") for seed in SEEDS]
    scores: dict[str, dict[str, list[float]]] = {}
    for kind, seed in track(jobs, description=description, transient=True):
        queries = _parts(_embed(features, test_pixels, kind, seed), cut)
        for part, rows in queries.items():
            accuracy = knn_accuracy(gallery[part], train_labels, rows, test_labels, k=NEIGHBORS)
            scores.setdefault(kind, {}).setdefault(part, []).append(accuracy)
    knn: dict[str, Any] = {
        "clean": {part: round(values[0], 2) for part, values in scores.pop("clean").items()}
    }
    for kind, by_part in scores.items():
        knn[kind] = {part: _mean_std(values) for part, values in by_part.items()}
    return {"knn": knn, "angle_r2": _angle_readings(features, train_pixels, test_pixels, cut)}


def _angle_readings(
    features: Features, train_pixels: Tensor, test_pixels: Tensor, cut: int | None
) -> dict[str, float]:
    parts, degrees = [], []
    # Two seeds, so that image i of the two sets does not share its angle.
    for pixels, seed in ((train_pixels[:ANGLE_TRAIN_IMAGES], 1), (test_pixels, 0)):
        parts.append(_parts(_embed(features, pixels, "r_masked", seed), cut))
        degrees.append(draw_angles(np.arange(len(pixels)), seed).numpy())
    return {
        name: round(
            angle_r2(parts[0][name].numpy(), degrees[0], parts[1][name].numpy(), degrees[1]), 3
        )
        for name in parts[0]
    }
