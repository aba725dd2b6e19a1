"""Unsupervised saliency by TokenCut on ECSSD, DUTS-TE or DUT-OMRON.

    python -m training.evaluate.saliency runs/my-vit --dataset ecssd --data ECSSD

A picture's patches are cut in two by the second eigenvector of their similarity graph.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from scipy.linalg import eigh
from scipy.ndimage import label
from torch import Tensor
from torch.nn import functional as F

from clever_zoo.cli import fail
from clever_zoo.encoder import Encoder, evaluating
from clever_zoo.errors import CleverZooError, DataError, ShapeError
from clever_zoo.preprocess import load_image, normalize_pixels
from clever_zoo.records import RESULTS_FILENAME, Record
from training.evaluate.dense import check_finite, dense_record
from training.evaluate.inputs import forbid_tf32, load_encoder

SIMILARITY_THRESHOLD = 0.2
WEAK_EDGE = 1e-5
THRESHOLDS = np.arange(255) / 255
BETA_SQUARED = 0.3

PROTOCOL = (
    "TokenCut: sides to the nearest multiple of the patch (Lanczos), keys of the last attention "
    f"layer, edges 1 where the cosine is above {SIMILARITY_THRESHOLD}, else {WEAK_EDGE}, second "
    "eigenvector cut at its mean, connected component of its largest entry, nearest upsampling, no "
    f"bilateral solver; maxF with beta^2 = {BETA_SQUARED} over {len(THRESHOLDS)} thresholds"
)

Boolean = NDArray[np.bool_]


class SaliencyData(StrEnum):
    """The data sets whose layouts are known."""

    ecssd = "ecssd"
    duts = "duts"
    dut_omron = "dut-omron"


# Folders of pictures (.jpg) and of masks (.png).
LAYOUTS = {
    SaliencyData.ecssd: ("images", "ground_truth_mask"),
    SaliencyData.duts: ("DUTS-TE-Image", "DUTS-TE-Mask"),
    SaliencyData.dut_omron: ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
}


class SaliencyPair(NamedTuple):
    """A picture and its mask."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class SaliencyScores:
    """Means over all pictures, 0..1.

    Attributes:
        encoder, dataset: What was scored on what.
        images: Number of pictures.
        max_f: F averaged over pictures at each threshold, at its best threshold.
        iou: Intersection over union of the masks.
        accuracy: Share of pixels on the right side.
        seconds: Wall time.
    """

    encoder: str
    dataset: str
    images: int
    max_f: float
    iou: float
    accuracy: float
    seconds: float


def read_saliency(root: Path, dataset: SaliencyData) -> tuple[SaliencyPair, ...]:
    """All pictures of a data set with their masks, sorted by name.

    Raises:
        DataError: For a missing folder, a picture or mask without its partner, or a mask of
            another size than its picture.
    """
    image_folder, mask_folder = (root / name for name in LAYOUTS[dataset])
    hint = f"put the {dataset} files into {image_folder}/*.jpg and {mask_folder}/*.png"
    images = {path.stem: path for path in sorted(image_folder.glob("*.jpg"))}
    masks = {path.stem: path for path in sorted(mask_folder.glob("*.png"))}
    if not images:
        raise DataError(f"{image_folder} holds no .jpg files; {hint}")
    if unpaired := sorted(images.keys() ^ masks.keys()):
        raise DataError(
            f"{len(images)} pictures and {len(masks)} masks, without a partner: "
            f"{', '.join(unpaired[:5])}; {hint}"
        )
    pairs = tuple(SaliencyPair(path, masks[stem]) for stem, path in images.items())
    for pair in pairs:
        _check_sizes(pair)
    return pairs


def _check_sizes(pair: SaliencyPair) -> None:
    sizes = []
    for path in pair:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}; fetch it again") from error
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{pair.mask} is {sizes[1][0]}x{sizes[1][1]}, but {pair.image} is "
            f"{sizes[0][0]}x{sizes[0][1]}; both must have one size, fetch them again"
        )


def read_truth(path: Path) -> Boolean:
    """The salient pixels of a mask, (H, W): all that are not black."""
    with Image.open(path) as image:
        return np.array(image.convert("L")) > 0


