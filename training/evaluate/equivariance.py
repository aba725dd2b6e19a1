"""How much of what was done to a picture can be read from each part of its features.

A simple regression or classifier learns, on training images each changed by a draw of its own, to
tell the draw from the features, and is scored on test images with other draws. What a half holds
is thereby measured; to know what it means, measure an untrained network and a baseline cut at the
same index in the same way.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from clever_zoo.embedding import Part
from clever_zoo.errors import DataError, NonFiniteError
from clever_zoo.turn import wrapped
from training import pixel_ops
from training.evaluate.inputs import EvaluationImages, Features, embed_changed, parts_of
from training.evaluate.linear import fit_cached
from training.evaluate.perturb import draw_angles, draw_jitter, perturb
from training.evaluate.scores import top_k
from training.streams import uniforms
from training.views import CROP_DRAWS, crop_boxes

RIDGE_PENALTY = 1.0
MAX_ANGLE_DEG = 90.0
CROP_SCALE = (0.2, 1.0)
HIDDEN_DIMS = (256, 256)
EPOCHS = 30
DRIFT_ANGLES_DEG = range(-180, 181, 15)
DRIFT_IMAGES = 1000
TRAIN_IMAGES = 20_000
MIN_TRAIN_IMAGES = 20
# Two seeds, so that image i of the two splits does not share its draw.
TRAIN_SEED, TEST_SEED = 1, 0

_STREAM = (1 << 32) + 1  # beside that of the perturbations
# Positions in the stream of an image.
_QUARTER, _FLIP, _PAIR, _CROP = 0, 1, 2, 4

Samples = NDArray[np.integer]
Values = NDArray[np.floating]

_READINGS: Mapping[str, str] = {
    "angle": (
        "rotation uniform in ±90°, black outside the inscribed circle; ridge regression (penalty "
        f"{RIDGE_PENALTY:g}, standardised features) to (sin, cos): R², mean of the two, and mean "
        "absolute error of the angle"
    ),
    "rotation4": (
        "rotation by 0, 90, 180 or 270°, black outside the inscribed circle; logistic regression "
        "(L2 penalty 1, standardised features); chance is 25 %"
    ),
    "relative_angle": (
        "two copies of an image, each rotated on its own by an angle uniform in ±90°, black "
        "outside the inscribed circle; from the standardised features of both a perceptron with "
        f"two hidden layers of {HIDDEN_DIMS[0]} (Adam, learning rate 0.001, batch 200, "
        f"{EPOCHS} epochs, the best one on a held-out tenth of the training pairs) predicts "
        "(sin, cos) of the difference: R², mean of the two, and mean absolute error of the angle"
    ),
    "crop": (
        f"random resized crop (scale {CROP_SCALE[0]:g} to {CROP_SCALE[1]:g}, aspect ratio 3:4 to "
        f"4:3, bicubic); ridge regression (penalty {RIDGE_PENALTY:g}, standardised features) to "
        "the logarithm of the box's share of the area and to its centre: R² of each"
    ),
    "flip": (
        "mirrored left-right or not, at even odds; logistic regression (L2 penalty 1, "
        "standardised features); chance is 50 %"
    ),
    "jitter": (
        "colour jitter (0.4, 0.4, 0.4, 0.1), always; ridge regression (penalty "
        f"{RIDGE_PENALTY:g}, standardised features) to its four factors: R² of each; on grey "
        "pictures saturation and hue change nothing, so that theirs is near 0"
    ),
}
TASKS: Mapping[str, str] = {
    **{
        name: f"{text}; fitted on the first {TRAIN_IMAGES:,} training images (seed {TRAIN_SEED}), "
        f"scored on the test images (seed {TEST_SEED})"
        for name, text in _READINGS.items()
    },
    "drift": (
        "distance between the features of a rotated and of the upright image over the length of "
        "the latter, black outside the inscribed circle; mean over the first "
        f"{DRIFT_IMAGES:,} test images"
    ),
}


class Reading(NamedTuple):
    """One number.

    Attributes:
        task: Key of `TASKS`.
        metric: "r2" and "r2_..." (1 is perfect, 0 no better than the mean), "mae_deg" in degrees,
            "top1" in percent, "ratio".
        part: Which part of the features.
        value: The number.
        n: Test images or pairs that were scored.
        at: Angle of a point of the drift curve in degrees, else None.
        seconds: Fitting and scoring of this part, and the embedding that all parts share.
    """

    task: str
    metric: str
    part: Part
    value: float
    n: int
    at: float | None = None
    seconds: float = 0.0


def rotate_masked(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Rotate (B, 3, s, s) counter-clockwise by (B,) degrees, black outside the circle."""
    return pixel_ops.circular_mask(pixel_ops.rotate(pixels, degrees))


