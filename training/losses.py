"""The terms of the CLeVER objective, one pure function each.

Legend: T teacher views, S student views (the first T are the same views), B batch,
K prototypes. Teacher arguments are detached here. A view is never paired with itself: the
T (S - 1) remaining pairs are averaged.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Reduction = Literal["mean_abs", "abs_mean", "mean_square"]


def _mean_over_pairs(pairs: Tensor) -> Tensor:
    """Mean of a (T, S) table without the entries in which a view meets itself."""
    teacher_views, student_views = pairs.shape
    return (pairs.sum() - pairs.diagonal().sum()) / (teacher_views * (student_views - 1))


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


def orthogonality_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    center: Tensor,
    teacher_temp: float,
    student_temp: float,
) -> Tensor:
    """Cosine similarity of the equivariant prototype assignments of different views.

    For each pair (t, s != t): ``|mean_b cos(a[t, b], p[s, b])|`` over the K axis, with ``a`` and
    ``p`` the softmax outputs of `dino_loss`. Probabilities are not negative, so every cosine is
    in [0, 1] and the absolute value changes nothing; it is left out.

    Args:
        teacher_logits: (T, B, K).
        student_logits: (S, B, K).
        center: (K,), subtracted from the teacher's logits.

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
    return _mean_over_pairs(cosines.mean(-1))


def embedding_orthogonality_loss(
    online: Tensor, target: Tensor, *, reduction: Reduction = "mean_abs"
) -> Tensor:
    """Orthogonality of un-normalised equivariant outputs, for methods without prototypes.

    Pairs (target view t, online view s != t) of cosines over the last axis; here they can be
    negative, so the order of mean and absolute value matters.

    Args:
        online: (S, B, D), the student's (or predictor's) equivariant output of each view.
        target: (T, B, D), the target's output of the first T views; detached here.
        reduction: "mean_abs" (the reference) takes |mean over batch and pairs|; "abs_mean" the
            mean of absolute cosines; "mean_square" the mean of squares.

    Returns:
        Scalar in [0, 1].

    Source: the SimSiam form of the authors' DDCL code.
    """
    cosines = torch.einsum(
        "tbd,sbd->tsb",
        F.normalize(target.detach(), dim=-1, eps=1e-8),
        F.normalize(online, dim=-1, eps=1e-8),
    )
    match reduction:
        case "mean_abs":
            return _mean_over_pairs(cosines.mean(-1)).abs()
        case "abs_mean":
            return _mean_over_pairs(cosines.abs().mean(-1))
        case "mean_square":
            return _mean_over_pairs(cosines.square().mean(-1))
        case _:
            raise ValueError(
                f"unknown reduction {reduction!r}; use 'mean_abs', 'abs_mean' or 'mean_square'"
            )


def head_balance_loss(invariant_head: nn.Module, equivariant_head: nn.Module) -> Tensor:
    """Difference of the two heads' squared parameter norms, ``|sum p^2 - sum p^2|``.

    Counts trainable parameters only. The reference counts the frozen gains too, which cancel
    when both heads have equally many prototypes, the only case in which its code runs.

    Source: paper, L_PReg; the authors' ``main_dino.py``.
    """
    invariant, equivariant = (
        sum(p.square().sum() for p in head.parameters() if p.requires_grad)
        for head in (invariant_head, equivariant_head)
    )
    return torch.as_tensor(invariant - equivariant).abs()
