"""The report of runs: built from run folders, its content read back as a browser would."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

from clever_zoo.cards import METRICS
from clever_zoo.errors import CheckpointError, DataError
from clever_zoo.records import (
    PARTS,
    RESULTS_FILENAME,
    Environment,
    Network,
    Protocol,
    Record,
    Result,
)
from training import report
from training.report import read_runs, smooth, verdict, write_report
from training.runlog import LOG, RunLog

RECIPE = {
    "name": "clever-test",
    "seed": 7,
    "epochs": 4,
    "batch_size": 32,
    "head": {"prototypes": 16},
    "views": {"global_scale": [0.4, 1.0]},
}
ENVIRONMENT = {"commit": "abc123", "device": "cpu", "hardware": "A <fast> CPU", "torch": "2.15"}
DIAGNOSTICS = {
    f"{half}_{kind}": value
    for half in ("invariant", "equivariant")
    for kind, value in {"std": 0.8, "rank": 20.0, "usage": 0.9, "assignment": 0.3}.items()
}


def line(step: int) -> dict[str, float]:
    return {
        "step": step,
        "epoch": step / 30,
        "loss": 6 - step / 50,
        "contrastive": 5 - step / 50,
        "transform": 1.0,
        "lr": 0.001,
        "weight_decay": 0.04,
        "momentum": 0.99 + step / 1e5,
        "grad_norm": 1.5,
        "images_per_s": 400.0,
        "step_s": 0.08,
        "data_s": 0.02,
        "seconds": step * 0.08,
        **(DIAGNOSTICS if step % 20 == 0 else {}),
    }


def brief_line(step: int) -> dict[str, float]:
    """As an earlier release wrote it."""
    return {"step": step, "loss": 6.0 - step / 50, "seconds": step * 0.08}


def make_run(folder: Path, lines: list[dict] | None = None, **recipe) -> Path:
    """The files of a run that stopped after its last line, of 120 steps."""
    lines = [line(step) for step in range(120)] if lines is None else lines
    folder.mkdir()
    with RunLog(folder / LOG, first_step=0, total_steps=120) as log:
        for values in lines:
            log.step(values)
    progress = {"step": len(lines), "steps": 120, "seconds": 3725.0, "world_size": 2}
    header = {"recipe": json.dumps(RECIPE | recipe), "progress": json.dumps(progress)}
    save_file({"x": np.zeros(1)}, folder / report.CHECKPOINT, metadata=header)
    (folder / report.ENVIRONMENT).write_text(
        json.dumps([ENVIRONMENT, ENVIRONMENT | {"commit": "def456"}])
    )
    return folder


def add_results(run: Path, **columns: float) -> None:
    """A record whose numbers are all the same within a network; the first one is the model."""
    roles = dict(zip(columns, ("model", "baseline"), strict=False))
    networks = [
        Network(name=n, role=n if n in ("untrained", "pixels") else roles[n]) for n in columns
    ]
    Record(
        model=networks[0].name,
        dataset="fashion-mnist",
        invariant_dim=4,
        images={"test": 10},
        tasks={"knn": "nearest neighbours", "angle": "regression"},
        perturbations={"ori": "Ori: none", "r": "R: rotation", "cj_r": "CJ+R: both"},
        networks=tuple(networks),
        environments=(Environment(**ENVIRONMENT, python="3.11"),),
        results=tuple(
            Result(
                network=name,
                protocol=Protocol(task=metric.task, perturbation=metric.perturbation),
                part=part,
                metric=metric.metric,
                at=metric.at,
                seeds=(0, 1) if metric.perturbation == "cj_r" else (),
                mean=value,
                std=0.5,
                n=10,
            )
            for name, value in columns.items()
            for metric in METRICS
            if metric.task in ("knn", "angle")
            for part in PARTS
        ),
    ).write(run / RESULTS_FILENAME)


class Page(HTMLParser):
    """Text, table cells by row, and images of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.rows, self.images, self._cell = "", [], [], False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs) -> None:
        self._cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        if self._cell:
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_data(self, data) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag) -> None:
        self._cell = False

    def row(self, *head: str) -> list[str]:
        (found,) = [r[len(head) :] for r in self.rows if r[: len(head)] == list(head)]
        return found

    def headings(self) -> list[str]:
        return re.findall("<h2>(.*?)</h2>", self.source)


