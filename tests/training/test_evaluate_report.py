"""Cards, tables, figures and pages from hand-made records; what is stale is found."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import clever_zoo
from clever_zoo.cards import (
    METRICS,
    READINGS,
    card_figures,
    columns_of,
    every_metric,
    findings,
    metric_cell,
    render_card,
    results_table,
    table_rows,
)
from clever_zoo.errors import DataError
from clever_zoo.records import PARTS, Environment, Network, Protocol, Record, Result
from training.evaluate import plots, report

ROOT = Path(__file__).parents[2]
NAME = "clever-resnet18.fmnist"
PERTURBATIONS = {"ori": "Ori: none", "cj": "CJ: jitter", "r": "R: rotation", "cj_r": "CJ+R: both"}
DIGEST = "ab" * 32
# Base of every value of a network; each part and perturbation adds its own.
LEVELS = {NAME: 60.0, "dino-x": 58.0, "untrained": 40.0, "pixels": 30.0}
PART_STEPS = {"full": 0.0, "invariant": 0.7, "equivariant": -1.4}


def training_facts(recipe: str) -> dict:
    return {
        "recipe": recipe, "seed": 0, "epochs": 8, "steps": 10, "images_seen": 640,
        "seconds": 120.0, "images_per_s": 5.3, "hardware": "A CPU", "torch": "2.15",
        "commit": "c" * 40,
    }  # fmt: skip


def rows_of(network: str) -> list[Result]:
    level, seeds = LEVELS[network], (0, 1, 2)
    rows = []
    for part in PARTS if network != "pixels" else ("full",):
        value = level + PART_STEPS[part]

        def add(task, metric, mean, *, at=None, part=part, features="last1", **protocol):
            random = protocol.get("perturbation", "ori") != "ori"
            rows.append(
                Result(
                    network=network,
                    protocol=Protocol(task=task, features=features, **protocol),
                    part=part,
                    metric=metric,
                    at=at,
                    seeds=seeds if random else (),
                    mean=mean,
                    std=0.25 if random else 0.0,
                    n=100,
                )
            )

        for i, perturbation in enumerate(PERTURBATIONS):
            for k in (10.0, 20.0):
                add("knn", "top1", value - i + k / 100, at=k, perturbation=perturbation)
            add("linear_cached", "top1_last", value + 5 - i, perturbation=perturbation)
        add("linear_cached", "top1_last", value - 9, perturbation="cj_r", interpolation="bilinear")
        for metric in READINGS:
            add(metric.task, metric.metric, value / 100 if "r2" in metric.metric else value)
        add("angle", "mae_deg", 90 - value)
        for angle in (30.0, 60.0, 90.0):
            add("drift", "ratio", level * angle / 9000, at=angle)
    if network == NAME:
        add("finetune_short", "top1_best", 91.25, part="full")
    return rows


def build(rows: list[Result], networks: tuple[str, ...] = tuple(LEVELS)) -> Record:
    """The record of some networks, listed with the controls first."""
    roles = dict(zip(LEVELS, ("model", "baseline", "untrained", "pixels"), strict=True))
    return Record(
        model=NAME,
        dataset="fashion-mnist",
        invariant_dim=409,
        images={"train": 600, "test": 100},
        tasks={row.protocol.task: f"how {row.protocol.task} works" for row in rows},
        perturbations=PERTURBATIONS,
        networks=tuple(
            Network(
                name=name,
                role=roles[name],
                sha256=None if name == "pixels" else DIGEST,
                training=training_facts(name) if roles[name] in ("model", "baseline") else {},
            )
            for name in reversed(networks)
        ),
        environments=(
            Environment(
                commit="d" * 40, device="cpu", hardware="Some CPU", torch="2.15", python="3.11"
            ),
        ),
        results=tuple(rows),
    )


@pytest.fixture
def record() -> Record:
    return build([row for name in LEVELS for row in rows_of(name)])


@pytest.fixture
def partial() -> Record:
    """k-NN at 20 and the angle alone, of the model alone."""
    kept = ("knn", "top1", 20.0), ("angle", "r2", None)
    rows = [r for r in rows_of(NAME) if (r.protocol.task, r.metric, r.at) in kept]
    return build(rows, (NAME,))


@pytest.fixture
def checkout(tmp_path: Path, record: Record) -> Path:
    """What the report reads of a checkout, with the hand-made record as the released one."""
    shutil.copytree(ROOT / "training" / "records", tmp_path / "training" / "records")
    (tmp_path / "bench").mkdir()
    for name in ("README.md", "training/README.md", "bench/results.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in clever_zoo.list_models():
        (tmp_path / "model_cards" / name).mkdir(parents=True)
        record.write(tmp_path / "model_cards" / name / "results.json")
    return tmp_path


def changed(record: Record, **of_row) -> Record:
    """The record with the first number of that description one larger."""

    def fits(row: Result) -> bool:
        facts = row.model_dump() | row.protocol.model_dump()
        return all(facts[key] == value for key, value in of_row.items())

    index = next(i for i, row in enumerate(record.results) if fits(row))
    rows = list(record.results)
    rows[index] = rows[index].model_copy(update={"mean": rows[index].mean + 1})
    return build(rows)


def cells(table: str) -> dict[tuple[str, ...], list[str]]:
    """Metric and part -> values of a Markdown table; the head under ("metric", "part")."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line] for line in lines if "---" not in line[0]]
    return {tuple(line[:2]): line[2:] for line in split}


