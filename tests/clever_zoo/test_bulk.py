"""From files to a file of embeddings, through the command line and below it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import clever_zoo
from clever_zoo.bulk import embed_files, find_images
from clever_zoo.cli import app
from clever_zoo.errors import DataError, ImageError
from clever_zoo.samples import sample_class, sample_paths
from tests.clever_zoo.test_preprocess import bad_files

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    encoder.save_pretrained(folder)
    return f"local-dir:{folder}"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for i, path in enumerate(sample_paths()[:7]):
        shutil.copy(path, folder / ("deep" if i % 2 else ".") / path.name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_samples_are_complete() -> None:
    paths = sample_paths()
    classes = [sample_class(path) for path in paths]
    assert len(paths) == 300
    assert {classes.count(name) for name in classes} == {30}
    assert len(set(classes)) == 10


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_embeds_folders_globs_and_files(pictures: Path, tmp_path: Path, model, suffix) -> None:
    out = tmp_path / f"out.{suffix}"
    inputs = [str(pictures), str(pictures / "deep/*.png"), str(sample_paths()[200])]
    result = runner.invoke(
        app, ["embed", *inputs, "-o", str(out), "-m", model, "--batch-size", "3"]
    )
    assert result.exit_code == 0, result.output
    encoder = clever_zoo.from_pretrained(model)
    if suffix == "npz":
        with np.load(out) as content:
            paths, halves = content["path"].tolist(), [content["invariant"], content["equivariant"]]
            assert str(content["sha256"]) == encoder.spec.weights.sha256
    else:
        table = pq.read_table(out)
        assert [f.name for f in table.schema] == ["path", "invariant", "equivariant"]
        assert str(table.schema.field("invariant").type) == "fixed_size_list<element: float>[153]"
        assert table.schema.metadata[b"model"].decode() == encoder.spec.name
        assert table.schema.metadata[b"sha256"].decode() == encoder.spec.weights.sha256
        paths = table["path"].to_pylist()
        halves = [np.stack(table[name].to_numpy()) for name in ("invariant", "equivariant")]
    assert len(paths) == len(set(paths)) == 8
    expected = encoder.embed(paths)
    for ours, theirs in zip(halves, expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.linalg.norm(theirs, axis=1).max())


def test_unreadable_files_are_listed_and_the_rest_written(pictures, tmp_path, model) -> None:
    bad = set(bad_files(pictures)) - {"missing.png"}
    out = tmp_path / "out.parquet"
    result = runner.invoke(app, ["embed", str(pictures), "-o", str(out), "-m", model])
    assert result.exit_code == 1, result.output
    assert pq.read_table(out).num_rows == 7
    lines = (tmp_path / "out.parquet.errors.jsonl").read_text().splitlines()
    listed = {Path(json.loads(line)["path"]).name: json.loads(line)["reason"] for line in lines}
    assert listed.keys() == bad
    assert all(listed.values())
    for name in bad:
        (pictures / name).unlink()
    assert runner.invoke(app, ["embed", str(pictures), "-o", str(out), "-m", model]).exit_code == 0
    assert not (tmp_path / "out.parquet.errors.jsonl").exists()


def test_raise_stops_at_the_first_and_leaves_the_old_file(pictures, tmp_path, model) -> None:
    bad_files(pictures)
    out = tmp_path / "out.parquet"
    out.write_bytes(b"earlier result")
    arguments = ["embed", str(pictures), "-o", str(out), "-m", model, "--on-error", "raise"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "ImageError" in result.output
    assert out.read_bytes() == b"earlier result"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.parquet", "pictures"]
    encoder = clever_zoo.from_pretrained(model)
    with pytest.raises(ImageError):
        embed_files(find_images([pictures]), encoder, out, on_error="raise")


@pytest.mark.parametrize(
    ("make", "hint"),
    [("empty", "no images in"), ("absent", "no file, no folder"), ("*.png", "no file, no folder")],
)
def test_nothing_to_embed_is_exit_code_2(tmp_path: Path, make: str, hint: str, model) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out.parquet"
    result = runner.invoke(app, ["embed", str(tmp_path / make), "-o", str(out), "-m", model])
    assert result.exit_code == 2
    assert hint in result.output
    assert not out.exists()


def test_other_mistakes_are_exit_code_2(pictures: Path, tmp_path: Path, model: str) -> None:
    result = runner.invoke(
        app, ["embed", str(pictures), "-o", str(tmp_path / "x.csv"), "-m", model]
    )
    assert result.exit_code == 2
    assert ".parquet or .npz" in result.output
    result = runner.invoke(
        app, ["embed", str(pictures), "-o", str(tmp_path / "x.npz"), "-m", "dino-resnet50"]
    )
    assert result.exit_code == 2
    assert "training.pretrain dino-resnet50.fmnist" in result.output.replace("\n", "")


def test_unusable_targets_and_devices_are_exit_code_2(pictures, tmp_path, model) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    targets = [tmp_path / "folder.npz", tmp_path / "file/x.npz"]
    for target in targets:
        result = runner.invoke(app, ["embed", str(pictures), "-o", str(target), "-m", model])
        assert (result.exit_code, "error" in result.output) == (2, True)
    out = ["-o", str(tmp_path / "x.npz"), "-m", model, "--device", "warp-drive"]
    assert runner.invoke(app, ["embed", str(pictures), *out]).exit_code == 2
    result = runner.invoke(app, ["embed", "x" * 300, "-o", str(tmp_path / "x.npz"), "-m", model])
    assert result.exit_code == 2


def test_markup_in_names_is_printed_as_it_is(pictures, tmp_path, model) -> None:
    out = tmp_path / "x[bold].npz"
    result = runner.invoke(app, ["embed", str(pictures), "-o", str(out), "-m", model])
    assert result.exit_code == 0
    assert "x[bold].npz" in result.output


def test_names_that_are_not_utf8_are_listed(pictures, tmp_path, model) -> None:
    name = os.fsdecode(os.fsencode(pictures) + b"/caf\xe9.png")
    shutil.copy(sample_paths()[0], name)
    report = embed_files(
        find_images([pictures]), clever_zoo.from_pretrained(model), tmp_path / "out.parquet"
    )
    assert report.written == 7
    assert report.unreadable == 1
    assert "not valid UTF-8" in json.loads(report.errors_path.read_text())["reason"]


def test_all_unreadable_still_writes_an_empty_file(tmp_path: Path, model: str) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    for suffix in ("parquet", "npz"):
        out = tmp_path / f"out.{suffix}"
        report = embed_files([tmp_path / "a.png"], clever_zoo.from_pretrained(model), out)
        assert (report.written, report.unreadable) == (0, 1)
        assert out.exists()


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_an_encoder_without_a_split_writes_an_empty_half(tmp_path: Path, suffix: str) -> None:
    encoder = clever_zoo.create_encoder("resnet18", invariant_dim=512)
    out = tmp_path / f"out.{suffix}"
    embed_files(sample_paths()[:3], encoder, out)
    if suffix == "npz":
        with np.load(out) as content:
            assert content["equivariant"].shape == (3, 0)
    else:
        table = pq.read_table(out)
        assert table["equivariant"].to_pylist() == [[], [], []]
        assert len(table["invariant"][0].as_py()) == 512


def test_find_images_takes_named_files_whatever_their_suffix(pictures: Path) -> None:
    assert list(find_images([pictures / "notes.txt"])) == [pictures / "notes.txt"]
    assert len(list(find_images([pictures, pictures]))) == 7
    with pytest.raises(DataError):
        list(find_images([pictures / "nothing-*.png"]))


def test_list_info_and_help() -> None:
    listed = runner.invoke(app, ["list"])
    assert listed.exit_code == 0
    assert "vit_small" in listed.output
    assert set(clever_zoo.list_models()) <= set(listed.output.split())  # whole at 80 columns
    assert runner.invoke(app, ["list", "--backbone", "vgg"]).exit_code == 2
    assert runner.invoke(app, ["info", "clever-resnet99"]).exit_code == 2
    assert runner.invoke(app, ["verify", "clever-resnet99"]).exit_code == 2
    for command in ("list", "info", "embed", "compare", "convert", "verify"):
        shown = runner.invoke(app, [command, "--help"])
        assert shown.exit_code == 0
        assert "Usage" in shown.output
