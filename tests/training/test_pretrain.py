"""The training loop on the bundled pictures: resume to the bit, schedules, safety stops."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from clever_zoo.errors import CheckpointError, DataError, NonFiniteError, RecipeError
from clever_zoo.samples import sample_paths
from training import pretrain
from training.checkpoint import load_recipe_and_teacher
from training.config import RECIPES, Recipe, load_recipe, parse_recipe
from training.data import ImageSet
from training.networks import build_student, build_teacher, forward_views

SMALL = {
    "name": "small",
    "seed": 3,
    "epochs": 2,
    "batch_size": 8,
    "data": {"dataset": "fashion-mnist", "crop_pct": 1.0},
    "backbone": {"name": "resnet18"},
    "views": {"global_size_px": 16, "local_size_px": 8, "local_views": 1},
    "head": {"prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8},
    "optimizer": {"warmup_epochs": 0.5, "freeze_last_layer_epochs": 0.25, "ema_momentum": 0.9},
}
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
def data() -> ImageSet:
    images = np.stack([np.asarray(Image.open(p)) for p in sample_paths()[::9]])
    return ImageSet(torch.from_numpy(images).unsqueeze(1), torch.zeros(34).long(), ("all",))


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / pretrain.CHECKPOINT)


@pytest.mark.parametrize(
    "changes", [{}, {"method": {"clever": False}}, VIT], ids=["clever", "dino", "vit"]
)
def test_resuming_changes_no_bit(tmp_path: Path, data: ImageSet, changes) -> None:
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
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path, data, monkeypatch) -> None:
    """A kill after step 5 with a checkpoint at step 3 and half a log line loses nothing."""
    pretrain.train(recipe(), data, tmp_path / "whole")
    run = tmp_path / "killed"
    pretrain.train(recipe(), data, run, stop_at_step=3)
    saved = (run / pretrain.CHECKPOINT).read_bytes()
    pretrain.train(recipe(), data, run, stop_at_step=5)
    (run / pretrain.CHECKPOINT).write_bytes(saved)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    pretrain.train(recipe(), data, run)
    a, b = tensors(tmp_path / "whole"), tensors(run)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert [line["step"] for line in log_lines(run)] == list(range(8))


def test_kill_nine_and_resume_change_no_bit(tmp_path: Path, fashion_mnist_folder: Path) -> None:
    """SIGKILL at some step of a real process, then the same command again."""
    command = [sys.executable, "-m", "training.pretrain", "clever-resnet18.fmnist", "--smoke"]
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
    assert [line["step"] for line in log_lines(run)] == list(range(8))


def log_lines_so_far(folder: Path) -> list[str]:
    return (folder / "log.jsonl").read_text().splitlines()


def test_log_holds_every_term(tmp_path: Path, data: ImageSet) -> None:
    pretrain.train(recipe(), data, tmp_path, stop_at_step=2)
    for line in log_lines(tmp_path):
        terms = line["contrastive"] + line["orthogonality"] + line["head_balance"]
        assert line["loss"] == pytest.approx(terms, rel=1e-5)
        assert {"lr", "weight_decay", "momentum", "step", "seconds"} <= line.keys()


def test_another_recipes_checkpoint_is_refused_with_the_difference(tmp_path: Path, data) -> None:
    pretrain.train(recipe(), data, tmp_path, stop_at_step=1)
    before = (tmp_path / pretrain.CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match=r"seed: checkpoint 3, recipe 4") as caught:
        pretrain.train(recipe(seed=4, batch_size=4), data, tmp_path)
    assert "batch_size: checkpoint 8, recipe 4" in str(caught.value)
    assert (tmp_path / pretrain.CHECKPOINT).read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, data: ImageSet) -> None:
    pretrain.train(recipe(), data, tmp_path, stop_at_step=1)
    path = tmp_path / pretrain.CHECKPOINT
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
    real = pretrain.Clever.loss_terms

    def broken(self, *arguments):
        terms = real(self, *arguments)
        steps.append(1)
        return terms | {"orthogonality": terms["orthogonality"] * float("nan")}

    monkeypatch.setattr(pretrain.Clever, "loss_terms", broken)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("stepped"))
    with pytest.raises(NonFiniteError, match=r"step 0: orthogonality is nan"):
        pretrain.train(recipe(), data, tmp_path)
    assert steps == [1]


def test_the_time_limit_leaves_a_checkpoint(tmp_path: Path, data: ImageSet) -> None:
    progress = pretrain.train(recipe(), data, tmp_path, time_limit_s=1e-9)
    assert progress["step"] == 0
    assert (tmp_path / pretrain.CHECKPOINT).exists()
    pretrain.train(recipe(), data, tmp_path, stop_at_step=2)
    spent = log_lines(tmp_path)[-1]["seconds"]
    progress = pretrain.train(recipe(), data, tmp_path, time_limit_s=spent / 2 + 5, stop_at_step=3)
    assert progress["step"] == 3
    assert progress["seconds"] > spent


def test_other_data_is_refused(tmp_path: Path, data: ImageSet) -> None:
    pretrain.train(recipe(), data, tmp_path, stop_at_step=1)
    fewer = ImageSet(data.images[:16], data.labels[:16], data.class_names)
    with pytest.raises(CheckpointError, match=r"steps: checkpoint 8, recipe 4"):
        pretrain.train(recipe(), fewer, tmp_path)
    other = ImageSet(data.images.flip(0), data.labels, data.class_names)
    with pytest.raises(CheckpointError, match="data_sha256"):
        pretrain.train(recipe(), other, tmp_path)


def test_too_little_data_is_a_data_error(tmp_path: Path, data: ImageSet) -> None:
    with pytest.raises(DataError, match="34 images do not fill one batch of 64"):
        pretrain.train(recipe(batch_size=64), data, tmp_path)


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
    loaded, teacher, progress = load_recipe_and_teacher(tmp_path / pretrain.CHECKPOINT)
    assert loaded == recipe()
    assert progress["step"] == 2
    assert torch.equal(teacher["conv1.weight"], after["teacher.conv1.weight"])


def test_prototypes_are_frozen_at_first(tmp_path: Path, data: ImageSet) -> None:
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


def test_every_student_tensor_gets_a_gradient_and_no_teacher_tensor(data: ImageSet) -> None:
    r = recipe()
    student, method = build_student(r.backbone, 0), pretrain.build_method(r)
    teacher = build_teacher(student)
    views = pretrain.build_views(r)(data.images[:8], np.arange(8), 0).pixels
    terms = method.loss_terms(forward_views(teacher, views[:2]), forward_views(student, views), 0)
    sum(terms.values()).backward()
    missing = [n for m in (student, method) for n, p in m.named_parameters()
               if (p.grad is not None) != p.requires_grad]  # fmt: skip
    assert missing == []
    assert all(p.grad is None for p in teacher.parameters())
    assert {n for n, p in method.named_parameters() if not p.requires_grad} == {
        n for n, _ in method.named_parameters() if "teacher" in n or n.endswith("weight.original0")
    }


def test_orthogonality_leaves_the_invariant_half_alone(data: ImageSet) -> None:
    method = pretrain.build_method(recipe())
    features = torch.randn(3, 8, 512, requires_grad=True)
    method.loss_terms(features[:2].detach(), features, 0)["orthogonality"].backward()
    assert features.grad is not None
    assert not features.grad[..., :409].any()
    assert features.grad[..., 409:].any()
    assert all(p.grad is None for p in method.invariant.parameters())


def test_centers_follow_the_teachers_mean_logits() -> None:
    method = pretrain.build_method(recipe())
    teacher, student = torch.randn(2, 8, 512), torch.randn(3, 8, 512)
    expected = 0.1 * method.equivariant.project(teacher[..., 409:], student[..., 409:]).teacher
    method.loss_terms(teacher, student, 0)
    torch.testing.assert_close(method.equivariant.center, expected.mean((0, 1)))
    assert method.invariant.center.abs().sum() > 0


def test_multi_crop_passes_keep_the_order_of_views() -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((1, 2, 3))[:, None]

    views = [torch.full((2, 3, size, size), float(i)) for i, size in enumerate((32, 32, 16, 16))]
    features = forward_views(Mean(), views)
    assert features.shape == (4, 2, 1)
    assert features[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_schedules_of_the_paper() -> None:
    """IN-100: 247 steps an epoch, 200 epochs, batch 512."""
    r = parse_recipe({"name": "paper", "data": {"dataset": "image-folder"},
                      "backbone": {"name": "vit_small"}}, "test")  # fmt: skip
    optimizer = pretrain.build_optimizer(nn.Linear(2, 2), nn.Linear(2, 2))
    steps = 247 * 200
    seen = {}
    for step in (0, 2469, 2470, steps - 1):
        momentum = pretrain.set_schedules(optimizer, r, step, steps)
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
    decayed, plain = pretrain.build_optimizer(student, nn.Identity()).param_groups
    ids = {id(p): n for n, p in student.named_parameters()}
    names = {ids[id(p)] for p in decayed["params"]}
    assert {"pos_embed", "cls_token", "blocks.0.attn.qkv.weight"} <= names
    assert {ids[id(p)] for p in plain["params"]} == {
        n for n, p in student.named_parameters() if p.ndim == 1
    }


def test_each_tensor_is_clipped_by_its_own_norm() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad, layer.bias.grad = torch.full((2, 2), 5.0), torch.full((2,), 0.1)
    pretrain.clean_gradients(layer, nn.Identity(), recipe(), epoch=1.0)
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


def test_only_the_student_drops_paths() -> None:
    student = build_student(recipe(**VIT).backbone, 0)
    rates = [[m.drop_prob for m in net.modules() if hasattr(m, "drop_prob")]
             for net in (student, build_teacher(student))]  # fmt: skip
    assert max(rates[0]) == pytest.approx(0.1)
    assert not any(rates[1])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path: Path) -> None:
    loaded = load_recipe(path.stem)
    assert loaded.name == path.stem
    assert loaded.method.clever == path.stem.startswith("clever-")
    assert path.stem.split(".")[0].split("-", 1)[1].replace("-", "_") == loaded.backbone.name
    assert f"python -m training.pretrain {path.stem}" in path.read_text()
    other = "dino" if loaded.method.clever else "clever"
    twin = load_recipe(path.stem.replace(path.stem.split("-")[0], other))
    assert twin.model_copy(update={"name": "", "method": None}) == loaded.model_copy(
        update={"name": "", "method": None}
    )


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
        ({"method": {"invariant_dim": 512}}, "both halves need one"),
        ({"method": {"clever": False, "invariant_dim": 9}}, "nothing is cut"),
        ({**VIT, "views": {"global_size_px": 18, "local_size_px": 8}}, "multiple of patch 4"),
        ({"backbone": {"name": "resnet18", "model_args": {"in_chans": 1}}}, "in_chans"),
        ({"data": {"dataset": "fashion-mnist", "std": [0, 1, 1]}}, "data.std"),
        ({"epochs": "20"}, "epochs"),
        ({"seed": True}, "seed"),
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
    app = pretrain.typer.Typer()
    app.command()(pretrain.main)
    arguments = ["clever-resnet18.fmnist", "--smoke", "--data", str(fashion_mnist_folder)]
    out = ["--out", str(tmp_path / "run")]
    stopped = runner.invoke(app, [*arguments, *out, "--time-limit-min", "0"])
    assert stopped.exit_code == pretrain.UNFINISHED_EXIT_CODE, stopped.output
    finished = runner.invoke(app, [*arguments, *out])
    assert finished.exit_code == 0, finished.output
    assert "8 of 8 steps" in finished.output
    (environment,) = json.loads((tmp_path / "run/environment.json").read_text())
    assert {"commit", "hardware", "torch"} <= environment.keys()
    assert runner.invoke(app, ["no-such-recipe"]).exit_code == 2