def test_table_of_all_networks(record: Record) -> None:
    table = cells(results_table(record))
    assert table["metric", "part"] == list(LEVELS)  # model, baseline, untrained, pixels
    clean = [f"{LEVELS[name] + 0.7 + 0.2:.1f}" for name in list(LEVELS)[:3]]
    assert table["k-NN, clean (%)", "invariant"] == [*clean, ""]
    assert table["k-NN, CJ+R (%)", "full"][0] == f"{60 - 3 + 0.2:.1f} ± 0.2"
    assert table["angle R²", "equivariant"][:3] == ["0.59", "0.57", "0.39"]
    assert len(table) == 1 + 3 * len(METRICS)


def test_rows_without_a_value_are_left_out(partial: Record) -> None:
    table = cells(results_table(partial))
    assert {metric for metric, _ in table} == {
        "metric",
        "k-NN, clean (%)",
        "k-NN, rotated ±90° (%)",
        "k-NN, CJ+R (%)",
        "angle R²",
    }
    assert card_figures(partial).keys() == {"perturbed"}
    card = render_card(clever_zoo.model_info(NAME), partial)
    assert "figures/drift.svg" not in card
    assert "Fine-tuned" not in card
    assert "baseline" not in " ".join(findings(partial))


def test_every_number_has_a_row_of_its_own(record: Record) -> None:
    metrics = every_metric(record)
    labels = [metric.label for metric in metrics]
    assert len(set(labels)) == len(labels)
    shown = sum(
        column.find(metric, part) is not None
        for column in columns_of(record)
        for metric in metrics
        for part in PARTS
    )
    assert shown == len(record.results)
    assert {
        "k-NN, k = 10, CJ+R, top-1 (%)",
        "linear probe, CJ+R, bilinear, top-1 (%)",
        "drift, at 60, ratio",
        "crop, R² x",
        "rotation angle, mean error (°)",
        "head and encoder, preset short, top-1 (%) of the best epoch on the test images",
    } <= set(labels)


def test_features_of_four_blocks_are_labelled() -> None:
    row = Result(
        network=NAME,
        protocol=Protocol(task="linear_cached", features="last4_per_block"),
        part="full",
        metric="top1_last",
        mean=50.0,
        n=10,
    )
    (metric,) = every_metric(build([row]))
    assert metric.label == "linear probe, last4_per_block, Ori, top-1 (%)"
    assert cells(results_table(build([row]), [metric]))[metric.label, "full"][0] == "50.0"


def test_cells() -> None:
    facts = {"network": "n", "protocol": Protocol(task="t"), "part": "full", "n": 1}
    several = Result(**facts, metric="top1", mean=72.94, std=0.04, seeds=(0, 1))
    assert metric_cell(several) == "72.9 ± 0.0"
    assert metric_cell(several.model_copy(update={"seeds": (0,)})) == "72.9"
    assert metric_cell(Result(**facts, metric="r2_x", mean=-0.004)) == "0.00"
    assert metric_cell(Result(**facts, metric="iou", mean=0.6514)) == "0.651"
    assert metric_cell(None) == ""


def test_findings_state_both_halves_and_controls(record: Record) -> None:
    sentences = findings(record)
    assert (
        "angle R²: the equivariant half 0.59, the same cut of the baseline 0.57, that of the "
        "untrained network 0.39; the invariant half 0.61, the same cut of the baseline 0.59, that "
        "of the untrained network 0.41."
    ) in sentences
    count = len(READINGS)
    assert sentences[-1] == (
        f"Of the readings of how a picture was seen, the equivariant half is above the invariant "
        f"half in 0 of {count}, the same cut of the baseline in {count} of {count}, that of the "
        f"untrained network in {count} of {count}."
    )
    better = changed(record, network=NAME, task="angle", metric="r2", part="equivariant")
    assert f"above the invariant half in 1 of {count}" in findings(better)[-1]
    unread = [
        r.model_copy(update={"mean": -0.1 * (2 + PARTS.index(r.part))})
        if r.metric == "r2_hue"
        else r
        for r in record.results
    ]
    unread = record.model_copy(update={"results": tuple(unread)})
    assert f"half in 0 of {count - 1}, " in findings(unread)[-1]


