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
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0], device=first.factors.device)
    a, b = (torch.where(p.jitter[:, None], p.factors, neutral) for p in (first, second))
    return (b - a) / torch.tensor(JITTER_HALF_RANGES, device=a.device)


class TransformTerm(nn.Module):
    """Prediction of the relative transformation from the equivariant halves of two views.

    Args:
        feature_dim: Width D of the features.
        invariant_dim: Where they are cut.
    """

    GROUPS = (2, 1, 3, 4)  # rotation, flip, crop, jitter

    def __init__(self, feature_dim: int, invariant_dim: int, section: CleverSection) -> None:
        super().__init__()
        self.invariant_dim = invariant_dim
        self.section = section
        hidden = section.transform_hidden_dim
        self.head = self._perceptron(2 * (feature_dim - invariant_dim), hidden)
        if section.adversary_weight:
            self.adversary = self._perceptron(2 * invariant_dim, hidden)

    def _perceptron(self, in_dim: int, hidden: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, sum(self.GROUPS))
        )

    def loss_terms(
        self, online_features: Tensor, parameters: list[ViewParameters]
    ) -> dict[str, Tensor]:
        """The weighted terms of a step by name.

        Args:
            online_features: (S, B, D); the first two views are used.
            parameters: What was done to each view.
        """
        first, second = parameters[:2]
        pair = split_features(online_features[:2], self.invariant_dim)
        s = self.section
        prediction = self.head(torch.cat(list(pair.equivariant), dim=1))
        terms = {"transform": s.transform_weight * self.error(prediction, first, second)}
        if s.decorrelation_weight:
            terms["decorrelation"] = s.decorrelation_weight * decorrelation_loss(
                pair.invariant, [first, second]
            )
        if s.adversary_weight:
            reversed_pair = _Reverse.apply(
                torch.cat(list(pair.invariant), dim=1), s.adversary_weight
            )
            terms["adversary"] = self.error(self.adversary(reversed_pair), first, second)
        return terms

    def error(self, prediction: Tensor, first: ViewParameters, second: ViewParameters) -> Tensor:
        rotation, flip, crop, jitter = prediction.float().split(self.GROUPS, dim=1)
        same_flip = (first.flip == second.flip).float()
        # Saturation and hue of a grey view cannot be seen.
        seen = torch.ones_like(jitter)
        seen[:, 2:] = (~(first.grayscale | second.grayscale))[:, None].float()
        errors = [
            F.mse_loss(rotation, relative_rotation(first, second)),
            F.binary_cross_entropy_with_logits(flip.squeeze(1), same_flip),
            F.mse_loss(crop, relative_crop(first, second)),
            ((jitter - relative_jitter(first, second)).square() * seen).mean(),
        ]
        return torch.stack(errors).mean()


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.weight * gradient, None


def decorrelation_loss(invariant: Tensor, parameters: list[ViewParameters]) -> Tensor:
    """Squared correlation of the invariant half's dimensions with each view's rotation and crop."""
    invariant = gather_batch(invariant).flatten(0, 1)
    targets = gather_batch(torch.stack([_own_transform(p) for p in parameters])).flatten(0, 1)
    x, y = (_standardized(t.float()) for t in (invariant, targets))
    return (x.T @ y / len(x)).square().sum(0).mean()


def _own_transform(p: ViewParameters) -> Tensor:
    radians = torch.deg2rad(p.angle)
    return torch.stack([radians.sin(), radians.cos()], dim=1)


def _standardized(x: Tensor) -> Tensor:
    center = x - x.mean(0)
    return center / (center.square().mean(0) + 1e-5).sqrt()
