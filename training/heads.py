"""Projection heads, used in training only."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


class DinoHead(nn.Module):
    """Three-layer perceptron, unit-length bottleneck, weight-normalised prototypes.

    Shapes: (N, in_dim) -> (N, prototypes).

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

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_dim) -> (N, prototypes) raw scores."""
        return self.last_layer(F.normalize(self.mlp(features), dim=-1, eps=1e-12))
