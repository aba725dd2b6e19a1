"""The selective scan's forms against its definition, and the four orders of the pixels."""

import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clever_zoo.backbones import scan_torch
from clever_zoo.backbones.scan import (
    _SelectiveScan,
    cross_merge,
    cross_scan,
    selective_scan,
    selective_scan_loop,
)
from clever_zoo.errors import ShapeError

NAMES = ("u", "delta", "A", "B", "C", "D")


def scan_inputs(
    b: int, k: int, c: int, length: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """Random inputs with decays from almost none to almost all."""
    g = torch.Generator().manual_seed(length)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    tensors = [
        normal(b, k, c, length),
        F.softplus(3 * normal(b, k, c, length) - 1),
        -torch.exp(normal(k, c)),
        normal(b, k, length),
        normal(b, k, length),
        normal(k, c),
    ]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def with_gradients(form, inputs: list[Tensor]) -> list[Tensor]:
    """y, then the gradients of a weighted sum of it."""
    y = form(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).cos()
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def difference(ours: Tensor, expected: Tensor) -> float:
    """Greatest difference relative to the greatest value."""
    greatest = expected.double().abs().max().clip(min=1e-30)
    return ((ours.double() - expected.double()).abs().max() / greatest).item()


def assert_same_scan(form, inputs: list[Tensor], reference: list[Tensor]) -> None:
    y, *gradients = with_gradients(form, inputs)
    expected_y, *expected = with_gradients(selective_scan_loop, reference)
    assert difference(y, expected_y) < 1e-5
    for name, ours, theirs in zip(NAMES, gradients, expected, strict=True):
        assert difference(ours, theirs) < 1e-4, name


def test_the_loop_is_the_recurrence() -> None:
    """Halving the state and adding one gives 2 - 2^-i."""
    ones = torch.ones(1, 1, 1, 6, dtype=torch.float64)
    rate = torch.full((1, 1), -math.log(2), dtype=torch.float64)
    y = selective_scan_loop(ones, ones, rate, ones[0], ones[0], torch.full((1, 1), 10.0))
    expected = [10 + 2 - 0.5**i for i in range(6)]
    assert y.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 49, 65, 196, 577, 784])
def test_agrees_with_the_loop(length: int) -> None:
    inputs = scan_inputs(2, 4, 3, length)
    assert_same_scan(selective_scan, inputs, inputs)


def test_agrees_with_the_loop_at_224_px() -> None:
    inputs = scan_inputs(1, 4, 2, 3136)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert_same_scan(selective_scan, inputs, exact)


@pytest.mark.parametrize("decay", [0.0, 1e-7, 1e-3, 60.0, 1e30])
def test_is_stable_at_any_decay(decay: float) -> None:
    """States of 3,136 positions that forget nothing, little, much and everything."""
    u, delta, A, B, C, D = (x.detach() for x in scan_inputs(1, 1, 2, 3136))
    inputs = [u, torch.ones_like(delta), torch.full_like(A, -decay), B, C, D]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    forms = (selective_scan, inputs), (selective_scan_loop, inputs), (selective_scan_loop, exact)
    for ours, loop, truth in zip(*(with_gradients(*form) for form in forms), strict=True):
        # A decay next to 1 is itself rounded, 3,136 times the same way: the loop is no nearer.
        assert difference(ours, truth) < max(1e-5, 2 * difference(loop, truth))


def test_extreme_steps_side_by_side() -> None:
    u, _, A, B, C, D = scan_inputs(1, 4, 3, 900)
    delta = (10.0 ** torch.linspace(-8, 4, 900))[torch.randperm(900)].expand_as(u).contiguous()
    inputs = [u, delta.requires_grad_(), A, B, C, D]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert_same_scan(selective_scan, inputs, exact)


@pytest.mark.parametrize("length", [1, 11, 70])
def test_gradients_by_finite_differences(length: int) -> None:
    inputs = scan_inputs(2, 2, 2, length, torch.float64)
    assert torch.autograd.gradcheck(selective_scan, inputs, fast_mode=length > 20)