def test_no_finding_without_a_number_of_the_model(record: Record) -> None:
    rows = tuple(r for r in record.results if r.network != NAME or r.protocol.task != "angle")
    assert not any(
        sentence.startswith("angle R²")
        for sentence in findings(record.model_copy(update={"results": rows}))
    )


def test_card_holds_protocols_digests_and_where(record: Record) -> None:
    spec = clever_zoo.model_info(NAME)
    card = render_card(spec, record)
    for text in (
        f"# {NAME}",
        "## Use and misuse",
        "- `knn`: how knn works.",
        "- `cj_r`: CJ+R: both.",
        "Some CPU, torch 2.15, Python 3.11, commit `dddddddddddd`",
        f"- `untrained`: sha256 `{DIGEST}`.",
        "deviation over seeds 0, 1, 2",
        "](figures/perturbed.svg)",
        "](figures/drift.svg)",
        "### What each half was measured to hold",
        "### Fine-tuned",
        f"recipe `training/recipes/{NAME}.toml`",
        spec.weights.sha256,
    ):
        assert text in card
    folded = card[card.index("<details>") : card.index("</details>")]
    assert "k-NN, k = 10, R, top-1 (%)" in folded
    assert all(sentence in card for sentence in findings(record))


def test_what_is_written_is_not_stale_and_a_changed_number_is_found(
    checkout: Path, record: Record
) -> None:
    folder = checkout / "model_cards" / NAME
    written = report.write_files(checkout)
    expected = {folder / "figures" / "perturbed.svg", folder / "figures" / "drift.svg"}
    expected |= {folder / "README.md", checkout / "README.md", checkout / report.COMPARISON}
    assert expected <= set(written)
    figures = re.findall(r"\]\((.*)/perturbed.svg\)", (checkout / "README.md").read_text())
    assert figures == ["model_cards/clever-resnet50.fmnist/figures"]  # the default model's alone
    assert report.stale_files(checkout) == []
    repeated = {checkout / "training" / "README.md"}  # where this model stands beside its re-run
    cases = {
        ("linear_cached", "top1_last"): repeated | expected - {folder / "figures" / "drift.svg"},
        ("drift", "ratio"): {folder / "README.md", folder / "figures" / "drift.svg"},
        ("jitter", "r2_hue"): {folder / "README.md", checkout / report.COMPARISON},
    }
    for (task, metric), stale in cases.items():
        changed(record, network=NAME, task=task, metric=metric).write(folder / "results.json")
        assert set(report.stale_files(checkout)) == stale, (task, metric)
    assert set(report.write_files(checkout)) == stale
    assert report.stale_files(checkout) == []


def test_a_trial_changes_the_readme_of_training(checkout: Path) -> None:
    report.write_files(checkout)
    path = checkout / "training" / "records" / "trial-clever-dino.json"
    trial = Record.read(path)
    rows = [row.model_copy(update={"mean": row.mean + 0.5}) for row in trial.results]
    trial.model_copy(update={"results": tuple(rows)}).write(path)
    assert report.stale_files(checkout) == [checkout / "training" / "README.md"]


def test_lost_markers(checkout: Path) -> None:
    (checkout / "README.md").write_text("# no markers\n")
    with pytest.raises(DataError, match="results: begin"):
        report.rendered_files(checkout)


