"""Evaluate a trained run beside its controls and write one results record.

    python -m training.evaluate runs/clever-resnet18.fmnist \
        --baseline runs/dino-resnet18.fmnist -o runs/clever-resnet18.fmnist/results.json
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from clever_zoo.cli import fail
from clever_zoo.encoder import usable_device
from clever_zoo.errors import CleverZooError, DataError
from clever_zoo.files import write_atomic
from training.data import load_split
from training.evaluate.suite import (
    NEIGHBORS,
    PROTOCOLS,
    SEEDS,
    backbone_features,
    evaluate_features,
    evaluation_pixels,
    pixel_features,
)
from training.networks import build_student
from training.pretrain import preprocess_spec
from training.provenance import environment
from training.runs import load_run


def evaluate_run(
    run: Path, baseline: Path | None, data: Path | None, device: str, *, controls: bool = True
) -> dict[str, Any]:
    """The whole record: the run, its baseline, and as controls the untrained network and pixels.

    Raises:
        CheckpointError: If a run cannot be read.
        DataError: If the data or the baseline does not fit.
    """
    recipe, teacher, training = load_run(run)
    spec = preprocess_spec(recipe)
    sets = [load_split(recipe.data, data, split) for split in ("train", "test")]
    if sets[0].class_names != sets[1].class_names:
        raise DataError(
            f"the classes of both splits must be the same: train has {sets[0].class_names}, "
            f"test {sets[1].class_names}"
        )
    if len(sets[0]) < NEIGHBORS:
        raise DataError(f"{len(sets[0])} training images are too few for {NEIGHBORS} neighbours")
    train, test = ((evaluation_pixels(s, spec), s.labels) for s in sets)
    networks = {recipe.name: (teacher, training)}
    if baseline is not None:
        other, other_teacher, other_training = load_run(baseline)
        if preprocess_spec(other) != spec or other.backbone != recipe.backbone:
            raise DataError(f"{other.name} has another backbone or transform than {recipe.name}")
        networks[other.name] = (other_teacher, other_training)
    if controls:
        untrained = build_student(recipe.backbone, recipe.seed)
        networks["untrained"] = (untrained, {"seed": recipe.seed})
    columns: dict[str, Any] = {}
    cut = recipe.invariant_dim
    for name, (network, facts) in networks.items():
        features = backbone_features(network.to(device), spec)
        scores = evaluate_features(features, train, test, cut=cut, description=name)
        columns[name] = {"training": facts, **scores}
    if controls:
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
    controls: Annotated[
        bool, typer.Option(help="Also evaluate the untrained network and raw pixels.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = 0,
) -> None:
    """Evaluate a run's teacher: k-NN (clean, rotated, jittered) and angle readings, per part.

    Columns: the run, its baseline cut at the same index, the untrained network, raw pixels.
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        usable_device(device)
        record = evaluate_run(run, baseline, data, device, controls=controls)
        write_atomic(output, (json.dumps(record, indent=2) + "\n").encode())
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
