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
        self.draws = torch.empty(0)  # (B,), uniform in [0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """In training, zero the chosen rows and scale the others by 1 / (1 - drop_prob)."""
        if not self.training or not self.drop_prob:
            return x
        kept = (self.draws >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def use_sampled_drop_path(network: nn.Module) -> None:
    """Replace every timm DropPath in a network."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, SampledDropPath(child.drop_prob))


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
    device = next(network.parameters()).device
    columns = torch.from_numpy(draws).float().to(device).unbind(1)
    for layer, column in zip(layers, columns, strict=True):
        layer.draws = column
