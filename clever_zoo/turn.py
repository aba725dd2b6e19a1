"""By how much one picture is turned against another, read from the equivariant half."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clever_zoo.compare import check_split
from clever_zoo.embedder import ImageEmbedder, Progress
from clever_zoo.errors import NonFiniteError
from clever_zoo.preprocess import ImageInput, image_pixels
from clever_zoo.samples import sample_paths

MAX_ANGLE_DEG = 90.0
TURNS = 12  # copies of each picture that the reading is fitted on
HELD_OUT = 3  # every third picture tests it
PENALTY = 1.0
_BATCH_SIZE = 100

Squares = NDArray[np.uint8]  # (N, size, size, 3)
Values = NDArray[np.float64]


class Turn(NamedTuple):
    """By how much a picture is turned against another one.

    Attributes:
        degrees: From the first to the second, counter-clockwise, above -180 and up to 180.
        error_deg: Mean absolute error of such readings on pairs of turned copies of bundled
            pictures that the reading was not fitted on.
        guess_deg: What the answer 0 would have cost on the same pairs.
    """

    degrees: float
    error_deg: float
    guess_deg: float


class _Reading(NamedTuple):
    """Ridge regression of standardised features (N, D) to sine and cosine."""

    mean: Values
    scale: Values
    weight: Values  # (D, 2)
    bias: Values

    def degrees(self, features: Values) -> Values:
        """Angles (N,) of features (N, D)."""
        sine, cosine = ((features - self.mean) / self.scale @ self.weight + self.bias).T
        return np.rad2deg(np.arctan2(sine, cosine))


def read_turn(
    encoder: ImageEmbedder,
    a: ImageInput,
    b: ImageInput,
    *,
    on_progress: Progress | None = None,
) -> Turn:
    """By how many degrees picture `b` is turned against picture `a`.

    How a picture stands is read from its equivariant half by a ridge regression, fitted now on
    copies of bundled pictures (small grey pictures of clothes) turned by up to 90 degrees. All
    pictures are black outside their inscribed circle, so that no corner tells the angle. What the
    reading is worth with this encoder stands beside it; with pictures of another kind it is worth
    less.

    Args:
        encoder: With a split.
        a, b: Paths, PIL images or (H, W, 3) uint8 arrays.
        on_progress: Called after each batch with the number of pictures done, of `turn_pictures()`.

    Raises:
        ImageError: For an unreadable picture; its index is 0 for `a`, 1 for `b`.
        SpecError: If the features are not split.
        NonFiniteError: If a feature is not finite.
    """
    spec = encoder.spec
    check_split(spec)
    sources: list[ImageInput] = [a, b, *sample_paths()]
    squares = np.stack([image_pixels(x, spec.preprocess, i) for i, x in enumerate(sources)])
    tested, fitted = _copies()
    numbers = np.concatenate([[0, 1], tested, fitted])
    angles = np.random.default_rng(0).uniform(-MAX_ANGLE_DEG, MAX_ANGLE_DEG, len(numbers))
    angles[:2] = 0
    features = _equivariant(encoder, squares, numbers, angles, on_progress)
    pairs = 2 + len(tested)
    reading = _fit(features[pairs:], angles[pairs:])
    first, second = reading.degrees(features[:pairs]).reshape(-1, 2).T
    degrees = wrapped(second - first)
    true = angles[1:pairs:2] - angles[:pairs:2]
    return Turn(
        degrees=float(degrees[0]),
        error_deg=float(np.abs(wrapped(degrees - true))[1:].mean()),
        guess_deg=float(np.abs(true)[1:].mean()),
    )


def turn_pictures() -> int:
    """How many pictures `read_turn` embeds."""
    return 2 + sum(map(len, _copies()))


def _copies() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the bundled pictures, after the two compared: in pairs to test, and to fit."""
    samples = np.arange(2, 2 + len(sample_paths()))
    tested = samples[::HELD_OUT]
    return np.repeat(tested, 2), np.repeat(np.setdiff1d(samples, tested), TURNS)


def turned(squares: Squares, degrees: Values) -> Squares:
    """Turn each square counter-clockwise, nearest pixel, black outside the inscribed circle."""
    size = squares.shape[1]
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    outside = x**2 + y**2 > (size / 2) ** 2
    copies = np.stack(
        [np.asarray(Image.fromarray(s).rotate(d)) for s, d in zip(squares, degrees, strict=True)]
    )
    copies[:, outside] = 0
    return copies


def wrapped(degrees: Values) -> Values:
    """The same angles, above -180 and up to 180."""
    return 180 - (180 - degrees) % 360


def _equivariant(
    encoder: ImageEmbedder,
    squares: Squares,
    numbers: NDArray[np.int64],
    degrees: Values,
    on_progress: Progress | None,
) -> Values:
    """Equivariant halves (M, d) of the squares of these numbers, turned."""
    rows = []
    for start in range(0, len(numbers), _BATCH_SIZE):
        batch = slice(start, start + _BATCH_SIZE)
        pixels = turned(squares[numbers[batch]], degrees[batch])
        rows.append(encoder.embed_pixels(pixels).equivariant.astype(np.float64))
        if on_progress is not None:
            on_progress(start + len(pixels))
    features = np.concatenate(rows)
    if not np.isfinite(features).all():
        raise NonFiniteError(
            f"a picture's equivariant half of {encoder.spec.name} is not finite; check the "
            "weights with clever-zoo verify"
        )
    return features


def _fit(features: Values, degrees: Values) -> _Reading:
    radians = np.deg2rad(degrees)
    targets = np.stack([np.sin(radians), np.cos(radians)], axis=1)
    mean, spread = features.mean(0), features.std(0)
    scale = np.where(spread > 0, spread, 1.0)
    x, bias = (features - mean) / scale, targets.mean(0)
    gram = x.T @ x + PENALTY * np.eye(x.shape[1])
    return _Reading(mean, scale, np.linalg.solve(gram, x.T @ (targets - bias)), bias)
