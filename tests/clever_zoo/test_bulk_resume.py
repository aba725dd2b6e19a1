"""A bulk run that is stopped goes on: nothing lost, nothing doubled, memory constant."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

import clever_zoo
from clever_zoo import bulk
from clever_zoo.bulk import BulkReport, embed_files, find_images
from clever_zoo.embedder import ImageEmbedder
from clever_zoo.embedding import Embedding, split_features
from clever_zoo.errors import BackendMissingError, DataError, ImageError, SpecError
from clever_zoo.locate import released_folder
from clever_zoo.onnx_encoder import OnnxEncoder
from clever_zoo.registry import model_info
from clever_zoo.samples import sample_paths

SPEC = model_info("clever-resnet18")
SMALL_PARTS_CLI = (
    "import clever_zoo.bulk; clever_zoo.bulk.PART_IMAGES = 8; "
    "from clever_zoo.cli import main; main()"
)


class PixelSlices(ImageEmbedder):
    """An encoder without a network: some of the pixels are the features."""

    spec = SPEC

    def __init__(self, fail_after: int = 1 << 62) -> None:
        self.images = 0
        self._fail_after = fail_after

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> Embedding[NDArray[np.float32]]:
        if self.images >= self._fail_after:
            raise KeyboardInterrupt
        self.images += len(pixels)
        features = pixels.reshape(len(pixels), -1)[:, 1000:1512].astype(np.float32)
        return split_features(features, self.spec.invariant_dim)


@pytest.fixture
def onnx_model(onnx_models: Path) -> Path:
    return onnx_models / "resnet18.onnx"


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """100 pictures; every ninth file is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, path in enumerate(sample_paths()[:100]):
        target = folder / f"{i:03d}.png"
        if i % 9 == 4:
            target.write_bytes(b"no picture")
        else:
            shutil.copy(path, target)
    return [str(path) for path in find_images([folder])]


@pytest.fixture
def run(
    pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., BulkReport]:
    monkeypatch.setattr(bulk, "PART_IMAGES", 16)

    def run(
        *,
        paths: list[str] = pictures,
        name: str = "out.parquet",
        encoder: PixelSlices | None = None,
        **options,
    ) -> BulkReport:
        options = {"batch_size": 8, "threads": 2, **options}
        return embed_files(paths, encoder or PixelSlices(), tmp_path / name, **options)

    return run


def interrupt(run: Callable[..., BulkReport], after: int = 50, **options) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(encoder=PixelSlices(fail_after=after), **options)


def content(out: Path) -> list[object]:
    """All rows and error lines, bit for bit."""
    errors = out.with_name(f"{out.name}.errors.jsonl")
    lines = errors.read_text() if errors.exists() else None
    if out.suffix == ".npz":
        with np.load(out) as arrays:
            return [lines, *((name, arrays[name].tobytes()) for name in sorted(arrays))]
    table = pq.read_table(out)
    halves = (np.stack(table[name].to_numpy()).tobytes() for name in ("invariant", "equivariant"))
    return [lines, table["path"].to_pylist(), *halves, table.schema.metadata]


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_an_interrupted_run_goes_on_where_it_was(run, pictures, tmp_path: Path, suffix) -> None:
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"
    report = run(name=whole.name)
    assert (report.written, report.unreadable, report.resumed) == (89, 11, 0)
    assert not (tmp_path / f".whole.{suffix}.parts").exists()
    for after in (30, 20, 1):
        interrupt(run, after, name=out.name, resume=True)
        assert not out.exists()
    encoder = PixelSlices()
    done = []
    report = run(name=out.name, encoder=encoder, resume=True, on_progress=done.append)
    assert (report.written, report.unreadable, report.resumed) == (89, 11, 48)
    assert encoder.images == 89 - sum(i % 9 != 4 for i in range(48))
    assert done == [56, 64, 72, 80, 88, 96, 100]
    assert content(out) == content(whole)
    assert {p.name for p in tmp_path.iterdir()} == {
        "pictures", whole.name, f"{whole.name}.errors.jsonl", out.name, f"{out.name}.errors.jsonl",
    }  # fmt: skip
    rows = content(whole)[1] if suffix == "parquet" else np.load(whole)["path"].tolist()
    assert rows == [path for i, path in enumerate(pictures) if i % 9 != 4]


