"""Seeded perturbations of evaluation images; each image's draw depends on (seed, index) alone."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training import pixel_ops
from training.pixel_ops import circular_mask
from training.streams import uniforms

Perturbation = Literal["clean", "r", "cj_r", "r_masked"]

MAX_ANGLE_DEG = 90.0
JITTER_LOW = (0.6, 0.6, 0.6, -0.1)
JITTER_HIGH = (1.4, 1.4, 1.4, 0.1)
_STREAM = 1 << 32  # outside the view numbers of training


def draw_angles(samples: NDArray[np.integer], seed: int) -> Tensor:
    """Rotation angle of each image, uniform in [-90, 90] degrees, (N,)."""
    turn = uniforms(seed, 0, samples, _STREAM, 1)[:, 0]
    return torch.from_numpy((2 * turn - 1) * MAX_ANGLE_DEG).float()


def perturb(x: Tensor, samples: NDArray[np.integer], kind: Perturbation, seed: int) -> Tensor:
    """Perturb resized and cropped evaluation images.

    Args:
        x: (N, 3, H, W) float, whole numbers 0..255.
        samples: Index of each image in its data set, (N,).
        kind: "clean"; "r": rotation in [-90, 90] degrees, nearest, black corners; "cj_r": the
            same, then colour jitter (0.4, 0.4, 0.4, 0.1), always; "r_masked": rotation, then
            everything outside the inscribed circle black.

    Source: the authors' ``eval_linear.py`` (CJ+R is its ``aug1_2``), which seeds nothing.
    """
    if kind == "clean":
        return x
    x = pixel_ops.rotate(x, draw_angles(samples, seed).to(x.device))
    if kind == "r_masked":
        return circular_mask(x)
    if kind == "cj_r":
        u = uniforms(seed, 0, samples, _STREAM, 8, first=1)
        low, high = np.array(JITTER_LOW), np.array(JITTER_HIGH)
        factors = torch.from_numpy(low + u[:, 4:] * (high - low)).float().to(x.device)
        order = torch.from_numpy(u[:, :4].argsort(1)).to(x.device)
        everyone = torch.ones(len(x), dtype=torch.bool, device=x.device)
        pixel_ops.color_jitter_(x, order, factors, everyone)
    return x
