"""Barlow Twins: the cross-correlation of two views' features becomes the identity.

Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction". CLeVER on
it follows a figure of the authors ("DDCL_Sym"); how the gradient flows and cosines are reduced
there is not shown. Here the gradient reaches both views, and absolute cosines are averaged: a
mean of signed ones is near zero for standardised features whatever they hold.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from training.heads import perceptron
from training.losses import barlow_twins_loss
from training.methods.base import EmbeddingMethod, Projections
from training.schema import Section


class BarlowTwinsSection(Section):
    """Widths of the projector and the weight of the off-diagonal entries."""

    name: Literal["barlow_twins"]
    hidden_dim: int = Field(8192, ge=1)
    output_dim: int = Field(8192, ge=1)
    off_diagonal_weight: float = Field(0.0051, ge=0)


class BarlowTwins(EmbeddingMethod):
    """Projector of three layers on features of width `in_dim`."""

    has_teacher = False
    couples_batch = True
    detach_target = False
    reduction = "abs_mean"

    def __init__(self, in_dim: int, section: BarlowTwinsSection) -> None:
        hidden = section.hidden_dim
        super().__init__(perceptron(in_dim, hidden, hidden, section.output_dim, last_bias=False))
        self.off_diagonal_weight = section.off_diagonal_weight

    def loss(self, projections: Projections, epoch: int) -> Tensor:
        """Squared distance of the cross-correlation from the identity, weighted."""
        return barlow_twins_loss(projections.online, off_diagonal_weight=self.off_diagonal_weight)
