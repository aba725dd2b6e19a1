"""The training loop on the bundled pictures: resume to the bit, schedules, safety stops."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from clever_zoo.errors import CheckpointError, DataError, NonFiniteError, RecipeError
from clever_zoo.samples import sample_paths
from training import pretrain
from training.checkpoint import CHECKPOINT, load_recipe_and_encoder
from training.clever import Clever
from training.config import RECIPES, BackboneConfig, Recipe, load_recipe, parse_recipe
from training.data import ImageSet, TrainImages, load_train_images
from training.drop_path import SampledDropPath, choose_paths
from training.methods.byol import ByolSection
from training.networks import build_student, build_teacher, forward_views
from training.objective import build_method
from training.optimizers import build_optimizer, clip_gradients, set_schedules
from training.runs import load_run

SMALL = {
    "name": "small",
    "seed": 3,
    "epochs": 2,
    "batch_size": 8,
    "data": {"dataset": "fashion-mnist", "crop_pct": 1.0},
    "backbone": {"name": "resnet18"},
    "views": {"global_size_px": 16, "local_size_px": 8, "local_views": 1},
    "method": {
        "name": "dino",
        "prototypes": 16,
        "hidden_dim": 16,
        "bottleneck_dim": 8,
        "freeze_last_layer_epochs": 0.25,
        "ema_momentum": 0.9,
    },
    "clever": {},
    "optimizer": {"warmup_epochs": 0.5},
}
MINIATURE = ["clever-resnet18.fmnist", "epochs=1", "batch_size=32", "method.prototypes=64"]
MINIATURE += ["method.hidden_dim=64", "method.bottleneck_dim=32", "optimizer.warmup_epochs=0.25"]
TWO_VIEWS = {"global_size_px": 16, "local_size_px": 8, "local_views": 0}
VIT = {
    "backbone": {
        "name": "vit_tiny",
        "model_args": {"img_size": 16, "patch_size": 4},
        "drop_path_rate": 0.1,
    }
}


def recipe(**changes) -> Recipe:
    return parse_recipe({**SMALL, **changes}, "test")


@pytest.fixture(scope="module")
def image_set() -> ImageSet:
    images = np.stack([np.asarray(Image.open(p)) for p in sample_paths()[::9]])
    return ImageSet(torch.from_numpy(images).unsqueeze(1), torch.zeros(34).long(), ("all",))


@pytest.fixture(scope="module")
def data(image_set: ImageSet) -> TrainImages:
    return TrainImages(image_set)


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / CHECKPOINT)


def spend(folder: Path, seconds: float) -> None:
    """Have a checkpoint say that its run took so long."""
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        header = file.metadata()
    progress = json.loads(header["progress"]) | {"seconds": seconds}
    header["progress"] = json.dumps(progress)
    save_file(tensors(folder), folder / CHECKPOINT, metadata=header)


@pytest.fixture(autouse=True)
def _keep_sigterm() -> Iterator[None]:
    """The command takes SIGTERM for its process, which here goes on."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("changes", [{}, {"clever": None}, VIT], ids=["clever", "dino", "vit"])
