"""Beyond the paper: the equivariant half predicts how two views of one image differ.

No published term ties the equivariant half to the transformation. Here a small head reads, from
the equivariant halves of the two global views, their relative rotation, flip, crop and colour
jitter, whose true values the view pipeline knows. Off unless the recipe gives it a weight.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clever_zoo.embedding import split_features
from training.clever import CleverSection
from training.distributed import gather_batch
from training.views import ViewParameters

JITTER_HALF_RANGES = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue


def relative_rotation(first: ViewParameters, second: ViewParameters) -> Tensor:
    """(B, 2): sine and cosine of the angle that turns the first view's content as the second's.

    A mirrored image turns the other way round: with unequal flips the angles add up.
    """
    sign = torch.where(first.flip == second.flip, -1.0, 1.0)
    radians = torch.deg2rad(second.angle + sign * first.angle)
    return torch.stack([radians.sin(), radians.cos()], dim=1)


def relative_crop(first: ViewParameters, second: ViewParameters) -> Tensor:
    """(B, 3): log of the ratio of sides, and where the second crop's centre lies in the first view.

    The centre is given to the right and downwards from the first view's centre, in sides of that
    view, after its flip and rotation.
    """
    scale = (second.height * second.width / (first.height * first.width)).log() / 2
    right = (second.left + second.width / 2 - first.left - first.width / 2) / first.width
    down = (second.top + second.height / 2 - first.top - first.height / 2) / first.height
    right = torch.where(first.flip, -right, right)
    radians = torch.deg2rad(first.angle)
    cos, sin = radians.cos(), radians.sin()
    # Counter-clockwise on a screen whose second axis points down.
    return torch.stack([scale, cos * right + sin * down, cos * down - sin * right], dim=1)


def relative_jitter(first: ViewParameters, second: ViewParameters) -> Tensor:
    """(B, 4): differences of brightness, contrast, saturation and hue, about -2..2."""
    difference = _factors(second) - _factors(first)
    return difference / torch.tensor(JITTER_HALF_RANGES, device=difference.device)


def own_transform(p: ViewParameters) -> Tensor:
    """(B, 10): what was done to each view itself: rotation, flip, crop and colour jitter.

    Columns: sine and cosine of the angle, flip, log of the area, centre across and down, and the
    jitter's factors (neutral where there was none).
    """
    radians = torch.deg2rad(p.angle)
    across, down = p.left + p.width / 2, p.top + p.height / 2
    geometry = [radians.sin(), radians.cos(), p.flip.float(), (p.height * p.width).log()]
    return torch.cat([torch.stack([*geometry, across, down], dim=1), _factors(p)], dim=1)


def _factors(p: ViewParameters) -> Tensor:
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0], device=p.factors.device)
    return torch.where(p.jitter[:, None], p.factors, neutral)


class TransformTerm(nn.Module):
    """Prediction of the relative transformation from the equivariant halves of two views.

    With a `decorrelation_weight` the invariant half is kept from telling the same: see
    `RunningProbe`.

    Args:
        feature_dim: Width D of the features.
        invariant_dim: Where they are cut.
    """

    GROUPS = (2, 1, 3, 4)  # rotation, flip, crop, jitter

    def __init__(self, feature_dim: int, invariant_dim: int, section: CleverSection) -> None:
        super().__init__()
        self.invariant_dim = invariant_dim
        self.section = section
        self.head = nn.Sequential(
            nn.Linear(2 * (feature_dim - invariant_dim), section.transform_hidden_dim),
            nn.ReLU(),
            nn.Linear(section.transform_hidden_dim, sum(self.GROUPS)),
        )
        self.probe = (
            RunningProbe(invariant_dim, sum(self.GROUPS)) if section.decorrelation_weight else None
        )

    def loss_terms(
        self, online_features: Tensor, parameters: list[ViewParameters], epoch: float
    ) -> dict[str, Tensor]:
        """The weighted terms of a step by name; they are 0 before their first epoch.

        Args:
            online_features: (S, B, D); the first two views are used.
            parameters: What was done to each view.
            epoch: Fractional epoch.
        """
        started = float(epoch >= self.section.transform_start_epochs)
        pair, known = split_features(online_features[:2], self.invariant_dim), parameters[:2]
        prediction = self.head(torch.cat(list(pair.equivariant), dim=1))
        weight = started * self.section.transform_weight
        terms = {"transform": weight * transform_loss(prediction, *known)}
        if self.probe is not None:
            told = torch.stack([own_transform(p) for p in known])
            weight = started * self.section.decorrelation_weight
            terms["decorrelation"] = weight * self.probe(
                gather_batch(pair.invariant).flatten(0, 1), gather_batch(told).flatten(0, 1)
            )
        return terms


def transform_loss(prediction: Tensor, first: ViewParameters, second: ViewParameters) -> Tensor:
    """Mean error of rotation, crop and jitter (squared) and of the flip (cross-entropy).

    Args:
        prediction: (B, 10): sine, cosine; logit that the flips are equal; log scale, right,
            down; four jitter differences. Saturation and hue do not count where a view is grey.
    """
    rotation, flip, crop, jitter = prediction.float().split(TransformTerm.GROUPS, dim=1)
    seen = torch.ones_like(jitter)
    seen[:, 2:] = (~(first.grayscale | second.grayscale))[:, None].float()
    errors = [
        F.mse_loss(rotation, relative_rotation(first, second)),
        F.binary_cross_entropy_with_logits(flip.squeeze(1), (first.flip == second.flip).float()),
        F.mse_loss(crop, relative_crop(first, second)),
        ((jitter - relative_jitter(first, second)).square() * seen).mean(),
    ]
    return torch.stack(errors).mean()


class RunningProbe(nn.Module):
    """What a linear regression would read from features, as a loss that unlearns it.

    The regression is solved at every step from running averages of the features' covariances, so
    that it knows thousands of images and is never behind. The share of the truth's variance that
    it tells of this batch (R^2) is squared and pushed to 0. The slope of a correlation would
    vanish where everything can be read; that of a covariance does not.
    """

    MOMENTUM = 0.99
    RIDGE = 1e-3  # relative to the mean variance

    def __init__(self, width: int, targets: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("covariance", torch.zeros(width, width))
        self.register_buffer("cross", torch.zeros(width, targets))

    def forward(self, features: Tensor, truth: Tensor) -> Tensor:
        """Mean over targets of (R^2)^2, about 0..1; features (N, width), truth (N, targets)."""
        with torch.autocast(features.device.type, enabled=False):
            truth = truth - truth.mean(0)
            read = features.float() @ self._solve(features.detach().float(), truth)
            read = read - read.mean(0)
            told = (read * truth).mean(0) / (truth.square().mean(0) + 1e-8)
            return told.square().mean()

    @torch.no_grad()
    def _solve(self, features: Tensor, truth: Tensor) -> Tensor:
        self.steps += 1
        rate = torch.clamp(1 / self.steps, min=1 - self.MOMENTUM)
        self.mean.lerp_(features.mean(0), rate)
        center = features - self.mean
        self.covariance.lerp_(center.T @ center / len(center), rate)
        self.cross.lerp_(center.T @ truth / len(center), rate)
        ridge = self.RIDGE * self.covariance.diagonal().mean() + 1e-8
        identity = torch.eye(len(self.mean), device=self.mean.device)
        return torch.linalg.solve(self.covariance + ridge * identity, self.cross)
