"""Checkpoints of other code bases, made here with their exact names and containers."""

import argparse
import itertools
import os
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import clever_zoo
import clever_zoo.timm  # timm's door to VMamba
from clever_zoo.backbones import BACKBONES
from clever_zoo.cli import app
from clever_zoo.convert import convert_checkpoint
from clever_zoo.convert_backbones import recognise
from clever_zoo.errors import CheckpointError, CleverZooError, SpecError, WeightsMismatchError
from clever_zoo.samples import sample_paths
from clever_zoo.spec import ModelSpec, PreprocessSpec
from training.heads import DinoHead

HIDDEN, BOTTLENECK, PROTOTYPES = 24, 16, 40
State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def filled(state: State, seed: int) -> State:
    """The same names and shapes with other values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(value.shape, generator=generator).add(0.5).mul(0.05)
        if value.is_floating_point()
        else value + seed
        for key, value in state.items()
    }


@pytest.fixture(scope="module")
def resnet() -> State:
    return filled(clever_zoo.create_encoder("resnet18").backbone.state_dict(), 1)


@pytest.fixture(scope="module")
def vit() -> State:
    return filled(clever_zoo.create_encoder("vit_tiny").backbone.state_dict(), 2)


def dino_head(in_dim: int, seed: int) -> State:
    """As the reference's DINOHead names it, with the weight norm of its day."""
    shapes = {"mlp.0": (HIDDEN, in_dim), "mlp.2": (HIDDEN, HIDDEN), "mlp.4": (BOTTLENECK, HIDDEN)}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        state[f"{key}.weight"] = torch.randn(shape, generator=generator)
        state[f"{key}.bias"] = torch.randn(shape[0], generator=generator)
    state["last_layer.weight_g"] = torch.ones(PROTOTYPES, 1)
    state["last_layer.weight_v"] = torch.randn(PROTOTYPES, BOTTLENECK, generator=generator)
    return state


def pretraining_run(
    backbone: State, *widths: int, teacher_is_ddp: bool, **arguments: Any
) -> dict[str, Any]:
    """A checkpoint.pth as main_dino.py writes it: net=CLeVER of two widths, net=dino of one."""

    def network(prefix: str, weights: State, seed: int) -> State:
        state = prefixed(f"{prefix}backbone.", weights)
        for head, width in zip(("head", "head2"), widths, strict=False):
            state |= prefixed(f"{prefix}{head}.", dino_head(width, seed + width))
        return state

    centers = ("center", "center2")[: len(widths)]
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    net = "CLeVER" if len(widths) == 2 else "dino"
    return {
        "student": network("module.", filled(backbone, 7), 30),
        "teacher": network("module." if teacher_is_ddp else "", backbone, 40),
        "optimizer": optimizer.state_dict(),
        "epoch": 200,
        "args": argparse.Namespace(**{"hp1": 0.8, "net": net, "lr": 5e-4, **arguments}),
        "dino_loss": {key: torch.rand(1, PROTOTYPES) for key in centers},
        "fp16_scaler": {"scale": 65536.0, "_growth_tracker": 3},
    }


def saved(content: Any, folder: Path, name: str = "checkpoint.pth", **options: Any) -> Path:
    path = folder / name
    torch.save(content, path, **options)
    return path


def assert_same(folder: Path, expected: State) -> None:
    """The folder holds exactly these tensors."""
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == expected.keys()
    for key, value in stored.items():
        assert torch.equal(value, expected[key]), key


def assert_every_door_agrees(folder: Path) -> None:
    """timm and transformers read the folder and give the features that we give."""
    from transformers import AutoModel

    encoder = clever_zoo.from_pretrained(folder)
    size = encoder.spec.preprocess.input_size_px
    pixels = torch.rand(2, 3, size, size)
    with torch.no_grad():
        ours = encoder(pixels).full
        assert ours.isfinite().all()
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(model(pixels), ours)
        wrapper = AutoModel.from_pretrained(folder).eval()
        assert torch.equal(wrapper(pixels).pooler_output, ours)