def test_resuming_changes_no_bit(tmp_path: Path, data: TrainImages, changes) -> None:
    """8 steps = 3 steps + a stop + 5 steps; the stop is in the middle of an epoch."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pretrain.train(recipe(**changes), data, whole)["step"] == 8
    assert pretrain.train(recipe(**changes), data, parts, stop_at_step=3)["step"] == 3
    pretrain.train(recipe(**changes), data, parts)
    a, b = tensors(whole), tensors(parts)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    lines = [
        [json.loads(x) for x in (f / "log.jsonl").read_text().splitlines()] for f in (whole, parts)
    ]
    for one, other in zip(*lines, strict=True):
        clocks = dict.fromkeys(("seconds", "step_s", "data_s", "images_per_s"), 0)
        assert one | clocks == other | clocks


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path, data, monkeypatch) -> None:
    """A kill after step 5 with a checkpoint at step 3 and half a log line loses nothing."""
    pretrain.train(recipe(), data, tmp_path / "whole")
    run = tmp_path / "killed"
    pretrain.train(recipe(), data, run, stop_at_step=3)
    saved = (run / CHECKPOINT).read_bytes()
    pretrain.train(recipe(), data, run, stop_at_step=5)
    (run / CHECKPOINT).write_bytes(saved)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    pretrain.train(recipe(), data, run)
    a, b = tensors(tmp_path / "whole"), tensors(run)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert [line["step"] for line in log_lines(run)] == list(range(8))


@pytest.mark.slow
def test_kill_nine_and_resume_change_no_bit(tmp_path: Path, fashion_mnist_folder: Path) -> None:
    """SIGKILL at some step of a real process, then the same command again."""
    command = [sys.executable, "-m", "training.pretrain", *MINIATURE]
    command += ["--data", str(fashion_mnist_folder), "--checkpoint-every-s", "0", "--out"]
    root = Path(__file__).parents[2]
    run = tmp_path / "killed"
    with subprocess.Popen([*command, str(run)], cwd=root, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if (run / "log.jsonl").exists() and len(log_lines_so_far(run)) >= 3:
                process.kill()
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    for out in (run, tmp_path / "whole"):
        subprocess.run([*command, str(out)], cwd=root, check=True, stdout=subprocess.DEVNULL)
    a, b = tensors(run), tensors(tmp_path / "whole")
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert [line["step"] for line in log_lines(run)] == list(range(9))


def log_lines_so_far(folder: Path) -> list[str]:
    return (folder / "log.jsonl").read_text().splitlines()


def test_log_holds_every_term(tmp_path: Path, data: TrainImages) -> None:
    pretrain.train(recipe(), data, tmp_path, stop_at_step=2)
    for line in log_lines(tmp_path):
        terms = line["contrastive"] + line["orthogonality"] + line["head_balance"]
        assert line["loss"] == pytest.approx(terms, rel=1e-5)
        assert {"lr", "weight_decay", "momentum", "step", "seconds"} <= line.keys()


def test_another_recipes_checkpoint_is_refused_with_the_difference(tmp_path: Path, data) -> None:
    pretrain.train(recipe(), data, tmp_path, stop_at_step=1)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match=r"seed: checkpoint 3, recipe 4") as caught:
        pretrain.train(recipe(seed=4, batch_size=4), data, tmp_path)
    assert "batch_size: checkpoint 8, recipe 4" in str(caught.value)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, data: TrainImages) -> None:
    pretrain.train(recipe(), data, tmp_path, stop_at_step=1)
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        pretrain.train(recipe(), data, tmp_path)
    flipped = bytearray(whole)
    flipped[-5000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="is damaged"):
        pretrain.train(recipe(), data, tmp_path)


def test_a_broken_loss_stops_before_the_step(tmp_path: Path, data, monkeypatch) -> None:
    steps = []
    real = Clever.loss_terms

    def broken(self, *arguments):
        terms = real(self, *arguments)
        steps.append(1)
        return terms | {"orthogonality": terms["orthogonality"] * float("nan")}

    monkeypatch.setattr(Clever, "loss_terms", broken)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("stepped"))
    with pytest.raises(NonFiniteError, match=r"step 0: orthogonality is nan on rank 0"):
        pretrain.train(recipe(), data, tmp_path)
    assert steps == [1]


def test_the_time_limit_leaves_a_checkpoint(tmp_path: Path, data: TrainImages) -> None:
    progress = pretrain.train(recipe(), data, tmp_path, time_limit_s=1e-9)
    assert progress["step"] == 0
    assert (tmp_path / CHECKPOINT).exists()
    pretrain.train(recipe(), data, tmp_path, stop_at_step=2)
    spend(tmp_path, 1000.0)  # the limit is of this call alone
    progress = pretrain.train(recipe(), data, tmp_path, time_limit_s=500, stop_at_step=3)
    assert progress["step"] == 3
    assert progress["seconds"] > 1000


def test_other_data_is_refused(tmp_path: Path, data: TrainImages, image_set: ImageSet) -> None:
    images, labels, names = image_set.images, image_set.labels, image_set.class_names
    pretrain.train(recipe(), data, tmp_path, stop_at_step=1)
    fewer = TrainImages(ImageSet(images[:16], labels[:16], names))
    with pytest.raises(CheckpointError, match=r"steps: checkpoint 8, now 4"):
        pretrain.train(recipe(), fewer, tmp_path)
    other = TrainImages(ImageSet(images.flip(0), labels, names))
    with pytest.raises(CheckpointError, match="data_sha256"):
        pretrain.train(recipe(), other, tmp_path)


def test_too_little_data_is_refused(tmp_path: Path, data: TrainImages) -> None:
    with pytest.raises(DataError, match="34 images do not fill one batch of 64"):
        pretrain.train(recipe(batch_size=64), data, tmp_path)


@pytest.mark.parametrize(("backbone", "block_end"), [("resnet18", "bn2"), ("resnet50", "bn3")])
@pytest.mark.parametrize("zeroed", [False, True])
def test_residual_blocks_start_as_their_shortcuts(backbone, block_end, zeroed) -> None:
    config = BackboneConfig(name=backbone, zero_init_residual=zeroed)
    gains = {
        name: module.weight
        for name, module in build_student(config, 0).named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    }
    ends = {name for name in gains if name.startswith("layer") and name.endswith(block_end)}
    assert len(ends) == {"resnet18": 8, "resnet50": 16}[backbone]
    for name, gain in gains.items():
        assert (gain == (0 if zeroed and name in ends else 1)).all(), name


def test_the_untrained_teacher_is_the_student_and_follows_it(tmp_path: Path, data) -> None:
    pretrain.train(recipe(), data, tmp_path, stop_at_step=0)
    start = tensors(tmp_path)
    student = build_student(recipe().backbone, recipe().seed).state_dict()
    assert all(
        torch.equal(start[f"{who}.{k}"], v)
        for k, v in student.items()
        for who in ("student", "teacher")
    )
    pretrain.train(recipe(), data, tmp_path, stop_at_step=2)
    after = tensors(tmp_path)
    for key in ("conv1.weight", "layer4.1.bn2.weight"):
        moved = after[f"teacher.{key}"] - start[f"teacher.{key}"]
        led = after[f"student.{key}"] - start[f"student.{key}"]
        assert 0 < moved.norm() < led.norm()
    for key in ("bn1.running_mean", "bn1.running_var"):  # statistics of its own batches
        assert not torch.equal(after[f"teacher.{key}"], start[f"teacher.{key}"])
        assert not torch.equal(after[f"teacher.{key}"], after[f"student.{key}"])
    loaded, teacher, progress = load_recipe_and_encoder(tmp_path / CHECKPOINT)
    assert loaded == recipe()
    assert progress["step"] == 2
    assert torch.equal(teacher["conv1.weight"], after["teacher.conv1.weight"])


def test_without_a_teacher_the_student_is_the_product(tmp_path: Path, data) -> None:
    r = recipe(method={"name": "simsiam", "hidden_dim": 16, "output_dim": 8, "bottleneck_dim": 4},
               views=TWO_VIEWS)  # fmt: skip
    pretrain.train(r, data, tmp_path, stop_at_step=2)
    saved = tensors(tmp_path)
    assert not [key for key in saved if "teacher" in key]
    _, network, facts = load_run(tmp_path)
    assert torch.equal(network.state_dict()["conv1.weight"], saved["student.conv1.weight"])
    assert facts["images_seen"] == 16


def test_prototypes_are_frozen_at_first(tmp_path: Path, data: TrainImages) -> None:
    """A quarter of an epoch of 4 steps: step 0 leaves both last layers alone, step 1 does not."""
    keys = [f"method.{half}.student_head.last_layer.parametrizations.weight.original1"
            for half in ("invariant", "equivariant")]  # fmt: skip
    history = []
    for step in (0, 1, 3):
        pretrain.train(recipe(), data, tmp_path, stop_at_step=step)
        history.append([tensors(tmp_path)[key] for key in keys])
    for start, frozen, free in zip(*history, strict=True):
        assert torch.equal(start, frozen)
        assert not torch.equal(frozen, free)


def test_centers_follow_the_teachers_mean_logits() -> None:
    method = build_method(recipe())
    teacher, student = torch.randn(2, 8, 512), torch.randn(3, 8, 512)
    half = method.equivariant
    scores = half.teacher_head(teacher[..., 409:].flatten(0, 1)) @ half.teacher_head.prototypes.T
    method.loss_terms(teacher, student, 0)
    assert not half.center.any()
    method.end_step(1.0)
    torch.testing.assert_close(half.center, 0.1 * scores.mean(0))
    assert method.invariant.center.abs().sum() > 0


def test_multi_crop_passes_keep_the_order_of_views() -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((1, 2, 3))[:, None]

    views = [torch.full((2, 3, size, size), float(i)) for i, size in enumerate((32, 32, 16, 16))]
    features = forward_views(Mean(), views, np.arange(2), seed=0, epoch=0)
    assert features.shape == (4, 2, 1)
    assert features[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_schedules_of_the_paper() -> None:
    """IN-100: 247 steps an epoch, 200 epochs, batch 512."""
    r = parse_recipe({"name": "paper", "data": {"dataset": "image-folder"},
                      "backbone": {"name": "vit_small"}}, "test")  # fmt: skip
    optimizer = build_optimizer(r.optimizer, [nn.Linear(2, 2), nn.Linear(2, 2)])
    steps = 247 * 200
    seen = {}
    for step in (0, 2469, 2470, steps - 1):
        momentum = set_schedules(optimizer, r, step, 247)["momentum"]
        decayed, plain = optimizer.param_groups
        assert plain["weight_decay"] == 0
        seen[step] = (decayed["lr"], decayed["weight_decay"], momentum)
    assert seen[0] == pytest.approx((0.0, 0.04, 0.996))
    assert seen[2469][0] == pytest.approx(1e-3)
    assert seen[2470][0] == pytest.approx(1e-3)
    assert seen[steps - 1][0] == pytest.approx(1e-6, rel=1e-2)
    assert seen[steps - 1][1] == pytest.approx(0.4, rel=1e-3)
    assert seen[steps - 1][2] == pytest.approx(1.0, rel=1e-6)


def test_weight_decay_groups() -> None:
    student = build_student(recipe(**VIT).backbone, 0)
    decayed, plain = build_optimizer(recipe().optimizer, [student]).param_groups
    ids = {id(p): n for n, p in student.named_parameters()}
    names = {ids[id(p)] for p in decayed["params"]}
    assert {"pos_embed", "cls_token", "blocks.0.attn.qkv.weight"} <= names
    assert {ids[id(p)] for p in plain["params"]} == {
        n for n, p in student.named_parameters() if p.ndim == 1
    }


def test_each_tensor_is_clipped_by_its_own_norm() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad, layer.bias.grad = torch.full((2, 2), 5.0), torch.full((2,), 0.1)
    norm = clip_gradients(layer.parameters(), recipe().optimizer)
    assert float(norm) == pytest.approx((100 + 0.02) ** 0.5)
    assert float(layer.weight.grad.norm()) == pytest.approx(3.0, rel=1e-4)
    assert layer.bias.grad.tolist() == pytest.approx([0.1, 0.1])


def test_local_vit_views_use_the_references_position_rule() -> None:
    torch.manual_seed(0)
    vit = build_student(recipe(**VIT).backbone, 0).eval()
    assert (
        0.015
        < build_student(load_recipe("clever-vit-tiny.fmnist").backbone, 0).cls_token.std()
        < 0.025
    )
    table = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(table, scale_factor=(2.1 / 4, 2.1 / 4), mode="bicubic")
    x = torch.zeros(1, 2, 2, 192)
    tokens = vit._pos_embed(x)
    torch.testing.assert_close(tokens[:, 1:], resized.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens[:, :1], vit.cls_token + vit.pos_embed[:, :1])
    assert vit(torch.randn(2, 3, 8, 8)).shape == (2, 192)


VMAMBA = {"name": "vmamba_tiny", "drop_path_rate": 0.2, "teacher_drop_path_rate": 0.2}


@pytest.mark.parametrize(("policy", "decay"), [("dino", True), ("model", False), ("all", True)])
def test_weight_decay_of_the_state_space(policy: str, decay: bool) -> None:
    """The reference decays the two that are no vectors; the model names them as not to be."""
    student = build_student(recipe(backbone=VMAMBA).backbone, 0)
    optimizer = recipe(optimizer={"weight_decay_policy": policy, "warmup_epochs": 0.5}).optimizer
    groups = build_optimizer(optimizer, [student]).param_groups
    ids = {id(p): n for n, p in student.named_parameters()}
    decayed = {ids[id(p)] for group in groups if group["decays"] for p in group["params"]}
    op = "layers.3.blocks.1.op"
    assert {f"{op}.A_logs", f"{op}.dt_projs_bias"} <= decayed or not decay
    assert f"{op}.A_logs" not in decayed or decay
    assert (f"{op}.Ds" in decayed) == (policy == "all")
    assert f"{op}.dt_projs_weight" in decayed


def test_a_vmamba_teacher_drops_paths_too() -> None:
    """As the reference's; the two are drawn apart, and each branch of a block as well."""
    config = load_recipe("clever-vmamba-tiny.in100-caug").backbone
    student = build_student(config, 0)
    teacher = build_teacher(student, config)
    for network in (student, teacher):
        paths = [m for m in network.modules() if isinstance(m, SampledDropPath)]
        assert len(paths) == 26
        assert paths[-1].drop_prob == pytest.approx(0.2)
    plain = build_student(recipe(backbone={"name": "vmamba_tiny"}).backbone, 0)
    assert not any(isinstance(m, SampledDropPath) for m in plain.modules())


