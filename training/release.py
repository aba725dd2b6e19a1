"""Turn an evaluated run into model_cards/NAME, if it passes the release gate.

    python -m training.release runs/clever-resnet18.fmnist

Paste the printed literal into clever_zoo/registry.py, then run `make tables`.
"""

import json
import math
import re
from pathlib import Path
from typing import Annotated

import typer

from clever_zoo.cards import DATASETS, render_card, shortfalls
from clever_zoo.cli import fail
from clever_zoo.embedding import Part
from clever_zoo.encoder import Encoder
from clever_zoo.errors import CleverZooError, DataError
from clever_zoo.files import write_atomic
from clever_zoo.golden import GOLDEN_FILENAME, golden_values
from clever_zoo.records import RESULTS_FILENAME, ROLES, Record, Role
from clever_zoo.samples import sample_paths
from clever_zoo.spec import ModelSpec, Provenance
from training.checkpoint import CHECKPOINT, recipe_difference, recorded_recipe
from training.config import load_recipe
from training.evaluate.inputs import load_encoder
from training.runs import load_run

MODEL_CARDS = Path(__file__).parent.parent / "model_cards"
NEIGHBORS = 20.0  # the k of the gate's k-NN
ABOVE_UNTRAINED = 15.0
ABOVE_PIXELS = 25.0
STORED_COSINE = 0.9999  # of each half with the trained one, at least


def gate_problems(record: Record) -> list[str]:
    """What keeps a run from being released, one line each.

    Its invariant half must be far enough above both controls under CJ+R; it must come from a known
    commit, and have a baseline of the same seed and recipe that saw at least as many images, so
    that no comparison flatters it. `shortfalls` are what must be accepted by hand.
    """
    networks = {role: record.network(role) for role in ROLES if role != "paper"}
    if absent := [role for role, network in networks.items() if network is None]:
        return [f"the record has no {', no '.join(absent)}; evaluate with all networks"]
    training = networks["model"].training
    rotated = _knn(record, "model", "invariant", "cj_r")
    floors = {
        f"{ABOVE_UNTRAINED} above the untrained network": (
            _knn(record, "untrained", "invariant", "cj_r") + ABOVE_UNTRAINED
        ),
        f"{ABOVE_PIXELS} above raw pixels": _knn(record, "pixels", "full", "cj_r") + ABOVE_PIXELS,
    }
    problems = [
        f"rotated k-NN {rotated:.2f} is not {text}: {floor:.2f}"
        for text, floor in floors.items()
        if not rotated >= floor
    ]
    if math.isnan(_knn(record, "model", "invariant", "ori")):
        problems.append("clean k-NN was not measured")
    baseline = networks["baseline"].training
    for key in ("seed", "epochs"):
        if baseline.get(key) != training[key]:
            problems.append(f"baseline {key} is {baseline.get(key)}, not {training[key]}")
    if baseline.get("images_seen", 0) < training["images_seen"]:
        problems.append(
            f"the baseline saw {baseline.get('images_seen', 0):,} images, fewer than the model's "
            f"{training['images_seen']:,}"
        )
    if baseline.get("shared_settings") != training.get("shared_settings"):
        problems.append("the baseline's recipe has other settings, and not of clever and run alone")
    for part in (training, *training.get("continued_under", [])):
        if not re.fullmatch("[0-9a-f]{40}", part["commit"]):
            problems.append(f"it was trained from {part['commit']!r}, not from a commit")
    return problems


def _knn(record: Record, role: Role, part: Part, perturbation: str) -> float:
    """Top-1 of k-NN with k = 20; NaN, which passes no gate, where it was not measured."""
    network = record.network(role)
    row = network and record.find(
        network.name, "knn", "top1", part, perturbation=perturbation, at=NEIGHBORS
    )
    return row.mean if row else float("nan")


