"""SimSiam: two views predict each other, and the gradient stops at the target.

Chen & He 2021, "Exploring Simple Siamese Representation Learning". No teacher and no negatives;
the predictor and the stopped gradient keep it from collapsing. With CLeVER this is the form of
the authors' DDCL code, with its heads and its reduction of the orthogonality term.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from training.heads import perceptron
from training.losses import negative_cosine_loss
from training.methods.base import EmbeddingMethod, Projections
from training.schema import Section


class SimSiamSection(Section):
    """Widths of projector and predictor."""

    name: Literal["simsiam"]
    hidden_dim: int = Field(2048, ge=1)
    output_dim: int = Field(2048, ge=1)
    bottleneck_dim: int = Field(512, ge=1)


class SimSiam(EmbeddingMethod):
    """Projector of three layers, predictor of two, on features of width `in_dim`."""

    has_teacher = False
    has_predictor = True

    def __init__(self, in_dim: int, section: SimSiamSection) -> None:
        hidden, width = section.hidden_dim, section.output_dim
        super().__init__(
            perceptron(in_dim, hidden, hidden, width, last_bias=True, last_norm=True),
            perceptron(width, section.bottleneck_dim, width, last_bias=True),
        )

    def loss(self, projections: Projections, epoch: int) -> Tensor:
        """Minus the cosine of each view's prediction and the other's projection, in [-1, 1]."""
        return negative_cosine_loss(projections.target, projections.online)
