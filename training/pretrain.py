"""Pretrain an encoder from a recipe.

    python -m training.pretrain clever-resnet18.fmnist --out runs/clever-resnet18.fmnist

The same command goes on where a stopped run left off, to the bit on a CPU.
"""

import functools
import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from clever_zoo.cli import fail
from clever_zoo.encoder import usable_device
from clever_zoo.errors import CheckpointError, CleverZooError, DataError, NonFiniteError
from clever_zoo.files import write_atomic
from clever_zoo.spec import PreprocessSpec
from training import ema
from training.checkpoint import load_checkpoint, recipe_difference, save_checkpoint
from training.clever import Clever
from training.config import Recipe, load_recipe, parse_recipe
from training.data import ImageSet, load_split
from training.methods.dino import Dino
from training.networks import build_student, build_teacher, forward_views
from training.provenance import environment
from training.runlog import RunLog
from training.schedules import cosine, warmup_cosine
from training.views import MultiCrop

CHECKPOINT = "checkpoint.safetensors"
ENVIRONMENT = "environment.json"
UNFINISHED_EXIT_CODE = 3


def build_method(recipe: Recipe) -> Dino | Clever:
    """The recipe's objective on features of width D."""
    if recipe.method.clever:
        return Clever(recipe.feature_dim, recipe.invariant_dim, recipe.head, recipe.loss)
    return Dino(recipe.feature_dim, recipe.head, recipe.loss)


def build_views(recipe: Recipe) -> MultiCrop:
    """The recipe's list of views."""
    d = recipe.data
    return MultiCrop(recipe.views, mean=d.mean, std=d.std, seed=recipe.seed)


def build_optimizer(student: nn.Module, method: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on everything but biases and vectors, as the reference groups."""
    named = [(n, p) for m in (student, method) for n, p in m.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if n.endswith(".bias") or p.ndim == 1]
    decayed = [p for n, p in named if not (n.endswith(".bias") or p.ndim == 1)]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def set_schedules(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, steps: int) -> float:
    """Set this step's learning rate and weight decay; returns the teacher's momentum."""
    o = recipe.optimizer
    warmup = int(o.warmup_epochs * steps / recipe.epochs)
    for group in optimizer.param_groups:
        group["lr"] = warmup_cosine(step, steps, warmup, recipe.peak_lr, o.min_lr)
    decay = cosine(step, steps, o.weight_decay, o.weight_decay_end)
    optimizer.param_groups[0]["weight_decay"] = decay
    return cosine(step, steps, o.ema_momentum, 1.0)


@functools.lru_cache(maxsize=1)  # asked for at every step, made once an epoch
def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(steps, batch_size): a shuffle of the data set, the incomplete last batch dropped."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[: count // batch_size * batch_size].reshape(-1, batch_size)


def check_finite(terms: dict[str, Tensor], step: int) -> None:
    """Stop before a broken step changes any weight.

    Raises:
        NonFiniteError: Naming the terms and the step.
    """
    broken = {name: term.item() for name, term in terms.items() if not term.isfinite()}
    if broken:
        raise NonFiniteError(
            f"step {step}: {', '.join(f'{k} is {v}' for k, v in broken.items())}; no weight was "
            "changed. Go on from the last checkpoint with a lower learning rate."
        )


def clean_gradients(student: nn.Module, method: nn.Module, recipe: Recipe, epoch: float) -> None:
    """Clip each tensor's gradient by its own norm; hold the prototypes still at first."""
    frozen = epoch < recipe.optimizer.freeze_last_layer_epochs
    for module in (student, method):
        for name, parameter in module.named_parameters():
            if frozen and "last_layer" in name:
                parameter.grad = None
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_([parameter], recipe.optimizer.clip_norm)


def record_environment(path: Path, device: str) -> None:
    """Keep a list of every environment that a run was trained under, the first one first."""
    seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    current = environment(device)
    if current not in seen:
        write_atomic(path, json.dumps([*seen, current], indent=2).encode())


def train(
    recipe: Recipe,
    data: ImageSet,
    out: Path,
    *,
    device: str = "cpu",
    time_limit_s: float = math.inf,
    checkpoint_every_s: float = 60.0,
    stop_at_step: int | None = None,
) -> dict[str, Any]:
    """Run or continue a recipe.

    Args:
        data: The training images.
        out: Folder of checkpoint and log; a checkpoint in it is continued.
        time_limit_s: Stop with a checkpoint after this many seconds of this call.
        stop_at_step: Stop with a checkpoint before this step.

    Returns:
        The progress: `step` (the next one), `steps` in all, `seconds` spent.

    Raises:
        DataError: If `data` does not fill a batch.
        CheckpointError: If `out` holds a checkpoint of another recipe or of other data.
        NonFiniteError: If a loss term breaks.
    """
    student = build_student(recipe.backbone, recipe.seed)
    student = student.to(device, memory_format=torch.channels_last)
    teacher = build_teacher(student)
    method = build_method(recipe).to(device)
    optimizer = build_optimizer(student, method)
    modules: dict[str, nn.Module] = {"student": student, "teacher": teacher, "method": method}
    make_views = build_views(recipe)
    images = data.images.to(device)

    steps_per_epoch = len(data) // recipe.batch_size
    if not steps_per_epoch:
        raise DataError(f"{len(data)} images do not fill one batch of {recipe.batch_size}")
    total = steps_per_epoch * recipe.epochs
    end = total if stop_at_step is None else min(stop_at_step, total)
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0}
    fixed = {"steps": total, "data_sha256": data.digest()}
    if (out / CHECKPOINT).exists():
        progress = load_checkpoint(out / CHECKPOINT, modules, optimizer, recipe)
        if changes := recipe_difference({k: progress[k] for k in fixed}, fixed):
            raise CheckpointError(
                f"{out / CHECKPOINT} belongs to other data ({'; '.join(changes)}); continue with "
                "the same images, or train into another folder (--out)"
            )
    if progress["step"] < end:
        record_environment(out / ENVIRONMENT, device)
    started = saved = time.monotonic()
    earlier_s = progress["seconds"]

    with RunLog(out / "log.jsonl", first_step=progress["step"], total_steps=total) as log:
        while progress["step"] < end and time.monotonic() - started < time_limit_s:
            step = progress["step"]
            epoch, within = divmod(step, steps_per_epoch)
            samples = epoch_order(len(data), recipe.batch_size, recipe.seed, epoch)[within]
            momentum = set_schedules(optimizer, recipe, step, total)

            views = make_views(images[samples], samples, epoch).pixels
            with torch.no_grad():
                teacher_features = forward_views(teacher, views[:2])
            student_features = forward_views(student, views)
            terms = method.loss_terms(teacher_features, student_features, epoch)
            check_finite(terms, step)
            loss = sum(terms.values(), start=torch.zeros((), device=device))

            optimizer.zero_grad()
            loss.backward()
            clean_gradients(student, method, recipe, step / steps_per_epoch)
            optimizer.step()
            ema.follow(teacher, student, momentum)
            method.follow(momentum)

            now = time.monotonic()
            progress = {"step": step + 1, "seconds": earlier_s + now - started}
            rates = {k: optimizer.param_groups[0][k] for k in ("lr", "weight_decay")}
            values = {name: term.item() for name, term in terms.items()}
            log.step(
                {
                    "step": step,
                    "loss": loss.item(),
                    **values,
                    **rates,
                    "momentum": momentum,
                    "seconds": round(progress["seconds"], 3),
                }
            )
            if now - saved > checkpoint_every_s:
                save_checkpoint(out / CHECKPOINT, modules, optimizer, recipe, progress | fixed)
                saved = now
    save_checkpoint(out / CHECKPOINT, modules, optimizer, recipe, progress | fixed)
    return progress | fixed


