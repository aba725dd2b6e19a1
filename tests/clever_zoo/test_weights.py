"""Damaged and hostile model folders: never wrong numbers, never another error than ours."""

import contextlib
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

import clever_zoo
from clever_zoo.encoder import pack_weights, read_weights
from clever_zoo.errors import CleverZooError, IntegrityError, SpecError, WeightsMismatchError
from clever_zoo.files import SUMS_FILENAME, write_sums
from clever_zoo.locate import ONNX_FILENAME
from clever_zoo.spec import CONFIG_FILENAME, WEIGHTS_FILENAME, WeightFile
from clever_zoo.weights import read_header

RELEASED = Path(__file__).parents[2] / "model_cards/clever-resnet18.fmnist"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=16, patch_size=8)
    encoder.save_pretrained(folder, dtype="float16")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    for name in (CONFIG_FILENAME, WEIGHTS_FILENAME):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    return tmp_path


def mutations(content: bytes, end: int, count: int, seed: int) -> Iterator[bytes]:
    """So many copies of a content, each with other damage before byte `end`."""
    rng = np.random.default_rng(seed)
    while count:
        start = int(rng.integers(end))
        length = int(rng.choice([1, 2, 8, 64]))
        mutant = bytearray(content)
        match rng.integers(6):
            case 0:
                mutant[start] ^= 1 << int(rng.integers(8))
            case 1:
                mutant[start : start + length] = rng.bytes(length)
            case 2:
                del mutant[start : start + length]
            case 3:
                mutant[start:start] = mutant[start : start + length]
            case 4:
                mutant[start : start + length] = bytes(length)
            case 5:
                del mutant[start:]
        if mutant != content:
            count -= 1
            yield bytes(mutant)


def with_header(path: Path, header: Any, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"", "not valid JSON"),
        (b"[]", "wrong at"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * (1 << 20) + b"{}", "at most 1048576"),
        ({"a": 3}, "wrong at a"),
        ({"a": entry([2], 0, 8) | {"x": 1}}, "a.x: unknown key"),
        ({"a": entry([-2], 0, 8)}, "a.shape.0"),
        ({"a": entry([True], 0, 4)}, "a.shape.0"),
        ({"a": entry([2.0], 0, 8)}, "a.shape.0"),
        ({"a": entry([2], 0, 8, "F33")}, "type 'F33'"),
        ({"a": entry([2**62, 4], 0, 2**66)}, "end at byte"),
        ({"a": entry([2], 0, 4)}, r"lies at bytes \[0, 4\], not at \[0, 8\]"),
        ({"a": entry([2], 8, 0)}, "lies at bytes"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, r"b lies at bytes \[4, 12\]"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, "b lies at bytes"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, "b lies at bytes"),
        ({"a": entry([2], 0, 8)}, "end at byte 8 of 16"),
        ({"a": entry([8], 0, 32)}, "end at byte 32 of 16"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, header: Any, problem: str) -> None:
    path = with_header(tmp_path / "x.safetensors", header, bytes(16))
    with pytest.raises(IntegrityError, match=problem) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("claimed", [2**63, 2**40, 10_000, 9])
def test_a_huge_header_is_refused_before_anything_is_allocated(
    tmp_path: Path, claimed: int
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + bytes(8))
    if claimed == 2**40:
        with path.open("r+b") as file:
            file.truncate(2**40 + 8)  # as long as it claims, and sparse
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match=f"{claimed} bytes"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_files_too_short_for_a_header(tmp_path: Path) -> None:
    for content in (b"", b"\x08", bytes(8)):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(IntegrityError, match="no safetensors file"):
            read_header(tmp_path / "x.safetensors")


def test_a_good_header_says_what_safetensors_says(whole: Path) -> None:
    names = {torch.float16: "F16", torch.float32: "F32"}
    tensors = load_file(whole / WEIGHTS_FILENAME)
    said = {key: (names[value.dtype], tuple(value.shape)) for key, value in tensors.items()}
    assert read_header(whole / WEIGHTS_FILENAME) == said


def test_types_that_float32_does_not_hold_are_refused(tmp_path: Path) -> None:
    encoder = clever_zoo.create_encoder("resnet18")
    state = encoder.backbone.state_dict()
    path = tmp_path / "x.safetensors"
    save_file({k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}, path)
    read_weights(encoder.backbone, path)
    assert encoder.backbone.conv1.weight.dtype == torch.float32
    for key, changed, name in (
        ("conv1.weight", torch.float64, "F64"),
        ("conv1.weight", torch.int32, "I32"),
        ("bn1.num_batches_tracked", torch.float32, "F32"),
    ):
        save_file(state | {key: state[key].to(changed)}, path)
        with pytest.raises(WeightsMismatchError, match=f"wrong type: {key} is {name}, expected"):
            read_weights(encoder.backbone, path)


def test_a_thousand_damaged_headers_give_the_same_numbers_or_an_error_of_ours(
    tmp_path: Path,
) -> None:
    """As if the digest had been made of the damaged file: the header alone must tell."""
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 8, bias=False)
    )
    content = pack_weights(module, "float16")
    expected = load(content)
    path = tmp_path / WEIGHTS_FILENAME
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    refused, count = 0, 1000
    for mutant in mutations(content, header_end, count, seed=0):
        path.write_bytes(mutant)
        try:
            read_weights(module, path)
        except CleverZooError:
            refused += 1
            continue
        for key, value in module.state_dict().items():
            assert torch.equal(value.float(), expected[key].float()), key
    assert refused > 0.9 * count


Load = Callable[[Path], Any]


