"""Everything that a step computes, as one module: from views to loss terms."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clever_zoo.embedding import split_features
from training import ema
from training.clever import Clever
from training.config import Recipe
from training.diagnostics import (
    assignment_entropy,
    effective_rank,
    feature_std,
    usage_entropy,
)
from training.methods.base import Method
from training.networks import build_student, build_teacher, compile_network, forward_views
from training.small_maps import use_small_map_convolutions
from training.transform import TransformTerm
from training.views import Views

TEACHER_VIEWS = 2
TEACHER_KEY = 1 << 20  # keeps the teacher's dropped paths apart from the student's


def build_method(recipe: Recipe) -> Method | Clever:
    """The recipe's method on features of width D, wrapped if it says so."""
    build = recipe.method_row.build
    if recipe.clever is None:
        return build(recipe.feature_dim, recipe.method)
    return Clever(
        lambda width: build(width, recipe.method),
        recipe.feature_dim,
        recipe.invariant_dim,
        recipe.clever,
    )


class Objective(nn.Module):
    """Student and, for methods that have one, its teacher; heads and losses.

    The networks are those of the recipe's seed.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = build_student(recipe.backbone, recipe.seed)
        if recipe.run.small_map_products:
            use_small_map_convolutions(self.student)
        self.teacher = (
            build_teacher(self.student, recipe.backbone)
            if recipe.method_row.build.has_teacher
            else None
        )
        if recipe.run.compile:
            for network in filter(None, (self.student, self.teacher)):
                compile_network(network)
        self.method = build_method(recipe)
        section = recipe.clever
        self.transform = (
            TransformTerm(recipe.feature_dim, recipe.invariant_dim, section, recipe.views.style)
            if section is not None and section.transform_weight
            else None
        )

    def forward(
        self, views: Views, samples: NDArray[np.integer], epoch: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted loss terms by name, and the student's features without gradient.

        Args:
            views: All views of a batch.
            samples: Index of each image in the data set, (B,).
            epoch: Fractional epoch.

        Returns:
            Scalars whose sum is the loss; features (S, B, D).
        """
        keys = {
            "samples": samples,
            "seed": self.recipe.seed,
            "epoch": int(epoch),
            "together": self.recipe.method_row.build.multi_crop,
        }
        online = forward_views(self.student, views.pixels, **keys)
        target = online
        if self.teacher is not None:
            with torch.no_grad():
                pixels = views.pixels[:TEACHER_VIEWS]
                target = forward_views(self.teacher, pixels, first_view=TEACHER_KEY, **keys)
        terms = self.method.loss_terms(target, online, int(epoch))
        if self.transform is not None:
            terms |= self.transform.loss_terms(online, views.parameters, epoch)
        return terms, online.detach().float()

    def diagnostics(self, features: Tensor) -> dict[str, float]:
        """Signs of collapse of each half by name, from the first view's features (S, B, D)."""
        halves = split_features(features[0], self.recipe.invariant_dim)._asdict()
        found = {}
        for name, half in halves.items():
            if half.shape[1] == 0:
                continue
            found[f"{name}_std"] = feature_std(half)
            found[f"{name}_rank"] = effective_rank(half)
            method = getattr(self.method, name) if isinstance(self.method, Clever) else self.method
            assignments = method.assignments(half)
            if assignments is not None:
                found[f"{name}_usage"] = usage_entropy(assignments)
                found[f"{name}_assignment"] = assignment_entropy(assignments)
        return found

    def end_step(self, momentum: float) -> None:
        """Move the teacher and whatever else follows, after an optimiser step."""
        if self.teacher is not None:
            ema.follow(self.teacher, self.student, momentum)
        self.method.end_step(momentum)
