"""What export_onnx writes, and what it refuses to write."""

import copy
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import clever_zoo
from clever_zoo import (
    Classifier,
    Encoder,
    ModelSpec,
    OnnxClassifier,
    OnnxEncoder,
    export_onnx,
    onnx_export,
)
from clever_zoo.cli import app
from clever_zoo.embedder import ImageEmbedder
from clever_zoo.encoder import current_weights
from clever_zoo.errors import DataError, ExportParityError, ImageError, SpecError
from clever_zoo.onnx_export import MIN_COSINE, max_relative_difference, min_cosine
from clever_zoo.onnx_graph import OnnxGraph
from clever_zoo.preprocess import image_pixels
from clever_zoo.samples import sample_paths
from training.data.fashion_mnist import load_fashion_mnist
from training.evaluate.knn import knn_scores

runner = CliRunner()


def small(backbone: str, size_px: int = 32, **fields: object) -> Encoder:
    """Random weights at a small input size."""
    torch.manual_seed(0)
    if backbone.startswith("vit"):
        return clever_zoo.create_encoder(backbone, img_size=size_px, patch_size=8, **fields)
    dim = {"resnet18": 409, "resnet50": 1638}[backbone]
    fields = {"invariant_dim": dim, "preprocess": {"input_size_px": size_px}, **fields}
    return Encoder(ModelSpec.create(name=backbone, backbone=backbone, **fields))


@pytest.fixture(scope="module")
def vit() -> Encoder:
    return small("vit_tiny")


@pytest.fixture(scope="module")
def released() -> Encoder:
    return clever_zoo.from_pretrained("clever-resnet18")


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    return {}