def test_only_the_student_drops_paths() -> None:
    student = build_student(recipe(**VIT).backbone, 0)
    rates = [[m.drop_prob for m in net.modules() if hasattr(m, "drop_prob")]
             for net in (student, build_teacher(student, recipe(**VIT).backbone))]  # fmt: skip
    assert max(rates[0]) == pytest.approx(0.1)
    assert not any(rates[1])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path: Path) -> None:
    loaded = load_recipe(path.stem)
    assert loaded.name == path.stem
    assert (loaded.clever is not None) == path.stem.startswith("clever-")
    assert loaded.backbone.name.replace("_", "-") in path.stem.split(".")[0]
    text = path.read_text()
    assert f"training.pretrain {path.stem}" in text
    assert "Hardware" in text
    assert "figure" in text or "published" in text.lower()
    if loaded.clever is not None and loaded.clever.transform_weight == 0:
        plain = path.stem.removeprefix("clever-")
        twin = load_recipe(plain if plain.startswith("simsiam") else f"dino-{plain}")
        other = {"name": "", "clever": None}
        assert twin.model_copy(update=other) == loaded.model_copy(update=other)


def test_no_recipe_repeats_another() -> None:
    """Recipes with the same values of their own would have them in a part that both extend."""
    own = {}
    for path in RECIPES.glob("*.toml"):
        content = tomllib.loads(path.read_text())
        del content["extends"]
        flat = json.dumps(content)
        assert len(flat) < 500, path
        own.setdefault(flat, []).append(path.stem)
    assert [names for values, names in own.items() if values != "{}" and len(names) > 1] == []