def test_one_run(tmp_path: Path) -> None:
    lines = [line(step) for step in range(120)]
    lines[3]["grad_norm"] = lines[9]["grad_norm"] = math.inf
    run = make_run(tmp_path / "one", lines)
    write_report([run], run / "report.html")
    page = Page(run / "report.html")
    assert page.row("recipe") == ["clever-test"]
    assert page.row("seed") == ["7"]
    assert page.row("steps") == ["120 of 120"]
    assert page.row("epochs") == ["4 of 4"]
    assert page.row("processes") == ["2"]
    assert page.row("images seen") == ["3,840"]
    assert page.row("wall time") == ["1:02:05"]
    assert page.row("hardware") == ["A <fast> CPU"]
    assert page.row("commit") == ["abc123, then def456"]
    assert page.text.count("no collapse seen (lowest: std 0.8, rank 20") == 2
    assert "one: grad_norm was not finite at 2 step(s), first at 3" in page.text
    assert page.headings() == [
        "Facts",
        "Loss",
        "Schedules",
        "Speed",
        "Diagnostics: invariant half",
        "Diagnostics: equivariant half",
    ]
    assert len(page.images) == 5
    for source in page.images:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.getpixel((0, 0))[3] == 0  # transparent: fits a light and a dark page
        assert np.asarray(picture)[..., 3].max() == 255
    assert not re.search(r"https?://|<script|<link", page.source)


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [brief_line(step) | {"lr": 0.1} for step in range(120)])
    old = [brief_line(step) for step in range(60)]
    head = {"prototypes": 64, "hidden_dim": 8}
    b = make_run(tmp_path / "b", old, seed=8, head=head)
    add_results(a, **{"clever-test": 70.0}, base=65.0, untrained=60.0, pixels=50.0)
    add_results(b, **{"clever-test": 65.0}, untrained=60.0, pixels=51.0)
    write_report([a, b], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.row("steps") == ["120 of 120", "60 of 120 (unfinished)"]
    assert page.row("setting") == ["a", "b"]
    assert page.row("head.prototypes") == ["16", "64"]
    assert page.row("head.hidden_dim") == ["", "8"]
    assert [r for r in page.rows if r[0].startswith("views")] == []
    # The record of a calls b's scores "base"; the untrained column is the same in both.
    assert page.row("metric", "part") == ["a", "b", "untrained", "pixels", "pixels of b"]
    assert page.row("k-NN, clean (%)", "full") == ["70.0", "65.0", "60.0", "50.0", "51.0"]
    assert page.row("k-NN, CJ+R (%)", "equivariant")[0] == "70.0 ± 0.5"
    assert "b, invariant half: no diagnostics were recorded" in page.text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name / "run" for name in ("x", "y")]
    for folder in folders:
        folder.parent.mkdir()
        make_run(folder)
    assert [run.label for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_verdict_names_what_crossed_which_limit_when(tmp_path: Path) -> None:
    lines = [line(step) for step in range(120)]
    lines[40] |= {"invariant_std": 0.049, "equivariant_usage": 0.01}
    lines[60] |= {"invariant_std": 0.01, "invariant_usage": 0.05}
    (run,) = read_runs([make_run(tmp_path / "run", lines)])
    state, text = verdict(run, "invariant")
    assert state == "collapsed"
    assert "std was below 0.05, first at step 40 (lowest 0.01 at step 60, last 0.8)" in text
    assert "usage was below 0.1, first at step 60" in text
    assert "rank" not in text
    assert verdict(run, "equivariant").state == "alive"  # its usage is no sign of collapse
    lines[100]["equivariant_rank"] = 1.9
    (run,) = read_runs([make_run(tmp_path / "other", lines)])
    assert "rank was below 2, first at step 100" in verdict(run, "equivariant").text


def test_smoothing_is_a_centred_mean(rng) -> None:
    values = rng.normal(size=400)
    expected = [values[max(0, i - 4) : i + 5].mean() for i in range(400)]
    np.testing.assert_allclose(smooth(values), expected, rtol=1e-10)
    constant = np.full(400, 0.1)
    assert (smooth(constant) == constant).all()


def test_folders_that_are_no_runs_are_all_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / report.ENVIRONMENT).unlink()
    with pytest.raises(CheckpointError) as caught:
        write_report([run, tmp_path / "nowhere"], tmp_path / "report.html")
    assert f"{run} has no environment.json" in str(caught.value)
    assert "nowhere has no checkpoint.safetensors, environment.json, log.jsonl" in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        (LOG, "", DataError),
        (LOG, '{"step": 0, "loss": 1}\n{"st\n{"step": 2, "loss": 1}\n', DataError),
        (LOG, '{"step": 0, "loss": "low"}\n', DataError),
        (report.CHECKPOINT, "no checkpoint", CheckpointError),
        (report.ENVIRONMENT, '{"commit": "abc"}', CheckpointError),
        (RESULTS_FILENAME, "{}", DataError),
        (RESULTS_FILENAME, '{"model": "m", "columns": {"m": {"knn": {}}}}', DataError),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(
    tmp_path: Path, name: str, content: str, error: type[Exception]
) -> None:
    run = make_run(tmp_path / "run", [line(0)])
    (run / name).write_text(content)
    page = tmp_path / "report.html"
    page.write_text("the earlier report")
    with pytest.raises(error, match=re.escape(name)):
        write_report([run], page)
    assert page.read_text() == "the earlier report"


def test_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report.main)
    run = make_run(tmp_path / "run", [brief_line(step) for step in range(5)])
    result = CliRunner().invoke(app, [str(run)])
    assert result.exit_code == 0, result.output
    assert (run / "report.html").exists()
    assert CliRunner().invoke(app, [str(run), str(run)]).exit_code == 2
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 2
    assert "CheckpointError" in result.output