def draw_quarters(samples: Samples, seed: int) -> Tensor:
    """Quarter turns counter-clockwise of each image, 0..3, (N,) int64."""
    u = uniforms(seed, 0, samples, _STREAM, 1, first=_QUARTER)[:, 0]
    return torch.from_numpy((u * 4).astype(np.int64))


def draw_flips(samples: Samples, seed: int) -> Tensor:
    """Whether each image is mirrored, (N,) bool."""
    return torch.from_numpy(uniforms(seed, 0, samples, _STREAM, 1, first=_FLIP)[:, 0] < 0.5)


def draw_pairs(samples: Samples, seed: int) -> Tensor:
    """Angles of the two copies of each image, uniform in ±90 degrees, (N, 2)."""
    u = uniforms(seed, 0, samples, _STREAM, 2, first=_PAIR)
    return torch.from_numpy((2 * u - 1) * MAX_ANGLE_DEG).float()


def draw_boxes(samples: Samples, seed: int, size_px: int) -> Tensor:
    """Box cut out of each square: top, left, height, width in pixels, (N, 4)."""
    u = uniforms(seed, 0, samples, _STREAM, CROP_DRAWS, first=_CROP)
    return torch.from_numpy(crop_boxes(u, (size_px, size_px), CROP_SCALE).T.copy()).float()


def turn_quarters(pixels: Tensor, samples: Samples, seed: int) -> Tensor:
    """The images of "rotation4"."""
    quarters = draw_quarters(samples, seed).tolist()
    turned = [image.rot90(k, (-2, -1)) for image, k in zip(pixels, quarters, strict=True)]
    return pixel_ops.circular_mask(torch.stack(turned))


def turn_copy(pixels: Tensor, samples: Samples, seed: int, *, copy: int) -> Tensor:
    """One of the two copies of each image of "relative_angle"; `copy` is 0 or 1."""
    return rotate_masked(pixels, draw_pairs(samples, seed)[:, copy])


def crop_images(pixels: Tensor, samples: Samples, seed: int) -> Tensor:
    """The images of "crop"."""
    size = pixels.shape[-1]
    return pixel_ops.resized_crop(pixels.byte(), draw_boxes(samples, seed, size), size, "bicubic")


def flip_images(pixels: Tensor, samples: Samples, seed: int) -> Tensor:
    """The images of "flip"."""
    flipped = pixels.clone()
    pixel_ops.flip_(flipped, draw_flips(samples, seed))
    return flipped


def angle_differences(samples: Samples, seed: int) -> Values:
    """Angle from the first to the second copy of each image, degrees in ±180, (N,)."""
    first, second = draw_pairs(samples, seed).numpy().T
    return second - first


def box_values(samples: Samples, seed: int, size_px: int) -> Values:
    """Logarithm of the box's share of the area, x and y of its centre in 0..1, (N, 3)."""
    top, left, height, width = draw_boxes(samples, seed, size_px).numpy().T / size_px
    return np.stack([np.log(height * width), left + width / 2, top + height / 2], axis=1)


def angle_error(predicted: Values, degrees: Values) -> float:
    """Mean absolute error in degrees of (sin, cos) predictions (N, 2) of angles (N,)."""
    error = np.rad2deg(np.arctan2(*predicted.T)) - degrees
    return float(np.abs(wrapped(error)).mean())


def _sin_cos(degrees: Values) -> Values:
    radians = np.deg2rad(degrees)
    return np.stack([np.sin(radians), np.cos(radians)], axis=1)


def _ridge(x: Tensor, y: Values) -> Pipeline:
    return make_pipeline(StandardScaler(), Ridge(alpha=RIDGE_PENALTY)).fit(x.numpy(), y)