@pytest.mark.parametrize("name", ["perturbed", "drift"])
def test_figures(name: str, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = plots.figure_panels(record, name)
    svg = plots.render_svg(name, panels)
    assert svg == plots.render_svg(name, panels)
    assert plots.stamp_of(svg) == plots.stamp(panels)
    assert len(svg) < 60_000
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {NAME, "dino-x", "untrained", "pixels", *PARTS} <= set(texts)
    assert not re.search(r"<dc:date>|matplotlib v", svg, re.IGNORECASE)
    # Another drawing of the same numbers is not stale, the same drawing of another version is.
    assert plots.stamp_of(svg.replace("#d1495b", "#000000")) == plots.stamp(panels)
    monkeypatch.setattr(plots, "VERSION", plots.VERSION + 1)
    assert plots.stamp_of(svg) != plots.stamp(panels)
    assert plots.stamp_of("<svg/>") is None


def test_panels_hold_the_numbers_of_the_record(record: Record, partial: Record) -> None:
    full, invariant, equivariant = plots.figure_panels(record, "perturbed")
    assert full.quantity == "linear probe, top-1 (%)"
    assert [series.role for series in full.series] == ["model", "baseline", "untrained", "pixels"]
    assert len(equivariant.series) == 3
    assert [(p.label, p.mean, p.std) for p in invariant.series[0].points] == [
        ("Ori", pytest.approx(65.7), 0.0),
        ("CJ", pytest.approx(64.7), 0.25),
        ("R", pytest.approx(63.7), 0.25),
        ("CJ+R", pytest.approx(62.7), 0.25),
    ]
    drift = plots.figure_panels(record, "drift")[2]
    assert [(p.at, p.mean) for p in drift.series[0].points] == [
        (angle, pytest.approx(60 * angle / 9000)) for angle in (30, 60, 90)
    ]
    assert plots.figure_panels(partial, "perturbed")[0].quantity == "k-NN, k = 20, top-1 (%)"
    assert plots.figure_panels(partial, "drift") == []


def test_comparison(record: Record, partial: Record) -> None:
    published = json.loads(
        (ROOT / "training" / "records" / "published-in100-linear.json").read_text()
    )
    text = report.comparison([("resnet18", record), ("vit_tiny", partial)], published)
    ours, _, theirs = text.partition("## The paper's own figures")
    table = cells(ours)
    assert table["k-NN, clean (%)", "invariant"] == ["60.9", "58.9", "+2.0"]
    assert table["linear probe, CJ (%)", "full"] == ["64.0 ± 0.2", "62.0 ± 0.2", "+2.0"]
    assert table["jitter: hue R²", "equivariant"] == ["0.59", "0.57", "+0.02"]
    assert "vit_tiny" not in ours  # no baseline
    paper = record.networks[0].model_copy(update={"name": "paper", "role": "paper"})
    beyond = record.model_copy(update={"networks": (*record.networks, paper)})
    assert "## resnet18" not in report.comparison([("resnet18", beyond)], published)
    assert theirs.strip().startswith("**These are the paper's own, on ImageNet-100; not ours")
    assert "not comparable" in theirs
    assert (
        "vanishes or turns round on\nViT-Small (-0.3), ResNet-18 (-0.3), ResNet-50 (+0.1)." in text
    )
    assert not re.search("ImageNet|82.|83.", ours)
    rows = cells(theirs)
    assert rows["ViT-Tiny", "CLeVER"] == ["68.7", "66.0", "74.9", "48.3"]
    assert rows["VMamba-Tiny", "DINO"] == ["80.9", "79.5", "83.2", "53.4"]
    assert len(rows) == 1 + 5 * 3
    for backbone in published["backbones"]:
        clever, dino, gap = (
            [float(x) for x in rows[backbone, method]]
            for method in ("CLeVER", "DINO", "difference")
        )
        assert gap == pytest.approx([a - b for a, b in zip(clever, dino, strict=True)])


def test_page(record: Record, tmp_path: Path) -> None:
    report.write_page(record, tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", source) == [
        "Networks",
        "Results",
        "Accuracy by perturbation",
        "k-NN by k",
        "What each half was measured to hold",
        "Drift",
        "Every number",
        "Protocols",
    ]
    assert source.count('<img src="data:image/png;base64,') == 4
    assert not re.search(r"https?://|<script|<link", source)
    for head, *values in table_rows(columns_of(record), every_metric(record)):
        assert f"<td>{head}</td>" in source or head == "metric"
        assert all(value in source for value in values)
    assert f"<td>{DIGEST}</td>" in source


def test_page_of_a_partial_record(partial: Record) -> None:
    headings = re.findall("<h2>(.*?)</h2>", report.page(partial))
    assert "Drift" not in headings
    assert "k-NN by k" not in headings  # one k is no curve
    assert "Accuracy by perturbation" in headings


def test_command(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(report.main)
    record.write(tmp_path / "results.json")
    result = CliRunner().invoke(app, ["--page", str(tmp_path / "results.json")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").exists()
    missing = CliRunner().invoke(app, ["--page", str(tmp_path / "other.json")])
    assert missing.exit_code == 2
    assert "does not exist" in missing.output
    for stale, code in (([], 0), ([Path("README.md")], 1)):
        monkeypatch.setattr(report, "stale_files", lambda stale=stale: stale)
        result = CliRunner().invoke(app, ["--check"])
        assert result.exit_code == code
        assert ("stale README.md" in result.output) == bool(stale)


@pytest.mark.parametrize(
    "path", sorted((ROOT / report.RECORDS).glob("remeasured-*.json")), ids=lambda path: path.stem
)
def test_measured_again_the_released_weights_gave_the_released_figures(path: Path) -> None:
    again = Record.read(path)
    released = report.released_records()[again.model]
    assert again.network("model").sha256 == released.network("model").sha256
    figures = {row.key: row for row in released.results}
    assert len(again.results) >= 72  # 3 parts, 4 k, 3 perturbations, top-1 and top-5
    for row in again.results:
        assert row.mean == pytest.approx(figures[row.key].mean, abs=0.05), row.key