def test_any_number_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = scan_inputs(3, 4, 5, 50)
    whole = with_gradients(selective_scan, inputs)
    monkeypatch.setattr(scan_torch, "TILE", 5 * 5 * 50)
    for ours, expected in zip(with_gradients(selective_scan, inputs), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_memory_layout_does_not_matter() -> None:
    inputs = scan_inputs(2, 4, 3, 20)
    expected = torch.autograd.grad(selective_scan(*inputs), inputs, torch.ones_like(inputs[0]))
    scattered = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(selective_scan(*scattered).sum(), scattered)
    assert not scattered[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = scan_inputs(2, 4, 3, 100, dtype)
    single = [x.detach().float().requires_grad_() for x in inputs]
    y, *gradients = with_gradients(selective_scan, inputs)
    expected_y, *expected = with_gradients(selective_scan, single)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected_y)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs.to(dtype))


def test_autocast_changes_nothing() -> None:
    inputs = scan_inputs(2, 4, 3, 100)
    expected = with_gradients(selective_scan, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(selective_scan, inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_keeps_only_inputs_and_states() -> None:
    inputs = scan_inputs(2, 4, 3, 100)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = selective_scan(*inputs)
    assert sum(kept.values()) == sum(x.nbytes for x in inputs) + y.nbytes


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (2, 4, 3)),
        ("u", (2, 4, 3, 0)),
        ("delta", (2, 4, 3, 9)),
        ("A", (4, 3, 1)),
        ("B", (2, 4, 3, 10)),
        ("C", (2, 1, 10)),
        ("D", (3,)),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    inputs = dict(zip(NAMES, scan_inputs(2, 4, 3, 10), strict=True)) | {name: torch.ones(shape)}
    with pytest.raises(ShapeError, match=rf"^{name} .*{re.escape(str(shape))}.*pass"):
        selective_scan(**inputs)


def test_integers_are_refused() -> None:
    _, *others = scan_inputs(2, 4, 3, 10)
    with pytest.raises(ShapeError, match=r"int64.*floats"):
        selective_scan(torch.ones(2, 4, 3, 10, dtype=torch.int64), *others)


def test_the_four_orders() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert cross_scan(x).view(4, 6).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (2, 7)])
def test_merging_what_was_scanned_gives_four_times_the_image(size: tuple[int, int]) -> None:
    x = torch.from_numpy(np.random.default_rng(0).integers(-99, 99, (2, 3, *size))).float()
    assert torch.equal(cross_merge(cross_scan(x), *size), 4 * x)


def test_scan_and_merge_are_transposes() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 3, 20, dtype=torch.float64, requires_grad=True)
    scanned, merged = cross_scan(x), cross_merge(y, 4, 5)
    assert (scanned * y).sum().item() == pytest.approx((x * merged).sum().item())
    assert torch.equal(torch.autograd.grad(scanned, x, y)[0], merged)
    assert torch.equal(torch.autograd.grad(merged, y, x)[0], scanned)
    assert torch.autograd.gradcheck(cross_scan, (x.mT,))
    assert torch.autograd.gradgradcheck(lambda y: cross_merge(y, 4, 5), (y,))


def test_images_and_sequences_of_wrong_shapes() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 4, 5\).*\(b, c, h, w\)"):
        cross_scan(torch.ones(3, 4, 5))
    with pytest.raises(ShapeError, match=r"\(1, 4, 3, 19\).*4 \* 5 = 20"):
        cross_merge(torch.ones(1, 4, 3, 19), 4, 5)
    with pytest.raises(ShapeError, match=r"\(1, 3, 3, 20\)"):
        cross_merge(torch.ones(1, 3, 3, 20), 4, 5)


class _Scan(torch.nn.Module):
    """Cross-scan, selective scan, cross-merge, with what the scan reads made from the image."""

    def forward(self, x: Tensor) -> Tensor:
        u = cross_scan(x)
        rate = torch.arange(1.0, 4 * x.shape[1] + 1).view(4, -1)
        y = selective_scan(u, F.softplus(u), -rate, u.mean(2), u.amax(2), rate.cos())
        return cross_merge(y, *x.shape[2:])


