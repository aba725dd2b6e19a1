"""Damaged and hostile model folders: never wrong numbers, never another error than ours."""

import json
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

import clever_zoo
from clever_zoo.encoder import pack_weights, read_weights
from clever_zoo.errors import CleverZooError, IntegrityError, SpecError, WeightsMismatchError
from clever_zoo.spec import CONFIG_FILENAME, WEIGHTS_FILENAME
from clever_zoo.weights import read_header


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
    """Copies of a content with some damage before byte `end`."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
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
    refused = tried = 0
    for mutant in mutations(content, header_end, 1100, seed=0):
        path.write_bytes(mutant)
        tried += 1
        try:
            read_weights(module, path)
        except CleverZooError:
            refused += 1
            continue
        for key, value in module.state_dict().items():
            assert torch.equal(value.float(), expected[key].float()), key
    assert tried >= 1000
    assert refused > 0.9 * tried


def load_mutants(folder: Path, name: str, count: int, seed: int) -> tuple[int, int]:
    """Load a folder with damage in one file; counts of mutants and of those that loaded."""
    expected = load_file(folder / WEIGHTS_FILENAME)
    content = (folder / name).read_bytes()
    tried = loaded = 0
    for mutant in mutations(content, len(content), count, seed):
        (folder / name).write_bytes(mutant)
        tried += 1
        try:
            encoder = clever_zoo.from_pretrained(folder)
        except CleverZooError:
            continue
        loaded += 1
        section = json.loads(mutant)["clever"]
        del section["schema_version"]
        assert json.loads(encoder.spec.model_dump_json()) == section
        for key, value in encoder.backbone.state_dict().items():
            assert torch.equal(value, expected[key].float()), key
    return tried, loaded


def test_damaged_folders_are_refused_or_load_what_they_say(folder: Path, whole: Path) -> None:
    """Weights have a digest. A config.json has none of its own: it is believed if it is valid."""
    tried, loaded = load_mutants(folder, WEIGHTS_FILENAME, 30, seed=1)
    assert tried >= 20
    assert not loaded
    (folder / WEIGHTS_FILENAME).write_bytes((whole / WEIGHTS_FILENAME).read_bytes())
    tried, loaded = load_mutants(folder, CONFIG_FILENAME, 40, seed=2)
    assert loaded < tried


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_damaged_folders(folder: Path, whole: Path, seed: int) -> None:
    tried, loaded = load_mutants(folder, WEIGHTS_FILENAME, 400, seed)
    assert tried > 300
    assert not loaded
    (folder / WEIGHTS_FILENAME).write_bytes((whole / WEIGHTS_FILENAME).read_bytes())
    load_mutants(folder, CONFIG_FILENAME, 400, seed)


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