@pytest.fixture
def trace_once(graphs: dict[str, onnx.ModelProto], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds: models of one name, with the same weights, share it."""
    trace = onnx_export._trace

    def traced(module: Encoder, *args: object) -> onnx.ModelProto:
        if module.spec.name not in graphs:
            graphs[module.spec.name] = trace(module, *args)
        return copy.deepcopy(graphs[module.spec.name])

    monkeypatch.setattr(onnx_export, "_trace", traced)


def pixels_of(encoder: Encoder, count: int) -> np.ndarray:
    paths = sample_paths()[5::9][:count]
    return np.stack([image_pixels(path, encoder.spec.preprocess) for path in paths])


def assert_parity(model: Encoder, onnx_encoder: OnnxEncoder) -> None:
    for count in (1, 3, 8, 32):
        pixels = pixels_of(model, count)
        for ours, theirs in zip(
            onnx_encoder.embed_pixels(pixels), model.embed_pixels(pixels), strict=True
        ):
            assert ours.shape == theirs.shape
            assert max_relative_difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize("name", clever_zoo.list_models())
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.usefixtures("trace_once")
def test_round_trip_of_every_released_model(tmp_path: Path, name: str, precision: str) -> None:
    model = clever_zoo.from_pretrained(name)
    report = export_onnx(model, tmp_path / "model.onnx", precision=precision)
    encoder = OnnxEncoder.from_pretrained(report.path)
    assert encoder.spec == clever_zoo.model_info(name)
    assert encoder.graph.info.precision == precision
    assert report.path.stat().st_size == report.size_bytes
    assert list(tmp_path.iterdir()) == [report.path]
    feed = {i.name: i.type for i in encoder.graph.session.get_inputs()}
    assert feed == {"pixels": "tensor(uint8)"}
    outputs = {o.name: o.type for o in encoder.graph.session.get_outputs()}
    assert outputs == dict.fromkeys(["invariant", "equivariant"], "tensor(float)")
    if precision == "fp32":
        assert_parity(model, encoder)
        return
    pixels = pixels_of(model, 32)
    halves = zip(encoder.embed_pixels(pixels), model.embed_pixels(pixels), strict=True)
    assert MIN_COSINE == {"fp16": 0.999, "int8": 0.98}  # what the README promises
    assert all(min_cosine(ours, theirs) >= MIN_COSINE[precision] for ours, theirs in halves)
    whole = model.spec.weights.size_bytes * 2  # they are stored in float16
    assert report.size_bytes < whole * {"fp16": 0.55, "int8": 0.3}[precision]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet50", "vit_small"])
def test_other_backbones_export_in_all_precisions(tmp_path: Path, backbone: str) -> None:
    model = small(backbone, 64)
    for precision in ("fp32", "fp16", "int8"):
        export_onnx(model, tmp_path / f"{precision}.onnx", precision=precision)
    assert_parity(model, OnnxEncoder.from_pretrained(tmp_path / "fp32.onnx"))


@pytest.mark.usefixtures("trace_once")
def test_int8_of_a_vit_is_dynamic_and_takes_no_calibration(vit: Encoder, tmp_path: Path) -> None:
    report = export_onnx(vit, tmp_path / "vit.onnx", precision="int8")
    operators = {node.op_type for node in onnx.load(report.path).graph.node}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= operators
    assert "QuantizeLinear" not in operators
    with pytest.raises(SpecError, match="int8 of vit_tiny takes none"):
        export_onnx(vit, tmp_path / "x.onnx", precision="int8", calibration=sample_paths()[:2])


@pytest.mark.usefixtures("trace_once")
def test_int8_of_a_resnet_is_static_with_the_given_pictures(released, tmp_path: Path) -> None:
    one = export_onnx(
        released, tmp_path / "a.onnx", precision="int8", calibration=sample_paths()[::8]
    )
    operators = {node.op_type for node in onnx.load(one.path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= operators
    assert "DynamicQuantizeLinear" not in operators
    other = export_onnx(
        released, tmp_path / "b.onnx", precision="int8", calibration=sample_paths()[4::8]
    )
    assert one.sha256 != other.sha256
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"bad\.png"):
        export_onnx(
            released, tmp_path / "c.onnx", precision="int8", calibration=[tmp_path / "bad.png"]
        )
    assert not (tmp_path / "c.onnx").exists()


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("empty", [[], iter(()), np.zeros((0, 32, 32, 3), dtype=np.uint8)])
def test_calibration_without_an_image_is_refused(released, tmp_path: Path, empty) -> None:
    with pytest.raises(DataError, match="calibration holds no image"):
        export_onnx(released, tmp_path / "x.onnx", precision="int8", calibration=empty)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("trace_once")
def test_calibration_may_be_one_array(released, tmp_path: Path) -> None:
    pixels = pixels_of(released, 32)
    reports = [
        export_onnx(released, tmp_path / "x.onnx", precision="int8", calibration=calibration)
        for calibration in (pixels, list(pixels))
    ]
    assert reports[0].sha256 == reports[1].sha256


@pytest.mark.usefixtures("trace_once")
def test_calibration_that_turns_the_embedding_is_refused(released, tmp_path: Path) -> None:
    black = [np.zeros((32, 32, 3), dtype=np.uint8)] * 3
    with pytest.raises(ExportParityError, match=r"int8 has a cosine of .* other calibration"):
        export_onnx(released, tmp_path / "x.onnx", precision="int8", calibration=black)
    assert not list(tmp_path.iterdir())


def test_the_file_stands_alone_and_holds_nothing_of_its_making(vit: Encoder, tmp_path) -> None:
    first = export_onnx(vit, tmp_path / "a.onnx")
    again = export_onnx(vit, tmp_path / "b.onnx")
    assert first.sha256 == again.sha256
    content = first.path.read_bytes()
    for trace in (b"site-packages", b".py", b"stack_trace", str(Path.cwd()).encode(), b"/tmp/"):
        assert trace not in content, trace
    model = onnx.load(first.path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert not [t for t in model.graph.initializer if t.data_location]
    assert {p.key for p in model.metadata_props} == {"clever_config", "clever_graph"}
    shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 32, 32, 3]


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = small("vit_tiny", drop_path_rate=0.5).train()
    model.backbone.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "x.onnx")
    assert model.training
    assert not model.backbone.norm.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_digest_is_of_the_weights_that_were_exported(vit: Encoder, tmp_path: Path) -> None:
    saved = vit.save_pretrained(tmp_path / "folder", dtype="float16")
    changed = clever_zoo.from_pretrained(tmp_path / "folder")
    assert current_weights(changed.backbone, saved.weights) == saved.weights
    with torch.no_grad():
        changed.backbone.norm.weight[0] += 0.1
    spec = OnnxEncoder.from_pretrained(export_onnx(changed, tmp_path / "x.onnx").path).spec
    assert spec.weights == changed.save_pretrained(tmp_path / "changed").weights != saved.weights


def test_an_empty_half_is_left_out(tmp_path: Path) -> None:
    model = small("vit_tiny", invariant_dim=192)
    report = export_onnx(model, tmp_path / "x.onnx")
    assert report.parity.keys() == {"invariant"}
    encoder = OnnxEncoder.from_pretrained(report.path)
    assert encoder.graph.outputs == {"invariant": 192}
    assert encoder.embed(sample_paths()[:3]).equivariant.shape == (3, 0)


@pytest.mark.parametrize("part", ["full", "equivariant"])
def test_classifiers_export_as_logits(vit: Encoder, tmp_path: Path, part: str) -> None:
    torch.manual_seed(1)
    classifier = clever_zoo.create_classifier(vit, 4, part=part)
    nn.init.normal_(classifier.head.weight)
    classifier.save_pretrained(tmp_path / "saved")
    result = runner.invoke(
        app, ["export", f"local-dir:{tmp_path / 'saved'}", "-o", str(tmp_path / "c.onnx")]
    )
    assert result.exit_code == 0, result.output
    assert "logits: greatest relative difference" in result.output
    ours = OnnxClassifier.from_pretrained(tmp_path / "c.onnx")
    loaded = Classifier.from_pretrained(tmp_path / "saved")
    assert ours.spec == loaded.spec
    paths = sample_paths()[::20]
    expected = loaded.predict(paths)
    predictions = ours.predict(paths)
    np.testing.assert_array_equal(predictions.classes, expected.classes)
    np.testing.assert_allclose(predictions.probabilities, expected.probabilities, atol=1e-5)


@pytest.mark.parametrize("half", ["invariant", "equivariant"])
@pytest.mark.parametrize("broken", ["off", "nan"])
@pytest.mark.usefixtures("trace_once")
def test_a_graph_that_differs_is_not_written(vit, tmp_path, monkeypatch, half, broken) -> None:
    run = OnnxGraph.run

    def disturbed(self: OnnxGraph, *args: object) -> list[np.ndarray]:
        outputs = run(self, *args)
        which = list(self.outputs).index(half)
        # One picture of one batch, so that averages would not show it.
        if len(outputs[which]) == 3:
            outputs[which][1, 7] += np.nan if broken == "nan" else 0.5
        return outputs

    monkeypatch.setattr(OnnxGraph, "run", disturbed)
    (tmp_path / "model.onnx").write_bytes(b"earlier")
    with pytest.raises(ExportParityError, match=rf"^{half} differs from torch by .* allowed 1e-04"):
        export_onnx(vit, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_choices_are_named(vit: Encoder, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="precision is 'bf16'; use 'fp32' or 'fp16' or 'int8'"):
        export_onnx(vit, tmp_path / "x.onnx", precision="bf16")
    with pytest.raises(SpecError, match="input is 'jpeg'"):
        export_onnx(vit, tmp_path / "x.onnx", input="jpeg")


@pytest.mark.parametrize("name", ["folder.onnx", "model", "model.pt"])
def test_a_target_that_nothing_opens_is_refused_first(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(DataError, match=r"name a file that ends in \.onnx"):
        export_onnx(None, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.usefixtures("trace_once")
def test_the_command_line_reports_and_refuses(tmp_path: Path) -> None:
    result = runner.invoke(app, ["export", "clever-resnet99", "-o", str(tmp_path / "x.onnx")])
    assert (result.exit_code, "UnknownModelError" in result.output) == (2, True)
    arguments = ["-o", str(tmp_path / "x.onnx"), "--precision", "int8"]
    arguments += ["--calibration", str(sample_paths()[0].parent / "s*.png")]
    result = runner.invoke(app, ["export", "clever-resnet18", *arguments])
    assert result.exit_code == 0, result.output
    assert re.search(r"equivariant: least cosine to torch 0\.9\d+", result.output)
    help_text = runner.invoke(app, ["export", "--help"]).output
    assert "Example" in help_text


def test_distances_against_loops() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 7)).astype(np.float32)
    relative = [
        np.sqrt(((x - y) ** 2).sum()) / np.sqrt((y**2).sum()) for x, y in zip(a, b, strict=True)
    ]
    cosine = [x @ y / np.sqrt(x @ x) / np.sqrt(y @ y) for x, y in zip(a, b, strict=True)]
    assert max_relative_difference(a, b) == pytest.approx(max(relative))
    assert min_cosine(a, b) == pytest.approx(min(cosine))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(2400)  # a ViT in fp16 is slow on a CPU
@pytest.mark.parametrize("name", clever_zoo.list_models("*.fmnist*"))
def test_neighbours_are_the_same_within_a_point(tmp_path: Path, name: str) -> None:
    """10,000 training pictures as the gallery, 5,000 test pictures as queries."""
    model = clever_zoo.from_pretrained(name)
    gallery, queries = (
        (data.images[:count, 0, ..., None].expand(-1, -1, -1, 3).numpy(), data.labels[:count])
        for data, count in (
            (load_fashion_mnist(None, "train"), 10_000),
            (load_fashion_mnist(None, "test"), 5_000),
        )
    )

    def accuracies(encoder: ImageEmbedder) -> dict[str, float]:
        (x, y), (test_x, test_y) = (
            (encoder.embed(pixels, batch_size=256), labels) for pixels, labels in (gallery, queries)
        )
        result = {}
        for part in ("full", "invariant", "equivariant"):
            a, b = (torch.from_numpy(getattr(e, part)) for e in (x, test_x))
            votes = knn_scores(a, y, b, ks=(20,), classes=10)[20]
            result[part] = float((votes.argmax(1) == test_y).float().mean() * 100)
        return result

    expected = accuracies(model)
    for precision in ("fp32", "fp16", "int8"):
        report = export_onnx(model, tmp_path / "model.onnx", precision=precision)
        found = accuracies(OnnxEncoder.from_pretrained(report.path))
        print(f" [{precision}: {found}, torch: {expected}] ", end="")
        for part, value in expected.items():
            assert abs(found[part] - value) <= 1.0, (precision, part)
