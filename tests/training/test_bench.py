"""The benchmark's command line in miniature; no time is asserted."""

import json

import pytest
from typer.testing import CliRunner

from bench.timing import photograph
from training.bench import app

TINY = ["--global-size", "32", "--local-size", "24", "--image-size", "40", "--batch", "3"]


@pytest.mark.parametrize(
    ("style", "local_views", "strength"), [("dino", 2, "caug_plus"), ("simsiam", 0, "caug")]
)
def test_views_writes_a_whole_record(tmp_path, style, local_views, strength) -> None:
    path = tmp_path / "views.json"
    arguments = ["--style", style, "--local-views", str(local_views), "--strength", strength]
    result = CliRunner().invoke(
        app, ["views", *TINY, *arguments, "--rounds", "3", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    assert "ratio" in result.output
    record = json.loads(path.read_text())
    assert len(record["rounds"]) == 3
    assert record["settings"]["style"] == style
    assert {"commit", "hardware", "torch"} <= set(record["environment"])
    for each in record["rounds"]:
        assert each["ratio"] == pytest.approx(each["batched"] / each["reference"])
    ratio = record["summary"]["ratio"]
    assert ratio["min"] <= ratio["median"] <= ratio["max"]


def test_impossible_options_are_explained() -> None:
    result = CliRunner().invoke(app, ["views", *TINY, "--style", "simsiam", "--local-views", "8"])
    assert result.exit_code == 2
    assert "local_views is 8" in result.output


def test_help_teaches() -> None:
    result = CliRunner().invoke(app, ["views", "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output


def test_photographs_are_reproducible() -> None:
    assert photograph(3, 40).tobytes() == photograph(3, 40).tobytes()
    assert photograph(3, 40).tobytes() != photograph(4, 40).tobytes()


def test_heads_prints_both_forms_and_equal_gradients(tmp_path) -> None:
    out = tmp_path / "heads.json"
    sizes = ["--batch", "128", "--views", "4", "--prototypes", "16384", "--feature-dim", "64"]
    result = CliRunner().invoke(app, ["heads", *sizes, "--chunk-images", "8", "--json", str(out)])
    assert result.exit_code == 0, result.output
    whole, chunked = json.loads(out.read_text())["forms"].values()
    assert whole["gradient_norm"] == pytest.approx(chunked["gradient_norm"], rel=1e-4)
    assert 0 < chunked["peak_bytes"] < whole["peak_bytes"]


def test_scan_compares_with_the_loop(tmp_path) -> None:
    out = tmp_path / "scan.json"
    sizes = ["--batch", "1", "--channels", "2", "--length", "20", "--rounds", "2"]
    result = CliRunner().invoke(app, ["scan", *sizes, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "times the loop" in result.output
    record = json.loads(out.read_text())
    assert record["settings"]["length"] == 20
    assert len(record["rounds"]) == len(record["canary_gflops"]) == 2
    ratios = [row["loop"] / row["torch"] for row in record["rounds"]]
    assert record["times_the_loop"]["torch"]["min"] == pytest.approx(min(ratios))
    assert record["times_the_loop"]["loop"]["median"] == 1


def test_small_maps_compares_with_convolutions(tmp_path) -> None:
    out = tmp_path / "small-maps.json"
    options = ["--batch", "2", "--size", "16", "--rounds", "2", "--json", str(out)]
    result = CliRunner().invoke(app, ["small-maps", "resnet18", *options])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["settings"] == {"backbone": "resnet18", "batch": 2, "size_px": 16}
    ratios = [row["convolutions"] / row["products"] for row in record["rounds"]]
    assert record["times_the_convolutions"]["products"]["max"] == pytest.approx(max(ratios))


@pytest.mark.slow
def test_backbones_compares_with_resnet50(tmp_path) -> None:
    out = tmp_path / "backbones.json"
    options = ["--batch", "2", "--size", "128", "--steps", "1", "--json", str(out)]
    result = CliRunner().invoke(app, ["backbones", "vmamba_tiny", *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["backbones"]
    assert list(rows) == ["resnet50", "vmamba_tiny"]
    weights = 4 * 4 * 23_508_032  # with gradients and two moments
    assert rows["resnet50"]["peak_bytes"] > weights
    assert rows["vmamba_tiny"]["peak_bytes"] < 2 * rows["resnet50"]["peak_bytes"]


@pytest.mark.slow
def test_step_estimates_a_whole_run(tmp_path) -> None:
    out = tmp_path / "step.json"
    result = CliRunner().invoke(
        app,
        ["step", "clever-vit-tiny.in100-caug", "--batch", "2", "--steps", "1", "--cores", "1",
         "--json", str(out)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    row = record["recipes"]["clever-vit-tiny.in100-caug"]
    hours = 200 * 126_689 / row["images_per_s"] / 3600
    assert row["in100_hours"] == pytest.approx(hours)
    assert 0 <= row["data_share"] < 1
    assert row["peer_images_per_s"] <= row["reference_views_per_s"]
