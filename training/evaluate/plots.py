"""Figures of results records: dots with deviations, and curves, one panel for each part.

They are drawn from plain `Panel`s. An SVG carries a stamp of the numbers in it, so that a test can
tell a stale figure whatever the version of matplotlib.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clever_zoo.cards import READINGS, Metric, columns_of, every_metric
from clever_zoo.embedding import Part
from clever_zoo.figures import GREY, STYLE
from clever_zoo.records import PARTS, Record, Role

VERSION = 1  # of the drawing; another one makes every stamp stale

Groups = Mapping[str, Sequence[Metric]]

_MARKS: Mapping[Role, tuple[str, str, str]] = {  # colour, marker, line
    "model": ("#d1495b", "o", "-"),
    "paper": ("#3f8f4f", "D", "-"),
    "baseline": ("#2a7fba", "s", "--"),
    "untrained": ("#9a8a1f", "^", "-."),
    "pixels": (GREY, "x", ":"),
}


class Point(NamedTuple):
    """A number in a figure: the label of its row, or its place on a curve."""

    label: str
    at: float | None
    mean: float
    std: float


class Series(NamedTuple):
    """The points of one network."""

    name: str
    role: Role
    points: tuple[Point, ...]


class Panel(NamedTuple):
    """What one pair of axes shows: a quantity, read from one part."""

    quantity: str
    part: Part
    series: tuple[Series, ...]


def panels_of(record: Record, groups: Groups, *, parts: Sequence[Part] = PARTS) -> list[Panel]:
    """A row of panels for each group of metrics; groups that were not measured are left out."""
    panels = []
    for quantity, metrics in groups.items():
        row = [Panel(quantity, part, _series(record, metrics, part)) for part in parts]
        if any(panel.series for panel in row):
            panels += row
    return panels


def _series(record: Record, metrics: Sequence[Metric], part: Part) -> tuple[Series, ...]:
    series = []
    for column in columns_of(record):
        points = tuple(
            Point(metric.label, metric.at, found.mean, found.std)
            for metric in metrics
            if (found := column.find(metric, part))
        )
        if points:
            series.append(Series(column.network, column.role, points))
    return tuple(series)


def _picked(record: Record, task: str, name: str, **fixed: object) -> list[Metric]:
    """Metrics of a task, labelled by what was done to the images."""
    picked = []
    for metric in every_metric(record):
        if (metric.task, metric.metric) == (
            task,
            name,
        ) and fixed.items() <= metric._asdict().items():
            short = record.perturbations[metric.perturbation].split(":")[0]
            with_bilinear = task == "linear_cached" and metric.interpolation == "bilinear"
            picked.append(metric._replace(label=short + ", bilinear" * with_bilinear))
    return picked


def accuracy_groups(record: Record) -> Groups:
    """Top-1 by perturbation, of k-NN and of every linear probe."""
    groups = {"k-NN, k = 20, top-1 (%)": _picked(record, "knn", "top1", at=20.0)}
    for features in dict.fromkeys(row.protocol.features for row in record.results):
        of = "" if features == "last1" else f" on {features}"
        for task, name in (
            ("linear_cached", "linear probe"),
            ("linear_reference", "published probe"),
        ):
            groups[f"{name}{of}, top-1 (%)"] = _picked(record, task, "top1_last", features=features)
    return groups


def neighbor_groups(record: Record) -> Groups:
    """Top-1 of k-NN over k, for each perturbation."""
    groups: dict[str, list[Metric]] = {}
    for metric in _picked(record, "knn", "top1"):
        groups.setdefault(f"{metric.label}: top-1 (%)", []).append(metric)
    return groups


def drift_groups(record: Record) -> Groups:
    """Drift over the angle of rotation."""
    return {"drift": sorted(_picked(record, "drift", "ratio"), key=lambda m: m.at or 0.0)}


def reading_groups() -> Groups:
    """How an image was seen, as read from a part."""
    return {
        "R²": [m for m in READINGS if m.metric.startswith("r2")],
        "top-1 (%)": [m for m in READINGS if m.metric == "top1"],
    }


def figure_panels(record: Record, name: str) -> list[Panel]:
    """The panels of a figure beside the card; empty if the record has no numbers for it.

    Args:
        record: Of the model.
        name: A key of `clever_zoo.cards.FIGURES`.
    """
    if name == "drift":
        return panels_of(record, drift_groups(record))
    for task, metric, quantity in (
        ("linear_cached", "top1_last", "linear probe, top-1 (%)"),
        ("knn", "top1", "k-NN, k = 20, top-1 (%)"),
    ):
        at = 20.0 if task == "knn" else None
        metrics = _picked(record, task, metric, at=at, interpolation="bicubic", features="last1")
        if panels := panels_of(record, {quantity: metrics}):
            return panels
    return []


def draw(name: str, panels: Sequence[Panel]) -> Figure:
    """A figure beside the card."""
    return draw_curves(panels, "angle of rotation (°)") if name == "drift" else draw_dots(panels)


def draw_dots(panels: Sequence[Panel]) -> Figure:
    """Numbers as dots on labelled rows; bars are standard deviations over the seeds."""
    rows = _rows(panels)
    labels = [
        list(dict.fromkeys(p.label for panel in row for s in panel.series for p in s.points))
        for row in rows
    ]
    heights = [len(names) + 1.5 for names in labels]
    figure, grid = _grid(rows, heights, 0.27)
    for axes_row, row, names in zip(grid, rows, labels, strict=True):
        for axes, panel in zip(axes_row, row, strict=True):
            for i, series in enumerate(panel.series):
                shift = (i - (len(panel.series) - 1) / 2) * 0.16
                y = [names.index(point.label) + shift for point in series.points]
                x, spread = ([getattr(p, key) for p in series.points] for key in ("mean", "std"))
                color, marker, _ = _MARKS[series.role]
                bars = spread if any(spread) else None
                axes.errorbar(x, y, xerr=bars, fmt=marker, color=color, markersize=4)
            axes.set_yticks(range(len(names)), names if panel is row[0] else [])
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.grid(axis="x", linewidth=0.5, alpha=0.3)
            axes.set_xlabel(panel.quantity)
        _share_limits(axes_row, "x")
    return figure


def draw_curves(panels: Sequence[Panel], label: str, *, logarithmic: bool = False) -> Figure:
    """Numbers over `at`, whose axis has this label; bars as in `draw_dots`."""
    rows = _rows(panels)
    figure, grid = _grid(rows, [1.0] * len(rows), 2.3)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes, panel in zip(axes_row, row, strict=True):
            for series in panel.series:
                x, y, spread = zip(*(point[1:] for point in series.points), strict=True)
                color, marker, line = _MARKS[series.role]
                bars = spread if any(spread) else None
                style = {"color": color, "marker": marker, "linestyle": line, "markersize": 3.5}
                axes.errorbar(x, y, yerr=bars, **style)
            if logarithmic:
                ticks = sorted({p.at for s in panel.series for p in s.points if p.at})
                axes.set_xscale("log")
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.minorticks_off()
            axes.grid(axis="y", linewidth=0.5, alpha=0.3)
            axes.set_xlabel(label)
        axes_row[0].set_ylabel(row[0].quantity)
        _share_limits(axes_row, "y")
    return figure


def _rows(panels: Sequence[Panel]) -> list[list[Panel]]:
    rows: dict[str, list[Panel]] = {}
    for panel in panels:
        rows.setdefault(panel.quantity, []).append(panel)
    return list(rows.values())


def _grid(
    rows: Sequence[Sequence[Panel]], heights: Sequence[float], unit_in: float
) -> tuple[Figure, Sequence[Sequence[Axes]]]:
    """Empty panels, a column for each part, under a legend of all networks."""
    size = (9.5, sum(heights) * unit_in + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    ratios = {"height_ratios": heights}
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, gridspec_kw=ratios)
    for axes, panel in zip(grid[0], rows[0], strict=True):
        axes.set_title(panel.part)
    for axes in grid.flat:
        axes.tick_params(length=0)
    for axes, panel in zip(grid.flat, (panel for row in rows for panel in row), strict=True):
        axes.set_visible(bool(panel.series))
    networks = {s.name: s.role for row in rows for panel in row for s in panel.series}
    handles = [
        Line2D([], [], color=_MARKS[role][0], marker=_MARKS[role][1], linestyle=_MARKS[role][2])
        for role in networks.values()
    ]
    figure.legend(handles, list(networks), loc="outside upper left", ncols=4, frameon=False)
    return figure, grid


def _share_limits(axes_row: Sequence[Axes], direction: str) -> None:
    shown = [axes for axes in axes_row if axes.get_visible()]
    lows, highs = zip(*(getattr(a, f"get_{direction}lim")() for a in shown), strict=True)
    for axes in shown:
        getattr(axes, f"set_{direction}lim")(min(lows), max(highs))


def stamp(panels: Sequence[Panel]) -> str:
    """Digest of the numbers and labels of a figure and of the version of the drawing."""
    return hashlib.sha256(json.dumps([VERSION, panels]).encode()).hexdigest()


def stamp_of(svg: str) -> str | None:
    """The stamp that an SVG carries, None if it has none."""
    found = re.search(r"figure stamp ([0-9a-f]{64})", svg)
    return found[1] if found else None


def render_svg(name: str, panels: Sequence[Panel]) -> str:
    """A figure beside the card, the same to the byte for the same numbers and matplotlib."""
    style = {"svg.hashsalt": name, "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    facts = {"Date": None, "Creator": None, "Description": f"figure stamp {stamp(panels)}"}
    buffer = io.StringIO()
    with mpl.rc_context(STYLE | style):
        draw(name, panels).savefig(buffer, format="svg", transparent=True, metadata=facts)
    # Indentation and a line for each point of a path are half of the file.
    return re.sub(r" *\n(?=[LzMC\"])", " ", re.sub(r"\n +", "\n", buffer.getvalue()))
