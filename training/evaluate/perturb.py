"""Seeded perturbations of evaluation images; each image's draw depends on (seed, index) alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training import pixel_ops
from training.pixel_ops import circular_mask
from training.streams import uniforms

JITTER_LOW = (0.6, 0.6, 0.6, -0.1)
JITTER_HIGH = (1.4, 1.4, 1.4, 0.1)
_STREAM = 1 << 32  # outside the view numbers of training
# Positions in the stream of an image.
_ANGLE, _JITTER, _NOISE = 0, 1, 16


@dataclass(frozen=True)
class Perturbation:
    """What is done to a test image, always all of it, in this order.

    Attributes:
        text: For records and cards.
        flip: Mirror left-right.
        max_angle_deg: Rotation uniform in +-this, nearest pixel, black corners; 0 for none.
        jitter: Colour jitter (0.4, 0.4, 0.4, 0.1).
        elastic_alpha: Strength of the elastic warp (sigma 5), 0 for none.
        masked: Black outside the inscribed circle, so that no corner tells the angle.
    """

    text: str
    flip: bool = False
    max_angle_deg: float = 0.0
    jitter: bool = False
    elastic_alpha: float = 0.0
    masked: bool = False

    @property
    def is_random(self) -> bool:
        """Whether two seeds give different pixels."""
        return bool(self.max_angle_deg or self.jitter or self.elastic_alpha)


# The authors' names in eval_linear.py: ori, basic, aug1, aug1_2, aug1_4_2, aug1_3, aug1_4_1 and
# aug1_4_3. "r" and "r_masked" are this project's own.
PERTURBATIONS: Mapping[str, Perturbation] = {
    "ori": Perturbation("Ori: none"),
    "cj": Perturbation("CJ: colour jitter", jitter=True),
    "cj_f": Perturbation("CJ+F: flip, jitter", flip=True, jitter=True),
    "cj_r": Perturbation("CJ+R: rotation in ±90°, jitter", max_angle_deg=90.0, jitter=True),
    "cj_r_e": Perturbation(
        "CJ+R+E: rotation in ±90°, jitter, elastic warp of strength 100",
        max_angle_deg=90.0,
        jitter=True,
        elastic_alpha=100.0,
    ),
    "cj_r180": Perturbation("CJ+R180: rotation in ±180°, jitter", max_angle_deg=180.0, jitter=True),
    "cj_r_e50": Perturbation(
        "CJ+R+E50: rotation in ±90°, jitter, elastic warp of strength 50",
        max_angle_deg=90.0,
        jitter=True,
        elastic_alpha=50.0,
    ),
    "cj_r_e150": Perturbation(
        "CJ+R+E150: rotation in ±90°, jitter, elastic warp of strength 150",
        max_angle_deg=90.0,
        jitter=True,
        elastic_alpha=150.0,
    ),
    "r": Perturbation("R: rotation in ±90°", max_angle_deg=90.0),
    "r_masked": Perturbation(
        "rotation in ±90°, black outside the inscribed circle", max_angle_deg=90.0, masked=True
    ),
}


def draw_angles(samples: NDArray[np.integer], seed: int, *, max_angle_deg: float = 90.0) -> Tensor:
    """Rotation angle of each image, uniform in +-`max_angle_deg` degrees, (N,)."""
    turn = uniforms(seed, 0, samples, _STREAM, 1, first=_ANGLE)[:, 0]
    return torch.from_numpy((2 * turn - 1) * max_angle_deg).float()


def draw_jitter(samples: NDArray[np.integer], seed: int) -> tuple[Tensor, Tensor]:
    """Order (N, 4) and factors (N, 4) of brightness, contrast, saturation and hue."""
    u = uniforms(seed, 0, samples, _STREAM, 8, first=_JITTER)
    low, high = np.array(JITTER_LOW), np.array(JITTER_HIGH)
    factors = low + u[:, 4:] * (high - low)
    return torch.from_numpy(u[:, :4].argsort(1)), torch.from_numpy(factors).float()


def perturb(x: Tensor, samples: NDArray[np.integer], kind: str, seed: int) -> Tensor:
    """Perturb resized and cropped evaluation images.

    Args:
        x: (N, 3, H, W) float, whole numbers 0..255.
        samples: Index of each image in its data set, (N,).
        kind: A key of `PERTURBATIONS`.
        seed: The other half of each image's key.

    Source: the authors' ``eval_linear.py``, which seeds nothing.
    """
    p = PERTURBATIONS[kind]
    everyone = torch.ones(len(x), dtype=torch.bool)
    if p.flip:
        x = x.flip(-1)
    if p.max_angle_deg:
        x = pixel_ops.rotate(x, draw_angles(samples, seed, max_angle_deg=p.max_angle_deg))
    if p.jitter:
        x = x.clone()
        pixel_ops.color_jitter_(x, *draw_jitter(samples, seed), everyone)
    if p.elastic_alpha:
        x = pixel_ops.elastic(x, _noise(x, samples, seed), alpha=p.elastic_alpha)
    if p.masked:
        x = circular_mask(x)
    return x


def _noise(x: Tensor, samples: NDArray[np.integer], seed: int) -> Tensor:
    """What an elastic warp smooths: uniform in -1..1, (N, 2, H, W)."""
    flat = uniforms(seed, 0, samples, _STREAM, 2 * x.shape[-2] * x.shape[-1], first=_NOISE)
    return torch.from_numpy(2 * flat - 1).float().view(-1, 2, *x.shape[-2:]).to(x.device)