def _perceptron(x: Tensor, y: Values) -> Pipeline:
    regression = MLPRegressor(
        hidden_layer_sizes=HIDDEN_DIMS,
        learning_rate_init=1e-3,
        max_iter=EPOCHS,
        early_stopping=True,
        n_iter_no_change=EPOCHS,
        random_state=0,
    )
    with warnings.catch_warnings():
        # The number of epochs is part of the protocol.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), regression).fit(x.numpy(), y)


def read_angle(
    x: Tensor,
    degrees: Values,
    test_x: Tensor,
    test_degrees: Values,
    fit: Callable[[Tensor, Values], Pipeline],
) -> dict[str, float]:
    """Fit (sin, cos) of an angle and score it.

    Args:
        x, test_x: Features (N, D).
        degrees, test_degrees: (N,).
        fit: Gives the fitted regression of (N, D) to (N, 2).
    """
    predicted = fit(x, _sin_cos(degrees)).predict(test_x.numpy())
    r2 = float(r2_score(_sin_cos(test_degrees), predicted))
    return {"r2": r2, "mae_deg": angle_error(predicted, test_degrees)}


def read_linear_angle(x: Tensor, y: Values, test_x: Tensor, test_y: Values) -> dict[str, float]:
    """`read_angle` by ridge regression."""
    # Features are nearly collinear: single precision is not enough to solve for them.
    return read_angle(x.double(), y, test_x.double(), test_y, _ridge)


def read_relative_angle(x: Tensor, y: Values, test_x: Tensor, test_y: Values) -> dict[str, float]:
    """`read_angle` by a perceptron with two hidden layers."""
    return read_angle(x, y, test_x, test_y, _perceptron)


def read_values(
    x: Tensor, y: Values, test_x: Tensor, test_y: Values, *, names: Sequence[str]
) -> dict[str, float]:
    """R² of ridge regression of features (N, D) to each of the values (N, len(names))."""
    predicted = _ridge(x.double(), y).predict(test_x.double().numpy())
    scores = r2_score(test_y, predicted, multioutput="raw_values")
    return {f"r2_{name}": float(score) for name, score in zip(names, scores, strict=True)}


def read_class(
    x: Tensor, y: Values, test_x: Tensor, test_y: Values, *, classes: int
) -> dict[str, float]:
    """Accuracy in percent of logistic regression of features (N, D) to classes (N,).

    Raises:
        NonFiniteError: If the regression does not reach its minimum.
    """
    probe = fit_cached(x, torch.from_numpy(y).long(), classes)
    if not probe.converged:
        raise NonFiniteError(
            f"logistic regression of {tuple(x.shape)} features to {classes} classes did not reach "
            "its minimum; look at the features"
        )
    return {"top1": top_k(probe.scores(test_x), torch.from_numpy(test_y).long(), 1)}


class _Task(NamedTuple):
    """How the images of a task are made, and what is read from them."""

    changes: Sequence[Callable[[Tensor, Samples, int], Tensor]]  # each gives one picture to embed
    targets: Callable[[Samples, int, int], Values]  # samples, seed, size in pixels
    read: Callable[[Tensor, Values, Tensor, Values], dict[str, float]]


_TASKS: Mapping[str, _Task] = {
    "angle": _Task(
        [lambda pixels, samples, seed: perturb(pixels, samples, "r_masked", seed)],
        lambda samples, seed, _: draw_angles(samples, seed).numpy(),
        read_linear_angle,
    ),
    "rotation4": _Task(
        [turn_quarters],
        lambda samples, seed, _: draw_quarters(samples, seed).numpy(),
        partial(read_class, classes=4),
    ),
    "relative_angle": _Task(
        [partial(turn_copy, copy=0), partial(turn_copy, copy=1)],
        lambda samples, seed, _: angle_differences(samples, seed),
        read_relative_angle,
    ),
    "crop": _Task([crop_images], box_values, partial(read_values, names=("scale", "x", "y"))),
    "flip": _Task(
        [flip_images],
        lambda samples, seed, _: draw_flips(samples, seed).numpy(),
        partial(read_class, classes=2),
    ),
    "jitter": _Task(
        [lambda pixels, samples, seed: perturb(pixels, samples, "cj", seed)],
        lambda samples, seed, _: draw_jitter(samples, seed)[1].numpy(),
        partial(read_values, names=("brightness", "contrast", "saturation", "hue")),
    ),
}