def test_a_recipe_lists_all_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        'epochs = 0\nbatchsize = 3\n[data]\ndataset = "fashion-mnist"\n'
        '[backbone]\nname = "resnet19"\n[views]\nstrength = "strong"\nlocal_scale = [0.5, 0.1]\n'
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 5
    for hint in ("epochs", "batchsize: unknown key (value 3)", "views.strength", "resnet19",
                 "views.local_scale"):  # fmt: skip
        assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"optimizer": {"warmup_epochs": 7}}, "warmup_epochs is 7"),
        ({"clever": {"invariant_dim": 512}}, "both halves need one"),
        ({"clever": {"invariant_dim": 0}}, "clever.invariant_dim"),
        ({"method": {"name": "byol"}}, "byol takes two views"),
        ({"method": {"name": "swav"}}, "swav"),
        ({"run": {"accumulation_steps": 3}}, "does not divide batch_size 8"),
        (
            {"run": {"accumulation_steps": 2}, "method": {"name": "simclr"}, "views": TWO_VIEWS},
            "compares the images of a batch",
        ),
        ({"backbone": {"name": "resnet18", "freeze_patch_embed": True}}, "is for a ViT"),
        ({"backbone": {"name": "vit_tiny", "zero_init_residual": True}}, "is for a ResNet"),
        ({"clever": {"alignment_weight": 1.0}}, "without a transform_weight"),
        ({**VIT, "views": {"global_size_px": 18, "local_size_px": 8}}, "multiple of patch 4"),
        ({"backbone": {"name": "resnet18", "model_args": {"in_chans": 1}}}, "in_chans"),
        ({"data": {"dataset": "fashion-mnist", "std": [0, 1, 1]}}, "data.std"),
        ({"epochs": "20"}, "epochs"),
        ({"seed": True}, "seed"),
        ({"seed": 10**20}, "seed"),
    ],
)
def test_recipe_mistakes(changes, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint) as caught:
        recipe(**changes)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("content", "hint"), [("epochs = [", "not valid TOML"), (None, "clever-resnet18.fmnist")]
)
def test_unreadable_recipes(tmp_path: Path, content, hint) -> None:
    path = tmp_path / "r.toml"
    if content:
        path.write_text(content)
    with pytest.raises(RecipeError, match=hint):
        load_recipe(path)


