"""Evaluate one model beside its controls; ends in results.json and a page of plots, report.html.

python -m training.evaluate runs/clever-resnet18.fmnist --baseline runs/dino-resnet18.fmnist
python -m training.evaluate clever-resnet18.fmnist -o evaluation --tasks knn,linear_cached
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from clever_zoo.cli import fail
from clever_zoo.encoder import Encoder, usable_device
from clever_zoo.errors import CleverZooError, DataError
from clever_zoo.records import RESULTS_FILENAME, ROLES, Record, Role
from clever_zoo.spec import PreprocessSpec
from training.checkpoint import CHECKPOINT, recorded_recipe
from training.config import (
    BackboneConfig,
    DataConfig,
    Recipe,
    load_recipe,
    merged,
    parse_override,
    parse_recipe,
    parse_section,
)
from training.data import check_classes, list_images, load_split
from training.evaluate.inputs import (
    EvaluationImages,
    Subject,
    forbid_tf32,
    load_encoder,
    raw_pixels,
    subject,
    untrained,
)
from training.evaluate.perturb import PERTURBATIONS
from training.evaluate.report import REPORT, write_page
from training.evaluate.suite import Task, evaluate_subject, task_texts
from training.provenance import measuring_environment

TASK_GROUPS: tuple[Task, ...] = get_args(Task)
CROPPING = {"linear_reference", "finetune"}  # tasks that make new crops of the training images


def evaluate(
    source: str,
    *,
    baseline: str | None = None,
    paper: str | None = None,
    data: Path | None = None,
    dataset: str | None = None,
    data_name: str | None = None,
    overrides: Sequence[str] = (),
    tasks: Collection[Task] = TASK_GROUPS,
    roles: Collection[Role] = ROLES,
    reference_epochs: int = 100,
    device: str = "cpu",
) -> Iterator[Record]:
    """Measure a model and its controls; yields a record after each network.

    Args:
        source: A run's folder or a source of `clever_zoo.from_pretrained`.
        baseline: The same of a network whose features are cut at the model's index.
        paper: The same of a network trained with the paper's terms alone, for a model with more.
        data: Folder of the data set.
        dataset: Name of the data set; None for the one the model was trained on.
        data_name: What the record calls the data, such as "imagenet-100"; None for `dataset`, which
            for a folder is the name of the way it is read.
        overrides: Values of the data section, such as "hf_name=org/name".
        tasks: What to measure.
        roles: Which networks to measure.
        reference_epochs: Epochs of the task "linear_reference".
        device: Where the features are computed.

    Raises:
        CheckpointError, UnknownModelError: If a source cannot be read.
        DataError, RecipeError: If the data, their description or the baseline does not fit.
        NonFiniteError: If a feature is not finite.
    """
    where = measuring_environment(device)
    encoder, training = load_encoder(source, device)
    recipe = _recipe(source, encoder)
    config = _data_config(source, recipe, encoder.spec.preprocess, dataset, overrides)
    seed = recipe.seed if recipe else 0
    cut = encoder.spec.invariant_dim
    rivals: dict[Role, str | None] = {"paper": paper, "baseline": baseline}
    others = [_rival(role, rival, encoder, device) for role, rival in rivals.items() if rival]
    stored = [list_images(config, data, split) for split in ("train", "test")]
    check_classes(*stored)
    train, test = (
        EvaluationImages(images, encoder.spec.preprocess, split)
        for images, split in zip(stored, ("train", "test"), strict=True)
    )
    digests = {name: x.digest() for name, x in zip(("train", "test"), stored, strict=True)}
    crops = load_split(config, data, "train") if CROPPING & set(tasks) else None
    spec = encoder.spec
    start = (
        recipe.backbone
        if recipe
        else BackboneConfig(name=spec.backbone, model_args=spec.model_args)
    )
    fresh = untrained(spec, start, seed).to(usable_device(device))
    subjects = [
        subject(encoder, "model", training, cut),
        *others,
        subject(fresh, "untrained", {"seed": seed}, cut),
        raw_pixels(train),
    ]
    _check_names([s.network.name for s in subjects])
    chosen = [s for s in subjects if s.network.role in roles]
    texts = task_texts(reference_epochs, seed, shuffled=train.shuffled or test.shuffled)
    for number, s in enumerate(chosen, 1):
        results = evaluate_subject(
            s,
            train,
            test,
            tasks,
            crops=crops,
            reference_epochs=reference_epochs,
            seed=seed,
            label=f"{number}/{len(chosen)} {s.network.name}",
        )
        used = [row.protocol for row in results]
        yield Record(
            model=encoder.spec.name,
            dataset=data_name or config.dataset,
            invariant_dim=cut,
            images={"train": len(train), "test": len(test)},
            digests=digests,
            tasks={p.task: texts[p.task] for p in used},
            perturbations={p.perturbation: PERTURBATIONS[p.perturbation].text for p in used},
            networks=(s.network,),
            environments=(where,),
            results=tuple(results),
        )


def _check_names(names: Sequence[str]) -> None:
    """Refuse two networks of one name, which a record could not tell apart.

    Raises:
        DataError: Naming it.
    """
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"two of the networks are called {name!r}; save one under another name "
                "(spec.name), or train it from a recipe of another name"
            )


def _recipe(source: str, encoder: Encoder) -> Recipe | None:
    """The recipe of a run or of a released model."""
    path = Path(source) / CHECKPOINT
    if path.is_file():
        return parse_recipe(recorded_recipe(path), str(path))
    provenance = encoder.spec.provenance
    return load_recipe(provenance.recipe) if provenance else None


def _data_config(
    source: str,
    recipe: Recipe | None,
    spec: PreprocessSpec,
    dataset: str | None,
    overrides: Sequence[str],
) -> DataConfig:
    if dataset is None and recipe is None:
        raise DataError(
            f"{source} does not say what it was trained on; pass --dataset, such as "
            "--dataset image-folder --data DIR"
        )
    content: dict[str, Any] = (
        {"dataset": dataset, "image_size_px": max(spec.resize_px, 8)}
        if dataset is not None
        else recipe.data.model_dump()
    )
    for override in overrides:
        content = merged(content, parse_override(override))
    return parse_section(DataConfig, content, "data")


def _rival(role: Role, source: str, encoder: Encoder, device: str) -> Subject:
    other, training = load_encoder(source, device)
    ours, theirs = encoder.spec, other.spec
    if (theirs.backbone, theirs.preprocess) != (ours.backbone, ours.preprocess):
        raise DataError(
            f"{theirs.name} has another backbone or transform than {ours.name}; compare networks "
            "that see the same pixels"
        )
    return subject(other, role, training, ours.invariant_dim)


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
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Values of the recipe's data section: hf_name, shards, image_size_px, cache ...",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of results.json and report.html; a run's own."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Run or name of the baseline, cut at the same index.")
    ] = None,
    paper: Annotated[
        str | None,
        typer.Option(
            help="For a model that goes beyond the paper: run or name of the one with the paper's "
            "terms alone."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data set (default: what the model was trained on).")
    ] = None,
    data_name: Annotated[
        str | None,
        typer.Option(help="What the record calls the data, such as imagenet-100 for a folder."),
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

    k-NN, linear probes on clean and perturbed images, what each half tells of rotation, crop, flip
    and colour, and fine-tuning. An existing results.json is brought up to date network by network:
    rows measured now replace theirs, and rows of other weights under the same name, or of a task
    that is defined otherwise now, are dropped.

    Example: python -m training.evaluate clever-resnet18.fmnist -o evaluation --tasks knn
    """
    if threads:
        torch.set_num_threads(threads)
    forbid_tf32()
    try:
        usable_device(device)
        folder = output or Path(source)
        if output is None and not (folder / CHECKPOINT).is_file():
            raise DataError(f"{source} is no run, so say where the record goes: --output FOLDER")
        path = folder / RESULTS_FILENAME
        record = Record.read(path) if path.exists() else None
        for measured in evaluate(
            source,
            baseline=baseline,
            paper=paper,
            data=data,
            dataset=dataset,
            data_name=data_name,
            overrides=overrides or (),
            tasks=_chosen(tasks, TASK_GROUPS, "--tasks"),
            roles=_chosen(networks, ROLES, "--networks"),
            reference_epochs=reference_epochs,
            device=device,
        ):
            record = measured if record is None else record.updated(measured)
            record.write(path)
        if record is None:
            raise DataError("there is nothing to measure: a baseline needs --baseline")
        write_page(record, folder / REPORT)
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(f"wrote {path} ({len(record.results)} figures) and {folder / REPORT}")


if __name__ == "__main__":
    typer.run(main)
