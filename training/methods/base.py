"""What every method is made of, and what most of them share.

A method is everything between the features of one half and its loss. To add one: a file with its
section of the recipe and its class, and a row in `training.methods.METHODS`.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from training import ema
from training.distributed import gather_batch
from training.losses import Reduction, embedding_orthogonality_loss
from training.schema import Section


class Projections(NamedTuple):
    """Head outputs of a step: target (T, B, P) and online (S, B, P).

    The first T online views are the target's views. The target takes no gradient but where a
    method has none apart from its online side.
    """

    target: Tensor
    online: Tensor


class Method(nn.Module):
    """One self-supervised objective on features of one width.

    Attributes:
        has_teacher: Whether the targets come from an average of past students.
        has_predictor: Whether the online side has a predictor after its projector.
        multi_crop: Whether more than two views can be used.
        couples_batch: Whether the loss compares the images of a batch with each other, so that
            the parts of a batch cannot be taken one after the other.
        reduction: How CLeVER's orthogonality term reduces cosines, unless the recipe says.
    """

    has_teacher: ClassVar[bool]
    has_predictor: ClassVar[bool] = False
    multi_crop: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False
    reduction: ClassVar[Reduction] = "mean_abs"

    def project(self, target_features: Tensor, online_features: Tensor) -> Projections:
        """(T, B, D) and (S, B, D) -> what the losses compare."""
        raise NotImplementedError

    def loss(self, projections: Projections, epoch: int) -> Tensor:
        """The method's own loss, a scalar."""
        raise NotImplementedError

    def orthogonality(
        self, projections: Projections, epoch: int, reduction: Reduction | None
    ) -> Tensor:
        """CLeVER's term when this method's heads sit on the equivariant half, a scalar."""
        raise NotImplementedError

    def equivariant_terms(self, projections: Projections) -> dict[str, Tensor]:
        """Further weighted terms by name where this method's heads sit on the equivariant half."""
        return {}

    def trained_heads(self) -> list[nn.Module]:
        """The modules whose norms CLeVER balances between the halves, in a fixed order."""
        raise NotImplementedError

    def frozen_parameters(self, epoch: float) -> Iterable[nn.Parameter]:
        """Parameters that stay as they are at this (fractional) epoch."""
        return ()

    def assignments(self, features: Tensor) -> Tensor | None:
        """(B, D) -> (B, K) probabilities over prototypes, for diagnostics; None without them."""
        return None

    def loss_terms(
        self, target_features: Tensor, online_features: Tensor, epoch: int
    ) -> dict[str, Tensor]:
        """The weighted terms of a step by name; their sum is the loss.

        Shapes: target (T, B, D), online (S, B, D).
        """
        return {"contrastive": self.loss(self.project(target_features, online_features), epoch)}

    def end_step(self, momentum: float) -> None:
        """Move what follows the trained heads, after an optimiser step."""


class EmbeddingMethod(Method):
    """Methods that compare embeddings: a projector, for some a predictor and a teacher projector.

    Each view goes through the heads on its own, so that batch-norm sees one view at a time, as
    the originals do.
    """

    detach_target: ClassVar[bool] = True

    def __init__(self, projector: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.projector = projector
        self.predictor = predictor
        self.teacher_projector = ema.frozen_copy(projector) if self.has_teacher else None

    def project(self, target_features: Tensor, online_features: Tensor) -> Projections:
        """(T, B, D) and (S, B, D) -> embeddings of the batch of all processes."""
        online = _each_view(self.projector, online_features)
        target = online
        if self.teacher_projector is not None:
            with torch.no_grad():
                target = _each_view(self.teacher_projector, target_features)
        if self.predictor is not None:
            online = _each_view(self.predictor, online)
        gathered = gather_batch(online)
        return Projections(gathered if target is online else gather_batch(target), gathered)

    def orthogonality(
        self, projections: Projections, epoch: int, reduction: Reduction | None
    ) -> Tensor:
        """Cosines between the online and the target embeddings of different views, a scalar."""
        return embedding_orthogonality_loss(
            projections.online,
            projections.target,
            reduction=reduction or self.reduction,
            detach_target=self.detach_target,
        )

    def trained_heads(self) -> list[nn.Module]:
        """The projector and, if there is one, the predictor."""
        return [head for head in (self.projector, self.predictor) if head is not None]

    def end_step(self, momentum: float) -> None:
        """Move the teacher's projector."""
        if self.teacher_projector is not None:
            ema.follow(self.teacher_projector, self.projector, momentum)


def _each_view(head: nn.Module, features: Tensor) -> Tensor:
    return torch.stack([head(view) for view in features])


class MethodRow(NamedTuple):
    """A method's section of the recipe and its class, called as `build(in_dim, section)`."""

    section: type[Section]
    build: Any
