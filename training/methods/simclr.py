"""SimCLR: each view finds the other view of its image among all views of the batch.

Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations". CLeVER
on SimCLR is an extrapolation: the paper's authors published no code for it. Its orthogonality
term has no gradient into the target side, taken both ways round.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from training.heads import perceptron
from training.losses import nt_xent_loss
from training.methods.base import EmbeddingMethod, Projections
from training.schema import Section


class SimClrSection(Section):
    """Widths of the projector and temperature."""

    name: Literal["simclr"]
    hidden_dim: int = Field(2048, ge=1)
    output_dim: int = Field(128, ge=1)
    temperature: float = Field(0.1, gt=0)


class SimClr(EmbeddingMethod):
    """Projector of two layers on features of width `in_dim`."""

    has_teacher = False
    couples_batch = True

    def __init__(self, in_dim: int, section: SimClrSection) -> None:
        super().__init__(perceptron(in_dim, section.hidden_dim, section.output_dim, last_bias=True))
        self.temperature = section.temperature

    def loss(self, projections: Projections, epoch: int) -> Tensor:
        """Cross-entropy of finding the other view, in nats."""
        return nt_xent_loss(projections.online, temperature=self.temperature)
