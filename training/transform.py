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
from training.losses import full_precision
from training.views import STYLES, StyleName, ViewParameters


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


def relative_jitter(first: ViewParameters, second: ViewParameters, style: StyleName) -> Tensor:
    """(B, 4): differences of brightness, contrast, saturation and hue, each in -2..2.

    The unit is half of the range that the style draws from; without jitter factors are neutral.
    """
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    a, b = (torch.where(p.jitter[:, None], p.factors, neutral) for p in (first, second))
    return (b - a) / torch.tensor([(high - low) / 2 for low, high in STYLES[style].jitter])


class TransformTerm(nn.Module):
    """Prediction of the relative transformation from the equivariant halves of two views.

    With an `alignment_weight` the invariant halves of the two views are pulled together, which
    keeps the invariant half from learning the same.

    Args:
        feature_dim: Width D of the features.
        invariant_dim: Where they are cut.
        style: Of the views.
    """

    GROUPS = (2, 1, 3, 4)  # rotation, flip, crop, jitter

    def __init__(
        self, feature_dim: int, invariant_dim: int, section: CleverSection, style: StyleName
    ) -> None:
        super().__init__()
        self.invariant_dim = invariant_dim
        self.section = section
        self.style = style
        self.head = nn.Sequential(
            nn.Linear(2 * (feature_dim - invariant_dim), section.transform_hidden_dim),
            nn.ReLU(),
            nn.Linear(section.transform_hidden_dim, sum(self.GROUPS)),
        )

    def loss_terms(
        self, online_features: Tensor, parameters: list[ViewParameters], epoch: float
    ) -> dict[str, Tensor]:
        """The weighted terms of a step by name; `transform` is 0 before its first epoch.

        Args:
            online_features: (S, B, D); the first two views are used.
            parameters: What was done to each view.
            epoch: Fractional epoch.
        """
        s = self.section
        pair = split_features(online_features[:2], self.invariant_dim)
        prediction = self.head(torch.cat(list(pair.equivariant), dim=1))
        weight = s.transform_weight * (epoch >= s.transform_start_epochs)
        error = transform_loss(prediction, *parameters[:2], style=self.style)
        terms = {"transform": weight * error}
        if s.alignment_weight:
            aligned = alignment_loss(gather_batch(pair.invariant))
            terms["alignment"] = s.alignment_weight * aligned
        return terms


@full_precision
def transform_loss(
    prediction: Tensor, first: ViewParameters, second: ViewParameters, *, style: StyleName
) -> Tensor:
    """Mean error of rotation, crop and jitter (squared) and of the flip (cross-entropy).

    Args:
        prediction: (B, 10): sine, cosine; logit that the flips are equal; log scale, right,
            down; four jitter differences. Saturation and hue do not count where a view is grey.
    """
    rotation, flip, crop, jitter = prediction.split(TransformTerm.GROUPS, dim=1)
    grey = first.grayscale | second.grayscale
    seen = torch.ones(len(grey), 4)
    seen[grey, 2:] = 0
    same_flip = (first.flip == second.flip).float()
    truth = (
        relative_rotation(first, second),
        relative_crop(first, second),
        relative_jitter(first, second, style),
        same_flip,
        seen,
    )
    true_rotation, true_crop, true_jitter, same_flip, seen = (
        t.to(prediction.device, non_blocking=True) for t in truth
    )
    errors = [
        F.mse_loss(rotation, true_rotation),
        F.binary_cross_entropy_with_logits(flip.squeeze(1), same_flip),
        F.mse_loss(crop, true_crop),
        ((jitter - true_jitter).square() * seen).mean(),
    ]
    return torch.stack(errors).mean()


@full_precision
def alignment_loss(features: Tensor) -> Tensor:
    """One minus the correlation of two views over the batch, a mean over dimensions.

    Scale and mean of a dimension do not matter, so that nothing is gained by shrinking it.

    Shapes: (2, B, D) -> scalar in [0, 2].
    """
    center = features - features.mean(1, keepdim=True)
    first, second = center / (center.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return 1 - (first * second).mean()
