"""The selective scan, one step after the other, and the four directions of an image."""

import torch
from torch import Tensor


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The recurrence, in float32 or float64."""
    u, delta, A, B, C, D = (
        t if t.dtype == torch.float64 else t.float() for t in (u, delta, A, B, C, D)
    )
    h = torch.zeros_like(u[..., 0])
    states = []
    for i in range(u.shape[-1]):
        h = (delta[..., i] * A).exp() * h + delta[..., i] * B[:, :, None, i] * u[..., i]
        states.append(C[:, :, None, i] * h)
    return torch.stack(states, -1) + D[..., None] * u


def cross_scan(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, 4, c, h * w)."""
    pair = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
    return torch.cat([pair, pair.flip(-1)], 1)


def cross_merge(y: Tensor, h: int, w: int) -> Tensor:
    """(b, 4, c, h * w) -> (b, c, h, w)."""
    pair = y[:, :2] + y[:, 2:].flip(-1)
    return pair[:, 0].unflatten(-1, (h, w)) + pair[:, 1].unflatten(-1, (w, h)).transpose(2, 3)
