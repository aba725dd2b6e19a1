"""The written model repository, without a server; test_triton_server.py has a real Triton."""

import io
import re
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from PIL import Image
from tritonclient.grpc.model_config_pb2 import (
    TYPE_FP32,
    TYPE_UINT8,
    ModelConfig,
    ModelInput,
    ModelInstanceGroup,
    ModelOutput,
)
from typer.testing import CliRunner

import clever_zoo
from clever_zoo.cli import app
from clever_zoo.errors import CleverZooError, DataError, ShapeError, SpecError
from clever_zoo.onnx_export import export_onnx
from clever_zoo.onnx_graph import OnnxGraph
from clever_zoo.preprocess import image_pixels
from clever_zoo.samples import sample_paths
from clever_zoo.serve.triton import write_triton_repository

NAME = "clever-resnet18.fmnist"


@pytest.fixture
def graph(onnx_models: Path) -> Path:
    return onnx_models / "resnet18.onnx"


@pytest.fixture
def repository(graph: Path, tmp_path: Path) -> Path:
    assert write_triton_repository(graph, tmp_path / "repo") == (NAME, f"{NAME}-jpeg")
    return tmp_path / "repo"


def read_configs(repository: Path) -> dict[str, ModelConfig]:
    """Each folder's config.pbtxt by Triton's own schema."""
    folders = [path for path in repository.iterdir() if path.is_dir()]
    configs = {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
        for folder in folders
    }
    assert all(name == config.name for name, config in configs.items())
    assert all((folder / "1").is_dir() for folder in folders)
    return configs


def tensors(items: Iterable[ModelInput | ModelOutput]) -> dict[str, tuple[int, list[int]]]:
    return {item.name: (item.data_type, list(item.dims)) for item in items}


def test_model_config_fits_the_graph(repository: Path, graph: Path) -> None:
    model = read_configs(repository)[NAME]
    session = OnnxGraph.open(graph).session
    assert model.backend == "onnxruntime"
    assert (repository / NAME / "1" / "model.onnx").read_bytes() == graph.read_bytes()
    (pixels,) = session.get_inputs()
    assert pixels.type == "tensor(uint8)"
    assert tensors(model.input) == {pixels.name: (TYPE_UINT8, pixels.shape[1:])}
    outputs = {o.name: (TYPE_FP32, o.shape[1:]) for o in session.get_outputs()}
    assert tensors(model.output) == outputs
    assert set(outputs) == {"invariant", "equivariant"}


def test_model_config_batches_and_warms_up(graph: Path, tmp_path: Path) -> None:
    write_triton_repository(graph, tmp_path, max_batch_size=8)
    configs = read_configs(tmp_path)
    assert {config.max_batch_size for config in configs.values()} == {8}
    model = configs[NAME]
    assert model.dynamic_batching.max_queue_delay_microseconds > 0
    assert model.dynamic_batching.default_queue_policy.max_queue_size > 0
    assert [group.kind for group in model.instance_group] == [ModelInstanceGroup.KIND_AUTO]
    assert [warmup.batch_size for warmup in model.model_warmup] == [1, 8]
    for warmup in model.model_warmup:
        sample = warmup.inputs["pixels"]
        assert (sample.data_type, list(sample.dims)) == (TYPE_UINT8, [32, 32, 3])


def test_decoder_has_a_bounded_queue_and_decodes_side_by_side(repository: Path) -> None:
    decoder = read_configs(repository)[f"{NAME}-decode"]
    assert decoder.dynamic_batching.default_queue_policy.max_queue_size > 0
    # Else one process would take all that waits, and the other none.
    assert list(decoder.dynamic_batching.preferred_batch_size) == [1]
    assert [(group.kind, group.count) for group in decoder.instance_group] == [
        (ModelInstanceGroup.KIND_CPU, 2)
    ]


def test_ensemble_joins_decoder_and_model(repository: Path) -> None:
    configs = read_configs(repository)
    model, decoder, ensemble = (configs[NAME + suffix] for suffix in ("", "-decode", "-jpeg"))
    assert decoder.backend == "python"
    assert ensemble.platform == "ensemble"
    assert [step.model_name for step in ensemble.ensemble_scheduling.step] == [
        decoder.name,
        model.name,
    ]
    known = tensors(ensemble.input)
    for step, part in zip(ensemble.ensemble_scheduling.step, (decoder, model), strict=True):
        for inside, outside in step.input_map.items():
            assert known[outside] == tensors(part.input)[inside]
        for inside, outside in step.output_map.items():
            known[outside] = tensors(part.output)[inside]
    assert tensors(ensemble.output) == {name: known[name] for name in ("invariant", "equivariant")}
    assert tensors(ensemble.output) == tensors(model.output)


