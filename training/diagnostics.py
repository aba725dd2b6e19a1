"""Is a half of the embedding alive? Numbers that fall when it collapses.

Legend: N rows, D width of the features, K prototypes. All are computed in float64, without
gradients, on the device of their input.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clever_zoo.errors import DataError, NonFiniteError, ShapeError


def _matrix(values: Tensor, name: str, min_columns: int) -> Tensor:
    if values.ndim != 2 or len(values) < 1 or values.shape[1] < min_columns:
        raise ShapeError(
            f"{name} have shape {tuple(values.shape)}; pass at least one row and {min_columns} "
            "column(s), (N, D) or (N, K)"
        )
    if not values.isfinite().all():
        raise NonFiniteError(f"{name} hold values that are not finite; the network has diverged")
    return values.double()


def _probabilities(values: Tensor) -> Tensor:
    rows = _matrix(values, "probabilities", 2)
    low, worst = rows.min().item(), (rows.sum(1) - 1).abs().max().item()
    if low < 0 or worst > 0.01:
        raise DataError(
            f"these are no probabilities: the smallest is {low:.4g}, and a row's sum is "
            f"{worst:.4g} away from 1; pass the softmax of the logits"
        )
    return rows


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Spread of the directions: 1 evenly over a sphere, 0 collapsed to a point.

    The mean over the D dimensions of the population standard deviation over rows of unit
    length, times sqrt(D).

    Args:
        features: (N, D).

    Returns:
        In [0, 1].

    Raises:
        ShapeError, NonFiniteError: If `features` is no matrix or not finite.

    Source: Chen & He 2021 (SimSiam), section 4.1.
    """
    rows = F.normalize(_matrix(features, "features", 1), dim=1)
    return rows.std(0, correction=0).mean().item() * math.sqrt(rows.shape[1])


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """Number of directions in which the rows vary: exp of the entropy of the spectrum.

    The spectrum is that of the matrix centred over rows, its singular values divided by their
    sum. Those as small as the rounding of the input's own type count as zero, so that constant
    rows have rank 1 and not that of their rounding errors.

    Args:
        features: (N, D).

    Returns:
        In [1, min(N - 1, D)]; 1 for constant rows.

    Raises:
        ShapeError, NonFiniteError: If `features` is no matrix or not finite.

    Source: Roy & Vetterli 2007.
    """
    rows = _matrix(features, "features", 1)
    count, width = rows.shape
    # Rounding is noise of eps times the root mean square; this is about its largest singular value.
    rounding = torch.finfo(features.dtype).eps * rows.norm() * (count**-0.5 + width**-0.5)
    spectrum = torch.linalg.svdvals(rows - rows.mean(0))
    spectrum = spectrum[spectrum > rounding]
    if not len(spectrum):
        return 1.0
    return torch.special.entr(spectrum / spectrum.sum()).sum().exp().item()


@torch.no_grad()
def usage_entropy(probabilities: Tensor) -> float:
    """How evenly the prototypes are used: 1 all alike, 0 only one.

    The entropy of the mean assignment, divided by ln K.

    Args:
        probabilities: (N, K), rows that sum to 1.

    Returns:
        In [0, 1].

    Raises:
        ShapeError, NonFiniteError, DataError: If these are no such probabilities.
    """
    mean = _probabilities(probabilities).mean(0)
    return torch.special.entr(mean).sum().item() / math.log(len(mean))


@torch.no_grad()
def assignment_entropy(probabilities: Tensor) -> float:
    """How undecided the single assignments are: 0 one-hot, 1 uniform.

    The mean of the rows' entropies, divided by ln K.

    Args:
        probabilities: (N, K), rows that sum to 1.

    Returns:
        In [0, 1].

    Raises:
        ShapeError, NonFiniteError, DataError: If these are no such probabilities.
    """
    rows = _probabilities(probabilities)
    return torch.special.entr(rows).sum(1).mean().item() / math.log(rows.shape[1])
