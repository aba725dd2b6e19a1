"""The terms of every objective, one pure function each.

Legend: T teacher (target) views, S student (online) views, of which the first T are the same
views, B batch, K prototypes, D width. Teacher arguments are detached here. A view is never
paired with itself: the T (S - 1) remaining pairs are averaged. Half-precision arguments are
taken to float32, and autocast is off inside.
"""

import functools
from collections.abc import Callable
from typing import Literal, ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clever_zoo.errors import SpecError

Reduction = Literal["mean_abs", "abs_mean", "mean_square"]
BalanceScope = Literal["all", "mlp"]
BalanceShape = Literal["absolute", "square", "log_ratio"]

_P = ParamSpec("_P")


def _widened(argument: object) -> object:
    half = isinstance(argument, Tensor) and argument.dtype in (torch.float16, torch.bfloat16)
    return argument.float() if half else argument  # type: ignore[union-attr]


def full_precision(loss: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Compute a loss in float32 (or wider) whatever autocast says."""

    @functools.wraps(loss)
    def compute(*arguments: _P.args, **keywords: _P.kwargs) -> Tensor:
        wide = [_widened(a) for a in arguments]
        named = {k: _widened(a) for k, a in keywords.items()}
        tensor = next(a for a in (*wide, *named.values()) if isinstance(a, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return loss(*wide, **named)  # type: ignore[arg-type]

    return compute


def _mean_over_pairs(pairs: Tensor) -> Tensor:
    """Mean of a (T, S) table without the entries in which a view meets itself."""
    teacher_views, student_views = pairs.shape
    return (pairs.sum() - pairs.diagonal().sum()) / (teacher_views * (student_views - 1))


@full_precision
def dino_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    center: Tensor,
    teacher_temp: float,
    student_temp: float,
) -> Tensor:
    """Cross-entropy between the prototype assignments of different views.

    For each pair (t, s != t): ``mean_b -sum_k q[t, b, k] * log p[s, b, k]`` with
    ``q = softmax((teacher - center) / teacher_temp)`` and ``p = softmax(student / student_temp)``.

    Args:
        teacher_logits: (T, B, K).
        student_logits: (S, B, K).
        center: (K,), subtracted from the teacher's logits.

    Returns:
        Scalar in nats.

    Source: paper, L_CL; Caron et al. 2021, equation 3.
    """
    target = ((teacher_logits - center) / teacher_temp).softmax(-1).detach()
    log_prediction = (student_logits / student_temp).log_softmax(-1)
    pairs = -torch.einsum("tbk,sbk->ts", target, log_prediction) / target.shape[1]
    return _mean_over_pairs(pairs)


@full_precision
def orthogonality_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    center: Tensor,
    teacher_temp: float,
    student_temp: float,
    reduction: Reduction = "mean_abs",
) -> Tensor:
    """Cosine similarity of the equivariant prototype assignments of different views.

    For each pair (t, s != t): ``|mean_b cos(a[t, b], p[s, b])|`` over the K axis, with ``a`` and
    ``p`` the softmax outputs of `dino_loss`. Probabilities are not negative, so every cosine is
    in [0, 1] and the absolute value changes nothing.

    Args:
        teacher_logits: (T, B, K).
        student_logits: (S, B, K).
        center: (K,), subtracted from the teacher's logits.
        reduction: As in `embedding_orthogonality_loss`; the first two agree here.

    Returns:
        Scalar in [0, 1]; 1 when all assignments are equal.

    Source: paper, L_Orth; the authors' ``main_dino.py``.
    """
    target = ((teacher_logits - center) / teacher_temp).softmax(-1).detach()
    prediction = (student_logits / student_temp).softmax(-1)
    cosines = torch.einsum(
        "tbk,sbk->tsb",
        F.normalize(target, dim=-1, eps=1e-8),
        F.normalize(prediction, dim=-1, eps=1e-8),
    )
    return _reduced_cosines(cosines, reduction)


@full_precision
def embedding_orthogonality_loss(
    online: Tensor,
    target: Tensor,
    *,
    reduction: Reduction = "mean_abs",
    detach_target: bool = True,
) -> Tensor:
    """Orthogonality of un-normalised equivariant outputs, for methods without prototypes.

    Pairs (target view t, online view s != t) of cosines over the last axis; here they can be
    negative, so the order of mean and absolute value matters.

    Args:
        online: (S, B, D), the student's (or predictor's) equivariant output of each view.
        target: (T, B, D), the target's output of the first T views.
        reduction: "mean_abs" (the reference) takes |mean over batch and pairs|; "abs_mean" the
            mean of absolute cosines; "mean_square" the mean of squares.
        detach_target: False lets the gradient reach both sides, for methods that have no target.

    Returns:
        Scalar in [0, 1].

    Source: the SimSiam form of the authors' DDCL code.
    """
    cosines = torch.einsum(
        "tbd,sbd->tsb",
        F.normalize(target.detach() if detach_target else target, dim=-1, eps=1e-8),
        F.normalize(online, dim=-1, eps=1e-8),
    )
    return _reduced_cosines(cosines, reduction)


def _reduced_cosines(cosines: Tensor, reduction: Reduction) -> Tensor:
    """One number from the cosines (T, S, B) of all pairs."""
    match reduction:
        case "mean_abs":
            return _mean_over_pairs(cosines.mean(-1)).abs()
        case "abs_mean":
            return _mean_over_pairs(cosines.abs().mean(-1))
        case "mean_square":
            return _mean_over_pairs(cosines.square().mean(-1))
        case _:
            raise SpecError(
                f"reduction is {reduction!r}; use 'mean_abs', 'abs_mean' or 'mean_square'"
            )


def head_balance_loss(
    invariant_head: nn.Module,
    equivariant_head: nn.Module,
    *,
    scope: BalanceScope = "all",
    normalize: bool = False,
    shape: BalanceShape = "absolute",
) -> Tensor:
    """Difference of the two heads' squared parameter norms, ``|sum p^2 - sum p^2|``.

    Counts trainable parameters only. The reference counts the frozen gains too, which cancel
    when both heads have equally many prototypes, the only case in which its code runs.

    Args:
        invariant_head, equivariant_head: Two modules of one structure.
        scope: "all" parameters (the reference), or the "mlp" without the prototypes, whose norm
            does not change what a weight-normalised layer computes.
        normalize: Means instead of sums of squares, so that the heads' sizes cancel.
        shape: Of the difference: "absolute" (the reference), "square", or "log_ratio", the
            squared logarithm of the ratio; the last two have no kink at equality.

    Source: paper, L_PReg; the authors' ``main_dino.py``.
    """
    a, b = (_squared_norm(h, scope, normalize) for h in (invariant_head, equivariant_head))
    match shape:
        case "absolute":
            return (a - b).abs()
        case "square":
            return (a - b).square()
        case "log_ratio":
            return (a / b).log().square()
        case _:
            raise SpecError(f"shape is {shape!r}; use 'absolute', 'square' or 'log_ratio'")


def _squared_norm(head: nn.Module, scope: BalanceScope, normalize: bool) -> Tensor:
    counted = [
        p
        for name, p in head.named_parameters()
        if p.requires_grad and not (scope == "mlp" and "last_layer" in name)
    ]
    total = torch.stack([p.square().sum() for p in counted]).sum() if counted else torch.zeros(())
    return total / sum(p.numel() for p in counted) if normalize else total


@full_precision
def negative_cosine_loss(target: Tensor, online: Tensor) -> Tensor:
    """Minus the cosine of different views: ``mean over pairs of mean_b -cos(online, target)``.

    Shapes: target (T, B, D), detached; online (S, B, D) -> scalar in [-1, 1].

    Source: Chen & He 2021 (SimSiam), equation 2.
    """
    cosines = torch.einsum(
        "tbd,sbd->ts",
        F.normalize(target.detach(), dim=-1),
        F.normalize(online, dim=-1),
    )
    return -_mean_over_pairs(cosines / online.shape[1])


@full_precision
def info_nce_loss(keys: Tensor, queries: Tensor, *, temperature: float) -> Tensor:
    """Each query finds its image's key of another view among the keys of the batch.

    For each pair (t, s != t): ``mean_b -log softmax_c(cos(queries[s, b], keys[t, c]) / tau)[b]``.

    Shapes: keys (T, B, D), detached; queries (S, B, D) -> scalar in nats.

    Source: Chen et al. 2021 (MoCo v3), algorithm 1, which scales this by 2 tau and sums both
    directions instead of averaging them.
    """
    keys, queries = F.normalize(keys.detach(), dim=-1), F.normalize(queries, dim=-1)
    similarity = torch.einsum("sbd,tcd->tsbc", queries, keys) / temperature
    own = similarity.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    return -_mean_over_pairs(own.mean(-1))


@full_precision
def nt_xent_loss(projections: Tensor, *, temperature: float) -> Tensor:
    """Each projection finds the same image's other view among all other 2B - 1 projections.

    Shapes: (2, B, D) -> scalar in nats.

    Source: Chen et al. 2020 (SimCLR), equation 1.
    """
    z = F.normalize(projections.flatten(0, 1), dim=-1)
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -1e9)
    other_view = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(similarity, other_view)


@full_precision
def barlow_twins_loss(projections: Tensor, *, off_diagonal_weight: float) -> Tensor:
    """The cross-correlation of two views' features is pulled to the identity.

    With both views standardised over the batch and ``c = z1^T z2 / B``:
    ``sum_i (1 - c_ii)^2 + off_diagonal_weight * sum_{i != j} c_ij^2``.

    Shapes: (2, B, D) -> scalar.

    Source: Zbontar et al. 2021, equation 1; standardised as a batch-norm layer does (eps 1e-5).
    """
    center = projections - projections.mean(1, keepdim=True)
    first, second = center / (center.square().mean(1, keepdim=True) + 1e-5).sqrt()
    correlation = first.T @ second / len(first)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + off_diagonal_weight * off_diagonal


@full_precision
def vicreg_loss(
    projections: Tensor,
    *,
    invariance_weight: float,
    variance_weight: float,
    covariance_weight: float,
) -> Tensor:
    """Equal views, features that vary, features that do not repeat each other.

    Sum of ``invariance_weight * mean (z1 - z2)^2``, ``variance_weight *`` the mean over both
    views of `variance_term`, and ``covariance_weight *`` the sum over both views of the squared
    off-diagonal covariances divided by D.

    Shapes: (2, B, D) -> scalar.

    Source: Bardes et al. 2022, equations 1 to 6, weighted as the authors' code does.
    """
    first, second = projections
    center = projections - projections.mean(1, keepdim=True)
    covariance = center.transpose(1, 2) @ center / (center.shape[1] - 1)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    off_diagonal = covariance.square().sum() - diagonal.square().sum()
    return (
        invariance_weight * F.mse_loss(first, second)
        + variance_weight * variance_term(projections)
        + covariance_weight * off_diagonal / projections.shape[-1]
    )


@full_precision
def variance_term(projections: Tensor) -> Tensor:
    """Hinge on the standard deviation over the batch: mean of ``relu(1 - sqrt(var + 1e-4))``.

    Shapes: (V, B, D) -> scalar in [0, 1].

    Source: Bardes et al. 2022, equation 1.
    """
    return F.relu(1 - (projections.var(1) + 1e-4).sqrt()).mean()
