"""VICReg: equal views, features that vary over the batch and do not repeat each other.

Bardes et al. 2022, "VICReg: Variance-Invariance-Covariance Regularization". CLeVER on VICReg is
an extrapolation: the paper's authors published no code for it. `equivariant_variance_weight`
adds VICReg's variance term to the equivariant half, which nothing else keeps from collapsing.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from training.heads import perceptron
from training.losses import variance_term, vicreg_loss
from training.methods.base import EmbeddingMethod, Projections
from training.schema import Section


class VicRegSection(Section):
    """Widths of the projector and the weights of the three terms."""

    name: Literal["vicreg"]
    hidden_dim: int = Field(8192, ge=1)
    output_dim: int = Field(8192, ge=1)
    invariance_weight: float = Field(25.0, ge=0)
    variance_weight: float = Field(25.0, ge=0)
    covariance_weight: float = Field(1.0, ge=0)
    equivariant_variance_weight: float = Field(0.0, ge=0)


class VicReg(EmbeddingMethod):
    """Projector ("expander") of three layers on features of width `in_dim`."""

    has_teacher = False
    couples_batch = True
    detach_target = False
    reduction = "abs_mean"

    def __init__(self, in_dim: int, section: VicRegSection) -> None:
        hidden = section.hidden_dim
        super().__init__(perceptron(in_dim, hidden, hidden, section.output_dim, last_bias=False))
        self.section = section

    def loss(self, projections: Projections, epoch: int) -> Tensor:
        """The weighted sum of the three terms."""
        s = self.section
        return vicreg_loss(
            projections.online,
            invariance_weight=s.invariance_weight,
            variance_weight=s.variance_weight,
            covariance_weight=s.covariance_weight,
        )

    def equivariant_terms(self, projections: Projections) -> dict[str, Tensor]:
        """The variance term, if it has a weight."""
        weight = self.section.equivariant_variance_weight
        if not weight:
            return {}
        return {"equivariant_variance": weight * variance_term(projections.online)}
