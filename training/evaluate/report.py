"""Everything that is written from records: cards, tables, the comparison, figures, a record's page.

python -m training.evaluate.report            # what `make tables` runs
python -m training.evaluate.report --check    # says what is stale, writes nothing
python -m training.evaluate.report --page runs/clever-resnet18.fmnist/results.json
"""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.figure import Figure

from bench.record import RESULTS, BenchRecord, markdown
from clever_zoo.cards import (
    ERRORS,
    FIGURES,
    METRICS,
    READINGS,
    Metric,
    card_figures,
    columns_by_role,
    columns_of,
    decimals_of,
    every_metric,
    findings,
    markdown_table,
    measured_lines,
    metric_cell,
    render_card,
    results_table,
    shortfalls,
    table_rows,
)
from clever_zoo.cli import fail
from clever_zoo.embedding import Part
from clever_zoo.errors import CleverZooError, DataError
from clever_zoo.figures import STYLE, figure_tag, html_page, html_table
from clever_zoo.files import write_atomic
from clever_zoo.records import PARTS, RESULTS_FILENAME, Network, Record
from clever_zoo.registry import DEFAULT_MODEL, list_models, model_info
from training.evaluate import plots

CHECKOUT = Path(__file__).parents[2]
RECORDS = Path("training") / "records"
CARDS = Path("model_cards")
COMPARISON = Path("training") / "COMPARISON.md"
REPORT = "report.html"
# What the records of runs begin with -> the released model that stands before them.
RELEASED_BESIDE = {
    "again": "clever-resnet18.fmnist",
    "plus": "clever-resnet18.fmnist_plus",
    "short": "clever-vit-tiny.fmnist",
}
FINE_TUNED = (
    Metric("fine-tuned, head alone (%)", "frozen_short", "top1_last"),
    Metric("fine-tuned, head and encoder (%)", "finetune_short", "top1_last"),
)
VANISHED = 0.1  # points; a published gain of no more is none

# CLeVER against DINO: the rows of the comparison beyond those of the cards.
COMPARED = (
    Metric("linear probe, CJ (%)", "linear_cached", "top1_last", "cj"),
    Metric("linear probe, CJ+F (%)", "linear_cached", "top1_last", "cj_f"),
    Metric("linear probe, CJ+R+E (%)", "linear_cached", "top1_last", "cj_r_e"),
    *(
        Metric(f"{name} (%)", task, "top1_last", *how, features=features)
        for features, of in (("last1", ""), ("last4_reference", ", last four blocks"))
        for task, name, how in (
            ("linear_reference", f"published probe{of}, clean", ("ori",)),
            ("linear_reference", f"published probe{of}, CJ+R", ("cj_r", None, "bilinear")),
        )
    ),
)
_PUBLISHED = """## The paper's own figures
**These are the paper's own, on ImageNet-100; not ours, not run here.** {protocol}.
Source: {source}.

{table}

Under BAug, whose views are not rotated, CLeVER's gain on CJ+R images vanishes or turns round on
{exceptions}.

The two sets of figures are not comparable: other data, for most rows another evaluation protocol,
and a far larger budget. These stand here to show what the method is reported to do where its
authors ran it."""


def released_records(root: Path = CHECKOUT) -> dict[str, Record]:
    """Name -> record of every released model.

    Raises:
        DataError: If a record cannot be read.
    """
    return {name: Record.read(root / CARDS / name / RESULTS_FILENAME) for name in list_models()}


