"""VMamba: names, shapes and counts of the specification, its arithmetic, and timm's interface."""

import copy
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

import clever_zoo
import clever_zoo.timm
from clever_zoo import OnnxEncoder, create_classifier, export_onnx, onnx_export
from clever_zoo.backbones import BACKBONES, build_backbone, vmamba
from clever_zoo.backbones.vmamba import SS2D, VMamba, create_vmamba
from clever_zoo.encoder import Encoder
from clever_zoo.errors import ShapeError, SpecError
from clever_zoo.onnx_export import MIN_COSINE, max_relative_difference, min_cosine
from clever_zoo.preprocess import image_pixels
from clever_zoo.samples import sample_paths
from clever_zoo.spec import ModelSpec

PARAMETERS = 29_480_064
MULTIPLY_ADDS = 4.812e9  # convolutions, linear layers and projections at 224 px


@pytest.fixture(scope="module")
def tiny() -> VMamba:
    torch.manual_seed(0)
    return build_backbone("vmamba_tiny").eval()


@pytest.fixture
def toy() -> VMamba:
    """Two stages of two blocks, for what does not depend on the size."""
    torch.manual_seed(0)
    return VMamba(num_classes=0, embed_dim=16, depths=(2, 2)).eval()


def small_encoder(**fields: object) -> Encoder:
    """Random weights at 32 px, the state space made to matter."""
    torch.manual_seed(0)
    spec = {"name": "vmamba_tiny", "backbone": "vmamba_tiny", "invariant_dim": 614}
    encoder = Encoder(ModelSpec.create(**spec | {"preprocess": {"input_size_px": 32}} | fields))
    return encoder.eval()


