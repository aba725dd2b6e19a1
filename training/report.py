"""Draw one or several runs as one HTML page: what was trained, how it went, what came out.

python -m training.report runs/clever-resnet18.fmnist runs/dino-resnet18.fmnist -o report.html
"""

import datetime
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from clever_zoo.cards import METRICS, Column, columns_of, table_rows
from clever_zoo.cli import fail
from clever_zoo.errors import CheckpointError, CleverZooError, DataError
from clever_zoo.figures import GREY, STYLE, figure_tag, html_page, html_table
from clever_zoo.files import write_atomic
from clever_zoo.records import RESULTS_FILENAME, Record
from training.checkpoint import CHECKPOINT, flatten
from training.provenance import ENVIRONMENT
from training.runlog import LOG, read_log

Values = NDArray[np.float64]

# A half counts as collapsed where a diagnostic is below its limit. The equivariant half may use
# few prototypes: nothing in the objective spreads its assignments over the whole data set.
LIMITS = {
    "invariant": {"std": 0.05, "rank": 2.0, "usage": 0.1},
    "equivariant": {"std": 0.05, "rank": 2.0},
}
DIAGNOSTICS = {
    "std": "feature std",
    "rank": "effective rank",
    "usage": "prototype usage entropy",
    "assignment": "assignment entropy",
}
SCHEDULES = {"lr": "learning rate", "weight_decay": "weight decay", "momentum": "momentum"}
SPEED = {
    "images_per_s": "images/s",
    "data_share": "time waiting for data (%)",
    "replaced_images": "replaced images",
}
NO_TERMS = {"step", "epoch", "loss", "grad_norm", "step_s", "data_s", "seconds"} | {
    *SCHEDULES,
    *SPEED,
    *(f"{half}_{kind}" for half in LIMITS for kind in DIAGNOSTICS),
}

SMOOTHING = 50  # windows that fit into a curve