def release(
    run: Path, record: Record, folder: Path, *, accept_shortfalls: bool = False
) -> ModelSpec:
    """Write the model folder; returns the spec for the registry.

    Args:
        run: Folder of the run.
        record: Its results, with all networks.
        folder: Where the model goes.
        accept_shortfalls: Release it although there are `shortfalls`, which its card then states.

    Raises:
        CheckpointError: If the run cannot be read.
        RecipeError: If its recipe is none of the bundled ones.
        DataError: If it does not pass the gate, the record is not of it, its recipe is not the
            bundled one of its name to the last value, or shortfalls are not accepted.
    """
    encoder, training = load_encoder(run)
    weights = encoder.spec.weights
    problems = [
        *gate_problems(record),
        *_recipe_problems(run, record),
        *_storage_problems(run, encoder),
    ]
    measured = record.network("model")
    if measured is None or weights is None or measured.sha256 != weights.sha256:
        problems.append("the record is of other weights than the run's; evaluate it again")
    if record.dataset not in DATASETS:
        problems.append(f"cards.py has no words for the data set {record.dataset!r}")
    if not accept_shortfalls:
        problems += [
            f"{sentence} (--accept-shortfalls has its card say so)"
            for sentence in shortfalls(record)
        ]
    if problems:
        raise DataError(f"{encoder.spec.name} is not released: {'; '.join(problems)}")
    encoder.spec = encoder.spec.model_copy(
        update={
            "provenance": Provenance(
                recipe=training["recipe"], commit=training["commit"], dataset=record.dataset
            )
        }
    )
    saved = encoder.save_pretrained(folder, dtype="float16")
    golden = golden_values(Encoder.load(saved, folder / saved.weights.filename).eval())
    write_atomic(folder / GOLDEN_FILENAME, (json.dumps(golden, indent=2) + "\n").encode())
    record.write(folder / RESULTS_FILENAME)
    write_atomic(folder / "README.md", render_card(saved, record).encode())
    return saved


def _storage_problems(run: Path, stored: Encoder) -> list[str]:
    """Halves that the stored weights make otherwise than the trained ones, on bundled pictures."""
    _, backbone, _ = load_run(run)
    trained = Encoder(stored.spec, backbone).eval()
    ours, theirs = (encoder.embed(sample_paths()).normalized() for encoder in (stored, trained))
    least = {half: (ours[i] * theirs[i]).sum(1).min() for i, half in enumerate(ours._fields)}
    return [
        f"the {half} half of the stored weights has a cosine of {cosine:.6f} with the trained "
        f"one's on a bundled picture; at least {STORED_COSINE} is wanted"
        for half, cosine in least.items()
        if not cosine >= STORED_COSINE
    ]


def _recipe_problems(run: Path, record: Record) -> list[str]:
    """Values laid over the recipe, whose name alone would not make the run; a missing control."""
    recorded = recorded_recipe(run / CHECKPOINT)
    bundled = load_recipe(recorded["name"])
    changes = recipe_difference(recorded, bundled.model_dump(mode="json"))
    problems = [f"it was trained with other values than the bundled recipe: {c}" for c in changes]
    if bundled.clever and bundled.clever.transform_weight and record.network("paper") is None:
        problems.append("it goes beyond the paper; evaluate with --paper, the paper's terms alone")
    return problems


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    results: Annotated[
        Path | None, typer.Option(help="Record from training.evaluate (default: RUN/results.json).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Target (default: model_cards/NAME).")
    ] = None,
    accept_shortfalls: Annotated[
        bool,
        typer.Option(
            "--accept-shortfalls",
            help="Release it although it or its baseline was stopped before the end, or raw pixels "
            "do better on clean pictures; its card says which.",
        ),
    ] = False,
) -> None:
    """Write a model folder from a run, if it passes the release gate."""
    try:
        record = Record.read(results or run / RESULTS_FILENAME)
        folder = output or MODEL_CARDS / record.model
        spec = release(run, record, folder, accept_shortfalls=accept_shortfalls)
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(repr(spec))


if __name__ == "__main__":
    typer.run(main)
