"""CLeVER around a method: it plays on the first part of the features, the rest is kept apart."""

from collections.abc import Callable, Iterable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from clever_zoo.embedding import split_features
from training.losses import BalanceScope, BalanceShape, Reduction, head_balance_loss
from training.methods.base import Method
from training.schema import Section


class CleverSection(Section):
    """The section whose presence in a recipe wraps the method; defaults are the paper's.

    `invariant_dim` None means int(0.8 D); `orthogonality_reduction` None the method's own. The
    fields from `transform_weight` on go beyond the paper, see `training.transform`.
    """

    invariant_dim: int | None = Field(None, ge=1)
    orthogonality_weight: float = Field(1.0, ge=0)
    orthogonality_reduction: Reduction | None = None
    head_balance_weight: float = Field(0.001, ge=0)
    head_balance_scope: BalanceScope = "all"
    head_balance_normalize: bool = False
    head_balance_shape: BalanceShape = "absolute"
    transform_weight: float = Field(0.0, ge=0)
    transform_start_epochs: float = Field(0.0, ge=0)
    transform_hidden_dim: int = Field(512, ge=1)
    alignment_weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "CleverSection":
        if self.alignment_weight and not self.transform_weight:
            raise ValueError(
                f"alignment_weight is {self.alignment_weight} without a transform_weight"
            )
        return self


class Clever(nn.Module):
    """A method on the invariant half, a second copy of its heads on the equivariant half.

    Args:
        build: Makes the method for features of a given width.
        feature_dim: Width D of the features.
        invariant_dim: Where they are cut.

    Source: arXiv 2406.00262 and the authors' ``main_dino.py``: L_CL + 1.0 L_Orth + 0.001 L_PReg;
    with several heads a half, the mean of L_PReg over them, as in the authors' DDCL code.
    """

    def __init__(
        self,
        build: Callable[[int], Method],
        feature_dim: int,
        invariant_dim: int,
        section: CleverSection,
    ) -> None:
        super().__init__()
        self.invariant_dim = invariant_dim
        self.section = section
        self.invariant = build(invariant_dim)
        self.equivariant = build(feature_dim - invariant_dim)

    def loss_terms(
        self, target_features: Tensor, online_features: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        """The weighted terms of a step by name; their sum is the loss.

        Shapes: target (T, B, D), online (S, B, D).
        """
        target = split_features(target_features, self.invariant_dim)
        online = split_features(online_features, self.invariant_dim)
        projections = self.equivariant.project(target.equivariant, online.equivariant)
        s = self.section
        return {
            **self.invariant.loss_terms(target.invariant, online.invariant, epoch),
            "orthogonality": s.orthogonality_weight
            * self.equivariant.orthogonality(projections, epoch, s.orthogonality_reduction),
            **self.equivariant.equivariant_terms(projections),
            "head_balance": s.head_balance_weight * self._head_balance(),
        }

    def _head_balance(self) -> Tensor:
        s = self.section
        heads = (half.trained_heads() for half in (self.invariant, self.equivariant))
        pairs = [
            head_balance_loss(
                *pair,
                scope=s.head_balance_scope,
                normalize=s.head_balance_normalize,
                shape=s.head_balance_shape,
            )
            for pair in zip(*heads, strict=True)
        ]
        return torch.stack(pairs).mean()

    def frozen_parameters(self, epoch: float) -> Iterable[nn.Parameter]:
        """Parameters of both halves that stay as they are at this (fractional) epoch."""
        yield from self.invariant.frozen_parameters(epoch)
        yield from self.equivariant.frozen_parameters(epoch)

    def end_step(self, momentum: float) -> None:
        """Move what follows the trained heads, after an optimiser step."""
        self.invariant.end_step(momentum)
        self.equivariant.end_step(momentum)