@dataclass(frozen=True)
class Run:
    """What the report shows of a run's folder.

    Attributes:
        label: Heading of its column, unique in the report.
        recipe: As written into the checkpoint, with dotted keys.
        facts: Name to text.
        log: Name to the value at each logged step, NaN where there is none.
        broken: Name to the steps at which the logged value was not finite.
        results: The record in results.json, None without the file.
    """

    label: str
    recipe: dict[str, Any]
    facts: dict[str, str]
    log: dict[str, Values]
    broken: dict[str, list[int]]
    results: Record | None

    def curve(self, name: str) -> tuple[Values, Values]:
        """Steps and values of one number, where it was recorded and finite."""
        values = self.log.get(name, np.empty(0))
        recorded = np.isfinite(values)
        return self.log["step"][: len(values)][recorded], values[recorded]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders that `training.pretrain` wrote.

    Raises:
        CheckpointError: If a folder is no run, or a checkpoint or environment is not readable.
        DataError: If a log is empty or damaged, or a results record is not readable.
    """
    problems = [
        f"\n  - {folder} has no {', '.join(missing)}"
        for folder in folders
        if (missing := [f for f in (CHECKPOINT, ENVIRONMENT, LOG) if not (folder / f).is_file()])
    ]
    if problems:
        raise CheckpointError(
            f"not the folder of a run:{''.join(problems)}\nPass folders that training.pretrain "
            "wrote (--out); a run has all three files after its first checkpoint."
        )
    names = [folder.resolve().name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return [_read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _read_run(folder: Path, label: str) -> Run:
    try:
        # The header alone: the tensors' digest is of no interest here, and reading them is slow.
        with safe_open(folder / CHECKPOINT, framework="numpy") as file:
            header = file.metadata() or {}
        recipe, progress = (json.loads(header[key]) for key in ("recipe", "progress"))
        environments = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        facts = _facts(recipe, progress, environments)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: {CHECKPOINT} or {ENVIRONMENT} cannot be read ({error!r}); continue the "
            "run to have them written again"
        ) from error
    log, broken = _columns(folder / LOG)
    return Run(label, flatten(recipe), facts, log, broken, _read_results(folder / RESULTS_FILENAME))


def _facts(
    recipe: dict[str, Any], progress: dict[str, Any], environments: list[dict[str, Any]]
) -> dict[str, str]:
    step, steps, seconds = (progress[key] for key in ("step", "steps", "seconds"))
    images = step * recipe["batch_size"]
    epochs = recipe["epochs"] + recipe.get("optimizer", {}).get("extra_warmup_epochs", 0)
    facts = {
        "recipe": recipe["name"],
        "seed": str(recipe["seed"]),
        "steps": f"{step:,} of {steps:,}" + ("" if step == steps else " (unfinished)"),
        "epochs": f"{epochs * step / steps:.3g} of {epochs}",
        "images seen": f"{images:,}",
        "wall time": str(datetime.timedelta(seconds=round(seconds))),
        "images/s": f"{images / max(seconds, 1e-9):,.1f}",
        "processes": str(progress.get("world_size", 1)),
    }
    for key in dict.fromkeys(key for seen in environments for key in seen):
        values = dict.fromkeys(str(seen[key]) for seen in environments if key in seen)
        facts[key] = ", then ".join(values)
    return facts


def _columns(path: Path) -> tuple[dict[str, Values], dict[str, list[int]]]:
    lines = read_log(path)
    if not lines:
        raise DataError(f"{path} holds no step; continue the run, then draw its report")
    names = dict.fromkeys(name for line in lines for name in line)
    try:
        log = {name: np.array([x.get(name) for x in lines], dtype=np.float64) for name in names}
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} holds a value that is no number ({error})") from error
    broken = {
        name: steps
        for name, values in log.items()
        if (steps := [lines[i]["step"] for i in np.flatnonzero(~np.isfinite(values))
                      if name in lines[i]])
    }  # fmt: skip
    if {"data_s", "step_s"} <= log.keys():
        log["data_share"] = 100 * log["data_s"] / log["step_s"]
    return log, broken


def _read_results(path: Path) -> Record | None:
    return Record.read(path) if path.exists() else None


class Verdict(NamedTuple):
    """What the diagnostics of one half say."""

    state: Literal["alive", "collapsed", "unknown"]
    text: str


def verdict(run: Run, half: str) -> Verdict:
    """Compare the diagnostics of a half with `LIMITS`, over the whole run."""
    lowest, crossed = [], []
    for kind, limit in LIMITS[half].items():
        steps, values = run.curve(f"{half}_{kind}")
        if not len(values):
            continue
        lowest.append(f"{kind} {values.min():.3g}")
        below = np.flatnonzero(values < limit)
        if len(below):
            crossed.append(
                f"{kind} was below {limit:g}, first at step {steps[below[0]]:,.0f} (lowest "
                f"{values.min():.3g} at step {steps[values.argmin()]:,.0f}, last {values[-1]:.3g})"
            )
    if crossed:
        return Verdict("collapsed", "; ".join(crossed))
    if lowest:
        return Verdict("alive", f"no collapse seen (lowest: {', '.join(lowest)})")
    return Verdict("unknown", "no diagnostics were recorded")


def smooth(values: Values) -> Values:
    """Centred moving mean; the window is cut off at both ends."""
    half = len(values) // SMOOTHING // 2
    # Sums of differences, so that a constant stays exactly constant.
    sums = np.concatenate([[0.0], np.cumsum(values - values[0])])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return values[0] + (sums[high] - sums[low]) / (high - low)


class _Panel(NamedTuple):
    name: str
    title: str
    limit: float | None = None
    noisy: bool = True


def _recorded(runs: Iterable[Run], panels: Iterable[_Panel]) -> list[_Panel]:
    return [p for p in panels if any(len(run.curve(p.name)[0]) for run in runs)]


def _line_style(run: int) -> str:
    """Dashes too tell the runs apart, so that a curve under an equal one is seen."""
    return ("-", "--", "-.")[run % 3]


def _draw_panel(axes: Axes, runs: Sequence[Run], panel: _Panel) -> None:
    axes.set_title(panel.title)
    low, high = math.inf, -math.inf
    for i, run in enumerate(runs):
        steps, values = run.curve(panel.name)
        if len(values):
            low, high = min(low, values.min()), max(high, values.max())
            bold = smooth(values) if panel.noisy else values
            if panel.noisy:
                axes.plot(steps, values, color=f"C{i}", linewidth=0.4, alpha=0.35)
            marker = "." if len(values) < SMOOTHING else None
            axes.plot(steps, bold, color=f"C{i}", linestyle=_line_style(i), marker=marker)
    if panel.limit is not None:
        axes.axhline(panel.limit, color=GREY, linestyle=":")
        low, high = min(low, panel.limit), max(high, panel.limit)
    if low > 0 and high > 1000 * low:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)


def draw_curves(runs: Sequence[Run], panels: Sequence[_Panel], columns: int = 3) -> Figure:
    """Small multiples over the steps, a colour for each run; dotted: the limit of collapse."""
    rows = math.ceil(len(panels) / columns)
    legend = len(runs) > 1
    figure = Figure(figsize=(11, 2.5 * rows + 0.4 * legend), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, runs, panel)
        axes.tick_params(labelbottom=True)
    figure.supxlabel("step", fontsize="medium")
    if legend:
        handles = [
            Line2D([], [], color=f"C{i}", linestyle=_line_style(i)) for i in range(len(runs))
        ]
        labels = [run.label for run in runs]
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return figure


def _facts_table(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.facts)
    rows = [[name, *(run.facts.get(name, "") for run in runs)] for name in names]
    return html_table(["", *(run.label for run in runs)], rows)


def _differences_table(runs: Sequence[Run]) -> str:
    absent = object()
    rows = []
    for key in sorted({key for run in runs for key in run.recipe}):
        values = [run.recipe.get(key, absent) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([key, *("" if v is absent else json.dumps(v) for v in values)])
    if not rows:
        return "<p>The recipes are the same.</p>"
    return html_table(["setting", *(run.label for run in runs)], rows)


def _scores(column: Column) -> dict[tuple[Any, ...], float]:
    """Everything measured on a network, under keys without its name."""
    rows = (row for row in column.record.results if row.network == column.network)
    return {row.key[1:]: row.mean for row in rows}


def _results_table(runs: Sequence[Run]) -> str:
    """Every column of every record once; a control that differs between records names its run."""
    records = {run.label: run.results for run in runs if run.results}
    columns = [
        column._replace(heading=label)
        for label, record in records.items()
        for column in columns_of(record)
        if column.role == "model"
    ]
    for label, record in records.items():
        for column in columns_of(record):
            if not any(_scores(column) == _scores(seen) for seen in columns):
                taken = any(column.heading == seen.heading for seen in columns)
                heading = f"{column.heading} of {label}" if taken else column.heading
                columns.append(column._replace(heading=heading))
    columns.sort(key=lambda column: column.role in ("untrained", "pixels"))
    head, *rows = table_rows(columns, METRICS)
    return html_table(head, rows)


def _verdicts(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        for half in LIMITS:
            state, text = verdict(run, half)
            where = html.escape(f"{run.label}, {half} half: ")
            lines.append(f'<li class="{state}">{where}<b>{html.escape(text)}</b></li>')
        for name, steps in run.broken.items():
            text = f"{run.label}: {name} was not finite at {len(steps):,} step(s)"
            text += f", first at {steps[0]:,}"
            lines.append(f'<li class="collapsed">{html.escape(text)}</li>')
    return f"<ul>{''.join(lines)}</ul>"


def _sections(runs: Sequence[Run]) -> Iterable[tuple[str, str]]:
    """Heading and HTML of each part of the page that the runs have content for."""
    yield "Facts", _facts_table(runs)
    if len(runs) > 1:
        yield "Differences between the recipes", _differences_table(runs)
    if any(run.results for run in runs):
        yield "Results", _results_table(runs)
    terms = dict.fromkeys(name for run in runs for name in run.log if name not in NO_TERMS)
    named = {"loss": "loss (sum of the terms)", **{t: t.replace("_", " ") for t in terms}}
    figures = {
        "Loss": (named | {"grad_norm": "gradient norm"}, "Thin: every step; bold: moving mean."),
        "Schedules": (SCHEDULES, "Learning rate, weight decay, momentum of the teacher."),
        "Speed": (SPEED, "Thin: every step; bold: moving mean."),
    }
    for heading, (titles, caption) in figures.items():
        noisy = titles is not SCHEDULES
        if panels := _recorded(runs, (_Panel(*item, noisy=noisy) for item in titles.items())):
            yield heading, figure_tag(draw_curves(runs, panels), caption, transparent=True)
    for half, limits in LIMITS.items():
        panels = [
            _Panel(f"{half}_{kind}", title, limits.get(kind)) for kind, title in DIAGNOSTICS.items()
        ]
        if panels := _recorded(runs, panels):
            figure = draw_curves(runs, panels, columns=len(DIAGNOSTICS))
            caption = "Dotted: collapsed below. Both entropies are shares of their maximum."
            yield f"Diagnostics: {half} half", figure_tag(figure, caption, transparent=True)


def write_report(runs: list[Path], out: Path) -> None:
    """Write one self-contained HTML page about one or several runs side by side.

    Shows the facts of each run, in what the recipes differ, the curves of every loss term,
    schedule and speed, the diagnostics of both halves with a verdict on collapse (see `LIMITS`),
    and the results of `training.evaluate` where a run has a results.json.

    Args:
        runs: Folders that `training.pretrain` wrote, finished or not.
        out: The page; replaced in one step.

    Raises:
        CheckpointError: If a folder is no run, or a checkpoint or environment is not readable.
        DataError: If a log is empty or damaged, or a results record is not readable.
    """
    loaded = read_runs(runs)
    with mpl.rc_context(STYLE | {"agg.path.chunksize": 20_000}):
        sections = list(_sections(loaded))
    title = f"Training of {' and '.join(run.label for run in loaded)}"
    page = html_page(title, sections, lead=_verdicts(loaded))
    write_atomic(out, page.encode())


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page (default for one run: RUN/report.html)."),
    ] = None,
) -> None:
    """Draw runs side by side as one HTML page: facts, curves, diagnostics, results.

    Each half of the embedding gets a verdict. It counts as collapsed where its
    feature std is below 0.05, its effective rank below 2 or, in the invariant
    half, its prototype usage below 0.1. A run that is still training can be
    drawn too, from its first checkpoint on.

    Example: python -m training.report runs/clever runs/dino -o comparison.html
    """
    if output is None and len(runs) > 1:
        raise typer.BadParameter("several runs need --output, such as -o report.html")
    page = output or runs[0] / "report.html"
    try:
        write_report(runs, page)
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(f"wrote {page}")


if __name__ == "__main__":
    typer.run(main)
