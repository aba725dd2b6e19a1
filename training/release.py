"""Turn a finished, evaluated run into model_cards/NAME, if it passes the release gate.

    python -m training.release runs/clever-resnet18.fmnist

Paste the printed literal into clever_zoo/registry.py, then run `make tables`.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from clever_zoo.cards import DATASETS, render_card
from clever_zoo.cli import fail
from clever_zoo.encoder import Encoder
from clever_zoo.errors import CleverZooError, DataError
from clever_zoo.files import write_atomic
from clever_zoo.golden import GOLDEN_FILENAME, golden_values
from clever_zoo.spec import ModelSpec, Provenance
from training.pretrain import preprocess_spec
from training.runs import load_run

MODEL_CARDS = Path(__file__).parent.parent / "model_cards"
ABOVE_UNTRAINED = 15.0
ABOVE_PIXELS = 25.0


def gate_problems(record: dict[str, Any]) -> list[str]:
    """What keeps a run from being released, one line each.

    Its invariant half must be far enough above both controls under CJ+R, and on a GPU, where
    time is no excuse, above raw pixels on clean images too; run and baseline must be finished
    and equal in budget, from a known commit.
    """
    columns = record["columns"]
    ours, untrained, pixels = (columns[n]["knn"] for n in (record["model"], "untrained", "pixels"))
    training = columns[record["model"]]["training"]
    rotated = ours["cj_r"]["invariant"]["mean"]
    floors = {
        f"{ABOVE_UNTRAINED} above the untrained network": (
            untrained["cj_r"]["invariant"]["mean"] + ABOVE_UNTRAINED
        ),
        f"{ABOVE_PIXELS} above raw pixels": pixels["cj_r"]["full"]["mean"] + ABOVE_PIXELS,
    }
    problems = [
        f"rotated k-NN {rotated} is not {text}: {floor:.2f}"
        for text, floor in floors.items()
        if rotated < floor
    ]
    if training["device"] != "cpu" and ours["clean"]["invariant"] <= pixels["clean"]["full"]:
        problems.append(f"clean k-NN {ours['clean']['invariant']} is not above raw pixels")
    baseline = columns.get(record["model"].replace("clever-", "dino-"), {}).get("training", {})
    for key in ("seed", "epochs", "steps", "images_seen"):
        if baseline.get(key) != training[key]:
            problems.append(f"baseline {key} is {baseline.get(key)}, not {training[key]}")
    if not training["finished"]:
        problems.append(f"the run stopped after {training['steps']} steps")
    if not re.fullmatch("[0-9a-f]{40}", training["commit"]):
        problems.append(f"it was trained from {training['commit']!r}, not from a commit")
    return problems


def release(run: Path, record: dict[str, Any], folder: Path) -> ModelSpec:
    """Write the model folder; returns the spec for the registry.

    Raises:
        CheckpointError: If the run cannot be read.
        DataError: If it does not pass the gate or the record is not of it.
    """
    recipe, teacher, training = load_run(run)
    problems = gate_problems(record)
    if record["columns"][record["model"]]["training"] != training:
        problems.append("the record is of another state of the run; evaluate it again")
    if record["dataset"] not in DATASETS:
        problems.append(f"cards.py has no words for the data set {record['dataset']!r}")
    if problems:
        raise DataError(f"{recipe.name} is not released: {'; '.join(problems)}")
    spec = ModelSpec(
        name=recipe.name,
        backbone=recipe.backbone.name,
        invariant_dim=recipe.invariant_dim,
        preprocess=preprocess_spec(recipe),
        model_args=recipe.backbone.model_args,
        provenance=Provenance(
            recipe=recipe.name, commit=training["commit"], dataset=recipe.data.dataset
        ),
    )
    saved = Encoder(spec, teacher).save_pretrained(folder, dtype="float16")
    golden = golden_values(Encoder.load(saved, folder / saved.weights.filename).eval())
    files = {
        GOLDEN_FILENAME: json.dumps(golden, indent=2) + "\n",
        "results.json": json.dumps(record, indent=2) + "\n",
        "README.md": render_card(saved, record),
    }
    for name, content in files.items():
        write_atomic(folder / name, content.encode())
    return saved


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    results: Annotated[
        Path | None, typer.Option(help="Record from training.evaluate (default: RUN/results.json).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Target (default: model_cards/NAME).")
    ] = None,
) -> None:
    """Write a model folder from a finished run, if it passes the release gate."""
    try:
        results = results or run / "results.json"
        if not results.is_file():
            raise DataError(f"{results} does not exist; write it with python -m training.evaluate")
        record = json.loads(results.read_text(encoding="utf-8"))
        spec = release(run, record, output or MODEL_CARDS / record["model"])
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(repr(spec))


if __name__ == "__main__":
    typer.run(main)