def specified_shapes() -> dict[str, tuple[int, ...]]:
    """Every parameter as the authors' files hold it, without the classifier."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.0.weight": (48, 3, 3, 3),
        "patch_embed.5.weight": (96, 48, 3, 3),
    }
    shapes |= {f"patch_embed.{i}.bias": (48,) for i in (0, 2)}
    shapes |= {f"patch_embed.{i}.bias": (96,) for i in (5, 7)}
    shapes |= {"patch_embed.2.weight": (48,), "patch_embed.7.weight": (96,)}
    for s, (c, depth) in enumerate(zip((96, 192, 384, 768), (2, 2, 8, 2), strict=True)):
        r = c // 16
        for b in range(depth):
            block = {
                "norm.weight": (c,),
                "norm.bias": (c,),
                "op.x_proj_weight": (4, r + 2, c),
                "op.dt_projs_weight": (4, c, r),
                "op.dt_projs_bias": (4, c),
                "op.A_logs": (4 * c, 1),
                "op.Ds": (4 * c,),
                "op.out_norm.weight": (c,),
                "op.out_norm.bias": (c,),
                "op.in_proj.weight": (c, c),
                "op.conv2d.weight": (c, 1, 3, 3),
                "op.out_proj.weight": (c, c),
                "norm2.weight": (c,),
                "norm2.bias": (c,),
                "mlp.fc1.weight": (4 * c, c),
                "mlp.fc1.bias": (4 * c,),
                "mlp.fc2.weight": (c, 4 * c),
                "mlp.fc2.bias": (c,),
            }
            shapes |= {f"layers.{s}.blocks.{b}.{name}": shape for name, shape in block.items()}
        if s < 3:
            down = f"layers.{s}.downsample"
            shapes |= {f"{down}.1.weight": (2 * c, c, 3, 3), f"{down}.1.bias": (2 * c,)}
            shapes |= {f"{down}.3.weight": (2 * c,), f"{down}.3.bias": (2 * c,)}
    return shapes | {"classifier.norm.weight": (768,), "classifier.norm.bias": (768,)}


def test_parameters_are_those_of_the_authors_files(tiny: VMamba) -> None:
    shapes = {name: tuple(value.shape) for name, value in tiny.state_dict().items()}
    assert shapes == specified_shapes()
    assert sum(map(math.prod, shapes.values())) == PARAMETERS
    classes = create_vmamba("vmamba_tiny")
    assert sum(p.numel() for p in classes.parameters()) == 30_249_064
    assert tuple(classes.state_dict()["classifier.head.weight"].shape) == (1000, 768)
    assert {m.eps for m in tiny.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_larger_siblings() -> None:
    with torch.device("meta"):
        small, base = (create_vmamba(f"vmamba_{n}", num_classes=0) for n in ("small", "base"))
    # The tiny one and twelve more blocks of the third stage.
    assert sum(p.numel() for p in small.parameters()) == PARAMETERS + 12 * 1_563_648
    assert base.num_features == 1024
    assert [len(stage.blocks) for stage in base.layers] == [2, 2, 20, 2]
    rates = [model.layers[3].blocks[1].drop_path2.drop_prob for model in (small, base)]
    assert rates == [pytest.approx(0.3), pytest.approx(0.6)]


def test_an_unknown_variant_names_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"vmamba_huge.*vmamba_tiny, vmamba_small, vmamba_base"):
        create_vmamba("vmamba_huge")


def test_initial_values() -> None:
    torch.manual_seed(0)
    op = SS2D(384)
    assert not op.A_logs.any()
    assert (op.Ds == 1).all()
    steps = F.softplus(op.dt_projs_bias).detach().log10()
    assert (steps.min(), steps.max()) == (pytest.approx(-3, abs=0.02), pytest.approx(-1, abs=0.02))
    assert steps.mean() == pytest.approx(-2, abs=0.05)  # uniform in the logarithm
    for parameter, bound in ((op.x_proj_weight, 384**-0.5), (op.dt_projs_weight, 24**-0.5)):
        weight = parameter.detach()
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    model = build_backbone("vmamba_tiny")
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(m.weight.detach().std() == pytest.approx(0.02, rel=0.05) for m in linear)
    assert not any(m.bias.any() for m in linear if m.bias is not None)
    conv = model.layers[2].downsample[1].weight.detach()  # PyTorch's own: uniform, 1 / sqrt(fan in)
    assert conv.abs().max() == pytest.approx((384 * 9) ** -0.5, rel=0.01)


def test_paths_are_dropped_ever_more_often() -> None:
    model = build_backbone("vmamba_tiny")
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    rates = [[b.drop_path1.drop_prob, b.drop_path2.drop_prob] for b in blocks[1:]]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 14)[1:, None].repeat(2, 1), rtol=1e-6)
    still = build_backbone("vmamba_tiny", drop_path_rate=0.0)
    assert not any(hasattr(m, "drop_prob") for m in still.modules())


def scan_by_hand(op: SS2D, image: np.ndarray) -> np.ndarray:
    """`SS2D` of one image (H, W, C) in float64, pixel after pixel along each direction."""
    p = {name: value.double().numpy() for name, value in op.state_dict().items()}
    height, width, dim = image.shape
    inner = np.pad(image @ p["in_proj.weight"].T, ((1, 1), (1, 1), (0, 0)))
    kernel = p["conv2d.weight"][:, 0]
    x = np.zeros((height, width, dim))
    for i in range(3):
        for j in range(3):
            x += inner[i : i + height, j : j + width] * kernel[:, i, j]
    x = x / (1 + np.exp(-x))
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    merged = np.zeros_like(x)
    rank = op.dt_rank
    a = -np.exp(p["A_logs"]).reshape(4, dim)
    d = p["Ds"].reshape(4, dim)
    for k, path in enumerate((rows, columns, rows[::-1], columns[::-1])):
        h = np.zeros(dim)
        for place in path:
            u = x[place]
            projected = p["x_proj_weight"][k] @ u
            step = p["dt_projs_weight"][k] @ projected[:rank] + p["dt_projs_bias"][k]
            step = np.log1p(np.exp(step))
            h = np.exp(step * a[k]) * h + step * projected[rank] * u
            merged[place] += projected[rank + 1] * h + d[k] * u
    mean, variance = merged.mean(-1, keepdims=True), merged.var(-1, keepdims=True)
    normed = (merged - mean) / np.sqrt(variance + 1e-5)
    return (normed * p["out_norm.weight"] + p["out_norm.bias"]) @ p["out_proj.weight"].T


def test_the_scan_block_by_hand() -> None:
    torch.manual_seed(0)
    op = SS2D(20)  # a rank of 2, rounded up
    with torch.no_grad():
        for parameter in op.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        images = torch.randn(2, 3, 5, 20)
        expected = np.stack([scan_by_hand(op, image.double().numpy()) for image in images])
        np.testing.assert_allclose(op(images).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_scan_block() -> None:
    torch.manual_seed(0)
    op = SS2D(16).double()
    x = torch.randn(1, 2, 3, 16, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(op, x, atol=1e-6)
    y = torch.linspace(-30, 30, 41, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(vmamba._Softplus.apply, y)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (224, 224), (37, 50), (1, 1)])
def test_any_size(tiny: VMamba, height: int, width: int) -> None:
    """Each halving rounds up."""
    pixels = torch.randn(1, 3, height, width)
    with torch.no_grad():
        last, maps = tiny.forward_intermediates(pixels)
        pooled = tiny(pixels)
    for info, stage in zip(tiny.feature_info, maps, strict=True):
        sides = [math.ceil(side / info["reduction"]) for side in (height, width)]
        assert stage.shape == (1, info["num_chs"], *sides)
    torch.testing.assert_close(last.mean((2, 3)), pooled)


@pytest.mark.parametrize(
    "shape", [(2, 1, 32, 32), (2, 4, 32, 32), (2, 3, 0, 32), (2, 3, 32, 0), (3, 32, 32)]
)
def test_wrong_pixels_are_shape_errors(toy: VMamba, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="pixels have shape"):
        toy(torch.zeros(shape))
    with pytest.raises(ShapeError, match="pixels have shape"):
        Encoder(small_encoder().spec, toy)(torch.zeros(shape))


def test_an_empty_batch_is_an_empty_embedding() -> None:
    assert small_encoder().embed([]).invariant.shape == (0, 614)


def test_features_are_maps_whose_mean_is_the_embedding() -> None:
    encoder = small_encoder()
    pixels = torch.randn(2, 3, 64, 96)
    older, newest = encoder.features(pixels, last=2)
    assert older.shape == (2, 384, 4, 6)
    torch.testing.assert_close(newest.mean((2, 3)), encoder(pixels).full)
    assert [m.shape[1] for m in encoder.features(pixels, last=4)] == [96, 192, 384, 768]
    with pytest.raises(ShapeError, match=r"last is 5; .* use 1\.\.4"):
        encoder.features(pixels, last=5)


def test_timm_interface(toy: VMamba) -> None:
    pixels = torch.randn(2, 3, 16, 24)
    caught: list[torch.Tensor] = []
    for info in toy.feature_info:
        module = toy.get_submodule(info["module"])
        module.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    last = toy.forward_features(pixels)
    raw = toy.forward_intermediates(pixels, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(raw, caught[:2], strict=True))
    final, normed = toy.forward_intermediates(pixels, indices=[1], norm=True)
    assert torch.equal(final, last)
    assert torch.equal(normed[0], last)
    caught.clear()
    assert len(toy.forward_intermediates(pixels, [0], stop_early=True, intermediates_only=True))
    assert len(caught) == 1
    with pytest.raises(ShapeError, match="NHWC"):
        toy.forward_intermediates(pixels, output_fmt="NHWC")
    assert isinstance(toy.get_classifier(), nn.Identity)
    toy.reset_classifier(7)
    assert toy(pixels).shape == (2, 7)
    assert torch.equal(toy.forward_head(last, pre_logits=True), toy.global_pool(last))
    assert toy.get_classifier() is toy.get_submodule(BACKBONES["vmamba_tiny"].classifier)
    toy.reset_classifier(0, "")
    assert toy(pixels).shape == last.shape


def test_built_as_timm_builds(toy: VMamba) -> None:
    model = create_vmamba("vmamba_tiny", features_only=True, in_chans=1, out_indices=(1, 3))
    assert model.feature_info.channels() == [192, 768]
    maps = model(torch.zeros(1, 1, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(1, 192, 4, 4), (1, 768, 1, 1)]
    config = timm.create_model("vmamba_tiny").pretrained_cfg
    assert (config["architecture"], config["input_size"]) == ("vmamba_tiny", (3, 224, 224))
    model = create_vmamba("vmamba_tiny", num_classes=3, drop_rate=0.5, depths=(1, 1))
    assert (model.head_drop.p, model.num_classes) == (0.5, 3)
    with pytest.raises(SpecError, match=r"model_args\.img_size: not an argument of vmamba_tiny"):
        build_backbone("vmamba_tiny", img_size=32)


def test_layers_for_layer_decay(tiny: VMamba) -> None:
    layers = group_parameters(tiny, tiny.group_matcher(coarse=False), reverse=True)
    assert layers.keys() == dict(tiny.named_parameters()).keys()
    names = ["patch_embed.0.weight"]
    names += [f"layers.{s}.blocks.{b}.op.Ds" for s, n in enumerate((2, 2, 8, 2)) for b in range(n)]
    assert [layers[name] for name in names] == list(range(15))
    assert layers["layers.1.downsample.1.bias"] == layers["layers.1.blocks.1.op.Ds"]
    assert layers["classifier.norm.weight"] == 14
    classifier = create_classifier(small_encoder(), 3)
    groups = classifier.parameter_groups(1.0, layer_decay=0.5)
    assert [g["lr"] for g in groups] == [*(0.5**d for d in range(15, 0, -1)), 1.0]


def test_what_the_model_spares_from_decay(toy: VMamba) -> None:
    blocks = [f"layers.{s}.blocks.{b}.op" for s in (0, 1) for b in (0, 1)]
    spared = {f"{b}.{name}" for b in blocks for name in ("A_logs", "Ds", "dt_projs_bias")}
    assert toy.no_weight_decay() == spared


def test_multiply_adds(tiny: VMamba, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the recurrence itself, as the specification counts."""
    monkeypatch.setattr(vmamba, "selective_scan", lambda u, *_: u)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tiny(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(MULTIPLY_ADDS, rel=0.01)


def kept_bytes(name: str) -> int:
    """What a forward pass at 224 px leaves in memory for the backward pass."""
    network, pixels = build_backbone(name).train(), torch.randn(1, 3, 224, 224)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = network(pixels)
    assert result.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def test_a_training_step_keeps_at_most_twice_what_resnet50_keeps() -> None:
    ours, peer = kept_bytes("vmamba_tiny"), kept_bytes("resnet50")
    assert peer > 60e6
    assert ours <= 2 * peer, (ours, peer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_scan_in_float32(toy: VMamba, dtype: torch.dtype) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    full = toy(pixels)
    with torch.autocast("cpu", dtype):
        mixed = toy(pixels)
    half = toy.to(dtype)(pixels.to(dtype)).float()
    for other in (mixed.float(), half):
        assert F.cosine_similarity(full, other).min() > 0.999


def test_every_door_gives_a_saved_encoder_to_the_bit(tmp_path: Path) -> None:
    encoder = small_encoder()
    encoder.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    loaded = clever_zoo.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = encoder(pixels).full
        assert torch.equal(loaded(pixels).full, expected)
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(model(pixels), expected)
        wrapper = AutoModel.from_pretrained(tmp_path).eval()
        assert torch.equal(wrapper(pixels).pooler_output, expected)
    classifier = create_classifier(loaded, 3, part="equivariant")
    classifier.save_pretrained(tmp_path / "classifier")
    again = clever_zoo.Classifier.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again(pixels), classifier.eval()(pixels))


def test_onnx_gives_torchs_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two last stages with a block each, traced once; at batches that were not traced."""
    backbone = create_vmamba("vmamba_tiny", num_classes=0, embed_dim=384, depths=(1, 1))
    encoder = Encoder(small_encoder().spec, backbone).eval()
    traced = onnx_export._trace(encoder, encoder.spec.preprocess, "uint8")
    monkeypatch.setattr(onnx_export, "_trace", lambda *_: copy.deepcopy(traced))
    for precision in ("fp32", "fp16", "int8"):
        report = export_onnx(encoder, tmp_path / f"{precision}.onnx", precision=precision)
        onnx_encoder = OnnxEncoder.from_pretrained(report.path)
        for count in (1, 3, 8):
            pixels = pixels_of(encoder, count)
            halves = zip(
                onnx_encoder.embed_pixels(pixels), encoder.embed_pixels(pixels), strict=True
            )
            for ours, theirs in halves:
                if precision == "fp32":
                    assert max_relative_difference(ours, theirs) <= 1e-4
                else:
                    assert min_cosine(ours, theirs) >= MIN_COSINE[precision]


@pytest.mark.slow
def test_onnx_at_224_px(tmp_path: Path) -> None:
    """The first stage scans 3,136 places: in no loop, and unrolled in none. A block a stage."""
    spec = small_encoder(preprocess={"input_size_px": 224}).spec
    backbone = create_vmamba("vmamba_tiny", num_classes=0, depths=(1, 1, 1, 1))
    report = export_onnx(Encoder(spec, backbone), tmp_path / "vmamba.onnx")
    nodes = [node.op_type for node in onnx.load(report.path).graph.node]
    assert not {"Loop", "Scan"} & set(nodes)
    assert len(nodes) < 2000


def pixels_of(encoder: Encoder, count: int) -> np.ndarray:
    paths = sample_paths()[5::9][:count]
    return np.stack([image_pixels(path, encoder.spec.preprocess) for path in paths])


@pytest.mark.slow
def test_a_compiled_network_keeps_the_scan_and_its_gradients() -> None:
    torch.manual_seed(0)
    toy = VMamba(num_classes=0, embed_dim=16, depths=(1, 1), drop_path_rate=0)
    pixels, gradients = torch.randn(2, 3, 40, 24), []
    for network in (toy, torch.compile(copy.deepcopy(toy), backend="aot_eager")):
        network(pixels).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_an_empty_batch_has_empty_features(toy: VMamba) -> None:
    assert toy(torch.zeros(0, 3, 32, 32)).shape == (0, 32)


def test_stopping_early_returns_the_map_of_its_stage(toy: VMamba) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    last, (first,) = toy.forward_intermediates(pixels, indices=[0], stop_early=True)
    assert torch.equal(last, first)