@pytest.mark.parametrize("teacher_is_ddp", [True, False])
def test_a_clever_run_gives_teacher_or_student_and_its_split(
    resnet: State, tmp_path: Path, teacher_is_ddp: bool
) -> None:
    run = pretraining_run(resnet, 409, 103, teacher_is_ddp=teacher_is_ddp, arch="resnet18")
    path = saved(run, tmp_path)
    done = convert_checkpoint(path, tmp_path / "teacher")
    assert (done.kind, done.network) == ("CLeVER pre-training run", "teacher")
    assert done.epoch == 200
    assert done.dropped == {"head": 8, "head2": 8}
    assert (done.spec.name, done.spec.invariant_dim, done.spec.equivariant_dim) == (
        "teacher", 409, 103,
    )  # fmt: skip
    assert done.spec.preprocess.input_size_px == 224
    assert_same(tmp_path / "teacher", resnet)
    if teacher_is_ddp:
        assert_every_door_agrees(tmp_path / "teacher")
    convert_checkpoint(path, tmp_path / "student", network="student")
    assert_same(tmp_path / "student", filled(resnet, 7))
    assert not list(tmp_path.rglob("heads*"))


def test_converting_twice_gives_the_same_bytes(vit: State, tmp_path: Path) -> None:
    path = saved(pretraining_run(vit, 153, 39, teacher_is_ddp=False), tmp_path)
    for folder in ("a/model", "b/model"):
        convert_checkpoint(path, tmp_path / folder, keep_heads=True)
    names = {"config.json", "model.safetensors", "heads.safetensors"}
    assert {p.name for p in (tmp_path / "a/model").iterdir()} == names
    for name in names:
        assert (tmp_path / "a/model" / name).read_bytes() == (
            tmp_path / "b/model" / name
        ).read_bytes()


def test_a_dino_run_has_no_split_whatever_its_arguments(vit: State, tmp_path: Path) -> None:
    """The authors' script records hp1 = 0.8 for net=dino, too."""
    run = pretraining_run(vit, 192, teacher_is_ddp=False)
    assert run["args"].hp1 == 0.8
    path = saved(run, tmp_path)
    done = convert_checkpoint(path, tmp_path / "whole")
    assert done.kind == "DINO pre-training run"
    assert (done.spec.invariant_dim, done.spec.equivariant_dim) == (192, 0)
    assert_same(tmp_path / "whole", vit)
    cut = convert_checkpoint(path, tmp_path / "cut", invariant_dim=153)
    assert cut.spec.equivariant_dim == 39
    for nonsense in (0, -3, 193):
        with pytest.raises(SpecError, match="invariant_dim"):
            convert_checkpoint(path, tmp_path / "bad", invariant_dim=nonsense)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_a_backbone_alone_under_any_prefix(vit: State, tmp_path: Path, prefix: str) -> None:
    done = convert_checkpoint(saved(prefixed(prefix, vit), tmp_path), tmp_path / "model")
    assert done.kind == "backbone alone"
    assert done.network is None
    assert not done.dropped
    assert_same(tmp_path / "model", vit)


def test_other_files_of_the_same_state(vit: State, tmp_path: Path) -> None:
    """The format before zip, and safetensors."""
    old = saved(vit, tmp_path, "old.pth", _use_new_zipfile_serialization=False)
    save_file(vit, tmp_path / "new.safetensors")
    convert_checkpoint(old, tmp_path / "m/model")
    convert_checkpoint(tmp_path / "new.safetensors", tmp_path / "n/model")
    for folder in "mn":
        assert_same(tmp_path / folder / "model", vit)


