"""Convolutions on maps of a few pixels as matrix products.

A ResNet at 32 pixels ends in maps of 2 x 2 pixels and one. There, on a CPU, torch's convolutions of
many channels take many times as long as the matrix product that does the same.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POINTWISE_PIXELS = 16  # of the greatest output map of a 1 x 1 kernel, to be a product
DENSE_SIDE = 2  # greatest side of a map on which a 3 x 3 kernel is one


class SmallMapConv2d(nn.Conv2d):
    """An ungrouped convolution that multiplies matrices where the map is small.

    The values differ from those of ``nn.Conv2d`` by rounding alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        height, width = input.shape[-2:]
        stride = self.stride[0]
        if self.kernel_size == (1, 1) and height * width <= POINTWISE_PIXELS * stride**2:
            return _pointwise(input, self.weight, stride)
        if self.kernel_size == (3, 3) and max(height, width) <= DENSE_SIDE:
            return _dense(input, self.weight, stride)
        return super().forward(input)


def use_small_map_convolutions(network: nn.Module) -> None:
    """Let the network's 1 x 1 and padded 3 x 3 convolutions multiply matrices on small maps.

    Args:
        network: Changed in place; its tensors and their names stay.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and _fits(module):
            module.__class__ = SmallMapConv2d


def _fits(conv: nn.Conv2d) -> bool:
    shapes = {((1, 1), (0, 0)), ((3, 3), (1, 1))}
    plain = conv.groups == 1 and conv.bias is None and conv.dilation == (1, 1)
    square = conv.stride[0] == conv.stride[1]
    return plain and square and (conv.kernel_size, conv.padding) in shapes


def _pointwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    pixels = x[..., ::stride, ::stride].movedim(1, -1)
    return F.linear(pixels, weight.flatten(1)).movedim(-1, 1)


def _dense(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """A 3 x 3 kernel, padded by one, on a map of at most 2 x 2 pixels.

    Every output pixel sees every input pixel, each through one tap of the kernel: one matrix
    (H' W' C', H W C) holds all of these taps.
    """
    height, width = x.shape[-2:]
    rows, columns = (range(0, side, stride) for side in (height, width))
    kernel = weight.permute(0, 2, 3, 1)  # as it lies in memory
    taps = [kernel[:, 1 - i : height + 1 - i, 1 - j : width + 1 - j] for i in rows for j in columns]
    y = F.linear(x.permute(0, 2, 3, 1).flatten(1), torch.stack(taps).flatten(2).flatten(0, 1))
    return y.view(len(x), len(rows), len(columns), -1).permute(0, 3, 1, 2)
