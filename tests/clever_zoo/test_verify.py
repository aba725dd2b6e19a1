"""`clever-zoo verify`: a verdict for everything that is recorded of a model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import clever_zoo
from clever_zoo.cli import app
from clever_zoo.errors import IntegrityError, SourceError, UnknownModelError
from clever_zoo.files import SUMS_FILENAME, folder_files, write_sums
from clever_zoo.golden import GOLDEN_FILENAME, golden_values
from clever_zoo.verify import verify_model

ROOT = Path(__file__).parents[2]
RELEASED = ROOT / "model_cards/clever-resnet18.fmnist"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model with all that can be checked but ONNX."""
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    encoder.save_pretrained(tmp_path)
    (tmp_path / GOLDEN_FILENAME).write_text(json.dumps(golden_values(encoder)))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/drift.svg").write_text("<svg/>")
    write_sums(tmp_path)
    return tmp_path


def verdicts(source: str | Path) -> dict[str, str]:
    return {check.subject: check.verdict for check in verify_model(source)}


def failures(source: str | Path) -> dict[str, str]:
    return {c.subject: c.detail for c in verify_model(source) if c.verdict == "FAILED"}


@pytest.mark.parametrize("name", clever_zoo.list_models())
def test_released_models_are_as_recorded(name: str) -> None:
    result = CliRunner().invoke(app, ["verify", name])
    assert result.exit_code == 0, result.output
    for line in ("config.json", "registry", "weights", "values in torch"):
        assert f"ok      {line}: " in result.output
    sha256 = clever_zoo.model_info(name).weights.sha256
    assert sha256 in result.output


def test_every_line_gets_a_verdict(folder: Path) -> None:
    assert verdicts(folder) == {
        "config.json": "ok",
        "registry": "skipped",
        "weights": "ok",
        "digest of config.json": "ok",
        "digest of figures/drift.svg": "ok",
        "digest of golden.json": "ok",
        "digest of model.safetensors": "ok",
        "values in torch": "ok",
    }
    # What comes with a download of a repository; the rest must be listed.
    for name in (".gitattributes", "README.md", "notes.txt"):
        (folder / name).touch()
    assert list(failures(folder)) == ["digest of notes.txt"]
    (folder / "notes.txt").unlink()
    (folder / SUMS_FILENAME).unlink()
    (folder / GOLDEN_FILENAME).unlink()
    assert verdicts(f"local-dir:{folder}") == {
        "config.json": "ok",
        "registry": "skipped",
        "weights": "ok",
        "SHA256SUMS": "skipped",
        "values": "skipped",
    }


def test_altered_files_fail_alone(folder: Path) -> None:
    (folder / "figures/drift.svg").write_text("<svg></svg>")
    assert list(failures(folder)) == ["digest of figures/drift.svg"]
    (folder / "figures/drift.svg").unlink()
    assert "No such file" in failures(folder)["digest of figures/drift.svg"]
    result = CliRunner().invoke(app, ["verify", f"local-dir:{folder}"])
    assert result.exit_code == 1
    assert "FAILED  digest of figures/drift.svg: " in result.output
    assert "ok      weights" in result.output


def test_altered_weights_and_values(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 64
    weights.write_bytes(content)
    found = failures(folder)
    assert {"weights", "digest of model.safetensors"} <= found.keys()
    assert "sha256" in found["weights"]
    # The digest of other weights, golden values of the old ones: only the values can tell.
    other = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    golden = (folder / GOLDEN_FILENAME).read_bytes()
    (folder / "onnx").mkdir()
    for name in ("onnx/model.onnx", "results.json", "heads.safetensors"):
        (folder / name).touch()
    other.save_pretrained(folder)
    assert folder_files(folder) == {"config.json", "model.safetensors", "figures/drift.svg"}
    (folder / GOLDEN_FILENAME).write_bytes(golden)
    write_sums(folder)
    found = failures(folder)
    assert list(found) == ["values in torch"]
    assert "differ by" in found["values in torch"]


NORMS = '"norms": {"invariant": 1, "equivariant": 1}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 50_000,
        "\xff",
        '{"norms": {"invariant": 1}}',
        f'{{{NORMS}, "invariant": [1], "equivariant": []}}',
        f'{{{NORMS}, "invariant": 1, "equivariant": {{}}}}',
        f'{{{NORMS}, "invariant": ["x"], "equivariant": [1]}}',
        f'{{{NORMS}, "invariant": [1{"0" * 400}], "equivariant": [1]}}',
    ],
)
def test_golden_values_that_are_none(folder: Path, content: str) -> None:
    (folder / GOLDEN_FILENAME).write_text(content)
    assert "holds" in failures(folder)["values in torch"]