def test_command_line(tmp_path: Path, fashion_mnist_folder: Path) -> None:
    runner = CliRunner()
    app = pretrain.app
    arguments = [*MINIATURE, "--data", str(fashion_mnist_folder)]
    out = ["--out", str(tmp_path / "run")]
    stopped = runner.invoke(app, [*arguments, *out, "--time-limit-min", "0"])
    assert stopped.exit_code == pretrain.UNFINISHED_EXIT_CODE, stopped.output
    finished = runner.invoke(app, [*arguments, *out])
    assert finished.exit_code == 0, finished.output
    assert "9 of 9 steps" in finished.output
    (environment,) = json.loads((tmp_path / "run/environment.json").read_text())
    assert {"commit", "hardware", "torch"} <= environment.keys()
    assert runner.invoke(app, ["no-such-recipe"]).exit_code == 2
    other = runner.invoke(app, [*arguments, *out, "seed=7", "--data", str(tmp_path / "none")])
    assert other.exit_code == 2
    assert "seed: checkpoint 0, recipe 7" in other.output


def test_a_broken_gradient_stops_before_the_step(tmp_path: Path, data, monkeypatch) -> None:
    real = Clever.loss_terms

    def broken(self, target, online, epoch):
        online.register_hook(lambda gradient: gradient * float("inf"))
        return real(self, target, online, epoch)

    monkeypatch.setattr(Clever, "loss_terms", broken)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("stepped"))
    with pytest.raises(NonFiniteError, match=r"step 0: the gradient of student\.conv1\.weight"):
        pretrain.train(recipe(), data, tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, data: TrainImages) -> None:
    """The write really fails: no file may grow beyond what was just written."""
    import resource

    pretrain.train(recipe(), data, tmp_path, stop_at_step=2)
    before = (tmp_path / CHECKPOINT).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="the last checkpoint is intact: make room") as caught:
            pretrain.train(recipe(), data, tmp_path, checkpoint_every_s=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / CHECKPOINT) in str(caught.value)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    assert pretrain.train(recipe(), data, tmp_path)["step"] == 8


def test_keep_leaves_the_last_epochs(tmp_path: Path, data: TrainImages) -> None:
    pretrain.train(recipe(epochs=3), data, tmp_path, keep=2)
    names = sorted(p.name for p in tmp_path.glob("checkpoint*"))
    assert names == ["checkpoint-0001.safetensors", "checkpoint-0002.safetensors", CHECKPOINT]
    _, _, progress = load_recipe_and_encoder(tmp_path / "checkpoint-0001.safetensors")
    assert progress["step"] == 8
    a, b = (load_recipe_and_encoder(tmp_path / name) for name in names[1:])
    assert all(torch.equal(v, b[1][k]) for k, v in a[1].items())