def rendered_files(root: Path = CHECKOUT) -> dict[Path, str]:
    """Path -> content of every text that is written from records.

    Args:
        root: Of the checkout whose READMEs and records are read.

    Raises:
        DataError: If a record cannot be read, or a README has lost its markers.
    """
    records = released_records(root)
    readme, training_readme = root / "README.md", root / "training" / "README.md"
    files = {
        root / CARDS / name / "README.md": render_card(model_info(name), record)
        for name, record in records.items()
    }
    sections = [_readme_section(name, record) for name, record in records.items()]
    sections.append(
        "CLeVER against DINO row by row, beside the paper's published table: "
        f"[{COMPARISON}]({COMPARISON})."
    )
    speed = markdown(BenchRecord.read(root / "bench" / RESULTS.name))
    files[readme] = _filled(readme, {"results": "\n\n".join(sections), "speed": speed})
    files[training_readme] = _filled(
        training_readme,
        {
            "trials": runs_table("trial", root),
            **{
                kind: runs_table(kind, root, [records[name]])
                for kind, name in RELEASED_BESIDE.items()
            },
            "bench": bench_tables(root),
            "finetune": finetune_lines(root),
            "reproduce": reproduce_table(records.values()),
        },
    )
    pairs = [(model_info(name).backbone, record) for name, record in records.items()]
    published = _read(root / RECORDS / "published-in100-linear.json")
    files[root / COMPARISON] = comparison(pairs, published)
    return files


def rendered_figures(root: Path = CHECKOUT) -> dict[Path, list[plots.Panel]]:
    """Path -> panels of every figure beside a card; the file's stem is the figure's name."""
    return {
        root / CARDS / name / "figures" / f"{figure}.svg": plots.figure_panels(record, figure)
        for name, record in released_records(root).items()
        for figure in card_figures(record)
    }


def stale_files(root: Path = CHECKOUT) -> list[Path]:
    """Texts that differ from what the records say, and figures with another stamp."""
    stale = [path for path, text in rendered_files(root).items() if _text_of(path) != text]
    for path, panels in rendered_figures(root).items():
        if plots.stamp_of(_text_of(path)) != plots.stamp(panels):
            stale.append(path)
    return stale


def write_files(root: Path = CHECKOUT) -> list[Path]:
    """Bring every stale file up to date; returns their paths."""
    stale = stale_files(root)
    texts, figures = rendered_files(root), rendered_figures(root)
    for path in stale:
        text = texts.get(path) or plots.render_svg(path.stem, figures[path])
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, text.encode())
    return stale


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _readme_section(name: str, record: Record) -> str:
    """A model's table; the default one's figures, too, the others' are in their cards."""
    folder = CARDS / name
    figures = [
        f"![{caption}]({folder}/figures/{figure}.svg)"
        for figure, caption in card_figures(record).items()
    ]
    title = f"`{name}` on {record.dataset} (all numbers: [its card]({folder}/README.md)):"
    shown = figures if name == model_info(DEFAULT_MODEL).name else []
    return "\n\n".join([title, results_table(record), *shown])


def runs_table(kind: str, root: Path = CHECKOUT, beside: Iterable[Record] = ()) -> str:
    """Runs that were not released side by side, with the controls of the first.

    Args:
        kind: What the names of their records begin with.
        root: Of the checkout whose records are read.
        beside: Records that stand before them.
    """
    paths = sorted((root / RECORDS).glob(f"{kind}-*.json"))
    records = [*beside, *(Record.read(path) for path in paths)]
    models = [c for record in records for c in columns_of(record) if c.role == "model"]
    controls = [c for c in columns_of(records[0]) if c.role != "model"]
    rows = (*METRICS, *FINE_TUNED, *READINGS[1:3], *ERRORS)
    table = markdown_table(table_rows([*models, *controls], rows))
    trained = [network for record in records if (network := record.network("model"))]
    return "\n".join([table, "", *map(_run_line, trained)])


def _run_line(network: Network) -> str:
    t = network.training
    return (
        f"- `{network.name}`: seed {t['seed']}, {t['steps']} steps, {t['images_seen']:,} "
        f"images in {t['seconds'] / 60:.0f} minutes on {t['hardware']}; commit {t['commit'][:7]}"
    )


def reproduce_table(records: Iterable[Record]) -> str:
    """The command that trains each released network, and what that took where it was done."""
    trained = {
        network.name: network.training
        for record in records
        for network in record.networks
        if "recipe" in network.training
    }
    cells = [["command", "images", "minutes", "images/s", "hardware", "commit"]]
    for t in trained.values():
        place = " --device cuda" if t.get("device") == "cuda" else ""
        cells.append(
            [
                f"`python -m training.pretrain {t['recipe']}{place}`",
                f"{t['images_seen']:,}",
                f"{t['seconds'] / 60:.0f}",
                f"{t['images_per_s']:.0f}",
                t["hardware"],
                t["commit"][:7],
            ]
        )
    notes = [f"- `{t['recipe']}`: {t['note']}." for t in trained.values() if "note" in t]
    return "\n".join([markdown_table(cells, texts=1), *(["", *notes] if notes else [])])