@pytest.mark.parametrize(
    ("patch", "side", "model_args", "size"),
    [
        (8, 28, {"patch_size": 8}, 224),
        (16, 6, {"img_size": 96}, 96),
        (4, 8, {"img_size": 32, "patch_size": 4}, 32),
    ],
)
def test_patches_and_positions_of_a_vit(
    vit: State, tmp_path: Path, patch: int, side: int, model_args: dict, size: int
) -> None:
    state = vit | {
        "patch_embed.proj.weight": torch.rand(192, 3, patch, patch),
        "pos_embed": torch.rand(1, 1 + side * side, 192),
    }
    done = convert_checkpoint(saved(state, tmp_path), tmp_path / "model")
    assert done.spec.model_args == model_args
    assert done.spec.preprocess.input_size_px == size
    assert done.title == f"ViT-Tiny/{patch}"
    assert_same(tmp_path / "model", state)
    if size == 32:
        assert_every_door_agrees(tmp_path / "model")


def test_a_vit_sees_96_pixels_after_conversion(vit: State, tmp_path: Path) -> None:
    path = saved(vit, tmp_path)
    done = convert_checkpoint(path, tmp_path / "model", input_size_px=96, crop_pct=1.0)
    assert "antialiasing" in done.notes[0]
    encoder = clever_zoo.from_pretrained(tmp_path / "model")
    assert encoder.spec.preprocess.resize_px == 96
    assert encoder.backbone.pos_embed.shape == (1, 197, 192)
    embedding = encoder.embed([np.zeros((50, 60, 3), np.uint8)])
    assert embedding.invariant.shape == (1, 192)
    with pytest.raises(SpecError, match="100, which patches of 16"):
        convert_checkpoint(path, tmp_path / "bad", input_size_px=100)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("resnet18", lambda: torchvision.models.resnet18(num_classes=7)),
        ("vit_tiny", lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7)),
        pytest.param("resnet50", torchvision.models.resnet50, marks=pytest.mark.slow),
        pytest.param("vit_small", lambda: timm.create_model("vit_small_patch16_224"),
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_torchvision_and_timm_classifiers(
    tmp_path: Path, name: str, make: Callable[[], torch.nn.Module]
) -> None:
    model = make().eval()
    done = convert_checkpoint(saved(model.state_dict(), tmp_path), tmp_path / "model")
    assert done.kind == "classifier"
    assert done.spec.backbone == name
    assert done.spec.equivariant_dim == 0
    assert sum(done.dropped.values()) == 2
    setattr(model, BACKBONES[name].classifier, torch.nn.Identity())
    pixels = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        ours = clever_zoo.from_pretrained(tmp_path / "model")(pixels).full
        torch.testing.assert_close(ours, model(pixels), rtol=1e-4, atol=1e-5)


HALVES = (0.5, 0.5, 0.5)


def test_the_normalisation_that_a_file_does_not_tell(vit: State, tmp_path: Path) -> None:
    """Most of timm's ViTs want another than ImageNet's; a run of the authors' code does not."""
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert (cfg.mean, cfg.std, cfg.crop_pct) == (HALVES, HALVES, 0.9)
    path = saved(vit, tmp_path, "vit.pth")
    silent = convert_checkpoint(path, tmp_path / "silent")
    assert silent.spec.preprocess == PreprocessSpec()
    assert "pretrained_cfg in timm" in "".join(silent.lines())
    told = convert_checkpoint(path, tmp_path / "told", mean=HALVES, std=HALVES, crop_pct=0.9)
    assert "pretrained_cfg" not in "".join(told.lines())
    image = Image.open(sample_paths()[0]).convert("RGB")
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    )
    pixels = clever_zoo.from_pretrained(tmp_path / "told").preprocess([image])
    assert torch.equal(pixels[0], transform(image))
    run = saved(pretraining_run(vit, 153, 39, teacher_is_ddp=False), tmp_path)
    assert "pretrained_cfg" not in "".join(convert_checkpoint(run, tmp_path / "run").lines())
    with pytest.raises(SpecError, match=r"std\.1"):
        convert_checkpoint(path, tmp_path / "bad", std=(1.0, 0.0, 1.0))


