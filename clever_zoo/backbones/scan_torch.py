"""The selective scan in plain torch: a recurrence in few steps, on tiles that fit a cache.

Every factor is exp of something that is not positive, so nothing overflows, whatever the decay.
Shapes: r rows, one for each direction of each image; c channels; l positions.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 4  # positions of a chunk; all chunks advance side by side
TILE = 300_000  # elements for each CPU thread


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`selective_scan` as one expression, for tracing."""
    h = _states(torch.exp(delta * A[..., None]), delta * u * B[:, :, None])
    return h * C[:, :, None] + u * D[..., None]


def _states(a: Tensor, x: Tensor) -> Tensor:
    """What `recur_` computes, out of place: in a graph, writing in place becomes scatters.

    The steps of a chunk go to the first axis, so that each of them is one piece of memory.
    """
    length = x.shape[-1]
    if length <= STEPS:
        return torch.stack(_advance(a.unbind(-1), x.unbind(-1)), -1)
    chunks = -(-length // STEPS)
    if missing := chunks * STEPS - length:
        a, x = (F.pad(v, (0, missing)) for v in (a, x))
    decays, steps = (v.unflatten(-1, (chunks, STEPS)).movedim(-1, 0).unbind() for v in (a, x))
    ends = _states(functools.reduce(torch.mul, decays), _advance(decays, steps)[-1])
    h = torch.stack(_advance(decays, steps, F.pad(ends[..., :-1], (1, 0))))
    return h.movedim(0, -1).flatten(-2)[..., :length]


def _advance(a: Sequence[Tensor], x: Sequence[Tensor], h: Tensor | None = None) -> list[Tensor]:
    """The states after each step from `h`, or from zero."""
    states = []
    for a_t, x_t in zip(a, x, strict=True):
        h = x_t if h is None else torch.addcmul(x_t, a_t, h)
        states.append(h)
    return states


def recur_(a: Tensor, x: Tensor, *, reverse: bool = False) -> None:
    """Replace x by h, where h_l = a_l h_(l-1) + x_l along the last axis and h before it is 0.

    With `reverse` from the end on: h_l = a_l h_(l+1) + x_l. Shapes: a, x (..., l).
    """
    length = x.shape[-1]
    order = range(length)[:: -1 if reverse else 1]
    done = 1
    if length > STEPS:
        done = length - length % STEPS
        whole = slice(length - done, length) if reverse else slice(done)
        _recur_chunks_(*(v[..., whole].unflatten(-1, (-1, STEPS)) for v in (a, x)), reverse=reverse)
    for t in range(done, length):
        x[..., order[t]].addcmul_(a[..., order[t]], x[..., order[t - 1]])


def _recur_chunks_(a: Tensor, x: Tensor, *, reverse: bool) -> None:
    """`recur_` over the two last axes, (..., chunks, STEPS).

    Each chunk first counts as one step, with its product of decays and its state from zero. That
    gives the states at all ends of chunks, and from these the states within.
    """
    decays, states = a.unbind(-1), x.unbind(-1)
    before, after = slice(-1), slice(1, None)
    if reverse:
        decays, states, before, after = decays[::-1], states[::-1], after, before
    decay = decays[0] * decays[1]
    end = torch.addcmul(states[1], decays[1], states[0])
    for a_t, x_t in zip(decays[2:], states[2:], strict=True):
        decay *= a_t
        torch.addcmul(x_t, a_t, end, out=end)
    recur_(decay, end, reverse=reverse)
    states[0][..., after].addcmul_(decays[0][..., after], end[..., before])
    for t in range(1, STEPS - 1):
        states[t].addcmul_(decays[t], states[t - 1])
    states[-1].copy_(end)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The scan and what its backward needs, computed in `dtype`.

    Args: as `selective_scan`.

    Returns:
        y and the states h, both (b, k, c, l).
    """
    y, h = (torch.empty(u.shape, dtype=dtype, device=u.device) for _ in range(2))
    rows = [_rows(x, len(u), dtype) for x in (u, delta, A, B, C, D, y, h)]
    a = y.new_empty(_tile_rows(u), *u.shape[2:])
    for tiles in zip(*(x.split(len(a)) for x in rows), strict=True):
        _forward_tile(a[: len(tiles[0])], *(x.to(dtype) for x in tiles))
    return y, h


def _forward_tile(
    a: Tensor,
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    y: Tensor, h: Tensor,
) -> None:  # fmt: skip
    """Write y and h; `a` is scratch."""
    torch.mul(delta, A, out=a).exp_()
    torch.mul(delta, u, out=h).mul_(B)
    recur_(a, h)
    torch.mul(h, C, out=y).addcmul_(u, D)


def backward(
    dy: Tensor, h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C and D in the dtype of h, from that of y.

    With g_l = C_l dy_l + a_(l+1) g_(l+1), the gradient of h_l, they are products of neighbours.
    """
    b, k, c, length = u.shape
    du, ddelta = (torch.empty_like(h) for _ in range(2))
    dA, dD = (h.new_empty(b, k, c) for _ in range(2))
    dB, dC = (h.new_empty(b, k, length) for _ in range(2))
    rows = [_rows(x, b, h.dtype) for x in (dy, h, u, delta, A, B, C, D)]
    rows += [x.flatten(0, 1) for x in (du, ddelta, dA, dB, dC, dD)]
    scratch = h.new_empty(3, _tile_rows(u), c, length)
    for tiles in zip(*(x.split(scratch.shape[1]) for x in rows), strict=True):
        _backward_tile(*scratch[:, : len(tiles[0])], *(x.to(h.dtype) for x in tiles))
    return du, ddelta, dA.sum(0), dB, dC, dD.sum(0)


def _backward_tile(
    next_a: Tensor, g: Tensor, product: Tensor,
    dy: Tensor, h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    du: Tensor, ddelta: Tensor, dA: Tensor, dB: Tensor, dC: Tensor, dD: Tensor,
) -> None:  # fmt: skip
    """Write the six gradients; the first three tensors are scratch."""
    torch.mul(delta[..., 1:], A, out=next_a[..., :-1])
    next_a[..., -1] = 0
    torch.mul(dy, C, out=g)
    recur_(next_a.exp_(), g, reverse=True)
    torch.sum(torch.mul(dy, h, out=product), 1, out=dC)
    torch.sum(torch.mul(dy, u, out=product), 2, out=dD)
    torch.mul(g, u, out=ddelta)
    torch.sum(torch.mul(ddelta, delta, out=product), 1, out=dB)
    ddelta *= B
    # h_(l-1) is 0 for the first position: what reaches the decay begins with the second.
    through_a = torch.mul(g[..., 1:], h[..., :-1], out=product[..., 1:]).mul_(next_a[..., :-1])
    ddelta[..., 1:].addcmul_(through_a, A)
    torch.sum(through_a.mul_(delta[..., 1:]), 2, out=dA)
    torch.mul(g.mul_(delta), B, out=du).addcmul_(dy, D)


def _tile_rows(u: Tensor) -> int:
    """Rows to compute at a time; off the CPU all of them."""
    rows = max(1, len(u) * u.shape[1])
    if u.device.type != "cpu":
        return rows
    return min(rows, max(1, TILE * torch.get_num_threads() // math.prod(u.shape[2:])))


def _rows(x: Tensor, images: int, dtype: torch.dtype) -> Tensor:
    """Any argument as (r, c or 1, l or 1); small ones in `dtype`."""
    if x.ndim == 2:
        return x.to(dtype).repeat(images, 1)[..., None]
    return x.flatten(0, 1) if x.ndim == 4 else x.to(dtype).flatten(0, 1)[:, None]