def test_another_number_of_processes_is_refused_unless_wanted(tmp_path: Path, data) -> None:
    pretrain.train(recipe(), data, tmp_path, stop_at_step=1)
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        header = file.metadata()
    progress = json.loads(header["progress"]) | {"world_size": 2}
    save_file(tensors(tmp_path), tmp_path / CHECKPOINT,
              header | {"progress": json.dumps(progress)})  # fmt: skip
    with pytest.raises(CheckpointError, match="world_size: checkpoint 2, now 1") as caught:
        pretrain.train(recipe(seed=9), data, tmp_path)
    assert "--elastic" in str(caught.value)
    assert "seed: checkpoint 3, recipe 9" in str(caught.value)
    assert pretrain.train(recipe(), data, tmp_path, elastic=True)["step"] == 8


@pytest.mark.slow
def test_sigterm_to_the_whole_group_stops_with_a_checkpoint(
    tmp_path: Path, fashion_mnist_folder: Path
) -> None:
    """A real process with a worker; what goes on afterwards is the run that nobody stopped."""
    command = [sys.executable, "-m", "training.pretrain", *MINIATURE, "epochs=3", "--workers", "1"]
    command += ["--threads", "1", "--data", str(fashion_mnist_folder), "--out"]
    root, out = Path(__file__).parents[2], tmp_path / "stopped"
    quiet = {"cwd": root, "stdout": subprocess.DEVNULL}
    with subprocess.Popen([*command, str(out)], start_new_session=True, **quiet) as process:
        while process.poll() is None and not (
            (out / "log.jsonl").exists() and len(log_lines_so_far(out)) >= 2
        ):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == pretrain.UNFINISHED_EXIT_CODE
    _, _, progress = load_recipe_and_encoder(out / CHECKPOINT)
    assert 0 < progress["step"] < 27
    workers = command.index("--workers")
    whole = [*command[:workers], *command[workers + 2 :], str(tmp_path / "w")]
    for arguments in ([*command, str(out)], whole):
        subprocess.run(arguments, check=True, **quiet)
    a, b = tensors(out), tensors(tmp_path / "w")
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_sgd_goes_on_where_prototypes_thaw(tmp_path: Path, data: TrainImages) -> None:
    sgd = {"name": "sgd", "lr_per_256": 0.05, "warmup_epochs": 0.5}
    pretrain.train(recipe(optimizer=sgd, run={"precision": "fp16"}), data, tmp_path)
    assert all(v.isfinite().all() for v in tensors(tmp_path).values())
    assert all(np.isfinite(line["loss"]) for line in log_lines(tmp_path))


def test_gradients_that_stay_broken_stop_a_scaled_run(tmp_path: Path, data, monkeypatch) -> None:
    real = Clever.loss_terms

    def broken(self, target, online, epoch):
        online.register_hook(lambda gradient: gradient * float("nan"))
        return real(self, target, online, epoch)

    monkeypatch.setattr(Clever, "loss_terms", broken)
    r = recipe(**VIT, epochs=9, run={"precision": "fp16"})
    with pytest.raises(NonFiniteError, match=r"the gradient of student\.cls_token"):
        pretrain.train(r, data, tmp_path)
    assert len(log_lines(tmp_path)) == 17  # halvings from 2^16 to below 1


def test_processes_that_would_train_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def others(row: torch.Tensor) -> torch.Tensor:
        return torch.stack([row, row - torch.tensor([3, 0])])

    pretrain.check_agreement(3, "ab" * 32, torch.device("cpu"))
    monkeypatch.setattr(pretrain, "rows_of_processes", others)
    with pytest.raises(CheckpointError, match=r"resume at steps \[3, 0\]"):
        pretrain.check_agreement(3, "ab" * 32, torch.device("cpu"))


def test_accumulation_is_the_whole_batch_for_a_vit(tmp_path: Path, data: TrainImages) -> None:
    """No batch-norm, so parts of a batch add up to it, centres included."""
    for parts in (1, 4):
        run = {"accumulation_steps": parts}
        pretrain.train(recipe(**VIT, run=run), data, tmp_path / str(parts))
    one, four = (log_lines(tmp_path / name) for name in "14")
    for a, b in zip(one, four, strict=True):
        for key in ("loss", "contrastive", "orthogonality", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)