def saliency_pixels(image: Image.Image, encoder: Encoder) -> Tensor:
    """A picture as TokenCut feeds it, (1, 3, H, W): sides to the nearest multiple of the patch."""
    patch = _patch_size(encoder)
    size = [max(round(side / p), 1) * p for side, p in zip(image.size, patch[::-1], strict=True)]
    resized = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    return torch.from_numpy(normalize_pixels(np.array(resized)[None], encoder.spec.preprocess))


def _patch_size(encoder: Encoder) -> tuple[int, int]:
    if not hasattr(encoder.backbone, "blocks") or not hasattr(encoder.backbone.blocks[-1], "attn"):
        raise ShapeError(
            f"{encoder.spec.backbone} has no attention layers, and TokenCut reads their keys; use "
            "a vit_tiny or vit_small encoder"
        )
    return encoder.backbone.patch_embed.patch_size


def key_grid(encoder: Encoder, pixels: Tensor) -> Tensor:
    """Keys of the last attention layer with all heads side by side, without the class token.

    Shapes: (B, 3, H, W) -> (B, h, w, D), h and w in patches.
    """
    caught: list[Tensor] = []
    hook = encoder.backbone.blocks[-1].attn.qkv.register_forward_hook(
        lambda _module, _inputs, output: caught.append(output)
    )
    try:
        encoder.features(pixels)
    finally:
        hook.remove()
    keys = caught[0].chunk(3, dim=-1)[1]
    return keys[:, 1:].unflatten(
        1, encoder.backbone.patch_embed.dynamic_feat_size(pixels.shape[2:])
    )


def token_cut(keys: NDArray[np.float64]) -> Boolean:
    """Which patches belong to the salient object.

    Shapes: (h, w, D) -> (h, w).

    Source: Wang et al. 2022, ``object_discovery.py``.
    """
    grid = keys.shape[:2]
    rows = keys.reshape(-1, keys.shape[-1])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
    weights = np.where(rows @ rows.T > SIMILARITY_THRESHOLD, 1.0, WEAK_EDGE)
    degrees = np.diag(weights.sum(1))
    _, vectors = eigh(degrees - weights, degrees, subset_by_index=[1, 1])
    vector = vectors[:, 0]
    seed = np.abs(vector).argmax()
    foreground = vector > vector.mean()
    if not foreground[seed]:
        foreground = ~foreground
    components, _ = label(foreground.reshape(grid))
    return components == components.flat[seed]


def saliency_mask(encoder: Encoder, image: Image.Image) -> Boolean:
    """The salient pixels of a picture, (H, W) in its own size.

    Raises:
        ShapeError: If the encoder has no attention, or the picture fewer than two patches.
        NonFiniteError: If its keys are not finite.
    """
    pixels = saliency_pixels(image, encoder).to(next(encoder.parameters()).device)
    with evaluating(encoder), torch.inference_mode():
        keys = check_finite(key_grid(encoder, pixels)[0], "keys of the last attention layer")
    if keys.shape[0] * keys.shape[1] < 2:
        raise ShapeError(
            f"the picture is {image.width}x{image.height}, one patch of {encoder.spec.name}; "
            "pass a larger one"
        )
    mask = torch.from_numpy(token_cut(keys.double().cpu().numpy()))
    size = image.height, image.width
    return F.interpolate(mask[None, None].float(), size=size, mode="nearest")[0, 0].numpy() > 0


def f_curve(predicted: NDArray[np.floating], truth: Boolean) -> NDArray[np.float64]:
    """F at each of 255 thresholds k / 255: pixels above it count as salient.

    Where nothing is predicted precision is 1, where nothing is salient recall is 1.

    Shapes: predicted (H, W) in 0..1, truth (H, W) -> (255,).
    """
    passed = np.searchsorted(THRESHOLDS, predicted.ravel(), side="left")
    counts = [np.bincount(passed[kind], minlength=256) for kind in (truth.ravel(), slice(None))]
    hits, marked = (c[::-1].cumsum()[::-1][1:] for c in counts)
    precision = np.divide(hits, marked, out=np.ones(255), where=marked > 0)
    salient = np.count_nonzero(truth)
    recall = hits / salient if salient else np.ones(255)
    total = BETA_SQUARED * precision + recall
    product = (1 + BETA_SQUARED) * precision * recall
    return np.divide(product, total, out=np.zeros(255), where=total > 0)


