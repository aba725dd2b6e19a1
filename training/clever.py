"""CLeVER around a method: it plays on the first part of the features, the rest is kept apart."""

from torch import Tensor, nn

from clever_zoo.embedding import split_features
from training.config import HeadConfig, LossConfig
from training.losses import head_balance_loss, orthogonality_loss
from training.methods.dino import Dino


class Clever(nn.Module):
    """DINO on the invariant half, a second copy of its head on the equivariant half.

    Source: arXiv 2406.00262 and the authors' ``main_dino.py``: L_CL + 1.0 L_Orth + 0.001 L_PReg.
    """

    def __init__(self, in_dim: int, invariant_dim: int, head: HeadConfig, loss: LossConfig) -> None:
        super().__init__()
        self.invariant_dim = invariant_dim
        self.config = loss
        self.invariant = Dino(invariant_dim, head, loss)
        self.equivariant = Dino(in_dim - invariant_dim, head, loss)

    def loss_terms(
        self, teacher_features: Tensor, student_features: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        """The weighted terms of a step by name; their sum is the loss.

        Shapes: teacher (T, B, D), student (S, B, D).
        """
        teacher = split_features(teacher_features, self.invariant_dim)
        student = split_features(student_features, self.invariant_dim)
        terms = self.invariant.loss_terms(teacher.invariant, student.invariant, epoch)
        logits = self.equivariant.project(teacher.equivariant, student.equivariant)
        orthogonality = orthogonality_loss(
            *logits, center=self.equivariant.center, **self.equivariant.temperatures(epoch)
        )
        self.equivariant.move_center(logits.teacher)
        balance = head_balance_loss(self.invariant.student_head, self.equivariant.student_head)
        terms["orthogonality"] = self.config.orthogonality_weight * orthogonality
        terms["head_balance"] = self.config.head_balance_weight * balance
        return terms

    def follow(self, momentum: float) -> None:
        """Move both teacher heads after an optimiser step."""
        self.invariant.follow(momentum)
        self.equivariant.follow(momentum)