# No ResNet in bf16: such convolutions are not deterministic on every CPU.
@pytest.mark.parametrize(
    ("precision", "backbone"),
    [("bf16", VIT), ("fp16", VIT), pytest.param("fp16", {}, marks=pytest.mark.slow)],
    ids=["bf16-vit", "fp16-vit", "fp16-resnet18"],
)
def test_half_precision_stays_near_full_precision(tmp_path, data, precision, backbone) -> None:
    """Weights stay float32; fp16 carries a loss scale through a stop, to the bit."""
    pretrain.train(recipe(**backbone), data, tmp_path / "fp32", stop_at_step=1)
    r = recipe(**backbone, run={"precision": precision})
    pretrain.train(r, data, tmp_path / "whole", stop_at_step=3)
    pretrain.train(r, data, tmp_path / "parts", stop_at_step=1)
    pretrain.train(r, data, tmp_path / "parts", stop_at_step=3)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert [k for k in whole if not torch.equal(whole[k], parts[k])] == []
    assert all(v.dtype in (torch.float32, torch.uint8, torch.int64) for v in whole.values())
    full, half = (log_lines(tmp_path / name) for name in ("fp32", "whole"))
    assert {"invariant_std", "equivariant_usage"} <= half[0].keys()
    assert full[0]["contrastive"] != half[0]["contrastive"]
    assert full[0]["contrastive"] == pytest.approx(half[0]["contrastive"], rel=0.03)
    with safe_open(tmp_path / "whole" / CHECKPOINT, framework="pt") as file:
        scale = json.loads(file.metadata()["scaler"])
    assert bool(scale) == (precision == "fp16")


def test_paths_are_dropped_as_the_recipe_says_in_one_place() -> None:
    with pytest.raises(RecipeError, match=r"model_args.drop_path_rate: set backbone.drop_path"):
        recipe(backbone=VMAMBA | {"model_args": {"drop_path_rate": 0.4}})


def test_convolutions_in_bf16_are_refused_on_a_cpu(tmp_path: Path, data: TrainImages) -> None:
    with pytest.raises(RecipeError, match=r"run\.precision is 'bf16'.*resnet18.*'fp32'"):
        pretrain.train(recipe(run={"precision": "bf16"}), data, tmp_path)
    assert not list(tmp_path.iterdir())


def test_finite_gradients_whose_squares_overflow_are_clipped() -> None:
    layer = torch.nn.Linear(3, 2)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)
    config = load_recipe("clever-resnet18.fmnist", ["optimizer.clip_norm=3.0"]).optimizer
    assert float(clip_gradients(layer.parameters(), config)) == pytest.approx(8**0.5 * 1e30)
    assert float(layer.bias.grad.norm()) == pytest.approx(3.0)


@pytest.mark.slow
def test_compiling_changes_rounding_alone(tmp_path: Path, data: TrainImages) -> None:
    """A ViT's blocks are one: with and without dropped paths, of two sizes, and a teacher's."""
    torch._dynamo.utils.counters.clear()
    for name, compiled in (("eager", False), ("compiled", True)):
        r = recipe(**VIT, run={"compile": compiled})
        pretrain.train(r, data, tmp_path / name, stop_at_step=2)
    a, b = (log_lines(tmp_path / name) for name in ("eager", "compiled"))
    for eager, compiled in zip(a, b, strict=True):
        assert eager["loss"] == pytest.approx(compiled["loss"], rel=1e-4)
    a, b = (tensors(tmp_path / name) for name in ("eager", "compiled"))
    assert a.keys() == b.keys()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


def test_simsiam_schedule_of_the_reference() -> None:
    """30 epochs up to lr 29/30 for all, a fresh optimiser, then a cosine by epoch."""
    r = load_recipe("clever-simsiam-resnet50.in100-caug")
    objective = nn.ModuleDict({"backbone": nn.Linear(2, 2), "predictor": nn.Linear(2, 2)})
    optimizer = build_optimizer(r.optimizer, [objective])
    for p in objective.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    rates = {}
    for epoch in (0, 15, 29, 30, 31, 529):
        for within in (0, 6):
            state = len(optimizer.state)
            set_schedules(optimizer, r, 7 * epoch + within, 7)
            fixed, moving = optimizer.param_groups
            assert fixed["fixed_lr"]
            rates[epoch] = (moving["lr"], fixed["lr"])
            assert (len(optimizer.state) < state) == (epoch == 30 and within == 0)
    assert rates[0] == (0, 0)
    assert rates[15] == pytest.approx((0.025, 0.025))
    assert rates[29] == pytest.approx((0.05 * 29 / 30, 0.05 * 29 / 30))
    assert rates[30] == pytest.approx((0.05, 0.05))
    assert r.optimizer.clip_norm == 0
    half_way = 0.025 * (1 + np.cos(np.pi / 500))
    assert rates[31] == pytest.approx((half_way, 0.05))
    assert rates[529][0] < 1e-6
    assert all(group["weight_decay"] == pytest.approx(1e-4) for group in optimizer.param_groups)


def test_weight_decay_policies() -> None:
    student = build_student(recipe(**VIT).backbone, 0)
    counts = {}
    for policy in ("dino", "model", "all"):
        config = recipe(optimizer={"warmup_epochs": 0, "weight_decay_policy": policy}).optimizer
        groups = build_optimizer(config, [student]).param_groups
        counts[policy] = sum(len(g["params"]) for g in groups if g["decays"])
    assert counts["model"] == counts["dino"] - 2  # pos_embed and cls_token
    assert counts["all"] == len(list(student.parameters()))