def score_saliency(
    pictures: Iterable[tuple[NDArray[np.floating], Boolean]],
) -> tuple[float, float, float]:
    """maxF, IoU and accuracy, means over pictures.

    Args:
        pictures: Prediction (H, W) in 0..1 and truth (H, W) of each; taken one by one, so that
            a data set's masks need not fit into memory.

    Raises:
        DataError: If there are none, their sizes differ or values leave 0..1.
    """
    curves, overlaps, hits = [], [], []
    for index, (predicted, truth) in enumerate(pictures):
        _check_prediction(index, predicted, truth)
        curves.append(f_curve(predicted, truth))
        salient = predicted > 0.5
        union = np.count_nonzero(salient | truth)
        overlaps.append(np.count_nonzero(salient & truth) / union if union else 1.0)
        hits.append((salient == truth).mean())
    if not curves:
        raise DataError("there are no pictures to score; check the data folder")
    return float(np.mean(curves, axis=0).max()), float(np.mean(overlaps)), float(np.mean(hits))


def _check_prediction(index: int, predicted: NDArray[np.floating], truth: Boolean) -> None:
    if predicted.shape != truth.shape:
        raise DataError(
            f"picture {index}: the prediction is {predicted.shape}, the mask {truth.shape}; both "
            "must have the picture's size"
        )
    if not ((predicted >= 0) & (predicted <= 1)).all():
        raise DataError(f"picture {index}: a prediction has values outside 0..1; scale it")


def evaluate_saliency(
    encoder: Encoder, pairs: Sequence[SaliencyPair], dataset: SaliencyData
) -> SaliencyScores:
    """Segment and score every picture.

    Raises:
        DataError, NonFiniteError, ShapeError: See `saliency_mask` and `score_saliency`.
    """
    start = time.perf_counter()
    scores = score_saliency(
        (saliency_mask(encoder, load_image(pair.image)), read_truth(pair.mask))
        for pair in track(pairs, dataset.value, transient=True)
    )
    seconds = time.perf_counter() - start
    return SaliencyScores(encoder.spec.name, dataset.value, len(pairs), *scores, seconds)


def saliency_record(scores: SaliencyScores, encoder: Encoder) -> Record:
    """The scores as a record."""
    return dense_record(
        encoder,
        {metric: getattr(scores, metric) for metric in ("max_f", "iou", "accuracy")},
        task="saliency",
        text=f"{PROTOCOL}; keys of the full features are read, halves do not exist there",
        dataset=scores.dataset,
        split="test",
        n_images=scores.images,
        n=scores.images,
        seconds=scores.seconds,
    )


def main(
    source: Annotated[
        str, typer.Argument(help="A released name, org/repo, local-dir:PATH, or a run's folder.")
    ],
    dataset: Annotated[SaliencyData, typer.Option(help="Which layout the folder has.")],
    data: Annotated[Path, typer.Option(help="Folder that holds the pictures' and masks' folders.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder that gets results.json.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
) -> None:
    """Find the salient object of each picture with TokenCut (ViT), and score maxF, IoU, accuracy.

    Example: python -m training.evaluate.saliency runs/my-vit --dataset ecssd --data ECSSD
    """
    forbid_tf32()
    try:
        encoder = load_encoder(source, device)[0]
        scores = evaluate_saliency(encoder, read_saliency(data, dataset), dataset)
        if output is not None:
            saliency_record(scores, encoder).write(output / RESULTS_FILENAME)
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(
        f"{scores.encoder} on {scores.images} pictures of {dataset.value}: maxF "
        f"{scores.max_f:.3f}, IoU {scores.iou:.3f}, accuracy {scores.accuracy:.3f}; "
        f"{scores.seconds:.0f} s"
    )


if __name__ == "__main__":
    typer.run(main)