class StandIn(SimpleNamespace):
    """Whatever triton_python_backend_utils builds: it keeps its arguments."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(args=args, **kwargs)


def test_decoder_gives_the_pixels_and_refuses_only_the_bad_request(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = ModuleType("triton_python_backend_utils")
    triton.Tensor = triton.InferenceResponse = StandIn
    triton.TritonError = type("TritonError", (StandIn,), {"INVALID_ARG": 3})
    triton.get_input_tensor_by_name = lambda request, name: SimpleNamespace(
        as_numpy=lambda: request[name]
    )
    monkeypatch.setitem(sys.modules, triton.__name__, triton)
    folder = repository / f"{NAME}-decode"
    decoder = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
    config = read_configs(repository)[folder.name]
    as_json = json_format.MessageToJson(config, preserving_proto_field_name=True)
    decoder.initialize({"model_config": as_json})

    paths = sample_paths()[:3]
    good = [path.read_bytes() for path in paths]
    bomb = io.BytesIO()
    Image.new("L", (5001, 5000)).save(bomb, "PNG")
    requests = [good[:2], [good[0], b"no image"], [bomb.getvalue()], good[2:]]
    first, refused, too_large, last = decoder.execute(
        [{"images": np.array(r, dtype=object)[:, None]} for r in requests]
    )
    preprocess = clever_zoo.model_info(NAME).preprocess
    expected = np.stack([image_pixels(path, preprocess) for path in paths])
    answers = [response.args[0][0].args for response in (first, last)]
    assert [name for name, _ in answers] == ["pixels", "pixels"]
    assert np.array_equal(np.concatenate([pixels for _, pixels in answers]), expected)
    assert "image 1 (8 bytes)" in refused.error.args[0]
    assert "5001x5000 pixels, at most 25000000" in too_large.error.args[0]
    assert refused.error.args[1] == triton.TritonError.INVALID_ARG


def test_other_models_of_the_repository_stay(repository: Path, graph: Path) -> None:
    (repository / "README.md").write_text("mine")
    write_triton_repository(graph, repository, name="resnet.v2_a-b")
    assert (repository / "README.md").read_text() == "mine"
    assert (
        "`resnet.v2_a-b-jpeg` takes files" in (repository / "resnet.v2_a-b/README.md").read_text()
    )
    again = read_configs(repository)
    assert len(again) == 6
    assert {NAME, "resnet.v2_a-b", "resnet.v2_a-b-jpeg"} < set(again)


@pytest.fixture
def small_classifier(tmp_path: Path) -> Path:
    """A folder with a classifier of random weights."""
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    clever_zoo.create_classifier(encoder, 10).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_command_writes_a_classifier(small_classifier: Path, tmp_path: Path) -> None:
    command = ["export", f"local-dir:{small_classifier}", "--format", "triton", "-o"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "repo")])
    assert result.exit_code == 0, result.output
    configs = read_configs(tmp_path / "repo")
    names = ("vit_tiny-classifier", "vit_tiny-classifier-jpeg")
    for name in names:
        assert name in result.output
        assert tensors(configs[name].output) == {"logits": (TYPE_FP32, [10])}


@pytest.mark.slow
def test_encoder_without_a_split(tmp_path: Path) -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", invariant_dim=192, img_size=32, patch_size=8)
    export_onnx(encoder, tmp_path / "model.onnx")
    names = write_triton_repository(tmp_path / "model.onnx", tmp_path / "repo")
    configs = read_configs(tmp_path / "repo")
    for name in names:
        assert tensors(configs[name].output) == {"invariant": (TYPE_FP32, [192])}


@pytest.mark.slow
def test_float32_graphs_are_refused(tmp_path: Path) -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    export_onnx(encoder, tmp_path / "model.onnx", input="float32")
    with pytest.raises(ShapeError, match="float32"):
        write_triton_repository(tmp_path / "model.onnx", tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "two words", "-flag", "é"])
def test_names_that_are_no_folder(graph: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=re.escape(repr(name))):
        write_triton_repository(graph, tmp_path / "repo", name=name)
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("target", "arguments", "error"),
    [("file", [], "DataError"), ("repo", ["--input", "float32"], "ShapeError")],
)
def test_the_command_refuses_before_it_exports(
    tmp_path: Path, monkeypatch, target: str, arguments: list[str], error: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr("clever_zoo.onnx_export.export_onnx", None)
    arguments = ["--format", "triton", "-o", str(tmp_path / target), *arguments]
    result = CliRunner().invoke(app, ["export", "clever-resnet18", *arguments])
    assert (result.exit_code, error in result.output) == (2, True), result.output


def test_bad_arguments_write_nothing(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="batch_size is 0"):
        write_triton_repository(graph, tmp_path / "repo", max_batch_size=0)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="is a file"):
        write_triton_repository(graph, tmp_path / "file")
    (tmp_path / "cut.onnx").write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(CleverZooError, match=r"cut\.onnx"):
        write_triton_repository(tmp_path / "cut.onnx", tmp_path / "repo")
    assert not (tmp_path / "repo").exists()
