"""The benchmark in miniature; no time is asserted."""

import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from bench.__main__ import SECTIONS, SMOKE, Bench, main
from bench.load import compare_with_session, run_load
from bench.peers import fastembed_style_folder, timm_folder
from bench.record import RESULTS, BenchRecord, Row, markdown
from bench.timing import take_turns
from clever_zoo import OnnxEncoder
from clever_zoo.errors import DataError
from clever_zoo.onnx_graph import OnnxGraph

app = Typer()
app.command()(main)


@pytest.mark.parametrize("section", ["preprocess", "startup"])
def test_a_section_prints_and_writes_ratios(tmp_path: Path, section: str) -> None:
    arguments = [section, "--smoke", "--rounds", "1", "--out", str(tmp_path / "r.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "canary" in result.output
    record = BenchRecord.read(tmp_path / "r.json")
    for row in record.rows:
        assert row.section == section
        assert row.ratio.median == pytest.approx(row.ours.median / row.theirs.median)


@pytest.mark.slow
def test_all_sections_run(tmp_path: Path) -> None:
    arguments = ["all", "--smoke", "--rounds", "1", "--out", str(tmp_path / "r.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {row.section for row in BenchRecord.read(tmp_path / "r.json").rows} == set(SECTIONS)


@pytest.mark.slow
def test_peers_compute_what_ours_does(tmp_path: Path) -> None:
    """A peer that did less would be no peer."""
    bench = Bench(tmp_path, SMOKE, rounds=1)
    paths = bench.pictures()
    ours = OnnxEncoder.from_pretrained(bench.graph("resnet18")).embed(paths).full
    graph = OnnxGraph.open(bench.graph("resnet18", input="float32"))
    backbone = bench.encoder("resnet18").backbone
    for theirs in (fastembed_style_folder(graph, paths, 2), timm_folder(backbone, paths, 2)):
        assert theirs.shape == ours.shape
        cosine = torch.cosine_similarity(torch.from_numpy(ours), torch.from_numpy(theirs))
        assert cosine.min() > 0.999


class EveryThirdIsRefused(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked += 1
        self.send_response(503 if self.asked % 3 == 0 else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_refused_requests_are_no_answers() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), EveryThirdIsRefused) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        try:
            load = run_load(address, "m", 8, clients=1, requests=8)
        finally:
            server.shutdown()
        assert (load.requests, load.errors) == (5, 3), "the one to warm up does not count"
    none = run_load(address, "m", 8, clients=1, requests=2)
    assert (none.requests, none.errors, none.images_per_s) == (0, 3, 0)
    assert math.isnan(none.p50_ms)


def test_a_load_of_less_than_a_batch_is_compared(onnx_models: Path) -> None:
    load, alone = compare_with_session(onnx_models / "resnet18.onnx", clients=2, requests=2)
    assert (load.requests, load.errors) == (4, 0)
    assert alone > 0


def test_turns_are_taken_and_the_first_round_is_left_out() -> None:
    calls: list[str] = []

    def work(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    figures, canaries = take_turns({"a": lambda: work("a"), "b": lambda: work("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert len(canaries) == 2


def test_ratios_are_of_the_same_rounds_and_requirements_are_judged() -> None:
    row = Row.of("models", "x", "y", "images/s", [2.0, 30.0, 4.0], [1.0, 10.0, 4.0], 2.5)
    assert (row.ratio.min, row.ratio.median, row.ratio.max) == (1.0, 2.0, 3.0)
    assert row.verdict == "≥ 2.5: **missed**"
    late = Row.of("latency", "x", "y", "ms", [2.0], [4.0], 0.65, at_most=True)
    assert late.verdict == "≤ 0.65: met"


def test_the_committed_record_is_whole(tmp_path: Path) -> None:
    record = BenchRecord.read(RESULTS)
    assert {row.section for row in record.rows} == set(SECTIONS)
    assert record.rounds >= 5
    assert "+" not in record.environment.commit
    for row in record.rows:
        assert row.subject in markdown(record)
    with pytest.raises(DataError, match="make bench"):
        BenchRecord.read(tmp_path / "absent.json")
