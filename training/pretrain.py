"""Pretrain an encoder from a recipe.

    python -m training.pretrain clever-resnet18.fmnist --out runs/clever-resnet18.fmnist
    torchrun --nproc-per-node 8 -m training.pretrain clever-resnet50.in100-caug --device cuda

The same command goes on where a stopped run left off, to the bit on a CPU.
"""

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from clever_zoo.cli import fail
from clever_zoo.errors import (
    CheckpointError,
    CleverZooError,
    DataError,
    NonFiniteError,
    RecipeError,
)
from clever_zoo.spec import PreprocessSpec
from training.checkpoint import (
    CHECKPOINT,
    RunState,
    check_resumable,
    keep_epoch,
    remove_unfinished,
)
from training.config import Recipe, load_recipe
from training.data import TrainImages, load_train_images
from training.distributed import (
    Processes,
    decided_by_any,
    gradients_averaged,
    joined_processes,
    rows_of_processes,
    spread,
)
from training.loader import step_batches
from training.objective import Objective
from training.optimizers import build_optimizer, clip_gradients, set_schedules
from training.provenance import ENVIRONMENT, record_environment
from training.report import write_report
from training.runlog import LOG, RunLog
from training.views import MultiCrop

UNFINISHED_EXIT_CODE = 3
DIAGNOSTICS_EVERY_STEPS = 50
LEAST_LOSS_SCALE = 1.0
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def build_views(recipe: Recipe) -> MultiCrop:
    """The recipe's list of views."""
    d = recipe.data
    return MultiCrop(recipe.views, mean=d.mean, std=d.std, seed=recipe.seed)


def check_shares(recipe: Recipe, processes: Processes) -> None:
    """Refuse a batch that cannot be divided among the processes and their parts.

    Raises:
        RecipeError: If it cannot.
    """
    parts = recipe.run.accumulation_steps
    if recipe.batch_size % (processes.world_size * parts):
        raise RecipeError(
            recipe.name,
            [
                f"batch_size {recipe.batch_size} cannot be divided among {processes.world_size} "
                f"process(es) of {parts} part(s) each; use a multiple of "
                f"{processes.world_size * parts}"
            ],
        )


def finite_means(terms: list[dict[str, Tensor]], step: int) -> dict[str, float]:
    """Each term's mean over a step's parts and all processes, all of which must call this.

    Raises:
        NonFiniteError: Naming the terms, the step and the processes.
    """
    names = list(terms[0])
    rows = torch.stack([torch.stack([part[name].detach() for name in names]) for part in terms])
    table = rows_of_processes(rows.mean(0))
    values = table.tolist()
    broken = [
        f"{name} is {value} on rank {rank}"
        for rank, row in enumerate(values)
        for name, value in zip(names, row, strict=True)
        if not math.isfinite(value)
    ]
    if broken:
        raise NonFiniteError(
            f"step {step}: {', '.join(broken)}; no weight was changed. Go on from the last "
            "checkpoint with a lower learning rate."
        )
    return dict(zip(names, np.mean(values, axis=0).tolist(), strict=True))


def check_agreement(step: int, data_sha256: str, device: torch.device) -> None:
    """Refuse processes that would train apart; all of them must call this.

    Raises:
        CheckpointError: If they resume at different steps or see different data.
    """
    facts = torch.tensor([step, int(data_sha256[:12], 16)], device=device)
    steps, data = rows_of_processes(facts).T.tolist()
    if len(set(steps)) > 1 or len(set(data)) > 1:
        raise CheckpointError(
            f"the processes resume at steps {steps} and see {len(set(data))} different data "
            "set(s); give all nodes one --out folder that they share, and the same images"
        )


def check_precision(recipe: Recipe, device: torch.device) -> None:
    """Refuse what torch computes wrongly without a word.

    Raises:
        RecipeError: For convolutions in bf16 on a CPU: of a 3x3 kernel with stride 2 on a map of
            one pixel, torch 2.14 returns memory that was never written as the weight's gradient.
    """
    name, precision = recipe.backbone.name, recipe.run.precision
    if device.type == "cpu" and precision == "bf16" and not name.startswith("vit"):
        problem = (
            f"run.precision is 'bf16', in which a CPU's gradients of {name}'s convolutions can be "
            "wrong; use 'fp32', or a GPU"
        )
        raise RecipeError(recipe.name, [problem])