def survivors(
    folder: Path,
    name: str,
    count: int,
    *,
    seed: int = 0,
    load: Load = clever_zoo.from_pretrained,
    end: int | None = None,
) -> Iterator[tuple[bytes, Any]]:
    """Load a folder so many times, each with other damage in one file; what loads, and from what.

    What does not load must fail with an error of ours. At the end the file is whole again.
    """
    path = folder / name
    content = path.read_bytes()
    for mutant in mutations(content, end or len(content), count, seed):
        path.write_bytes(mutant)
        with contextlib.suppress(CleverZooError):
            yield mutant, load(folder)
    path.write_bytes(content)


def assert_same_numbers(encoder: clever_zoo.Encoder, expected: Mapping[str, torch.Tensor]) -> None:
    for key, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, expected[key].float()), key


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """A sample by default, the rest when slow tests run."""
    counts = [few, pytest.param(many, marks=pytest.mark.slow)]
    return pytest.mark.parametrize("count", counts)


@few_or_many(30, 500)
def test_damaged_weights_never_load(folder: Path, count: int) -> None:
    assert not list(survivors(folder, WEIGHTS_FILENAME, count, seed=count))


@few_or_many(40, 500)
def test_a_damaged_config_is_refused_or_loads_what_it_says(folder: Path, count: int) -> None:
    """Without SHA256SUMS a config.json has no digest: it is believed if it is valid."""
    expected, loaded = load_file(folder / WEIGHTS_FILENAME), 0
    for mutant, encoder in survivors(folder, CONFIG_FILENAME, count, seed=count):
        loaded += 1
        section = json.loads(mutant)["clever"]
        del section["schema_version"]
        assert json.loads(encoder.spec.model_dump_json()) == section
        assert_same_numbers(encoder, expected)
    assert loaded < count


def load_signed(folder: Path) -> clever_zoo.Encoder:
    """Load a folder whose config.json was made to fit whatever the weights file holds."""
    path = folder / CONFIG_FILENAME
    config = json.loads(path.read_text())
    weights = WeightFile.of((folder / WEIGHTS_FILENAME).read_bytes())
    config["clever"]["weights"] = weights.model_dump()
    path.write_text(json.dumps(config))
    return clever_zoo.from_pretrained(folder)


@few_or_many(20, 200)
def test_damaged_headers_with_a_digest_that_fits(folder: Path, count: int) -> None:
    """Some damage is harmless: to what nobody reads."""
    expected = load_file(folder / WEIGHTS_FILENAME)
    end = 8 + struct.unpack("<Q", (folder / WEIGHTS_FILENAME).read_bytes()[:8])[0]
    for _, encoder in survivors(
        folder, WEIGHTS_FILENAME, count, seed=count, load=load_signed, end=end
    ):
        assert_same_numbers(encoder, expected)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, onnx_models: Path) -> Path:
    """A released model as it is published: with its graph, and the digests of all."""
    folder = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(RELEASED, folder)
    (folder / ONNX_FILENAME).parent.mkdir()
    shutil.copy(onnx_models / "resnet18.onnx", folder / ONNX_FILENAME)
    write_sums(folder)
    return folder


LOADERS: dict[str, Load] = {
    WEIGHTS_FILENAME: clever_zoo.from_pretrained,
    ONNX_FILENAME: clever_zoo.OnnxEncoder.from_pretrained,
}


@few_or_many(4, 60)
@pytest.mark.parametrize("main_file", LOADERS)
def test_a_damaged_published_folder_loads_as_published_or_not(
    published: Path, main_file: str, count: int
) -> None:
    """In torch and in ONNX Runtime: only a list of digests may be damaged where it is not read."""
    load = LOADERS[main_file]
    whole = load(published)
    for name in (CONFIG_FILENAME, main_file):
        assert not list(survivors(published, name, count, seed=count, load=load))
    for _, encoder in survivors(published, SUMS_FILENAME, 2 * count, seed=count, load=load):
        assert encoder.spec == whole.spec
        assert encoder.digests() == whole.digests()


@pytest.mark.slow
def test_a_damaged_graph_without_a_digest_loads_or_is_an_error_of_ours(
    tmp_path: Path, onnx_models: Path
) -> None:
    """Of an .onnx file on its own nothing is recorded; its text is at both ends."""
    shutil.copy(onnx_models / "vit.onnx", tmp_path)
    loaded = 0
    for _ in survivors(
        tmp_path, "vit.onnx", 200, end=60_000, load=lambda f: LOADERS[ONNX_FILENAME](f / "vit.onnx")
    ):
        loaded += 1
    assert loaded < 200


def test_a_folder_cannot_name_a_file_outside(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / WEIGHTS_FILENAME).read_bytes())
    config = json.loads((folder / CONFIG_FILENAME).read_text())
    for name in ("../outside.safetensors", str(outside), "x/../../outside.safetensors"):
        config["clever"]["weights"]["filename"] = name
        (folder / CONFIG_FILENAME).write_text(json.dumps(config))
        with pytest.raises(SpecError, match=r"weights\.filename"):
            clever_zoo.from_pretrained(folder)


def test_a_folder_brings_no_code(folder: Path) -> None:
    """Python files and pickles beside the weights are not so much as opened."""
    for name in ("modeling.py", "__init__.py", "hubconf.py", "conftest.py"):
        (folder / name).write_text("raise SystemExit('executed')")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    config = json.loads((folder / CONFIG_FILENAME).read_text())
    config |= {"auto_map": {"AutoModel": "modeling.Model"}, "custom_load": "modeling.load"}
    (folder / CONFIG_FILENAME).write_text(json.dumps(config))
    assert clever_zoo.from_pretrained(folder).spec.backbone == "vit_tiny"
    (folder / WEIGHTS_FILENAME).unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        clever_zoo.from_pretrained(folder)
