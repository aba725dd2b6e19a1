"""DINO: the student predicts the teacher's prototype assignment of another view.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers". The teacher is
an exponential moving average of the student; a running centre and a low temperature keep it
from collapsing.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training import ema
from training.config import HeadConfig, LossConfig
from training.heads import DinoHead
from training.losses import dino_loss
from training.schedules import linear_then_constant


class Logits(NamedTuple):
    """Raw prototype scores of a step: teacher (T, B, K), student (S, B, K)."""

    teacher: Tensor
    student: Tensor


class Dino(nn.Module):
    """Student head, its EMA teacher, and the teacher's centre, on features of width `in_dim`."""

    center: Tensor

    def __init__(self, in_dim: int, head: HeadConfig, loss: LossConfig) -> None:
        super().__init__()
        self.config = loss
        self.student_head: nn.Module = DinoHead(in_dim, **head.model_dump())
        self.teacher_head = ema.frozen_copy(self.student_head)
        self.register_buffer("center", torch.zeros(head.prototypes))

    def project(self, teacher_features: Tensor, student_features: Tensor) -> Logits:
        """(T, B, in_dim) and (S, B, in_dim) -> the logits of both sides."""
        with torch.no_grad():
            teacher = self.teacher_head(teacher_features.flatten(0, 1))
        student = self.student_head(student_features.flatten(0, 1))
        return Logits(
            teacher.unflatten(0, teacher_features.shape[:2]),
            student.unflatten(0, student_features.shape[:2]),
        )

    def temperatures(self, epoch: int) -> dict[str, float]:
        """The keyword arguments `teacher_temp` and `student_temp` of the losses at `epoch`."""
        c = self.config
        return {
            "teacher_temp": linear_then_constant(
                epoch, c.warmup_teacher_temp_epochs, c.warmup_teacher_temp, c.teacher_temp
            ),
            "student_temp": c.student_temp,
        }

    def loss_terms(
        self, teacher_features: Tensor, student_features: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        """The weighted terms of a step by name; their sum is the loss.

        Also moves the centre towards this step's teacher logits, after the loss has used it.
        """
        logits = self.project(teacher_features, student_features)
        loss = dino_loss(*logits, center=self.center, **self.temperatures(epoch))
        self.move_center(logits.teacher)
        return {"contrastive": loss}

    @torch.no_grad()
    def move_center(self, teacher_logits: Tensor) -> None:
        """Exponential moving average of the mean teacher logits, (T, B, K)."""
        # A new tensor, because the step's graph still holds the old one.
        mean = teacher_logits.mean((0, 1))
        self.center = self.center.lerp(mean, 1 - self.config.center_momentum)

    def follow(self, momentum: float) -> None:
        """Move the teacher head after an optimiser step."""
        ema.follow(self.teacher_head, self.student_head, momentum)
