"""DINO: the student predicts the teacher's prototype assignment of another view.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers". The teacher is
an exponential moving average of the student; a running centre and a low temperature keep it
from collapsing.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from training import ema
from training.distributed import mean_over_processes
from training.heads import DinoHead
from training.losses import Reduction, dino_loss, orthogonality_loss
from training.methods.base import Method, Projections
from training.schedules import linear_then_constant
from training.schema import Section


class DinoSection(Section):
    """Head, temperatures, centring; `chunk_images` is how many images are scored at a time."""

    name: Literal["dino"] = "dino"
    prototypes: int = Field(65536, ge=2)
    hidden_dim: int = Field(2048, ge=1)
    bottleneck_dim: int = Field(256, ge=1)
    batch_norm: bool = False
    freeze_gain: bool = True
    freeze_last_layer_epochs: float = Field(1, ge=0)
    student_temp: float = Field(0.1, gt=0)
    teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp_epochs: int = Field(0, ge=0)
    center_momentum: float = Field(0.9, ge=0, le=1)
    equivariant_center: bool = True
    ema_momentum: float = Field(0.996, ge=0, le=1)
    chunk_images: int | None = Field(None, ge=1)

    def head_arguments(self) -> dict[str, int | bool]:
        """Keyword arguments of `DinoHead`."""
        keys = ("prototypes", "hidden_dim", "bottleneck_dim", "batch_norm", "freeze_gain")
        return {key: getattr(self, key) for key in keys}


class Dino(Method):
    """Student head, its EMA teacher, and the teacher's centre, on features of width `in_dim`."""

    has_teacher = True
    multi_crop = True

    center: Tensor

    def __init__(self, in_dim: int, section: DinoSection) -> None:
        super().__init__()
        self.section = section
        self.student_head = DinoHead(in_dim, **section.head_arguments())  # type: ignore[arg-type]
        self.teacher_head = ema.frozen_copy(self.student_head)
        self.register_buffer("center", torch.zeros(section.prototypes))
        self._bottleneck_means: list[Tensor] = []

    def project(self, target_features: Tensor, online_features: Tensor) -> Projections:
        """(T, B, in_dim) and (S, B, in_dim) -> the unit bottlenecks of both sides."""
        with torch.no_grad():
            target = self.teacher_head(target_features.flatten(0, 1))
        online = self.student_head(online_features.flatten(0, 1))
        projections = Projections(
            target.unflatten(0, target_features.shape[:2]),
            online.unflatten(0, online_features.shape[:2]),
        )
        self._bottleneck_means.append(projections.target.float().mean((0, 1)))
        return projections

    def loss(self, projections: Projections, epoch: int) -> Tensor:
        """Cross-entropy of the student's assignments to the teacher's, in nats."""

        def part(teacher: Tensor, student: Tensor) -> Tensor:
            temps = self._temperatures(epoch)
            return dino_loss(teacher, student, center=self.center, **temps)

        return self._over_chunks(part, projections)

    def orthogonality(
        self, projections: Projections, epoch: int, reduction: Reduction | None
    ) -> Tensor:
        """Cosines between the assignments of different views, in [0, 1]."""
        center = self.center if self.section.equivariant_center else torch.zeros_like(self.center)

        def part(teacher: Tensor, student: Tensor) -> Tensor:
            return orthogonality_loss(
                teacher,
                student,
                center=center,
                reduction=reduction or self.reduction,
                **self._temperatures(epoch),
            )

        return self._over_chunks(part, projections)

    def _over_chunks(
        self, loss: Callable[[Tensor, Tensor], Tensor], projections: Projections
    ) -> Tensor:
        """A loss that is a mean over images, of a few images' scores at a time.

        Scores are T + S times B x K numbers. With chunks they are thrown away and computed again
        for the gradient, so that the memory they take does not grow with the batch.
        """
        batch = projections.target.shape[1]
        size = self.section.chunk_images or batch
        prototypes = self.student_head.prototypes
        with torch.no_grad():
            teacher_prototypes = self.teacher_head.prototypes

        def part(target: Tensor, online: Tensor, prototypes: Tensor) -> Tensor:
            scores = F.linear(online, prototypes)
            return loss(F.linear(target, teacher_prototypes), scores) * (target.shape[1] / batch)

        if size >= batch:
            return part(*projections, prototypes)
        chunks = zip(*(p.split(size, dim=1) for p in projections), strict=True)
        parts = [checkpoint(part, *c, prototypes, use_reentrant=False) for c in chunks]
        return torch.stack(parts).sum()

    def _temperatures(self, epoch: int) -> dict[str, float]:
        s = self.section
        return {
            "teacher_temp": linear_then_constant(
                epoch, s.warmup_teacher_temp_epochs, s.warmup_teacher_temp, s.teacher_temp
            ),
            "student_temp": s.student_temp,
        }

    def trained_heads(self) -> list[nn.Module]:
        """The student's head."""
        return [self.student_head]

    def frozen_parameters(self, epoch: float) -> Iterable[nn.Parameter]:
        """The prototypes, during the first epochs."""
        if epoch < self.section.freeze_last_layer_epochs:
            return self.student_head.last_layer.parameters()
        return ()

    @torch.no_grad()
    def assignments(self, features: Tensor) -> Tensor:
        """(B, in_dim) -> (B, K): the student's assignments."""
        head = self.student_head.eval()  # looking changes no running statistics
        scores = F.linear(head(features), head.prototypes)
        head.train()
        return (scores.float() / self.section.student_temp).softmax(-1)

    @torch.no_grad()
    def end_step(self, momentum: float) -> None:
        """Move the centre towards the mean teacher scores of the step, then the teacher head.

        Scores are linear in the bottleneck, so their mean is the score of the mean bottleneck.
        """
        mean = mean_over_processes(torch.stack(self._bottleneck_means).mean(0))
        self._bottleneck_means.clear()
        self.center.lerp_(self.teacher_head.prototypes @ mean, 1 - self.section.center_momentum)
        ema.follow(self.teacher_head, self.student_head, momentum)
