"""VMamba's scan: pixels in four orders, and a linear recurrence along each of them.

Shapes: b images, k directions, c channels, l positions, h x w pixels.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clever_zoo.backbones import scan_torch
from clever_zoo.errors import ShapeError


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, kernel: bool = True
) -> Tensor:
    """Run h_l = exp(delta_l A) h_(l-1) + delta_l B_l u_l and read y_l = C_l h_l + D u_l; h_0 is 0.

    Args:
        u: Input, (b, k, c, l).
        delta: Step sizes, positive, (b, k, c, l).
        A: Rates of decay, negative, (k, c).
        B: What a position adds to the state, (b, k, l).
        C: What a position reads from the state, (b, k, l).
        D: What passes by the state, (k, c).
        kernel: On CUDA, use the Triton kernels if Triton is installed.

    Returns:
        y, (b, k, c, l), computed in float32, or in float64 for a float64 `u`.

    Raises:
        ShapeError: If a shape does not fit `u`, or `u` is no floating-point tensor.
    """
    _check_shapes(u, delta, A, B, C, D)
    if torch.compiler.is_exporting():  # no tiles and nothing in place
        return scan_torch.scan(*(x.to(_dtype_of(u)) for x in (u, delta, A, B, C, D)))
    form = _triton_form() if kernel and u.is_cuda else None
    return _apply(form or scan_torch, u, delta, A, B, C, D)


@torch.compiler.disable  # a compiler would unroll the steps, and leave the kernels unused
def _apply(form: ModuleType, *inputs: Tensor) -> Tensor:
    return _SelectiveScan.apply(form, *inputs)


def selective_scan_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """`selective_scan` as its definition reads, one position after the other.

    What the other forms are tested and timed against; in the dtype of its inputs.
    """
    h, y = torch.zeros_like(u[..., 0]), []
    for u_l, delta_l, b, c in zip(*(x.unbind(-1) for x in (u, delta, B, C)), strict=True):
        h = torch.exp(delta_l * A) * h + delta_l * b[..., None] * u_l
        y.append(c[..., None] * h + D * u_l)
    return torch.stack(y, -1)


def cross_scan(x: Tensor) -> Tensor:
    """Read images along four paths: by rows, by columns, and both from the end.

    Shapes: (b, c, h, w) -> (b, 4, c, h * w).

    Raises:
        ShapeError: If `x` has another rank.
    """
    if x.ndim != 4:
        raise ShapeError(f"x has shape {tuple(x.shape)}; pass (b, c, h, w)")
    if not torch.compiler.is_exporting():
        return _CrossScan.apply(x)
    ahead = torch.stack([x.flatten(2), x.mT.flatten(2)], 1)
    return torch.cat([ahead, ahead.flip(-1)], 1)


def cross_merge(y: Tensor, h: int, w: int) -> Tensor:
    """Put values along the four paths of `cross_scan` back to their pixels and add them up.

    Shapes: (b, 4, c, h * w) -> (b, c, h, w).

    Raises:
        ShapeError: If `y` has another shape.
    """
    if y.ndim != 4 or y.shape[1] != 4 or y.shape[3] != h * w:
        raise ShapeError(f"y has shape {tuple(y.shape)}; pass (b, 4, c, {h} * {w} = {h * w})")
    if not torch.compiler.is_exporting():
        return _CrossMerge.apply(y, h, w)
    return _put_back(y, h, w)


def _dtype_of(u: Tensor) -> torch.dtype:
    return torch.promote_types(u.dtype, torch.float32)


def _check_shapes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> None:
    if u.ndim != 4 or not u.is_floating_point() or 0 in u.shape[1:]:
        raise ShapeError(
            f"u is {u.dtype} of shape {tuple(u.shape)}; pass floats (b, k, c, l), only b may be 0"
        )
    b, k, c, length = u.shape
    expected = {
        "delta": (b, k, c, length),
        "A": (k, c),
        "B": (b, k, length),
        "C": (b, k, length),
        "D": (k, c),
    }
    given = {"delta": delta, "A": A, "B": B, "C": C, "D": D}
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ShapeError(
                f"{name} has shape {tuple(given[name].shape)}; with u {tuple(u.shape)} pass {shape}"
            )


@functools.cache
def _triton_form() -> ModuleType | None:
    try:
        from clever_zoo.backbones import scan_triton
    except ImportError:
        return None
    return scan_triton


class _SelectiveScan(torch.autograd.Function):
    """The scan by a module's `forward` and `backward`; keeps the inputs as they are and h."""

    @staticmethod
    def forward(ctx: Any, form: ModuleType, *inputs: Tensor) -> Tensor:
        y, h = form.forward(*inputs, _dtype_of(inputs[0]))
        ctx.form = form
        ctx.save_for_backward(h, *inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, *inputs = ctx.saved_tensors
        gradients = ctx.form.backward(dy, h, *inputs)
        return None, *(g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True))


class _CrossScan(torch.autograd.Function):
    """Each order written where it belongs, in half the time of stacking them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        b, c, *ctx.size = x.shape
        h, w = ctx.size
        y = x.new_empty(b, 4, c, h * w)
        y[:, 0].unflatten(-1, (h, w)).copy_(x)
        y[:, 1].unflatten(-1, (w, h)).copy_(x.mT)
        y[:, 2:] = y[:, :2].flip(-1)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return cross_merge(dy, *ctx.size)


class _CrossMerge(torch.autograd.Function):
    """Keeps nothing: the gradient of putting back is reading."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: int, w: int) -> Tensor:
        return _put_back(y, h, w)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return cross_scan(dx), None, None


def _put_back(y: Tensor, h: int, w: int) -> Tensor:
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return rows.unflatten(-1, (h, w)) + columns.unflatten(-1, (w, h)).mT