def test_a_changed_config_of_a_published_folder_is_not_loaded(folder: Path) -> None:
    """The one file without a digest of its own; SHA256SUMS has it."""
    path = folder / "config.json"
    path.write_text(path.read_text().replace("0.485", "0.585"))
    with pytest.raises(IntegrityError, match=r"config\.json has sha256 .*SHA256SUMS lists"):
        clever_zoo.from_pretrained(folder)
    sums = (folder / SUMS_FILENAME).read_text().splitlines(keepends=True)
    (folder / SUMS_FILENAME).write_text("".join(line for line in sums if "config" not in line))
    with pytest.raises(IntegrityError, match=r"config\.json is not listed"):
        clever_zoo.from_pretrained(folder)
    (folder / SUMS_FILENAME).unlink()
    encoder = clever_zoo.from_pretrained(folder)
    assert encoder.spec.preprocess.mean[0] == 0.585
    write_sums(folder)
    encoder.save_pretrained(folder)  # what it replaces is listed no more
    assert clever_zoo.from_pretrained(folder).spec == encoder.spec


def test_a_broken_config_does_not_end_the_check(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    found = verdicts(folder)
    assert found["config.json"] == "FAILED"
    assert found["digest of golden.json"] == "ok"


@pytest.mark.parametrize(
    "line", ["0" * 64 + "  ../x", "0" * 64 + "  /etc/passwd", "0" * 64 + "  a/../../x",
             "0" * 64 + "  a\\b", "0" * 63 + "  config.json", "config.json", "\udcff\x00",
             "\n".join(f"{digit * 64}  config.json" for digit in "01"),
             "\n".join(f"{0:064}  {i}" for i in range(20_000))],
)  # fmt: skip
def test_sums_name_files_below_the_folder(folder: Path, line: str) -> None:
    (folder.parent / "x").write_text("")
    (folder / SUMS_FILENAME).write_bytes(line.encode("utf-8", "surrogateescape"))
    assert "no list of digests" in failures(folder)["SHA256SUMS"]


def test_another_model_under_a_released_name_fails(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["clever"]["name"] = "clever-resnet18.fmnist"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / GOLDEN_FILENAME).unlink()
    found = failures(folder)
    assert "not what this release records" in found["registry"]
    assert "has no golden.json" in found["values"]


def test_released_weights_stored_in_another_type_are_known_again(tmp_path: Path) -> None:
    encoder = clever_zoo.from_pretrained("clever-resnet18")
    encoder.save_pretrained(tmp_path)
    checks = {check.subject: check for check in verify_model(tmp_path)}
    assert checks["registry"].verdict == "ok"
    assert "stored in another type" in checks["registry"].detail
    assert checks["values"].verdict == "skipped"
    other = clever_zoo.create_encoder("resnet18")
    other.spec = encoder.spec.model_copy(update={"provenance": None})
    claimed = other.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["clever"]["provenance"] = encoder.spec.provenance.model_dump()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert claimed.name == encoder.spec.name
    assert "other weights" in failures(tmp_path)["registry"]


def test_changed_weights_claim_no_release(tmp_path: Path) -> None:
    encoder = clever_zoo.from_pretrained("clever-resnet18")
    spec = encoder.save_pretrained(tmp_path)
    assert (spec.name, spec.provenance) == (encoder.spec.name, encoder.spec.provenance)
    with torch.no_grad():
        encoder.backbone.conv1.weight[0, 0, 0, 0] += 1
    spec = encoder.save_pretrained(tmp_path)
    assert (spec.name, spec.provenance) == ("clever-resnet18.fmnist-changed", None)
    assert clever_zoo.from_pretrained(tmp_path).save_pretrained(tmp_path).name == spec.name
    assert verdicts(tmp_path)["registry"] == "skipped"


def test_the_onnx_file_is_checked_too(tmp_path: Path, onnx_models: Path) -> None:
    shutil.copytree(RELEASED, tmp_path / "model")
    (tmp_path / "model/onnx").mkdir()
    exported = onnx_models / "resnet18.onnx"
    shutil.copy(exported, tmp_path / "model/onnx/model.onnx")
    assert verdicts(tmp_path / "model")["values in onnxruntime"] == "ok"
    (tmp_path / "model/onnx/model.onnx").write_bytes(exported.read_bytes()[:-100_000])
    assert "values in onnxruntime" in failures(tmp_path / "model")


def test_classifiers_have_digests_and_no_values(tmp_path: Path) -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    clever_zoo.create_classifier(encoder, 3).save_pretrained(tmp_path)
    found = verdicts(tmp_path)
    assert (found["config.json"], found["weights"], found["values"]) == ("ok", "ok", "skipped")


def test_what_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no folder"):
        verify_model(tmp_path / "absent")
    with pytest.raises(SourceError, match=r"hf download org/repo --local-dir PATH"):
        verify_model("hf-hub:org/repo")
    with pytest.raises(UnknownModelError):
        verify_model("clever-resnet99")