def test_without_resume_it_starts_again_and_says_so(run, tmp_path: Path, caplog) -> None:
    interrupt(run)
    folder = tmp_path / ".out.parquet.parts"
    assert f"what is done is kept in {folder}" in caplog.text
    caplog.clear()
    encoder = PixelSlices()
    report = run(encoder=encoder)
    assert (encoder.images, report.resumed) == (89, 0)
    assert f"removing {folder}" in caplog.text


def test_parts_outlive_a_typo_and_a_missing_decoder(run, tmp_path: Path, monkeypatch) -> None:
    interrupt(run)
    parts = sorted((tmp_path / ".out.parquet.parts").iterdir())
    with pytest.raises(DataError):
        run(paths=find_images([tmp_path / "typo"]))
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.delitem(sys.modules, "clever_zoo.fast_pixels", raising=False)
    with pytest.raises(BackendMissingError, match="simplejpeg"):
        run(decoder="fast")
    assert sorted((tmp_path / ".out.parquet.parts").iterdir()) == parts


def test_parts_of_another_run_are_refused(run, pictures, tmp_path: Path) -> None:
    interrupt(run)
    with pytest.raises(DataError, match="batch_size was 8 and is 4"):
        run(resume=True, batch_size=4)
    with pytest.raises(DataError, match="decoder was 'pillow' and is 'fast'"):
        run(resume=True, decoder="fast")
    other = PixelSlices()
    weights = SPEC.weights.model_copy(update={"sha256": "0" * 64})
    other.spec = SPEC.model_copy(update={"weights": weights})
    with pytest.raises(DataError, match=f"sha256 was '{SPEC.weights.sha256}' and is '0000"):
        run(resume=True, encoder=other)

    class InEightBits(PixelSlices):
        precision = "int8"

    other = InEightBits()
    with pytest.raises(DataError, match="precision was 'fp32' and is 'int8'"):
        run(resume=True, encoder=other)
    with pytest.raises(DataError, match=r"part-00000000.npz is not of the files 0 to 15 .*changed"):
        run(resume=True, paths=pictures[1:])
    assert run(resume=True, paths=pictures[:-1]).resumed == 48, "a change after what is done"


def test_two_runs_to_one_output_are_kept_apart(run, tmp_path: Path) -> None:
    refused = []

    def meanwhile(done: int) -> None:
        if done in (16, 64):
            with pytest.raises(DataError, match="another run holds") as caught:
                run(resume=done == 64)
            refused.append(str(caught.value))
            assert run(name="other.npz").written == 89

    report = run(on_progress=meanwhile)
    assert (report.written, report.resumed, len(refused)) == (89, 0, 2)
    assert str(tmp_path / ".out.parquet.lock") in refused[0]
    assert not list(tmp_path.glob(".*")), "nothing is left behind"
    assert run().written == 89


def test_parts_of_another_graph_are_refused(pictures, onnx_model: Path, tmp_path: Path) -> None:
    """The same spec and weights, but a graph that was made otherwise."""
    graph = onnx.load(onnx_model)
    graph.producer_version = "another"
    onnx.save(graph, tmp_path / "other.onnx")
    first, other = map(OnnxEncoder.from_pretrained, (onnx_model, tmp_path / "other.onnx"))
    assert first.spec == other.spec
    out = tmp_path / "out.npz"

    def stopped(chunks, options, progress):
        yield next(bulk.embed_chunks(first, chunks, options, progress))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_files(pictures, first, out, engine=stopped)
    with pytest.raises(DataError, match=r"graph_sha256 was .* and is "):
        embed_files(pictures, other, out, resume=True)
    embed_files(pictures, first, out, resume=True)
    with np.load(out) as arrays:
        assert str(arrays["graph_sha256"]) == hashlib.sha256(onnx_model.read_bytes()).hexdigest()
        assert str(arrays["sha256"]) == SPEC.weights.sha256


def test_the_digest_is_of_the_weights_as_they_are(pictures, tmp_path: Path) -> None:
    def recorded(encoder: clever_zoo.Encoder) -> str:
        embed_files(pictures[:1], encoder, tmp_path / "out.npz")
        with np.load(tmp_path / "out.npz") as arrays:
            return str(arrays["sha256"])

    encoder = clever_zoo.from_pretrained("clever-resnet18")
    assert recorded(encoder) == SPEC.weights.sha256
    with torch.no_grad():
        encoder.backbone.conv1.weight += 0.1
    assert recorded(encoder) == encoder.save_pretrained(tmp_path / "saved").weights.sha256
    fresh = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    assert recorded(fresh) == fresh.save_pretrained(tmp_path / "fresh").weights.sha256