def measure(
    features: Features,
    cut: int | None,
    train: EvaluationImages,
    test: EvaluationImages,
    *,
    description: str = "equivariance",
) -> list[Reading]:
    """Every reading of one network; see `TASKS`.

    Args:
        features: From `features_of`.
        cut: Index at which the features are cut into halves; None for the full vector alone.
        train, test: What is fitted on and what is scored.
        description: For the progress bar.

    Raises:
        NonFiniteError: If a feature is not finite, or an image's features are all 0.
        DataError: If there are too few images.
    """
    count, test_count = min(len(train), TRAIN_IMAGES), len(test)
    if count < MIN_TRAIN_IMAGES or test_count < 2:
        raise DataError(
            f"equivariance is to be measured with {count} training and {test_count} test image(s); "
            f"use at least {MIN_TRAIN_IMAGES} and 2"
        )
    for images in (train, test):
        images.prepare("bicubic")  # its progress bar cannot stand inside the other
    readings = []
    for name in track(TASKS, description=description, transient=True):
        if name == "drift":
            readings += _drift(features, cut, test, min(test_count, DRIFT_IMAGES))
        else:
            readings += _readings(name, features, cut, (train, count), (test, test_count))
    return readings


def _readings(
    name: str,
    features: Features,
    cut: int | None,
    train: tuple[EvaluationImages, int],
    test: tuple[EvaluationImages, int],
) -> list[Reading]:
    """What one task reads from each part; images come with how many of them are used."""
    task, started = _TASKS[name], time.monotonic()
    parts, targets = [], []
    for (images, count), seed in ((train, TRAIN_SEED), (test, TEST_SEED)):
        embedded = [
            embed_changed(features, images, partial(change, seed=seed), name=name, limit=count)
            for change in task.changes
        ]
        parts.append(_side_by_side(embedded, cut))
        targets.append(task.targets(np.arange(count), seed, images.spec.input_size_px))
    embed_s = time.monotonic() - started
    readings = []
    for part, x in parts[0].items():
        started = time.monotonic()
        values = task.read(x, targets[0], parts[1][part], targets[1])
        seconds = embed_s + time.monotonic() - started
        n = len(targets[1])
        readings += [Reading(name, m, part, v, n, seconds=seconds) for m, v in values.items()]
    return readings


def _side_by_side(embedded: Sequence[Tensor], cut: int | None) -> dict[Part, Tensor]:
    """By part, that part of several (N, D) features beside each other."""
    split = [parts_of(features, cut) for features in embedded]
    return {part: torch.cat([s[part] for s in split], dim=1) for part in split[0]}


def _drift(
    features: Features, cut: int | None, test: EvaluationImages, count: int
) -> list[Reading]:
    started = time.monotonic()

    def turned(degrees: float) -> dict[Part, Tensor]:
        def change(pixels: Tensor, samples: Samples) -> Tensor:
            return rotate_masked(pixels, torch.full((len(samples),), degrees))

        return _side_by_side(
            [embed_changed(features, test, change, name="drift", limit=count)], cut
        )

    upright = turned(0.0)
    by_angle = {a: turned(float(a)) if a else upright for a in DRIFT_ANGLES_DEG}
    seconds = time.monotonic() - started
    return [
        Reading("drift", "ratio", part, drift(x, upright[part]), len(x), float(angle), seconds)
        for angle, parts in by_angle.items()
        for part, x in parts.items()
    ]


def drift(turned: Tensor, upright: Tensor) -> float:
    """Mean over images of the distance of two features over the length of the second, (N, D).

    Raises:
        NonFiniteError: If the length of a second one is 0.
    """
    length = upright.double().norm(dim=1)
    if not length.all():
        row = int((length == 0).nonzero()[0])
        raise NonFiniteError(
            f"all {upright.shape[1]} features of upright image {row} are 0, so its drift has no "
            "value; look for a dead part of the network or a black image"
        )
    return float(((turned.double() - upright.double()).norm(dim=1) / length).mean())
