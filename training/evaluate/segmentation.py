"""DAVIS-2017 video object segmentation by label propagation, scored with J and F.

    python -m training.evaluate.segmentation clever-resnet18 --data DAVIS -o out/davis

Nothing is trained: the masks of a video's first frame are carried on to the next frames by the
similarity of patch features.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F

from clever_zoo.cli import fail
from clever_zoo.embedding import Part
from clever_zoo.encoder import Encoder, evaluating
from clever_zoo.errors import CleverZooError, DataError
from clever_zoo.files import replacing, write_atomic
from clever_zoo.preprocess import load_image
from clever_zoo.records import RESULTS_FILENAME, Record
from clever_zoo.spec import IMAGENET_STD, ModelSpec
from training.evaluate.dense import PartChoice, check_finite, dense_record, patch_grid
from training.evaluate.inputs import forbid_tf32, load_encoder

SHORT_SIDE_PX = 480
LONG_SIDE_STEP_PX = 64
# Typed so in the reference, in place of 0.229; its published numbers were computed with it.
REFERENCE_STD = (0.228, 0.224, 0.225)
CONTEXT_FRAMES = 7
NEIGHBORHOOD_PATCHES = 12
TOP_K = 5
TEMPERATURE = 0.1
BOUNDARY_TOLERANCE = 0.008
RECALL_THRESHOLD = 0.5
VOID = 255
OBJECTS_FILENAME = "scores.json"
_TARGETS_AT_ONCE = 1024
_ROUNDING = 1e-5

PROTOCOL = (
    "DAVIS-2017 semi-supervised, 480p files: label propagation with the last block's patch "
    f"features (first frame and last {CONTEXT_FRAMES} frames as context, "
    f"+-{NEIGHBORHOOD_PATCHES} patches, top {TOP_K}, temperature {TEMPERATURE}); J and F without "
    "first and last frame, mean over all objects"
)

Mask = NDArray[np.uint8]
FrameFeatures = Callable[[Tensor], Tensor]
LAYOUT = (
    "put the official 480p files so: DAVIS/ImageSets/2017/val.txt, "
    "DAVIS/JPEGImages/480p/SEQUENCE/00000.jpg, DAVIS/Annotations/480p/SEQUENCE/00000.png"
)


class Sequence(NamedTuple):
    """One video: its frames in order and a mask of object numbers for each."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class ObjectScore:
    """J (region overlap) and F (boundary agreement) of one object, 0..1.

    Attributes:
        sequence, object_id: Which object.
        j_mean, f_mean: Mean over the scored frames.
        j_recall, f_recall: Share of the frames above 0.5.
    """

    sequence: str
    object_id: int
    j_mean: float
    j_recall: float
    f_mean: float
    f_recall: float


@dataclass(frozen=True)
class SegmentationScores:
    """Means over all objects of all sequences, 0..1; `j_and_f` is the mean of both means."""

    encoder: str
    part: Part
    j_and_f: float
    j_mean: float
    j_recall: float
    f_mean: float
    f_recall: float
    objects: tuple[ObjectScore, ...]
    seconds: float


def read_davis(root: Path, split: str = "val") -> tuple[Sequence, ...]:
    """The sequences of a split, every file found and every size checked.

    Raises:
        DataError: For a missing list, sequence, frame or mask, too few frames, or a mask of
            another size than its frame.
    """
    listing = root / "ImageSets" / "2017" / f"{split}.txt"
    try:
        names = listing.read_text(encoding="utf-8").split()
    except FileNotFoundError as error:
        raise DataError(f"{listing} does not exist; {LAYOUT}") from error
    if not names:
        raise DataError(f"{listing} names no sequence; {LAYOUT}")
    return tuple(_read_sequence(root, name) for name in names)


def _read_sequence(root: Path, name: str) -> Sequence:
    frames = sorted((root / "JPEGImages" / "480p" / name).glob("*.jpg"))
    masks = sorted((root / "Annotations" / "480p" / name).glob("*.png"))
    unpaired = sorted({p.stem for p in frames} ^ {p.stem for p in masks})
    if unpaired:
        raise DataError(
            f"sequence {name!r}: {len(frames)} frames and {len(masks)} masks, without a partner: "
            f"{', '.join(unpaired[:5])}; {LAYOUT}"
        )
    if len(frames) < 3:
        raise DataError(
            f"sequence {name!r} has {len(frames)} frames; first and last are not scored, so it "
            f"needs at least 3; {LAYOUT}"
        )
    sequence = Sequence(name, tuple(frames), tuple(masks))
    _check_numbering(sequence)
    expected = _image_size(frames[0])
    for path in (*frames, *masks):
        if (size := _image_size(path)) != expected:
            raise DataError(
                f"{path} is {size[0]}x{size[1]}, but {frames[0]} is {expected[0]}x{expected[1]}; "
                "frames and masks of a sequence must have one size, fetch them again"
            )
    return sequence