def test_files_from_before_batches_were_counted(resnet: State, tmp_path: Path) -> None:
    old = {key: value for key, value in resnet.items() if not key.endswith("num_batches_tracked")}
    done = convert_checkpoint(saved(old, tmp_path), tmp_path / "model")
    assert "20 counters" in done.notes[-1]
    del old["bn1.weight"]
    with pytest.raises(WeightsMismatchError, match=r"missing: bn1\.weight"):
        convert_checkpoint(saved(old, tmp_path), tmp_path / "model2")
    some = {key: value for key, value in resnet.items() if key != "bn1.num_batches_tracked"}
    with pytest.raises(WeightsMismatchError, match=r"missing: bn1\.num_batches_tracked"):
        convert_checkpoint(saved(some, tmp_path), tmp_path / "model2")


def linear_stack(widths: tuple[int, ...], seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    pairs = itertools.pairwise(widths)
    return {f"{3 * i}.weight": torch.rand(b, a, generator=generator)
            for i, (a, b) in enumerate(pairs)}  # fmt: skip


def test_ddcl_runs_round_their_split(resnet: State, tmp_path: Path) -> None:
    state = {
        f"module.encoder.{key.replace('downsample.', 'shortcut.')}": value
        for key, value in resnet.items()
    }
    for branch, width in (("img", 410), ("aug", 102)):
        state |= prefixed(f"module.projector_{branch}.", linear_stack((width, 32, 32, 32), width))
        state |= prefixed(f"module.predictor_{branch}.", linear_stack((32, 8, 32), width))
    run = {"epoch": 500, "arch": "resnet18", "state_dict": state, "optimizer": {}}
    path = saved(run, tmp_path, "checkpoint_0499.pth.tar")
    done = convert_checkpoint(path, tmp_path / "model", keep_heads=True)
    assert done.kind == "DDCL pre-training run"
    assert done.epoch == 500
    assert (done.spec.invariant_dim, done.spec.equivariant_dim) == (410, 102)
    assert_same(tmp_path / "model", resnet)
    heads = load_file(tmp_path / "model/heads.safetensors")
    assert heads["equivariant.projector.0.weight"].shape == (32, 102)
    assert heads["invariant.predictor.3.weight"].shape == (32, 8)


def test_simsiam_baselines_have_their_projector_at_fc(resnet: State, tmp_path: Path) -> None:
    state = prefixed("module.encoder.", resnet)
    state |= prefixed("module.encoder.fc.", linear_stack((512, 32, 32, 32), 0))
    state |= prefixed("module.predictor.", linear_stack((32, 8, 32), 1))
    path = saved({"epoch": 100, "arch": "resnet18", "state_dict": state}, tmp_path)
    done = convert_checkpoint(path, tmp_path / "model", keep_heads=True)
    assert done.kind == "SimSiam pre-training run"
    assert done.spec.equivariant_dim == 0
    assert_same(tmp_path / "model", resnet)
    heads = load_file(tmp_path / "model/heads.safetensors")
    assert {key.split(".")[0] for key in heads} == {"projector", "predictor"}


def test_linear_classifiers_have_no_backbone_but_fine_tuned_ones_do(
    resnet: State, tmp_path: Path
) -> None:
    linear = {
        "epoch": 100,
        "state_dict": {"module.linear.weight": torch.rand(10, 512),
                       "module.linear.bias": torch.rand(10)},
        "optimizer": {},
        "scheduler": {"T_max": 100, "base_lrs": [0.1]},
        "best_acc": 81.2,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"no backbone, only linear.*that it was trained on"):
        convert_checkpoint(saved(linear, tmp_path), tmp_path / "model")
    tuned = saved(linear | {"state_dict_model": resnet}, tmp_path)
    done = convert_checkpoint(tuned, tmp_path / "model", invariant_dim=409)
    assert done.kind == "CLeVER fine-tuning run"
    assert done.dropped == {"linear": 2}
    assert_same(tmp_path / "model", resnet)


def test_kept_heads_fit_the_heads_of_training(vit: State, tmp_path: Path) -> None:
    run = pretraining_run(vit, 153, 39, teacher_is_ddp=False)
    done = convert_checkpoint(saved(run, tmp_path), tmp_path / "model", keep_heads=True)
    heads = load_file(done.heads)
    for prefix, name, width in (("invariant", "head", 153), ("equivariant", "head2", 39)):
        head = DinoHead(width, prototypes=PROTOTYPES, hidden_dim=HIDDEN, bottleneck_dim=BOTTLENECK)
        start = f"{prefix}.teacher_head."
        head.load_state_dict(
            {k.removeprefix(start): v for k, v in heads.items() if k.startswith(start)}
        )
        direction = run["teacher"][f"{name}.last_layer.weight_v"]
        expected = torch.nn.functional.normalize(direction, dim=1)
        torch.testing.assert_close(head.prototypes.detach(), expected)
        center = run["dino_loss"]["center" if prefix == "invariant" else "center2"]
        assert torch.equal(heads[f"{prefix}.center"], center[0])
    assert len(heads) == 18


def test_heads_are_of_the_weights_beside_them_or_not_there(vit: State, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    whole = vit | {"head.weight": torch.ones(2, 192)}
    for change, error in (
        ({"norm.bias": torch.full((192,), float("inf"))}, clever_zoo.errors.NonFiniteError),
        ({"head.weight": torch.zeros(2, dtype=torch.complex128)}, CheckpointError),
        ({"head.weight": torch.zeros(2, dtype=torch.uint8).view(torch.bits8)}, CheckpointError),
    ):
        with pytest.raises(error):
            convert_checkpoint(saved(whole | change, tmp_path), folder, keep_heads=True)
        assert not folder.exists()
    convert_checkpoint(saved(whole, tmp_path), folder, keep_heads=True)
    assert torch.equal(load_file(folder / "heads.safetensors")["head.weight"], torch.ones(2, 192))
    convert_checkpoint(saved(vit, tmp_path), folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


class Payload:
    """A pickle of this runs a command in whoever unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


class Indirect(Payload):
    """The same by way of the types that are allowed."""

    def __reduce__(self) -> tuple:
        return eval, (f"__import__('os').system('touch {self.marker}')",)


@pytest.mark.parametrize("kind", [Payload, Indirect])
@pytest.mark.parametrize("place", ["alone", "beside", "in the arguments", "in the state dict"])
@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_does_not_run(
    tmp_path: Path, kind: type[Payload], place: str, container: str
) -> None:
    marker = tmp_path / "ran"
    payload = kind(marker)
    content = {
        "alone": payload,
        "beside": {"teacher": {}, "extra": payload},
        "in the arguments": {"teacher": {}, "args": argparse.Namespace(hp1=payload)},
        "in the state dict": {"teacher": {"conv1.weight": payload}},
    }[place]
    path = tmp_path / "checkpoint.pth"
    if container == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(path, tmp_path / "model")
    assert "weights_only=False" not in str(caught.value)
    assert not marker.exists()
    assert not (tmp_path / "model").exists()
    if container != "pickle":  # the payload itself works
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_the_allow_list_is_put_back(vit: State, tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    convert_checkpoint(saved(vit, tmp_path), tmp_path / "model")
    with pytest.raises(CheckpointError):
        convert_checkpoint(saved(Payload(tmp_path / "x"), tmp_path), tmp_path / "model")
    assert set(torch.serialization.get_safe_globals()) == before


def test_harmless_objects_of_other_libraries_are_passed_over(
    resnet: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy's numbers, and the dictionary that VMamba's script saves as its configuration."""
    module: Any = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = module.CfgNode(MODEL=module.CfgNode(TYPE="vssm"))
    config.__dict__["__immutable__"] = True
    content = {
        "model": resnet,
        "config": config,
        "max_accuracy": np.float64(82.6),
        "best": np.int64(3),
        "epoch": 264,
    }
    path = saved(content, tmp_path)
    monkeypatch.undo()
    done = convert_checkpoint(path, tmp_path / "model")
    assert (done.kind, done.epoch) == ("training run", 264)
    assert_same(tmp_path / "model", resnet)


def resnet_names(blocks: tuple[int, ...], *, bottleneck: bool, width: tuple = (64, 64)) -> State:
    """Names of a ResNet of any depth, with tensors of next to no size."""
    convolutions = ("conv1", "conv2", "conv3") if bottleneck else ("conv1", "conv2")
    state = {
        f"layer{stage}.{block}.{convolution}.weight": torch.zeros(1, 1, 1, 1)
        for stage, count in enumerate(blocks, start=1)
        for block in range(count)
        for convolution in convolutions
    }
    return state | {"layer1.0.conv2.weight": torch.zeros(*width, 1, 1)}


def vit_names(width: int, blocks: int, patch: int = 16, side: int = 14) -> State:
    state = {f"blocks.{block}.norm1.weight": torch.zeros(1) for block in range(blocks)}
    return state | {
        "cls_token": torch.zeros(1, 1, width),
        "pos_embed": torch.zeros(1, 1, 1).expand(1, 1 + side * side, 1).clone(),
        "patch_embed.proj.weight": torch.zeros(1, 1, patch, patch),
    }


def vmamba_names(channels: int, blocks: tuple[int, ...], ratio: int = 1) -> State:
    state = {
        f"layers.{stage}.blocks.{block}.op.{name}": torch.zeros(1)
        for stage, count in enumerate(blocks)
        for block in range(count)
        for name in ("A_logs", "Ds", "out_norm.weight", "out_proj.weight")
    }
    return state | {
        "layers.0.blocks.0.op.out_norm.weight": torch.zeros(channels * ratio),
        "layers.0.blocks.0.op.out_proj.weight": torch.zeros(channels, channels * ratio),
    }


@pytest.mark.parametrize(
    ("title", "state"),
    [
        ("ResNet-34", resnet_names((3, 4, 6, 3), bottleneck=False)),
        ("ResNet-101", resnet_names((3, 4, 23, 3), bottleneck=True)),
        ("ResNet-152", resnet_names((3, 8, 36, 3), bottleneck=True)),
        ("a ResNet-50 with wide", resnet_names((3, 4, 6, 3), bottleneck=True, width=(128, 128))),
        (r"a ResNet with \(1, 1, 1, 1\) blocks", resnet_names((1, 1, 1, 1), bottleneck=False)),
        ("ViT-Base/16", vit_names(768, 12)),
        ("ViT-Base/8", vit_names(768, 12, patch=8, side=28)),
        ("ViT-Large/14", vit_names(1024, 24, patch=14, side=16)),
        ("a ViT-Small/16 of 8 blocks", vit_names(384, 8)),
        ("VMamba-Small", vmamba_names(96, (2, 2, 20, 2))),
        ("VMamba-Base", vmamba_names(128, (2, 2, 20, 2))),
        (r"VMamba-Tiny \(s2l5, upstream's vmambav2_tiny_224.*vmambav2v_tiny_224",
         vmamba_names(96, (2, 2, 5, 2), ratio=2)),
        ("a Swin Transformer",
         {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(1)}),
        ("an unknown network .1 tensors: features.0.weight", {"features.0.weight": torch.zeros(1)}),
    ],
)  # fmt: skip
def test_other_backbones_are_named_beside_the_ones_here(
    tmp_path: Path, title: str, state: State
) -> None:
    with pytest.raises(CheckpointError, match=f"holds {title}") as caught:
        convert_checkpoint(saved(state, tmp_path), tmp_path / "model")
    assert ", ".join(BACKBONES) in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_vmamba_is_known_by_its_tensors() -> None:
    found = recognise(vmamba_names(96, (2, 2, 8, 2)), "test")
    assert found.backbone == "vmamba_tiny"
    assert "vmambav2v_tiny_224" in found.note


def older_vmamba(state: State) -> State:
    """As upstream's older files name it, with linear layers written as 1x1 convolutions."""
    names = (
        (r"^patch_embed\.0\.", "patch_embed.proj."),
        (r"^patch_embed\.2\.", "patch_embed.norm."),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"\.op\.", ".self_attention."),
        (r"^classifier\.norm\.", "norm."),
    )
    older = {}
    for key, value in state.items():
        is_linear = re.search(r"\.(in_proj|out_proj|fc1|fc2)\.weight$", key)
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        older[key] = value[..., None, None] if is_linear else value
    return older


def test_vmamba_checkpoints_of_the_authors_and_of_upstream(tmp_path: Path) -> None:
    state = filled(clever_zoo.create_encoder("vmamba_tiny").backbone.state_dict(), 3)
    older = older_vmamba(state)
    assert len(older.keys() - state.keys()) > 100
    head = {"head.weight": torch.rand(5, 768), "head.bias": torch.rand(5)}
    run = pretraining_run(state, 614, 154, teacher_is_ddp=False, arch="vssm2-vmambav2_tiny_224")
    present = {"model": state | prefixed("classifier.", head), "epoch": 264}
    for folder, content, kind, split in (
        ("authors", run, "CLeVER pre-training run", 614),
        ("present", present, "training run", 768),
        ("older", {"model": older | head}, "training run", 768),
    ):
        path = saved(content, tmp_path)
        done = convert_checkpoint(path, tmp_path / folder, input_size_px=32)
        assert (done.kind, done.spec.invariant_dim) == (kind, split)
        assert (done.spec.backbone, done.title) == ("vmamba_tiny", "VMamba-Tiny (s1l8)")
        assert_same(tmp_path / folder, state)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        ours = clever_zoo.from_pretrained(tmp_path / "authors")(pixels).full
        assert ours.isfinite().all()
        model = timm.create_model(f"local-dir:{tmp_path / 'authors'}", pretrained=True).eval()
        assert torch.equal(model(pixels), ours)


def test_contradictions_are_errors(vit: State, tmp_path: Path) -> None:
    def refused(message: str, content: Any, error: type = CheckpointError, **options: Any) -> None:
        with pytest.raises(error, match=message):
            convert_checkpoint(saved(content, tmp_path), tmp_path / "model", **options)
        assert not (tmp_path / "model").exists()

    run = pretraining_run(vit, 153, 39, teacher_is_ddp=False)
    student = run.pop("student")
    refused("holds ViT-Tiny/16, not 'resnet50'", run, backbone="resnet50")
    refused("trained with an invariant_dim of 153, not 96", run, invariant_dim=96)
    refused("hp1 = 0.5, but the invariant head reads 153 of 192",
            run | {"args": argparse.Namespace(hp1=0.5)})  # fmt: skip
    refused("hp1 = nan", run | {"args": argparse.Namespace(hp1=float("nan"))})
    wide = run["teacher"] | {"head2.mlp.0.weight": torch.zeros(HIDDEN, 40)}
    refused("read 153 and 40 features, its backbone has 192", run | {"teacher": wide})
    headless = {k: v for k, v in run["teacher"].items() if not k.startswith("head.")}
    refused("its heads have no 'head'", run | {"teacher": headless})
    single = {k: v for k, v in run["teacher"].items() if not k.startswith("head2.")}
    refused("net = CLeVER, which has two heads, but it has only head;", run | {"teacher": single})
    refused("has no teacher; it has a student", {"student": student})
    refused("no pre-training run's checkpoint, so it has no student", vit, network="student")
    refused("twice, with and without", vit | {"module.norm.bias": vit["norm.bias"]})
    refused("missing: norm.bias", {k: v for k, v in vit.items() if k != "norm.bias"},
            WeightsMismatchError)  # fmt: skip
    refused("unexpected: mask_token", vit | {"mask_token": torch.zeros(1)}, WeightsMismatchError)
    refused(r"wrong shape: norm.bias is \(5,\)", vit | {"norm.bias": torch.zeros(5)},
            WeightsMismatchError)  # fmt: skip
    refused("wrong type: norm.bias is F64", vit | {"norm.bias": vit["norm.bias"].double()},
            WeightsMismatchError)  # fmt: skip
    refused("part of a backbone", vmamba_names(0, (2, 2, 8, 2)))
    refused("part of a backbone", {k: v for k, v in vit.items() if "patch_embed" not in k})
    refused("norm.bias holds values that are not finite",
            vit | {"norm.bias": torch.full((192,), float("inf"))},
            clever_zoo.errors.NonFiniteError)  # fmt: skip
    refused("name", vit, SpecError, name="../x")


def test_files_that_are_no_checkpoints(vit: State, tmp_path: Path) -> None:
    def refused(message: str, path: Path) -> None:
        with pytest.raises(CleverZooError, match=message):
            convert_checkpoint(path, tmp_path / "model")

    refused("does not exist", tmp_path / "absent.pth")
    refused("does not exist", tmp_path)
    for content in (b"", b"hello", b"PK\x03\x04" + bytes(100), os.urandom(1000)):
        (tmp_path / "noise.pth").write_bytes(content)
        refused("damaged", tmp_path / "noise.pth")
    (tmp_path / "noise.safetensors").write_bytes(b"hello")
    refused("no safetensors file", tmp_path / "noise.safetensors")
    refused("holds a list", saved([vit], tmp_path))
    refused("'epoch' is no plain tensor but int", saved({"epoch": 3}, tmp_path))
    refused("1 is no plain tensor", saved({1: torch.zeros(1)}, tmp_path))
    huge = torch.zeros(1).expand(10**12)
    refused("'x' is no plain tensor", saved({"x": huge}, tmp_path))
    refused("'x' is no plain tensor", saved({"x": torch.zeros(3, 3).to_sparse()}, tmp_path))
    refused("nothing", saved({}, tmp_path))
    script = saved({}, tmp_path, "script.pt")
    with zipfile.ZipFile(script, "a") as archive:
        archive.writestr("script/constants.pkl", b"")  # what tells TorchScript, which is code
    with pytest.warns(UserWarning, match="TorchScript"):
        refused("TorchScript", script)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_damaged_checkpoints_are_errors_of_ours(tmp_path: Path, container: str) -> None:
    """Whatever torch makes of the bytes; here only that no other error comes out."""
    content = {"teacher": {"backbone.cls_token": torch.rand(1, 1, 8)},
               "args": argparse.Namespace(hp1=0.8)}  # fmt: skip
    path = saved(content, tmp_path, _use_new_zipfile_serialization=container == "zip")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        mutant = bytearray(whole)
        start = int(rng.integers(len(whole)))
        match rng.integers(3):
            case 0:
                mutant[start] ^= 1 << int(rng.integers(8))
            case 1:
                mutant[start : start + 8] = rng.bytes(int(rng.integers(12)))
            case 2:
                del mutant[start:]
        path.write_bytes(mutant)
        with pytest.raises(CleverZooError):
            convert_checkpoint(path, tmp_path / "model")


def test_the_command_says_what_it_found(vit: State, tmp_path: Path) -> None:
    path = saved(pretraining_run(vit, 153, 39, teacher_is_ddp=False), tmp_path)
    arguments = ["convert", str(path), "-o", str(tmp_path / "model"), "--network", "student",
                 "--keep-heads", "--name", "my-vit", "--dtype", "float16",
                 "--mean", ".5", ".5", ".5", "--std", ".25", ".5", "1"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for fact in (
        "found: CLeVER pre-training run, student, epoch 200",
        "backbone: ViT-Tiny/16, here vit_tiny",
        "features: 192, 153 invariant, 39 equivariant",
        "dropped: head (8 tensors), head2 (8 tensors), kept in",
        "written: my-vit",
    ):
        assert fact in result.output
    heads = load_file(tmp_path / "model/heads.safetensors")
    assert "equivariant.student_head.mlp.4.bias" in heads
    preprocess = ModelSpec.read(tmp_path / "model/config.json").preprocess
    assert (preprocess.mean, preprocess.std) == (HALVES, (0.25, 0.5, 1.0))
    assert load_file(tmp_path / "model/model.safetensors")["cls_token"].dtype == torch.float16
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "x"), "-o", str(tmp_path / "y")])
    assert result.exit_code == 2
    assert "does not exist" in result.output
