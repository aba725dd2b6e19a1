"""BYOL: the student predicts the teacher's projection of the other view.

Grill et al. 2020, "Bootstrap Your Own Latent". CLeVER on BYOL is an extrapolation: the paper's
authors published no code for it.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from training.heads import perceptron
from training.losses import negative_cosine_loss
from training.methods.base import EmbeddingMethod, Projections
from training.schema import Section


class ByolSection(Section):
    """Widths of projector and predictor, and the teacher's first momentum."""

    name: Literal["byol"]
    hidden_dim: int = Field(4096, ge=1)
    output_dim: int = Field(256, ge=1)
    ema_momentum: float = Field(0.996, ge=0, le=1)


class Byol(EmbeddingMethod):
    """Projector and predictor of two layers each, on features of width `in_dim`."""

    has_teacher = True
    has_predictor = True

    def __init__(self, in_dim: int, section: ByolSection) -> None:
        hidden, width = section.hidden_dim, section.output_dim
        super().__init__(
            perceptron(in_dim, hidden, width, last_bias=True),
            perceptron(width, hidden, width, last_bias=True),
        )

    def loss(self, projections: Projections, epoch: int) -> Tensor:
        """Squared distance of unit vectors, 2 - 2 cos, in [0, 4]."""
        return 2 + 2 * negative_cosine_loss(projections.target, projections.online)