def preprocess_spec(recipe: Recipe) -> PreprocessSpec:
    """The evaluation transform of the recipe's encoder."""
    d = recipe.data
    return PreprocessSpec(
        input_size_px=recipe.views.global_size_px, crop_pct=d.crop_pct, mean=d.mean, std=d.std
    )


def smoke_version(recipe: Recipe) -> Recipe:
    """The same recipe in miniature: one epoch, small batch and head."""
    content = recipe.model_dump()
    content |= {"name": f"{recipe.name}-smoke", "epochs": 1, "batch_size": 16}
    content["head"] |= {"prototypes": 64, "hidden_dim": 64, "bottleneck_dim": 32}
    content["optimizer"] |= {"warmup_epochs": 0.25, "freeze_last_layer_epochs": 0.25}
    return parse_recipe(content, f"smoke version of {recipe.name}")


def main(
    recipe: Annotated[
        str, typer.Argument(help="Name of a bundled recipe or path of a .toml file.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run (default: runs/NAME), continued if there."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the data set; Fashion-MNIST is found where Debian puts it."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = 0,
    time_limit_min: Annotated[
        float, typer.Option(min=0, help="Stop with a checkpoint after so many minutes of training.")
    ] = math.inf,
    checkpoint_every_s: Annotated[float, typer.Option(min=0, help="Seconds.")] = 60.0,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A miniature on 128 images, to see that it runs.")
    ] = False,
) -> None:
    """Pretrain an encoder; the same command continues a stopped run, to the bit on a CPU.

    Writes OUT/checkpoint.safetensors (atomically), OUT/log.jsonl with every loss term of every
    step, and OUT/environment.json. Exit code 0: finished. 2: bad input. 3: stopped by the time
    limit.

    Example: python -m training.pretrain clever-resnet18.fmnist --out runs/clever-resnet18.fmnist
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        loaded = load_recipe(recipe)
        usable_device(device)
        images = load_split(loaded.data, data, "train")
        if smoke:
            loaded = smoke_version(loaded)
            images = ImageSet(images.images[:128], images.labels[:128], images.class_names)
        folder = out or Path("runs") / loaded.name
        progress = train(
            loaded,
            images,
            folder,
            device=device,
            time_limit_s=60 * time_limit_min,
            checkpoint_every_s=checkpoint_every_s,
        )
    except (CleverZooError, OSError) as error:
        fail(error)
    step, steps, seconds = (progress[key] for key in ("step", "steps", "seconds"))
    typer.echo(f"{step} of {steps} steps, {seconds:.0f} s: {folder}")
    if step < steps:
        raise typer.Exit(UNFINISHED_EXIT_CODE)


if __name__ == "__main__":
    typer.run(main)