@pytest.fixture(scope="module")
def traced() -> torch.export.ExportedProgram:
    sizes = ({0: torch.export.Dim("batch")},)
    example = torch.randn(2, 3, 14, 15)
    return torch.export.export(_Scan().eval(), (example,), dynamic_shapes=sizes)


@pytest.fixture(scope="module")
def exported(
    traced: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("scan") / "scan.onnx"
    torch.onnx.export(traced, f=path, input_names=["x"], external_data=False, verbose=False)
    return path


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_gives_the_same_values(exported: Path, batch: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(batch, 3, 14, 15, generator=torch.Generator().manual_seed(batch))
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (ours,) = session.run(None, {"x": x.numpy()})
    assert difference(torch.from_numpy(ours), _Scan()(x)) < 1e-5


def test_the_graph_has_no_step_per_position(traced: torch.export.ExportedProgram) -> None:
    """Fifteen times the positions only add a level or two to the recurrence."""
    large = torch.export.export(_Scan().eval(), (torch.randn(1, 3, 56, 56),))
    assert len(large.graph.nodes) < min(2 * len(traced.graph.nodes), 500)


@pytest.mark.parametrize("length", [2, 9, 64, 100])
def test_the_traced_form_agrees_with_the_loop(length: int) -> None:
    inputs = scan_inputs(2, 4, 3, length)
    assert_same_scan(scan_torch.scan, inputs, inputs)


def scan_by_triton(*inputs: Tensor) -> Tensor:
    scan_triton = pytest.importorskip("clever_zoo.backbones.scan_triton")
    return _SelectiveScan.apply(scan_triton, *inputs)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="runs in the process below")
@pytest.mark.parametrize("length", [1, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triton_agrees_with_the_loop_when_interpreted(
    length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of two channels and sixteen positions: some whole, some not."""
    from clever_zoo.backbones import scan_triton

    monkeypatch.setattr(scan_triton, "TILE", 32)
    monkeypatch.setattr(scan_triton, "MAX_POSITIONS", 16)
    inputs = scan_inputs(2, 2, 3, length, dtype)
    assert_same_scan(scan_by_triton, inputs, inputs)


def test_triton_kernels_in_the_interpreter() -> None:
    """Triton decides on import whether to interpret, hence another process."""
    pytest.importorskip("triton")
    arguments = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "when_interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "8 passed" in result.stdout


@pytest.mark.parametrize("inputs", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_triton_kernels_compile_for_a_gpu(kernel: str, inputs: str) -> None:
    """Down to machine code for compute capability 8.0, which needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clever_zoo.backbones import scan_triton

    function = getattr(scan_triton, kernel)
    outputs = "fp64" if inputs == "fp64" else "fp32"
    computed = {"y_ptr", "h_ptr"} | {f"d{name}_ptr" for name in ("y", *NAMES)}
    signature = {
        name: "constexpr" if name.isupper() else f"*{outputs if name in computed else inputs}"
        if name.endswith("_ptr") else "i32"
        for name in function.arg_names
    }  # fmt: skip
    source = ASTSource(function, signature, {"CHANNELS": 8, "POSITIONS": 128})
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 9, 49, 196, 3136])
def test_triton_on_a_gpu(length: int) -> None:
    inputs = scan_inputs(2, 4, 5, length, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert_same_scan(scan_by_triton, inputs, exact)
    assert torch.equal(selective_scan(*inputs), scan_by_triton(*inputs))
    assert_same_scan(partial(selective_scan, kernel=False), inputs, exact)


@pytest.mark.gpu
def test_triton_reads_bfloat16() -> None:
    inputs = scan_inputs(2, 4, 5, 300, torch.bfloat16, "cuda")
    y, *gradients = with_gradients(scan_by_triton, inputs)
    single = [x.detach().float().requires_grad_() for x in inputs]
    expected_y, *expected = with_gradients(scan_by_triton, single)
    assert torch.equal(y, expected_y)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(gradients, expected, strict=True))