@pytest.mark.parametrize("damage", ["truncated", "altered", "foreign"])
def test_a_damaged_part_is_named_and_can_be_deleted(run, tmp_path: Path, damage: str) -> None:
    whole = tmp_path / "whole.parquet"
    run(name=whole.name)
    interrupt(run)
    part = tmp_path / ".out.parquet.parts/part-00000001.npz"
    old = part.read_bytes()
    middle = len(old) // 2
    part.write_bytes(
        {
            "truncated": old[:middle],
            "altered": old[:middle] + bytes([old[middle] ^ 1]) + old[middle + 1 :],
            "foreign": b"\x93NUMPY",
        }[damage]
    )
    with pytest.raises(DataError, match=f"{part.name} is damaged .*delete it and resume"):
        run(resume=True)
    part.unlink()
    run(resume=True)
    assert content(tmp_path / "out.parquet") == content(whole)


def test_a_bad_file_can_be_mended_before_going_on(run, pictures, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"image 4 .*004\.png"):
        run(on_error="raise")
    assert not (tmp_path / ".out.parquet.parts").exists(), "nothing was done yet"
    for path in pictures[4:60:9]:
        shutil.copy(sample_paths()[0], path)
    with pytest.raises(ImageError, match=r"image 67 "):
        run(on_error="raise")
    for path in pictures[67::9]:
        shutil.copy(sample_paths()[0], path)
    report = run(on_error="raise", resume=True)
    assert (report.written, report.resumed, report.errors_path) == (100, 64, None)


def test_raise_does_not_pass_over_what_an_earlier_run_skipped(run, pictures) -> None:
    interrupt(run)
    with pytest.raises(ImageError, match=r"image 4 "):
        run(on_error="raise", resume=True)
    for path in pictures[4::9]:
        shutil.copy(sample_paths()[0], path)
    assert run(on_error="raise", resume=True).written == 100


