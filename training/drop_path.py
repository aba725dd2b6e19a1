"""Stochastic depth whose draws belong to each view of each image, not to a generator's state."""

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import DropPath
from torch import Tensor, nn

from training.streams import uniforms

_STREAM = 1 << 33  # outside the view numbers of the pixels


class SampledDropPath(nn.Module):
    """A residual branch that is dropped for the rows that `choose_paths` has chosen."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        # (B,): 0 or 1 / (1 - drop_prob). The pass reads nothing else, so that blocks of different
        # rates are compiled as one.
        self.scales = torch.empty(0) if drop_prob else None

    def forward(self, x: Tensor) -> Tensor:
        """In training, zero the chosen rows and scale the others by 1 / (1 - drop_prob)."""
        if not self.training or self.scales is None:
            return x
        return x * self.scales.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def use_sampled_drop_path(network: nn.Module, share: float = 1.0) -> None:
    """Replace every DropPath in a network, timm's or ours, by one of `share` times its rate."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, (DropPath, SampledDropPath)):
                setattr(module, name, SampledDropPath(share * child.drop_prob))


def choose_paths(
    network: nn.Module, samples: NDArray[np.integer], views: range, *, seed: int, epoch: int
) -> None:
    """Draw which rows of the next forward pass drop which branch.

    Args:
        samples: Index of each image in the data set, (B,).
        views: Numbers of the views; the pass has len(views) x B rows, view by view.
    """
    layers = [m for m in network.modules() if isinstance(m, SampledDropPath) and m.drop_prob]
    if not layers:
        return
    draws = np.concatenate(
        [uniforms(seed, epoch, samples, _STREAM + view, len(layers)) for view in views]
    )
    rates = torch.tensor([layer.drop_prob for layer in layers], dtype=torch.float64)
    kept = torch.from_numpy(draws).float() >= rates.float()
    device = next(network.parameters()).device
    columns = (kept / (1 - rates).float()).to(device).unbind(1)
    for layer, column in zip(layers, columns, strict=True):
        layer.scales = column