def test_global_clipping_scales_all_tensors_alike() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad, layer.bias.grad = torch.full((2, 2), 5.0), torch.full((2,), 0.1)
    config = recipe(optimizer={"warmup_epochs": 0, "clip_scope": "global"}).optimizer
    clip_gradients(layer.parameters(), config)
    assert float(layer.weight.grad[0, 0] / layer.bias.grad[0]) == pytest.approx(50)
    norm = (layer.weight.grad.square().sum() + layer.bias.grad.square().sum()).sqrt()
    assert float(norm) == pytest.approx(3.0, rel=1e-4)


def test_dropped_paths_belong_to_the_view_of_the_image() -> None:
    """Their shares are the stated probability; order and company of the images change nothing."""
    layers = nn.Sequential(SampledDropPath(0.3), SampledDropPath(0.1))
    samples = np.arange(20_000)
    layers.register_parameter("device_of", nn.Parameter(torch.zeros(1)))
    choose_paths(layers, samples, range(2, 4), seed=1, epoch=5)
    kept = [layer(torch.ones(40_000, 1, 1)).flatten() for layer in layers]
    for layer, rows in zip(layers, kept, strict=True):
        assert float((rows == 0).float().mean()) == pytest.approx(layer.drop_prob, abs=0.01)
        assert float(rows.max()) == pytest.approx(1 / (1 - layer.drop_prob))
    order = np.array([7, 3, 19_999])
    choose_paths(layers, order, range(3, 4), seed=1, epoch=5)
    assert torch.equal(layers[0](torch.ones(3)), kept[0][20_000 + order])
    assert torch.equal(layers.eval()[0](torch.ones(3)), torch.ones(3))


def test_recipes_extend_and_take_overrides(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        '[data]\ndataset = "fashion-mnist"\n[backbone]\nname = "resnet18"\n'
    )
    (tmp_path / "b.toml").write_text('extends = ["a"]\nepochs = 20\n[clever]\n')
    loaded = load_recipe(
        tmp_path / "b.toml", ["epochs=30", "method.name=dino", "clever.transform_weight=0.5"]
    )
    assert (loaded.name, loaded.epochs, loaded.backbone.name) == ("b", 30, "resnet18")
    assert loaded.clever is not None
    assert loaded.clever.transform_weight == 0.5
    other = load_recipe("clever-resnet18.fmnist", ["method.name=byol", "views.local_views=0"])
    assert other.method == ByolSection(name="byol")
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        load_recipe(tmp_path / "b.toml", ["epochs"])
    (tmp_path / "a.toml").write_text('extends = ["b"]\n')
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(tmp_path / "b.toml")
    (tmp_path / "a.toml").write_text('extends = "none"\n')
    with pytest.raises(RecipeError, match="use a list"):
        load_recipe(tmp_path / "b.toml")
    (tmp_path / "a.toml").write_text('extends = ["none"]\n')
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "b.toml")


@pytest.mark.slow
def test_an_epoch_of_vmamba_lowers_the_loss(tmp_path: Path, fashion_mnist_folder: Path) -> None:
    """The recipe itself on 300 pictures, with a small head and batch."""
    overrides = [*MINIATURE[1:], "batch_size=16", "optimizer.warmup_epochs=0.1"]
    loaded = load_recipe("clever-vmamba-tiny.fmnist", overrides)
    images = load_train_images(loaded.data, fashion_mnist_folder, at_least=16)
    pretrain.train(loaded, images, tmp_path)
    losses = [line["loss"] for line in log_lines(tmp_path)]
    assert len(losses) == 18
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5


SMOKE = sorted(p.stem for p in RECIPES.glob("*.toml"))
QUICK_SMOKE = (
    "clever-vit-tiny.in100-caug",
    "clever-simsiam-resnet18.fmnist",
    "dino-vmamba-tiny.fmnist",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK_SMOKE else pytest.mark.slow) for n in SMOKE],
)
def test_every_recipe_smoke_runs_two_steps(tmp_path: Path, name: str) -> None:
    loaded = load_recipe(name, ["run.smoke=true"])
    images = load_train_images(loaded.data, None, at_least=loaded.batch_size)
    progress = pretrain.train(loaded, images, tmp_path)
    assert progress["step"] == progress["steps"] == 2
    assert all(np.isfinite(line["loss"]) for line in log_lines(tmp_path))
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_adapts_matrices_and_no_vectors(decay: float) -> None:
    config = recipe(optimizer={"name": "lars", "warmup_epochs": 0}).optimizer
    layer = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = build_optimizer(config, [layer])
    for group in optimizer.param_groups:
        group |= {"lr": 1.0, "weight_decay": decay if group["decays"] else 0.0}
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weight = before["weight"]
    trust = 0.001 * weight.norm() / (6**0.5 + decay * weight.norm())
    torch.testing.assert_close(layer.weight, weight - trust * (1 + decay * weight))
    torch.testing.assert_close(layer.bias, before["bias"] - 1)
