"""MoCo v3: each view's prediction finds the teacher's key of the other view in the batch.

Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers". For a ViT
the authors hold the patch projection still: `backbone.freeze_patch_embed`. CLeVER on MoCo v3 is
an extrapolation: the paper's authors published no code for it.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from training.heads import perceptron
from training.losses import info_nce_loss
from training.methods.base import EmbeddingMethod, Projections
from training.schema import Section


class MoCoV3Section(Section):
    """Widths of projector and predictor, temperature, the teacher's first momentum."""

    name: Literal["mocov3"]
    hidden_dim: int = Field(4096, ge=1)
    output_dim: int = Field(256, ge=1)
    projector_layers: int = Field(3, ge=2)  # the authors: 3 for a ViT, 2 for a ResNet
    temperature: float = Field(0.2, gt=0)
    ema_momentum: float = Field(0.99, ge=0, le=1)


class MoCoV3(EmbeddingMethod):
    """Projector and predictor that end in a batch-norm, on features of width `in_dim`."""

    has_teacher = True
    has_predictor = True
    couples_batch = True

    def __init__(self, in_dim: int, section: MoCoV3Section) -> None:
        hidden = [section.hidden_dim] * (section.projector_layers - 1)
        width = section.output_dim
        super().__init__(
            perceptron(in_dim, *hidden, width, last_bias=False, last_norm=True),
            perceptron(width, section.hidden_dim, width, last_bias=False, last_norm=True),
        )
        self.temperature = section.temperature

    def loss(self, projections: Projections, epoch: int) -> Tensor:
        """Cross-entropy of finding one's own key, in nats."""
        return info_nce_loss(*projections, temperature=self.temperature)
