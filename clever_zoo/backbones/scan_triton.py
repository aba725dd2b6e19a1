"""The selective scan as Triton kernels: one pass over the sequence forward, one backward.

A program owns some channels of one direction of one image and walks along the sequence block by
block; within a block the recurrence is an associative scan. Sums over channels are written as one
partial sum per program and added up outside, so that gradients do not depend on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements of a block: channels of a program x positions
MAX_POSITIONS = 128


@triton.jit
def _after(a_first, x_first, a_second, x_second):
    """Two steps h -> a h + x as one: the first, then the second."""
    return a_first * a_second, a_second * x_first + x_second


@triton.jit
def _scan_block(a, x, state, POSITIONS: tl.constexpr):
    """States after each position of a block (channels, positions), and the last of them."""
    decay, h = tl.associative_scan((a, x), 1, _after)
    h += decay * state[:, None]
    is_last = tl.arange(0, POSITIONS)[None, :] == POSITIONS - 1
    return h, tl.sum(tl.where(is_last, h, 0.0), 1)


@triton.jit
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr, h_ptr,
    directions, channels, length,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    kind = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    weight = (row % directions) * channels + channel
    rate = tl.load(A_ptr + weight, known, 0.0).to(kind)[:, None]
    skip = tl.load(D_ptr + weight, known, 0.0).to(kind)[:, None]
    lines = ((row * channels + channel) * length)[:, None]
    state = tl.zeros((CHANNELS,), kind)
    for start in range(0, length, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        inside = position < length
        here = known[:, None] & inside[None, :]
        at = lines + position[None, :]
        u = tl.load(u_ptr + at, here, 0.0).to(kind)
        delta = tl.load(delta_ptr + at, here, 0.0).to(kind)
        b = tl.load(B_ptr + row * length + position, inside, 0.0).to(kind)[None, :]
        c = tl.load(C_ptr + row * length + position, inside, 0.0).to(kind)[None, :]
        # Past the end delta is 0, which keeps the state as it is.
        h, state = _scan_block(tl.exp(delta * rate), delta * b * u, state, POSITIONS)
        tl.store(h_ptr + at, h, here)
        tl.store(y_ptr + at, c * h + skip * u, here)


@triton.jit
def _backward_kernel(
    dy_ptr, h_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr,
    directions, channels, length,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    kind = h_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    weight = (row % directions) * channels + channel
    rate = tl.load(A_ptr + weight, known, 0.0).to(kind)[:, None]
    skip = tl.load(D_ptr + weight, known, 0.0).to(kind)[:, None]
    lines = ((row * channels + channel) * length)[:, None]
    sums = (row * tl.num_programs(1) + tl.program_id(1)) * length
    state = tl.zeros((CHANNELS,), kind)
    dA = tl.zeros((CHANNELS,), kind)
    dD = tl.zeros((CHANNELS,), kind)
    for start in range(0, length, POSITIONS):
        # Loaded from the end on: the gradient's recurrence then runs forward in the block.
        position = length - 1 - start - tl.arange(0, POSITIONS)
        inside = position >= 0
        here = known[:, None] & inside[None, :]
        at = lines + position[None, :]
        dy = tl.load(dy_ptr + at, here, 0.0).to(kind)
        u = tl.load(u_ptr + at, here, 0.0).to(kind)
        delta = tl.load(delta_ptr + at, here, 0.0).to(kind)
        later = here & (position < length - 1)[None, :]
        next_delta = tl.load(delta_ptr + at + 1, later, 0.0).to(kind)
        h = tl.load(h_ptr + at, here, 0.0)
        previous_h = tl.load(h_ptr + at - 1, here & (position > 0)[None, :], 0.0)
        b = tl.load(B_ptr + row * length + position, inside, 0.0).to(kind)[None, :]
        c = tl.load(C_ptr + row * length + position, inside, 0.0).to(kind)[None, :]
        g, state = _scan_block(tl.exp(next_delta * rate), c * dy, state, POSITIONS)
        ga = g * tl.exp(delta * rate) * previous_h
        tl.store(du_ptr + at, g * delta * b + skip * dy, here)
        tl.store(ddelta_ptr + at, g * b * u + rate * ga, here)
        tl.store(dB_ptr + sums + position, tl.sum(g * delta * u, 0), inside)
        tl.store(dC_ptr + sums + position, tl.sum(dy * h, 0), inside)
        dA += tl.sum(ga * delta, 1)
        dD += tl.sum(dy * u, 1)
    tl.store(dA_ptr + row * channels + channel, dA, known)
    tl.store(dD_ptr + row * channels + channel, dD, known)


def _tile(length: int) -> tuple[int, int]:
    """Channels of a program and positions of a block for sequences of a length."""
    positions = min(MAX_POSITIONS, max(16, triton.next_power_of_2(length)))
    return TILE // positions, positions


def _launch(kernel: triton.JITFunction, *tensors: Tensor, shape: torch.Size) -> None:
    b, k, c, length = shape
    channels, positions = _tile(length)
    with torch.cuda.device_of(tensors[0]):
        kernel[b * k, triton.cdiv(c, channels)](
            *tensors, k, c, length, CHANNELS=channels, POSITIONS=positions
        )


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `clever_zoo.backbones.scan_torch.forward`, for tensors on a GPU."""
    y, h = (torch.empty(u.shape, dtype=dtype, device=u.device) for _ in range(2))
    inputs = [x.contiguous() for x in (u, delta, A, B, C, D)]
    _launch(_forward_kernel, *inputs, y, h, shape=u.shape)
    return y, h


def backward(
    dy: Tensor, h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, ...]:
    """As `clever_zoo.backbones.scan_torch.backward`, for tensors on a GPU."""
    b, k, c, length = u.shape
    du, ddelta = (torch.empty_like(h) for _ in range(2))
    dA, dD = (h.new_empty(b, k, c) for _ in range(2))
    parts = triton.cdiv(c, _tile(length)[0])
    dB, dC = (h.new_empty(b, k, parts, length) for _ in range(2))
    inputs = [x.contiguous() for x in (dy, h, u, delta, A, B, C, D)]
    _launch(_backward_kernel, *inputs, du, ddelta, dA, dB, dC, dD, shape=u.shape)
    return du, ddelta, dA.sum(0), dB.sum(2), dC.sum(2), dD.sum(0)
