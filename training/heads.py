"""Projection heads, used in training only."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


def perceptron(in_dim: int, *widths: int, last_bias: bool, last_norm: bool = False) -> nn.Module:
    """Linear, batch-norm, ReLU for each width but the last, which is linear.

    Shapes: (N, in_dim) -> (N, widths[-1]).

    Args:
        last_bias: Whether the last layer has one; the others leave it to their batch-norm.
        last_norm: A batch-norm without scale and shift at the end.
    """
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(in_dim, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        in_dim = width
    layers.append(nn.Linear(in_dim, widths[-1], bias=last_bias))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


class DinoHead(nn.Module):
    """Three-layer perceptron, unit-length bottleneck, weight-normalised prototypes.

    The call gives the bottleneck, (N, in_dim) -> (N, bottleneck_dim) with unit rows; the scores
    are `bottleneck @ prototypes.T`, kept apart because they are too large to keep whole.

    Source: Caron et al. 2021; the authors' code uses one such head per half. The last layer
    keeps PyTorch's default initialisation, as theirs does.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        batch_norm: bool = False,
        freeze_gain: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in ((in_dim, hidden_dim), (hidden_dim, hidden_dim)):
            layers.append(nn.Linear(width_in, width_out))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width_out))
            layers.append(nn.GELU())
        layers.append(nn.Linear(hidden_dim, bottleneck_dim))
        self.mlp = nn.Sequential(*layers)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, prototypes, bias=False))
        gain = self.last_layer.parametrizations.weight.original0
        with torch.no_grad():
            gain.fill_(1.0)
        gain.requires_grad_(not freeze_gain)

    @property
    def prototypes(self) -> Tensor:
        """(K, bottleneck_dim); unit rows while the gain is frozen."""
        return self.last_layer.weight

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_dim) -> (N, bottleneck_dim), rows of length 1."""
        return F.normalize(self.mlp(features), dim=-1, eps=1e-12)