def check_gradients(objective: nn.Module, norm: float, step: int) -> None:
    """Stop before a broken gradient changes any weight.

    Raises:
        NonFiniteError: Naming the first tensors and the step.
    """
    if math.isfinite(norm):
        return
    broken = [
        name
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    raise NonFiniteError(
        f"step {step}: the gradient of {', '.join(broken[:3])} is not finite "
        f"({len(broken)} tensors); no weight was changed. Go on from the last checkpoint with a "
        "lower learning rate, or with run.precision = 'fp32'."
    )


def train(
    recipe: Recipe,
    data: TrainImages,
    out: Path,
    *,
    workers: int = 0,
    processes: Processes | None = None,
    time_limit_s: float = math.inf,
    checkpoint_every_s: float = 60.0,
    keep: int = 0,
    elastic: bool = False,
    stop_at_step: int | None = None,
    interrupted: threading.Event | None = None,
) -> dict[str, Any]:
    """Run or continue a recipe.

    Args:
        data: The training images.
        out: Folder of checkpoint and log; a checkpoint in it is continued.
        workers: Processes that read images ahead.
        processes: Which of how many this one is; None: the only one, on the CPU.
        time_limit_s: Stop with a checkpoint after this many seconds of this call.
        keep: How many checkpoints of past epochs to keep beside the latest.
        elastic: Accept a checkpoint that another number of processes wrote.
        stop_at_step: Stop with a checkpoint before this step.
        interrupted: Stop with a checkpoint once it is set.

    Returns:
        The progress: `step` (the next one), `steps` in all, `seconds` spent.

    Raises:
        RecipeError: If the batch cannot be divided.
        DataError: If the data do not fill a batch.
        CheckpointError: If `out` holds a checkpoint of another recipe, of other data, or of
            another number of processes.
        NonFiniteError: If a loss term or a gradient breaks.
    """
    processes = processes or Processes(torch.device("cpu"))
    device, first = processes.device, processes.first
    check_shares(recipe, processes)
    check_precision(recipe, device)
    steps_per_epoch = len(data) // recipe.batch_size
    if not steps_per_epoch:
        raise DataError(f"{len(data)} images do not fill one batch of {recipe.batch_size}")
    total = steps_per_epoch * recipe.total_epochs
    end = total if stop_at_step is None else min(stop_at_step, total)

    objective = Objective(recipe).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(recipe.optimizer, objective.children())
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.run.precision == "fp16")
    state = RunState(objective, optimizer, scaler, recipe, device)
    fixed = {"steps": total, "data_sha256": data.digest(), "world_size": processes.world_size}
    progress = state.resume(out, fixed, elastic=elastic)
    check_agreement(progress["step"], fixed["data_sha256"], device)
    distributed = spread(objective, processes)
    make_views = build_views(recipe)
    batches = step_batches(data, recipe, range(progress["step"], end), processes, workers)
    half = HALF.get(recipe.run.precision)
    if first:
        remove_unfinished(out)
    if first and progress["step"] < end:
        record_environment(out / ENVIRONMENT, device.type)
    started = saved = time.monotonic()
    earlier_s = progress["seconds"]

    def wanted() -> bool:
        late = time.monotonic() - started >= time_limit_s
        stop = late or (interrupted is not None and interrupted.is_set())
        return progress["step"] < end and not decided_by_any(stop, device)

    with RunLog(out / LOG, first_step=progress["step"], total_steps=total, enabled=first) as log:
        while wanted():
            step, began = progress["step"], time.monotonic()
            epoch = step / steps_per_epoch
            batch = next(batches)
            images = batch.images.to(device, non_blocking=True)
            parts = batch.samples.numpy().reshape(recipe.run.accumulation_steps, -1)
            waited_s = time.monotonic() - began
            rates = set_schedules(optimizer, recipe, step, steps_per_epoch)

            optimizer.zero_grad()
            terms = []
            for i, (pixels, samples) in enumerate(
                zip(images.chunk(len(parts)), parts, strict=True)
            ):
                views = make_views(pixels, samples, int(epoch))
                with gradients_averaged(distributed, last=i == len(parts) - 1):
                    with torch.autocast(device.type, half, enabled=half is not None):
                        part_terms, features = distributed(views, samples, epoch)
                    loss = torch.stack(list(part_terms.values())).sum() / len(parts)
                    scaler.scale(loss).backward()
                terms.append(part_terms)
            values = finite_means(terms, step)

            for parameter in objective.method.frozen_parameters(epoch):
                parameter.grad = None
            scaler.unscale_(optimizer)
            norm = clip_gradients(objective.parameters(), recipe.optimizer).item()
            scaling = scaler.is_enabled()  # then such a step is skipped and the scale lowered
            if not scaling or scaler.get_scale() < LEAST_LOSS_SCALE:
                check_gradients(objective, norm, step)
            scaler.step(optimizer)
            scaler.update()
            objective.end_step(rates["momentum"])

            now = time.monotonic()
            progress = {"step": step + 1, "seconds": earlier_s + now - started}
            record = {"step": step, "epoch": epoch, "loss": sum(values.values())}
            record |= values | rates | {"grad_norm": norm}
            if first and step % DIAGNOSTICS_EVERY_STEPS == 0:
                record |= objective.diagnostics(features)
            if len(batch.replaced):
                record["replaced_images"] = len(batch.replaced)
            record |= {
                "images_per_s": recipe.batch_size / (now - began),
                "step_s": now - began,
                "data_s": waited_s,
                "seconds": progress["seconds"],
            }
            log.step(record)
            ends_epoch = keep > 0 and (step + 1) % steps_per_epoch == 0
            if first and (ends_epoch or now - saved > checkpoint_every_s):
                log.flush()
                state.save(out / CHECKPOINT, progress | fixed)
                saved = now
                if ends_epoch:
                    keep_epoch(out, int(epoch), keep)
    if first:
        state.save(out / CHECKPOINT, progress | fixed)
        if progress["step"]:
            write_report([out], out / "report.html")
    return progress | fixed


