"""Evaluate one model beside its controls; ends in results.json and a page of plots, report.html.

python -m training.evaluate runs/clever-resnet18.fmnist --baseline runs/dino-resnet18.fmnist
python -m training.evaluate clever-resnet18.fmnist -o evaluation --tasks knn,linear_cached
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from clever_zoo.cli import fail
from clever_zoo.encoder import Encoder, usable_device
from clever_zoo.errors import CleverZooError, DataError
from clever_zoo.records import RESULTS_FILENAME, Environment, Record, Role
from training.checkpoint import CHECKPOINT
from training.config import DataConfig, load_recipe
from training.data import check_classes, load_split
from training.evaluate.inputs import (
    EvaluationImages,
    Subject,
    load_encoder,
    raw_pixels,
    subject,
    untrained,
)
from training.evaluate.perturb import PERTURBATIONS
from training.evaluate.report import REPORT, write_page
from training.evaluate.suite import TASKS, Task, evaluate_subject
from training.provenance import environment
from training.runs import load_run

ROLES: tuple[Role, ...] = get_args(Role)
TASK_GROUPS: tuple[Task, ...] = get_args(Task)


def evaluate(
    source: str,
    *,
    baseline: str | None = None,
    data: Path | None = None,
    dataset: str | None = None,
    tasks: Collection[Task] = TASK_GROUPS,
    roles: Collection[Role] = ROLES,
    reference_epochs: int = 100,
    device: str = "cpu",
) -> Record:
    """Measure a model and its controls.

    Args:
        source: A run's folder or a source of `clever_zoo.from_pretrained`.
        baseline: The same of a network whose features are cut at the model's index.
        data: Folder of the data set.
        dataset: Name of the data set; None for the one the model was trained on.
        tasks: What to measure.
        roles: Which networks to measure; the record names the others too if they are given.
        reference_epochs: Epochs of the task "linear_reference".
        device: Where the features are computed.

    Raises:
        CheckpointError, UnknownModelError: If a source cannot be read.
        DataError: If the data or the baseline does not fit.
        NonFiniteError: If a feature is not finite.
    """
    encoder, training = load_encoder(source, device)
    config, seed = _data_and_seed(source, encoder, dataset)
    train, test = (
        EvaluationImages(load_split(config, data, split), encoder.spec.preprocess, split)
        for split in ("train", "test")
    )
    check_classes(train.data, test.data)
    cut = encoder.spec.invariant_dim
    subjects = [subject(encoder, "model", training, cut)]
    if baseline is not None:
        subjects.append(_baseline(baseline, encoder, device))
    fresh = untrained(encoder.spec, seed).to(usable_device(device))
    subjects += [subject(fresh, "untrained", {"seed": seed}, cut), raw_pixels(train.data)]
    chosen = [s for s in subjects if s.network.role in roles]
    results = [
        row
        for number, s in enumerate(chosen, 1)
        for row in evaluate_subject(
            s,
            train,
            test,
            tasks,
            reference_epochs=reference_epochs,
            label=f"{number}/{len(chosen)} {s.network.name}",
        )
    ]
    return Record(
        model=encoder.spec.name,
        dataset=config.dataset,
        invariant_dim=cut,
        images={"train": len(train), "test": len(test)},
        tasks={name: TASKS[name] for name in _tasks_of(results)},
        perturbations={name: PERTURBATIONS[name].text for name in _perturbations_of(results)},
        networks=tuple(s.network for s in chosen),
        environments=(Environment(**environment(device)),),
        results=tuple(results),
    )


def _tasks_of(results: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(row.protocol.task for row in results))


def _perturbations_of(results: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(row.protocol.perturbation for row in results))


def _data_and_seed(source: str, encoder: Encoder, dataset: str | None) -> tuple[DataConfig, int]:
    """The data section to read images by, and the seed that training started from."""
    if dataset is not None:
        spec = encoder.spec.preprocess
        return DataConfig(dataset=dataset, image_size_px=spec.resize_px), 0  # type: ignore[arg-type]
    if (Path(source) / CHECKPOINT).is_file():
        recipe = load_run(Path(source))[0]
    elif encoder.spec.provenance is not None:
        recipe = load_recipe(encoder.spec.provenance.recipe)
    else:
        raise DataError(
            f"{source} does not say what it was trained on; pass --dataset, such as "
            "--dataset image-folder --data DIR"
        )
    return recipe.data, recipe.seed


def _baseline(source: str, encoder: Encoder, device: str) -> Subject:
    other, training = load_encoder(source, device)
    ours, theirs = encoder.spec, other.spec
    if (theirs.backbone, theirs.preprocess) != (ours.backbone, ours.preprocess):
        raise DataError(
            f"{theirs.name} has another backbone or transform than {ours.name}; compare networks "
            "that see the same pixels"
        )
    return subject(other, "baseline", training, ours.invariant_dim)


def _chosen(text: str, allowed: Sequence[str], option: str) -> list[Any]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise DataError(f"{option} {text!r}: use a list of {', '.join(allowed)}")
    return names


def main(
    source: Annotated[
        str, typer.Argument(help="Folder of a run, a released name, or local-dir:PATH.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of results.json and report.html; a run's own."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Run or name of the baseline, cut at the same index.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data set (default: what the model was trained on).")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(TASK_GROUPS)}.")
    ] = ",".join(TASK_GROUPS),
    networks: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(ROLES)}.")
    ] = ",".join(ROLES),
    reference_epochs: Annotated[
        int, typer.Option(min=1, help="Epochs of linear_reference; published: 100.")
    ] = 100,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = 0,
) -> None:
    """Evaluate a model by part, beside its DINO baseline, the untrained network and raw pixels.

    k-NN, linear probes on clean and perturbed images, and what each half tells of rotation, crop,
    flip and colour. An existing results.json is brought up to date: rows measured now replace
    theirs, rows of other weights under the same name are dropped.

    Example: python -m training.evaluate clever-resnet18.fmnist -o evaluation --tasks knn
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        usable_device(device)
        folder = output or Path(source)
        if output is None and not (folder / CHECKPOINT).is_file():
            raise DataError(f"{source} is no run, so say where the record goes: --output FOLDER")
        record = evaluate(
            source,
            baseline=baseline,
            data=data,
            dataset=dataset,
            tasks=_chosen(tasks, TASK_GROUPS, "--tasks"),
            roles=_chosen(networks, ROLES, "--networks"),
            reference_epochs=reference_epochs,
            device=device,
        )
        path = folder / RESULTS_FILENAME
        if path.exists():
            record = Record.read(path).updated(record)
        record.write(path)
        write_page(record, folder / REPORT)
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(f"wrote {path} ({len(record.results)} figures) and {folder / REPORT}")


if __name__ == "__main__":
    typer.run(main)