def _check_numbering(sequence: Sequence) -> None:
    expected = [f"{i:05d}" for i in range(len(sequence.frames))]
    missing = sorted(set(expected) - {path.stem for path in sequence.frames})
    if missing:
        raise DataError(
            f"sequence {sequence.name!r}: frames are missing: {', '.join(missing[:5])}; {LAYOUT}"
        )


def _image_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image: {error}; fetch it again") from error


def read_mask(path: Path) -> Mask:
    """Object numbers of a palette PNG, (H, W): 0 background, 255 void.

    Raises:
        DataError: If it is no palette or grey image.
    """
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise DataError(
                f"{path} has mode {image.mode}; masks are palette PNGs whose values number the "
                "objects"
            )
        return np.array(image)


def palette() -> list[int]:
    """The colours of DAVIS and Pascal VOC masks, 256 x RGB.

    The bits of an index are dealt out to red, green and blue in turn, highest colour bit first.
    """
    return [
        sum(((index >> (3 * place + channel)) & 1) << (7 - place) for place in range(8))
        for index in range(256)
        for channel in range(3)
    ]


def write_mask(path: Path, mask: Mask) -> None:
    """Write object numbers (H, W) as a palette PNG."""
    image = Image.fromarray(mask)
    image.putpalette(palette())
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def frame_normalization(spec: ModelSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of frames: the encoder's, ImageNet's as the reference has it."""
    p = spec.preprocess
    return p.mean, REFERENCE_STD if p.std == IMAGENET_STD else p.std


def frame_pixels(path: Path, spec: ModelSpec, short_side_px: int = SHORT_SIDE_PX) -> Tensor:
    """A frame as the reference feeds it, (3, H, W) normalised.

    The short side becomes `short_side_px`, the long one in proportion, rounded down to a multiple
    of 64; bilinear without antialiasing.

    Source: DINO's ``eval_video_segmentation.py``, which resizes with OpenCV; there byte values
    can round one step differently.
    """
    image = torch.from_numpy(np.array(load_image(path))).permute(2, 0, 1).float()
    sides = image.shape[1:]
    size = [
        short_side_px
        if side == min(sides)
        else int(short_side_px * side / min(sides)) // LONG_SIDE_STEP_PX * LONG_SIDE_STEP_PX
        for side in sides
    ]
    resized = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in frame_normalization(spec))
    return (resized.round() / 255 - mean) / std


def propagate_labels(target: Tensor, sources: Tensor, labels: Tensor, window: Tensor) -> Tensor:
    """Soft labels of a frame's patches from those of earlier frames.

    A source votes with ``exp(cosine / 0.1)``; only those inside the window and, of these, each
    target's five strongest over all frames take part.

    Shapes: target (N, D), sources (S, N, D), labels (S, K, N), window (N, N) of 0 and 1
    -> (K, N), K object numbers with the background.

    Source: method of DINO's ``eval_video_segmentation.py``, ``label_propagation``.
    """
    target, sources = F.normalize(target, dim=-1), F.normalize(sources, dim=-1)
    votes = labels.transpose(0, 1).flatten(1)
    propagated = []
    for chunk, near in zip(
        target.split(_TARGETS_AT_ONCE), window.split(_TARGETS_AT_ONCE), strict=True
    ):
        weight = ((sources @ chunk.T) / TEMPERATURE).exp() * near.T
        weight = weight.flatten(0, 1)
        weakest = weight.topk(min(TOP_K, len(weight)), dim=0).values[-1]
        weight = weight.where(weight >= weakest, 0)
        propagated.append(votes @ (weight / weight.sum(0)))
    return torch.cat(propagated, dim=1)


def patch_window(height: int, width: int, radius: int = NEIGHBORHOOD_PATCHES) -> Tensor:
    """Which patches lie within a square around which, (N, N) float of 0 and 1, N = H x W."""
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    apart = [(axis[:, None] - axis[None]).abs() for axis in (rows, columns)]
    return (torch.maximum(*apart) <= radius).float()


def segment(
    features: FrameFeatures, frames: Iterable[Tensor], first_mask: Mask, *, name: str = "video"
) -> Iterator[Mask]:
    """Carry the first frame's mask through a video.

    Args:
        features: (3, H, W) pixels -> (h, w, D) patch features.
        frames: Normalised pixels of each frame, (3, H, W).
        first_mask: Object numbers of the first frame, in its original size.
        name: For the error message.

    Yields:
        The mask of each frame in the original size; the first is the given one.

    Raises:
        NonFiniteError: If a frame's features are not finite.
    """
    first_mask = np.where(first_mask == VOID, 0, first_mask).astype(np.uint8)
    context: deque[tuple[Tensor, Tensor]] = deque(maxlen=CONTEXT_FRAMES)
    for index, frame in enumerate(frames):
        grid = check_finite(features(frame), f"{name}, features of frame {index}")
        height, width, _ = grid.shape
        target = grid.flatten(0, 1)
        if index == 0:
            labels = _first_labels(first_mask, height, width).to(grid.device)
            first = target, labels
            window = patch_window(height, width).to(grid.device)
            yield first_mask
            continue
        known = [first, *context]
        sources, votes = (torch.stack(column) for column in zip(*known, strict=True))
        soft = propagate_labels(target, sources, votes, window)
        context.append((target, soft))
        yield _hard_mask(soft.unflatten(1, (height, width)), frame.shape[1:], first_mask.shape)


def _first_labels(mask: Mask, height: int, width: int) -> Tensor:
    small = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    numbers = torch.from_numpy(np.array(small)).long().flatten()
    return F.one_hot(numbers, int(mask.max()) + 1).T.float()


def _hard_mask(soft: Tensor, frame_size: tuple[int, ...], mask_size: tuple[int, ...]) -> Mask:
    """Object numbers in `mask_size` from soft labels (K, h, w)."""
    large = F.interpolate(soft[None], size=frame_size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    # A label that is the same everywhere but for rounding keeps its value: stretched to 0..1 the
    # background could win over it.
    spread = high - low
    stretched = torch.where(spread > _ROUNDING, (large - low) / spread, large)
    numbers = stretched.argmax(0).byte().cpu().numpy()
    size = mask_size[1], mask_size[0]
    return np.array(Image.fromarray(numbers).resize(size, Image.Resampling.NEAREST))


def region_overlap(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """J: intersection over union of two masks (H, W), 1 if both are empty."""
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def mask_boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels that differ from the next one to the right, below or diagonally, (H, W)."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def boundary_agreement(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """F: harmonic mean of boundary precision and recall of two masks (H, W).

    A boundary pixel counts as met if the other boundary passes within 0.8 % of the picture's
    diagonal, rounded up to whole pixels.

    Source: Perazzi et al. 2016; the rules for empty masks are those of davis2017-evaluation.
    """
    tolerance_px = np.ceil(BOUNDARY_TOLERANCE * np.hypot(*truth.shape))
    ours, theirs = mask_boundary(predicted), mask_boundary(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (distance_transform_edt(~theirs)[ours] <= tolerance_px).mean()
    recall = (distance_transform_edt(~ours)[theirs] <= tolerance_px).mean()
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def score_sequence(name: str, predicted: Mask, truth: Mask) -> list[ObjectScore]:
    """Scores of each object in a video, first and last frame left out, void pixels ignored.

    Objects are those of the first annotated mask; one that appears later only is not scored.

    Shapes: predicted, truth (T, H, W) object numbers.

    Raises:
        DataError: If the shapes differ, frames are too few, or the first mask has no object.

    Source: the choice of objects is that of davis2017-evaluation.
    """
    if predicted.shape != truth.shape or len(truth) < 3:
        raise DataError(
            f"sequence {name!r}: predicted masks {predicted.shape}, annotated {truth.shape}; both "
            "must be (T, H, W) with at least 3 frames"
        )
    valid = truth != VOID
    count = int(np.where(valid[0], truth[0], 0).max())
    if not count:
        raise DataError(
            f"sequence {name!r} has no annotated object in its first mask; fetch its masks again"
        )
    scores = []
    for number in range(1, count + 1):
        pairs = list(zip((predicted == number) & valid, truth == number, strict=True))[1:-1]
        j = np.array([region_overlap(ours, theirs) for ours, theirs in pairs])
        f = np.array([boundary_agreement(ours, theirs) for ours, theirs in pairs])
        recalls = [float((v > RECALL_THRESHOLD).mean()) for v in (j, f)]
        scores.append(
            ObjectScore(name, number, float(j.mean()), recalls[0], float(f.mean()), recalls[1])
        )
    return scores


def evaluate_segmentation(
    encoder: Encoder,
    sequences: Iterable[Sequence],
    out: Path,
    *,
    part: Part = "full",
    short_side_px: int = SHORT_SIDE_PX,
) -> SegmentationScores:
    """Segment and score videos; writes OUT/SEQUENCE/00000.png and so on.

    Args:
        encoder: Any; its features are cut to `part` before they are compared.
        sequences: From `read_davis`.
        out: Folder of the predicted masks.
        part: Which half of the features, or both.
        short_side_px: Other values than 480 leave the protocol.

    Raises:
        DataError: For masks that cannot be used.
        NonFiniteError: If features are not finite.
        ShapeError: If the encoder's patches do not divide the frames or it lacks the part.
    """
    start = time.perf_counter()
    device = next(encoder.parameters()).device
    objects: list[ObjectScore] = []
    for sequence in sequences:
        truth = np.stack([read_mask(path) for path in sequence.masks])
        frames = (frame_pixels(p, encoder.spec, short_side_px) for p in sequence.frames)

        def features(pixels: Tensor) -> Tensor:
            return patch_grid(encoder, pixels[None].to(device), part)[0]

        with evaluating(encoder), torch.inference_mode():
            masks = segment(features, frames, truth[0], name=sequence.name)
            bar = track(masks, sequence.name, total=len(truth), transient=True)
            predicted = np.stack(list(bar))
        objects += score_sequence(sequence.name, predicted, truth)
        for path, mask in zip(sequence.masks, predicted, strict=True):
            write_mask(out / sequence.name / path.name, mask)
    return _summary(encoder.spec.name, part, objects, time.perf_counter() - start)


def _summary(
    encoder: str, part: Part, objects: list[ObjectScore], seconds: float
) -> SegmentationScores:
    j, j_recall, f, f_recall = (
        float(np.mean([getattr(o, field) for o in objects]))
        for field in ("j_mean", "j_recall", "f_mean", "f_recall")
    )
    return SegmentationScores(
        encoder, part, (j + f) / 2, j, j_recall, f, f_recall, tuple(objects), seconds
    )


def segmentation_record(
    scores: SegmentationScores, encoder: Encoder, *, n_frames: int, short_side_px: int
) -> Record:
    """The scores as a record.

    Args:
        scores: What came out.
        encoder: What was scored.
        n_frames: Frames of all sequences.
        short_side_px: Of the frames that were fed.
    """
    metrics = ("j_and_f", "j_mean", "j_recall", "f_mean", "f_recall")
    return dense_record(
        encoder,
        {metric: getattr(scores, metric) for metric in metrics},
        task="segmentation",
        text=f"{PROTOCOL}; frames with a short side of {short_side_px} px; n counts objects",
        dataset="davis-2017",
        split="val",
        n_images=n_frames,
        n=len(scores.objects),
        seconds=scores.seconds,
        part=scores.part,
    )


def main(
    source: Annotated[
        str, typer.Argument(help="A released name, org/repo, local-dir:PATH, or a run's folder.")
    ],
    data: Annotated[Path, typer.Option(help="The DAVIS folder, with ImageSets in it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of masks and scores.")],
    part: Annotated[PartChoice, typer.Option(help="Which part of the features.")] = PartChoice.full,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    short_side_px: Annotated[
        int, typer.Option(min=64, help="Short side of the frames; other than 480 is no protocol.")
    ] = SHORT_SIDE_PX,
) -> None:
    """Carry the first masks of the DAVIS-2017 validation videos on, and score J and F.

    Writes the masks, results.json (the record) and scores.json (every object) to the folder.

    Example: python -m training.evaluate.segmentation clever-resnet18 --data DAVIS -o out/davis
    """
    forbid_tf32()
    try:
        encoder = load_encoder(source, device)[0]
        sequences = read_davis(data)
        scores = evaluate_segmentation(
            encoder, sequences, output, part=part.value, short_side_px=short_side_px
        )
        n_frames = sum(len(sequence.frames) for sequence in sequences)
        record = segmentation_record(
            scores, encoder, n_frames=n_frames, short_side_px=short_side_px
        )
        objects = [asdict(score) for score in scores.objects]
        write_atomic(output / OBJECTS_FILENAME, (json.dumps(objects, indent=2) + "\n").encode())
        record.write(output / RESULTS_FILENAME)
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(
        f"{scores.encoder}, {scores.part}: J&F {scores.j_and_f:.3f}, J {scores.j_mean:.3f} (recall "
        f"{scores.j_recall:.3f}), F {scores.f_mean:.3f} (recall {scores.f_recall:.3f}); "
        f"{len(scores.objects)} objects, {scores.seconds:.0f} s -> {output}"
    )


if __name__ == "__main__":
    typer.run(main)