def preprocess_spec(recipe: Recipe) -> PreprocessSpec:
    """The evaluation transform of the recipe's encoder."""
    d = recipe.data
    return PreprocessSpec(
        input_size_px=recipe.views.global_size_px, crop_pct=d.crop_pct, mean=d.mean, std=d.std
    )


def main(
    recipe: Annotated[
        str, typer.Argument(help="Name of a bundled recipe or path of a .toml file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Values that go over the recipe's, such as epochs=1, clever.transform_weight=1, "
            "run.precision=bf16; run.smoke=true makes a miniature, to see that it runs.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run (default: runs/NAME), continued if there."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the data set; Fashion-MNIST is found where Debian puts it."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for decoded images and fetched shards (default: DATA/cache)."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that read images ahead; 0: none.")
    ] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1. Under torchrun, cuda is one GPU a process.")
    ] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = 0,
    time_limit_min: Annotated[
        float, typer.Option(min=0, help="Stop with a checkpoint after so many minutes of training.")
    ] = math.inf,
    checkpoint_every_s: Annotated[float, typer.Option(min=0, help="Seconds.")] = 60.0,
    keep: Annotated[
        int, typer.Option(min=0, help="Keep the checkpoints of this many last epochs, too.")
    ] = 0,
    elastic: Annotated[
        bool,
        typer.Option("--elastic", help="Go on with another number of processes than before."),
    ] = False,
) -> None:
    """Pretrain an encoder; the same command continues a stopped run, to the bit on a CPU.

    Writes OUT/checkpoint.safetensors (atomically), OUT/log.jsonl with every loss term of every
    step, OUT/environment.json, OUT/tensorboard, and at the end OUT/report.html. SIGTERM stops a
    single process with a checkpoint. Exit code 0: finished, or stopped under torchrun. 2: bad
    input. 3: stopped before the end.

    Example: python -m training.pretrain clever-resnet18.fmnist --out runs/clever-resnet18.fmnist
    """
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # the shapes of a run stay the same
    interrupted = threading.Event()
    under_torchrun = "RANK" in os.environ
    if not under_torchrun:
        # A process of many may be waiting for a dead one, where no handler would ever run.
        signal.signal(signal.SIGTERM, lambda *_: interrupted.set())
    try:
        loaded = load_recipe(recipe, overrides or ())
        folder = out or Path("runs") / loaded.name
        with joined_processes(device) as processes:
            check_shares(loaded, processes)
            if (folder / CHECKPOINT).exists():
                known = {"world_size": processes.world_size}
                check_resumable(folder / CHECKPOINT, loaded, known, elastic=elastic)
            images = load_train_images(
                loaded.data, data, at_least=loaded.batch_size, cache_folder=cache
            )
            progress = train(
                loaded,
                images,
                folder,
                workers=workers,
                processes=processes,
                time_limit_s=60 * time_limit_min,
                checkpoint_every_s=checkpoint_every_s,
                keep=keep,
                elastic=elastic,
                interrupted=interrupted,
            )
    except (CleverZooError, OSError) as error:
        fail(error)
    step, steps, seconds = (progress[key] for key in ("step", "steps", "seconds"))
    if processes.first:
        typer.echo(f"{step} of {steps} steps, {seconds:.0f} s: {folder}")
    # torchrun answers any other exit code than 0 by starting the processes again.
    if step < steps and not under_torchrun:
        raise typer.Exit(UNFINISHED_EXIT_CODE)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