def test_a_missing_writer_is_found_before_the_work(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    encoder = PixelSlices()
    with pytest.raises(BackendMissingError, match=r"clever-zoo\[bulk\]"):
        run(encoder=encoder)
    assert encoder.images == 0
    assert run(name="out.npz", encoder=encoder).written == 89


def test_kill_at_random_moments(pictures, onnx_model: Path, tmp_path: Path) -> None:
    def start(out: Path) -> subprocess.Popen[bytes]:
        command = ["embed", str(tmp_path / "pictures"), "-o", str(out), "--resume"]
        options = ["-m", str(onnx_model), "--batch-size", "4", "--threads", "2"]
        return subprocess.Popen(
            [sys.executable, "-c", SMALL_PARTS_CLI, *command, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    assert start(whole).wait() == 1, "some files are unreadable"
    seed = random.randrange(1 << 32)
    moments = random.Random(seed)
    parts = tmp_path / ".out.parquet.parts"
    kills = 0
    for goal in sorted(moments.randint(1, 13) for _ in range(4)):
        process = start(out)
        while process.poll() is None and len(list(parts.glob("part-*"))) < goal:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2, f"seed {seed}"
    assert start(out).wait() == 1
    assert content(out) == content(whole), f"seed {seed}"
    assert not parts.exists()
    assert not list(tmp_path.glob(".*")), "nothing is left behind"


def peak_bytes(count: int, out: Path) -> int:
    paths: Iterator[str] = itertools.repeat(str(sample_paths()[0]), count)
    tracemalloc.start()
    try:
        assert embed_files(paths, PixelSlices(), out).written == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bulk, "PART_IMAGES", 64)
    out = tmp_path / "out.parquet"
    peak_bytes(64, out)  # imports
    few, many = peak_bytes(1_000, out), peak_bytes(4_000, out)
    assert many < 1.05 * few + 100_000, f"{few} and {many} bytes"


def test_find_images_is_lazy_sorted_and_sees_each_file_once(tmp_path: Path, monkeypatch) -> None:
    names = ["b/2.png", "b/1.JPG", "a.png", "a/z.png", "a/c/d.webp", "a-b/x.png", "a/n.txt", ".png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    found = list(find_images([tmp_path]))
    assert found == sorted(
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix.lower() in bulk.IMAGE_SUFFIXES
    )
    assert len(found) == 7
    assert list(find_images([tmp_path / "b", tmp_path, tmp_path / "*.png"])) == [
        *(path for path in found if path.parent.name == "b"),
        *(path for path in found if path.parent.name != "b"),
    ]
    monkeypatch.chdir(tmp_path)
    assert len(list(find_images([".", tmp_path, "a/../a.png"]))) == 8, "'..' is not worked out"
    images = find_images([tmp_path / "a", tmp_path / "nothing"])
    assert next(images) == tmp_path / "a/c/d.webp"
    with pytest.raises(DataError, match="nothing is no file"):
        list(images)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError):
        list(find_images([tmp_path]))


def test_values_that_are_not_finite_are_listed_and_not_written(run, pictures, tmp_path) -> None:
    class Overflowing(PixelSlices):
        def embed_pixels(self, pixels: NDArray[np.uint8]) -> Embedding[NDArray[np.float32]]:
            embedding = super().embed_pixels(pixels)
            embedding.equivariant[0, 3] = np.inf
            return embedding

    report = run(encoder=Overflowing())
    assert (report.written, report.unreadable) == (89 - 13, 11 + 13)
    lines = (tmp_path / "out.parquet.errors.jsonl").read_text().splitlines()
    listed = {json.loads(line)["path"]: json.loads(line)["reason"] for line in lines}
    assert list(listed) == sorted(listed)
    unusable = [path for path, reason in listed.items() if "not finite" in reason]
    readable = [path for i, path in enumerate(pictures) if i % 9 != 4]
    assert len(unusable) == 13
    assert set(unusable) <= set(readable)
    assert pq.read_table(tmp_path / "out.parquet")["path"].to_pylist() == [
        path for path in readable if path not in unusable
    ]
    with pytest.raises(ImageError, match="not finite"):
        run(encoder=Overflowing(), on_error="raise", paths=pictures[:1])


def test_each_output_has_its_own_list(run, tmp_path: Path) -> None:
    run(name="out.parquet")
    run(name="out.npz", paths=[str(path) for path in sample_paths()[:3]])
    assert (tmp_path / "out.parquet.errors.jsonl").exists()


@pytest.mark.parametrize("option", [{"decoder": "PIL"}, {"on_error": "stop"}])
def test_options_are_not_guessed(run, tmp_path: Path, option: dict[str, str]) -> None:
    (name, value), *_ = option.items()
    with pytest.raises(SpecError, match=f"{name} is '{value}'; use '"):
        run(**option)
    assert not list(tmp_path.glob("out*"))


def test_errors_are_listed_in_order(run, pictures, tmp_path: Path) -> None:
    run()
    lines = (tmp_path / "out.parquet.errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == pictures[4::9]


def test_onnx_runs_without_torch(pictures, onnx_model: Path, tmp_path: Path) -> None:
    """Chosen because the model is an .onnx file, or has one in its folder; else it is torch."""
    encoder = clever_zoo.from_pretrained("clever-resnet18")
    (tmp_path / "saved/onnx").mkdir(parents=True)
    shutil.copy(onnx_model, tmp_path / "saved/onnx/model.onnx")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(released_folder(SPEC) / name, tmp_path / "saved" / name)
    without_torch = (
        "import sys; sys.modules.update(torch=None, torchvision=None, timm=None); "
        "from clever_zoo.cli import main; main()"
    )

    def embed(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", without_torch, "embed", str(tmp_path / "pictures")]
        return subprocess.run(
            [*command, "-o", str(out), *options], capture_output=True, text=True, check=False
        )

    models = {"file": str(onnx_model), "folder": f"local-dir:{tmp_path / 'saved'}"}
    for name, model in models.items():
        result = embed(tmp_path / f"{name}.parquet", "-m", model)
        assert result.returncode == 1, result.stderr
        assert "89 images embedded with clever-resnet18.fmnist (onnx)" in result.stdout
        assert "images/s" in result.stderr
    assert content(tmp_path / "file.parquet") == content(tmp_path / "folder.parquet")
    table = pq.read_table(tmp_path / "file.parquet")
    assert table.schema.metadata[b"precision"] == b"fp32"
    expected = encoder.embed(table["path"].to_pylist())
    for name, half in expected._asdict().items():
        tolerance = 1e-4 * np.linalg.norm(half, axis=1).max()
        np.testing.assert_allclose(np.stack(table[name].to_numpy()), half, atol=tolerance)

    result = embed(tmp_path / "x.parquet", "-m", models["folder"], "--runtime", "torch")
    assert result.returncode == 2
    assert 'pip install "clever-zoo[torch]"' in result.stderr
    result = embed(tmp_path / "x.parquet", "-m", str(onnx_model), "--device", "mps")
    assert result.returncode == 2
    assert "'mps'" in result.stderr