def finetune_lines(root: Path = CHECKOUT) -> str:
    """Recorded runs of `python -m training.finetune`, one line each."""
    lines = []
    for path in sorted((root / RECORDS).glob("finetune-*.json")):
        record = Record.read(path)
        last, best = (
            next(r for r in record.results if r.metric == f"top1_{which}")
            for which in ("last", "best")
        )
        where = record.environments[last.environment]
        lines.append(
            f"- `{record.model}` on {record.images['train']:,} images of {record.dataset}: top-1 "
            f"{last.mean:.1f} % on {last.n:,} test images after the last epoch ({best.mean:.1f} % "
            f"in the epoch that the test images chose), {last.seconds / 60:.0f} minutes on "
            f"{where.hardware}, commit {where.commit[:7]}; {record.tasks[last.protocol.task]}"
        )
    return "\n".join(lines)


def bench_tables(root: Path = CHECKOUT) -> str:
    """What `python -m training.bench` recorded."""
    views, heads, step, scan, small_maps, backbones = (
        _read(root / RECORDS / f"bench-{n}.json")
        for n in ("views", "heads", "step", "scan", "small-maps", "backbones")
    )
    figures = {name: f["median"] for name, f in views["summary"].items()}
    spread = views["summary"]["ratio"]
    whole, chunked = heads["forms"].values()
    lines = [
        f"- **Views** ({views['title']}; {_where(views)}): batched {figures['batched']:.0f} "
        f"images/s, reference {figures['reference']:.0f}: ratio {figures['ratio']:.2f} "
        f"({spread['min']:.2f}..{spread['max']:.2f}).",
        f"- **Two heads of {heads['settings']['prototypes']:,} prototypes** at batch "
        f"{heads['settings']['batch']} ({_where(heads)}): peak {whole['peak_bytes'] / 1e9:.2f} GB "
        f"all at once, {chunked['peak_bytes'] / 1e9:.2f} GB in chunks, ratio "
        f"{chunked['peak_bytes'] / whole['peak_bytes']:.2f}; gradient norms "
        f"{whole['gradient_norm']:.6g} and {chunked['gradient_norm']:.6g}; "
        f"{whole['seconds']:.1f} s and {chunked['seconds']:.1f} s.",
        f"- **Steps** (batch {step['settings']['batch']}, {step['settings']['precision']}; "
        f"{_where(step)}); the peer is an ideal, this step without the making of "
        "its views, so the ratio is below 1:",
        "",
        "| recipe | images/s | ratio to the peer | waiting for data | 200 epochs of ImageNet-100 |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in step["recipes"].items():
        lines.append(
            f"| `{name}` | {row['images_per_s']:.2f} | "
            f"{row['images_per_s'] / row['peer_images_per_s']:.2f} | {row['data_share']:.1%} | "
            f"{row['in100_hours']:,.0f} h |"
        )
    ends = [_scan_line(scan), _small_maps_line(small_maps), *_backbone_lines(backbones)]
    return "\n".join([*lines, "", *ends])


def _scan_line(scan: Mapping[str, Any]) -> str:
    seconds, ratio = scan["seconds"], scan["times_the_loop"]["torch"]
    shape = " x ".join(f"{number:,}" for number in scan["settings"].values())
    return (
        f"- **VMamba's scan**, forward and backward ({shape}; {_where(scan)}): "
        f"{seconds['torch']['median'] * 1e3:,.0f} ms in plain torch, "
        f"{seconds['loop']['median'] * 1e3:,.0f} ms in the loop: {ratio['median']:.1f} times as "
        f"fast ({ratio['min']:.1f}..{ratio['max']:.1f})."
    )


def _small_maps_line(record: Mapping[str, Any]) -> str:
    settings, seconds = record["settings"], record["seconds"]
    ratio = record["times_the_convolutions"]["products"]
    return (
        f"- **Small maps as matrix products**: `{settings['backbone']}`, forward and backward "
        f"({settings['batch']} x {settings['size_px']} px; {_where(record)}): "
        f"{seconds['products']['median'] * 1e3:,.0f} ms, with torch's convolutions "
        f"{seconds['convolutions']['median'] * 1e3:,.0f} ms: {ratio['median']:.2f} times as fast "
        f"({ratio['min']:.2f}..{ratio['max']:.2f})."
    )


def _backbone_lines(record: Mapping[str, Any]) -> list[str]:
    settings, rows = record["settings"], record["backbones"]
    peer = rows["resnet50"]
    return [
        f"- **Training steps of the bare backbones** (batch {settings['batch']}, "
        f"{settings['size_px']} px, {settings['precision']}; {_where(record)}):",
        "",
        "| backbone | images/s | to resnet50 | peak memory | to resnet50 |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| `{name}` | {row['images_per_s']:.2f} | "
            f"{row['images_per_s'] / peer['images_per_s']:.2f} | "
            f"{row['peak_bytes'] / 1e9:.2f} GB | {row['peak_bytes'] / peer['peak_bytes']:.2f} |"
            for name, row in rows.items()
        ),
    ]


