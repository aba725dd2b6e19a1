"""Evaluate a trained run beside its controls and write one results record.

    python -m training.evaluate runs/clever-resnet18.fmnist \
        --baseline runs/dino-resnet18.fmnist -o runs/clever-resnet18.fmnist/results.json
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from clever_zoo.cli import fail
from clever_zoo.errors import CleverZooError
from clever_zoo.files import write_atomic
from training.checkpoint import load_recipe_and_teacher
from training.config import Recipe
from training.data import load_split
from training.evaluate.suite import (
    PROTOCOLS,
    SEEDS,
    backbone_features,
    evaluate_features,
    evaluation_pixels,
    pixel_features,
)
from training.networks import build_student
from training.pretrain import CHECKPOINT, ENVIRONMENT, preprocess_spec
from training.provenance import environment


def load_run(folder: Path) -> tuple[Recipe, nn.Module, dict[str, Any]]:
    """A run's recipe, its teacher backbone and the facts of its training."""
    recipe, tensors, progress = load_recipe_and_teacher(folder / CHECKPOINT)
    teacher = build_student(recipe.backbone, recipe.seed)
    teacher.load_state_dict(tensors)
    first, *later = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    images = progress["step"] * recipe.batch_size
    return recipe, teacher, {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "steps": progress["step"],
        "finished": progress["step"] == progress["steps"],
        "images_seen": images,
        "seconds": round(progress["seconds"]),
        "images_per_s": round(images / max(progress["seconds"], 1e-9), 1),
        **first,
        **({"continued_under": later} if later else {}),
    }  # fmt: skip


def evaluate_run(
    run: Path, baseline: Path | None, data: Path | None, device: str
) -> dict[str, Any]:
    """The whole record: the run, its baseline, the untrained network and raw pixels."""
    recipe, teacher, training = load_run(run)
    spec = preprocess_spec(recipe)
    sets = [load_split(recipe.data, data, split) for split in ("train", "test")]
    train, test = ((evaluation_pixels(s, spec), s.labels) for s in sets)
    networks = {recipe.name: (teacher, training)}
    if baseline is not None:
        other, other_teacher, other_training = load_run(baseline)
        networks[other.name] = (other_teacher, other_training)
    networks["untrained"] = (build_student(recipe.backbone, recipe.seed), {"seed": recipe.seed})
    columns: dict[str, Any] = {}
    cut = recipe.invariant_dim
    for name, (network, facts) in networks.items():
        features = backbone_features(network.to(device), spec)
        scores = evaluate_features(features, train, test, cut=cut, description=name)
        columns[name] = {"training": facts, **scores}
    columns["pixels"] = evaluate_features(
        pixel_features, train, test, cut=None, description="pixels"
    )
    return {
        "model": recipe.name,
        "dataset": recipe.data.dataset,
        "images": {"train": len(train[1]), "test": len(test[1])},
        "invariant_dim": recipe.invariant_dim,
        "perturbation_seeds": list(SEEDS),
        "protocols": PROTOCOLS,
        "evaluation": environment(device),
        "columns": columns,
    }


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the record goes.")],
    baseline: Annotated[Path | None, typer.Option(help="Run of the baseline.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = 0,
) -> None:
    """Evaluate a run's teacher: k-NN (clean, rotated, jittered) and angle readings, per part.

    Columns: the run, its baseline cut at the same index, the untrained network, raw pixels.
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        record = evaluate_run(run, baseline, data, device)
    except CleverZooError as error:
        fail(error)
    write_atomic(output, (json.dumps(record, indent=2) + "\n").encode())
    typer.echo(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