def _where(record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    return f"{environment['hardware']}, commit {environment['commit'][:7]}"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _filled(path: Path, contents: Mapping[str, str]) -> str:
    """The text of a file with what stands between the markers of each name replaced."""
    text = path.read_text(encoding="utf-8")
    for marker, content in contents.items():
        begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise DataError(f"{path} has lost the line {begin} or {end}")
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def comparison(records: Iterable[tuple[str, Record]], published: Mapping[str, Any]) -> str:
    """The text of training/COMPARISON.md.

    Args:
        records: Backbone and record of the released models; those without a baseline and those that
            go beyond the paper are left out.
        published: The paper's own figures, as in training/records.
    """
    sections = [
        "<!-- Written by `make tables` from the records. -->",
        "# CLeVER against its DINO baseline",
        "Both networks of a table had the same backbone, recipe, seed and epochs, and both are cut "
        "at the same index; how a training fell short stands under the title. The difference is "
        "CLeVER's value less DINO's, of unrounded means; in points where the row is in percent. "
        "One training seed each, so up to three points may be chance: ± is the deviation over "
        "seeds of the perturbation alone. 'Published probe' is the authors' protocol, run here on "
        "our data. Protocols, hardware and commits stand in the cards.",
        *(
            _compared(backbone, record)
            for backbone, record in records
            if record.network("baseline") and not record.network("paper")
        ),
        _published_section(published),
    ]
    return "\n\n".join(sections) + "\n"


def _compared(backbone: str, record: Record) -> str:
    columns = columns_by_role(record)
    model, baseline = columns["model"], columns["baseline"]
    rows = [
        [
            *(metric.label, part, metric_cell(ours), metric_cell(theirs)),
            _gap(ours.mean - theirs.mean, decimals_of(metric.metric)),
        ]
        for metric in (*METRICS[:-1], *COMPARED, *READINGS)
        for part in PARTS
        if (ours := model.find(metric, part)) and (theirs := baseline.find(metric, part))
    ]
    title = f"## {backbone}: `{model.network}` and `{baseline.network}`, on {record.dataset}"
    head = ["metric", "part", "CLeVER", "DINO", "difference"]
    limits = " ".join(shortfalls(record))
    return "\n\n".join(filter(None, [title, limits, markdown_table([head, *rows])]))


def _gap(value: float, decimals: int = 1) -> str:
    return f"{value:+z.{decimals}f}"


def _published_section(published: Mapping[str, Any]) -> str:
    rows, exceptions = [["backbone", "method", *published["columns"]]], []
    for backbone, methods in published["backbones"].items():
        rows += [[backbone, method, *map(str, values)] for method, values in methods.items()]
        pairs = zip(methods["CLeVER"], methods["DINO"], strict=True)
        gaps = [round(ours - theirs, 1) for ours, theirs in pairs]
        rows.append([backbone, "difference", *map(_gap, gaps)])
        if gaps[-1] <= VANISHED:
            exceptions.append(f"{backbone} ({_gap(gaps[-1])})")
    facts = {key: published[key] for key in ("protocol", "source")}
    table = markdown_table(rows)
    return _PUBLISHED.format(**facts, table=table, exceptions=", ".join(exceptions))


def page(record: Record) -> str:
    """The page of plots of one record: one HTML file that loads nothing."""
    with mpl.rc_context(STYLE):
        sections = list(_page_sections(record))
    return html_page(f"Evaluation of {record.model} on {record.dataset}", sections)


def write_page(record: Record, path: Path) -> None:
    """Write the page of plots in one step."""
    write_atomic(path, page(record).encode())


def _page_sections(record: Record) -> Iterable[tuple[str, str]]:
    """Heading and HTML of each part that the record has numbers for."""
    yield "Networks", _networks_table(record)
    yield "Results", _html_rows(record, METRICS)
    if panels := plots.panels_of(record, plots.accuracy_groups(record)):
        yield "Accuracy by perturbation", _tag(plots.draw_dots(panels), _DOTS)
    if _has_curve(panels := plots.panels_of(record, plots.neighbor_groups(record))):
        figure = plots.draw_curves(panels, "k", logarithmic=True)
        yield "k-NN by k", _tag(figure, "Weighted k-NN; bars: deviation over the seeds.")
    halves: tuple[Part, ...] = ("equivariant", "invariant")
    if panels := plots.panels_of(record, plots.reading_groups(), parts=halves):
        sentences = "".join(f"<li>{html.escape(text)}</li>" for text in findings(record))
        tables = _html_rows(record, (*READINGS, *ERRORS))
        body = f"{_tag(plots.draw_dots(panels), _DOTS)}<ul>{sentences}</ul>{tables}"
        yield "What each half was measured to hold", body
    if panels := plots.panels_of(record, plots.drift_groups(record)):
        figure = plots.draw_curves(panels, "angle of rotation (°)")
        yield "Drift", _tag(figure, FIGURES["drift"] + ".")
    yield "Every number", _html_rows(record, every_metric(record))
    definitions = (record.tasks | record.perturbations).items()
    yield "Protocols", html_table(["name", "definition"], definitions)


_DOTS = "Columns are parts; bars: deviation over the seeds."


def _has_curve(panels: Sequence[plots.Panel]) -> bool:
    return any(len(series.points) > 1 for panel in panels for series in panel.series)


def _tag(figure: Figure, caption: str) -> str:
    return figure_tag(figure, caption, transparent=True)


def _html_rows(record: Record, metrics: Iterable[Metric]) -> str:
    head, *rows = table_rows(columns_of(record), metrics)
    return html_table(head, rows)


def _networks_table(record: Record) -> str:
    facts = dict.fromkeys(key for n in record.networks for key in n.training)
    rows = [
        ["role", *(n.role for n in record.networks)],
        ["weights sha256", *(n.sha256 or "" for n in record.networks)],
        *([key, *(str(n.training.get(key, "")) for n in record.networks)] for key in facts),
    ]
    where = "".join(f"<li>{html.escape(line[2:])}</li>" for line in measured_lines(record))
    images = ", ".join(f"{count:,} {split}" for split, count in record.images.items())
    lead = (
        f"<p>{images} images; features cut at {record.invariant_dim}. Measured:</p><ul>{where}</ul>"
    )
    return lead + html_table(["", *(n.name for n in record.networks)], rows)


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if a file is stale.")
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option("--page", help="Only draw report.html beside this results.json."),
    ] = None,
) -> None:
    """Write model cards, the tables of both READMEs, the comparison and figures from the records.

    Only files that differ from their records are written. Figures are compared by the stamp of
    their numbers, so that another matplotlib alone rewrites nothing.

    Example: python -m training.evaluate.report --page runs/clever-resnet18.fmnist/results.json
    """
    try:
        if draw is not None:
            paths = [draw.parent / REPORT]
            write_page(Record.read(draw), paths[0])
        else:
            paths = stale_files() if check else write_files()
    except (CleverZooError, OSError) as error:
        fail(error)
    for path in paths:
        typer.echo(f"{'stale' if check else 'wrote'} {path}")
    if check and paths:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
