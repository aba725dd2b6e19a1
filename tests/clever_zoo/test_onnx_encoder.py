"""Exported models in ONNX Runtime. This file also runs where torch is not installed."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from clever_zoo import OnnxClassifier, OnnxEncoder, model_info
from clever_zoo.embedding import Embedding
from clever_zoo.errors import (
    BackendMissingError,
    DownloadError,
    ImageError,
    IntegrityError,
    ShapeError,
    SourceError,
    SpecError,
    UnknownModelError,
)
from clever_zoo.golden import GOLDEN_FILENAME, compare_golden
from clever_zoo.onnx_graph import OnnxGraph, tensorrt_provider
from clever_zoo.preprocess import image_pixels
from clever_zoo.samples import sample_paths
from tests.onnx_models import CLASS_NAMES, pictures

TOLERANCE = 1e-4  # of the norm of a half
RELEASED = Path(__file__).parents[2] / "model_cards/clever-resnet18.fmnist"
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
IMPORT_LIMIT_MB = 100  # 65 to 82 seen, with what was read around mapped libraries


@pytest.fixture(scope="module", params=["resnet18", "vit"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def encoder(onnx_models: Path, name: str) -> OnnxEncoder:
    return OnnxEncoder.from_pretrained(onnx_models / f"{name}.onnx", threads=1)


@pytest.fixture(scope="module")
def expected(onnx_models: Path, name: str) -> Embedding[np.ndarray]:
    with np.load(onnx_models / f"{name}.npz") as content:
        return Embedding(content["invariant"], content["equivariant"])


def assert_same(ours: Embedding[np.ndarray], expected: Embedding[np.ndarray]) -> None:
    for half, other in zip(ours, expected, strict=True):
        assert half.dtype == np.float32
        distance = np.linalg.norm(half - other, axis=1)
        assert (distance <= TOLERANCE * np.linalg.norm(other, axis=1)).all()


def in_subprocess(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_values_are_those_of_torch(encoder: OnnxEncoder, expected: Embedding[np.ndarray]) -> None:
    done: list[int] = []
    ours = encoder.embed(pictures(), batch_size=5, on_progress=done.append)
    assert done == [5, 10, 12]
    assert ours.invariant.shape == (12, encoder.spec.invariant_dim)
    assert_same(ours, expected)


def test_values_are_the_published_golden_ones(onnx_models: Path) -> None:
    encoder = OnnxEncoder.from_pretrained(onnx_models / "resnet18.onnx")
    assert encoder.spec == model_info("clever-resnet18")
    assert compare_golden(encoder, RELEASED / GOLDEN_FILENAME) <= TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 3, 8, 32])
def test_the_batch_is_dynamic(encoder: OnnxEncoder, batch_size: int) -> None:
    paths = sample_paths()[:32]
    pixels = np.stack([image_pixels(path, encoder.spec.preprocess) for path in paths])
    whole = encoder.embed_pixels(pixels)
    parts = [
        encoder.embed_pixels(pixels[start : start + batch_size])
        for start in range(0, 32, batch_size)
    ]
    assert_same(Embedding(*map(np.concatenate, zip(*parts, strict=True))), whole)


def test_no_images_give_no_rows(encoder: OnnxEncoder) -> None:
    assert encoder.embed([]).invariant.shape == (0, encoder.spec.invariant_dim)
    size = encoder.spec.preprocess.input_size_px
    none = encoder.embed_pixels(np.zeros((0, size, size, 3), dtype=np.uint8))
    assert none.equivariant.shape == (0, encoder.spec.equivariant_dim)


def test_kinds_of_images_are_mixed(encoder: OnnxEncoder, expected) -> None:
    mixed = [
        *(str(path) for path in pictures()[:4]),
        *(Image.open(path) for path in pictures()[4:8]),
        *(np.asarray(Image.open(path).convert("RGB")) for path in pictures()[8:]),
    ]
    assert_same(encoder.embed(mixed), expected)


def test_a_stream_is_read_no_more_than_two_batches_ahead(encoder: OnnxEncoder) -> None:
    read = 0

    def endless() -> Iterator[Path]:
        nonlocal read
        while True:
            read += 1
            yield sample_paths()[read % 300]

    batches = encoder.embed_batches(endless(), batch_size=4)
    for given in range(1, 6):
        assert next(batches).invariant.shape[0] == 4
        assert read <= 4 * given + 2 * 4
    batches.close()


def test_a_bad_image_is_named(encoder: OnnxEncoder, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"image 1 \(.*broken.png") as caught:
        encoder.embed([pictures()[0], tmp_path / "broken.png"])
    assert caught.value.index == 1


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 32, 32, 3), dtype=np.float32),
        np.zeros((32, 32, 3), dtype=np.uint8),
        np.zeros((2, 32, 32, 4), dtype=np.uint8),
        np.zeros((2, 3, 32, 32), dtype=np.uint8),
        np.zeros((2, 33, 32, 3), dtype=np.uint8),
    ],
    ids=["dtype", "rank", "channels", "order", "size"],
)
def test_wrong_pixels_are_refused(encoder: OnnxEncoder, wrong: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"expected uint8 of shape \(B, 32, 32, 3\)"):
        encoder.embed_pixels(wrong)


def test_threads_share_one_encoder(encoder: OnnxEncoder) -> None:
    paths = sample_paths()[:16]
    pixels = np.stack([image_pixels(path, encoder.spec.preprocess) for path in paths])
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(encoder.embed_pixels, [pixels[i : i + 1] for i in range(16)] * 3))
    for i, row in enumerate(rows):
        assert_same(row, encoder.embed_pixels(pixels[i % 16 : i % 16 + 1]))


def test_bound_inputs_and_outputs_give_the_same(encoder: OnnxEncoder, monkeypatch) -> None:
    """The path that CUDA takes, on the CPU."""
    pixels = np.stack([image_pixels(path, encoder.spec.preprocess) for path in pictures()])
    plain = encoder.embed_pixels(pixels)
    monkeypatch.setattr(encoder.graph, "device", "cuda")
    monkeypatch.setattr(encoder.graph, "device_id", 1)
    devices = []

    def to_numpy(array: np.ndarray, *device: object, call=ort.OrtValue.ortvalue_from_numpy):
        devices.append(device)
        return call(array, "cpu", 0)

    def bind(self: ort.IOBinding, name: str, *device: object, call=ort.IOBinding.bind_output):
        devices.append(device)
        return call(self, name, "cpu")

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", to_numpy)
    monkeypatch.setattr(ort.IOBinding, "bind_output", bind)
    for ours, theirs in zip(encoder.embed_pixels(pixels), plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert devices == [("cuda", 1)] * 3


class CudaSession:
    """A session that says it runs on a second GPU."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {"CUDAExecutionProvider": {"device_id": "1"}, "CPUExecutionProvider": {}}


def test_the_device_is_that_of_the_providers_options(encoder: OnnxEncoder) -> None:
    assert (encoder.graph.device, encoder.graph.device_id) == ("cpu", 0)
    graph = OnnxGraph(CudaSession(encoder.graph.session), "m.onnx", "")
    assert (graph.device, graph.device_id) == ("cuda", 1)


def test_providers_are_as_chosen_or_refused_by_name(onnx_models: Path) -> None:
    path = onnx_models / "vit.onnx"
    options = ("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})
    for providers in (["CPUExecutionProvider"], [options]):
        encoder = OnnxEncoder.from_pretrained(path, providers=providers)
        assert encoder.graph.session.get_providers() == ["CPUExecutionProvider"]
    for absent in (["WarpDriveExecutionProvider"], [], "CPUExecutionProvider"):
        with pytest.raises(BackendMissingError, match=r"has .*CPUExecutionProvider"):
            OnnxEncoder.from_pretrained(path, providers=absent)


def test_a_provider_that_ends_on_the_cpu_is_refused(onnx_models: Path, monkeypatch) -> None:
    """onnxruntime-gpu lists CUDA on any machine and falls back to the CPU."""
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: both)
    session = ort.InferenceSession
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda model, options, providers: session(model, options, ["CPUExecutionProvider"]),
    )
    with pytest.raises(BackendMissingError, match="cannot be used on this machine"):
        OnnxEncoder.from_pretrained(
            onnx_models / "vit.onnx", providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
        )
    best = OnnxEncoder.from_pretrained(onnx_models / "vit.onnx")
    assert best.graph.session.get_providers() == ["CPUExecutionProvider"]


def test_tensorrt_options_are_made_for_the_model() -> None:
    name, options = tensorrt_provider(
        model_info("clever-resnet18").preprocess, Path("engines"), max_batch=8
    )
    assert name == "TensorrtExecutionProvider"
    assert options["trt_profile_min_shapes"] == "pixels:1x32x32x3"
    assert options["trt_profile_max_shapes"] == "pixels:8x32x32x3"
    assert options["trt_engine_cache_path"] == "engines"


def test_the_classifier_predicts_as_torch_does(onnx_models: Path) -> None:
    classifier = OnnxClassifier.from_pretrained(onnx_models / "classifier.onnx")
    predictions = classifier.predict(pictures(), batch_size=5)
    with np.load(onnx_models / "classifier.npz") as content:
        np.testing.assert_array_equal(predictions.classes, content["classes"])
        np.testing.assert_allclose(predictions.probabilities, content["probabilities"], atol=1e-5)
    assert set(predictions.names) <= set(CLASS_NAMES)
    none = classifier.predict([])
    assert (none.probabilities.shape, none.names) == ((0, 3), ())


def test_an_encoder_is_no_classifier_and_the_reverse(onnx_models: Path) -> None:
    with pytest.raises(SpecError, match="describes a classifier"):
        OnnxEncoder.from_pretrained(onnx_models / "classifier.onnx")
    with pytest.raises(SpecError, match="it is no classifier"):
        OnnxClassifier.from_pretrained(onnx_models / "vit.onnx")


def test_damaged_missing_and_foreign_files_are_named(onnx_models: Path, tmp_path: Path) -> None:
    content = (onnx_models / "vit.onnx").read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.onnx").write_bytes(content[:size])
        with pytest.raises((IntegrityError, SpecError), match=r"cut\.onnx"):
            OnnxEncoder.from_pretrained(tmp_path / "cut.onnx")
    for name in (b"Softmax", b"invariant"):  # an operator; an output, named in the metadata too
        (tmp_path / "names.onnx").write_bytes(content.replace(name, b"\xd0" + name[1:]))
        with pytest.raises(IntegrityError, match=r"names\.onnx.*truncated, altered or newer"):
            OnnxEncoder.from_pretrained(tmp_path / "names.onnx")
    (tmp_path / "text.onnx").write_text("no graph at all")
    with pytest.raises(IntegrityError, match="truncated, altered or newer"):
        OnnxEncoder.from_pretrained(str(tmp_path / "text.onnx"))
    with pytest.raises(SourceError, match="clever-zoo export"):
        OnnxEncoder.from_pretrained("absent.onnx")
    with pytest.raises(SpecError, match=r"without clever_config and clever_graph"):
        OnnxEncoder.from_pretrained(onnx_models / "foreign.onnx")


def test_a_model_without_an_onnx_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"clever-zoo export clever-resnet18 -o model\.onnx"):
        OnnxEncoder.from_pretrained("clever-resnet18")
    shutil.copy(RELEASED / "config.json", tmp_path)
    with pytest.raises(DownloadError, match="clever-zoo export local-dir:"):
        OnnxEncoder.from_pretrained(f"local-dir:{tmp_path}")
    with pytest.raises(UnknownModelError):
        OnnxEncoder.from_pretrained("clever-resnet99")


def test_a_folder_with_an_onnx_file_is_a_source(onnx_models: Path, tmp_path: Path) -> None:
    shutil.copy(RELEASED / "config.json", tmp_path)
    (tmp_path / "onnx").mkdir()
    shutil.copy(onnx_models / "resnet18.onnx", tmp_path / "onnx/model.onnx")
    assert OnnxEncoder.from_pretrained(tmp_path).spec == model_info("clever-resnet18")
    config = json.loads((tmp_path / "config.json").read_text())
    config["clever"]["weights"]["sha256"] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match="export it again"):
        OnnxEncoder.from_pretrained(f"local-dir:{tmp_path}")


class Node(NamedTuple):
    name: str
    type: str
    shape: list[object]


class Session:
    """What a graph says of itself: a file's, but for what is passed."""

    def __init__(
        self,
        like: ort.InferenceSession | None = None,
        inputs: list[Node] | None = None,
        outputs: list[Node] | None = None,
        **metadata: str,
    ) -> None:
        known = like.get_modelmeta().custom_metadata_map if like else {}
        self.custom_metadata_map = known | metadata
        self.get_inputs = like.get_inputs if inputs is None and like else lambda: inputs
        self.get_outputs = like.get_outputs if outputs is None and like else lambda: outputs

    def get_modelmeta(self) -> "Session":
        return self


def test_metadata_that_do_not_fit_are_named() -> None:
    info = '{"input": "uint8", "precision": "fp32", "version": "1"}'
    for config, graph, message in (
        ("{", "{}", "not valid JSON"),
        ("{}", info.replace("fp32", "fp8"), r"(?s)m\.onnx, clever_graph:.*precision"),
        *((config, info, "no 'clever' section") for config in ("5", "[]", "null", "{}")),
    ):
        with pytest.raises(SpecError, match=message):
            OnnxGraph(Session(clever_config=config, clever_graph=graph), "m.onnx", "")


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": [Node("image", "tensor(uint8)", ["batch", 32, 32, 3])]},
        {"inputs": [Node("pixels", "tensor(float)", ["batch", 32, 32, 3])]},
        {"inputs": [Node("pixels", "tensor(uint8)", ["batch", 3, 32, 32])]},
        {"outputs": [Node("invariant", "tensor(float)", ["batch", 512])]},
        {
            "outputs": [
                Node("invariant", "tensor(float)", ["batch", 103]),
                Node("equivariant", "tensor(float)", ["batch", 409]),
            ]
        },
        {
            "outputs": [
                Node("invariant", "tensor(float16)", ["batch", 409]),
                Node("equivariant", "tensor(float16)", ["batch", 103]),
            ]
        },
    ],
    ids=["name", "input type", "order", "one output", "widths", "output type"],
)
def test_a_graph_that_is_not_as_its_spec_says_is_refused(onnx_models: Path, wrong) -> None:
    session = OnnxGraph.open(onnx_models / "resnet18.onnx").session
    with pytest.raises(SpecError, match=r"m\.onnx: its (in|out)puts are .* export it again"):
        OnnxGraph(Session(session, **wrong), "m.onnx", "")


def test_halves_are_told_apart_by_their_names(encoder: OnnxEncoder, expected, monkeypatch) -> None:
    nodes = encoder.graph.session.get_outputs()[::-1]
    monkeypatch.setattr(encoder.graph.session, "get_outputs", lambda: nodes)
    monkeypatch.setattr(encoder.graph.session, "_outputs_meta", nodes)
    swapped = OnnxEncoder(OnnxGraph(encoder.graph.session, "m.onnx", ""))
    assert_same(swapped.embed(pictures()), expected)


def test_no_extra_but_its_own_brings_onnx_runtime() -> None:
    """Else [onnx-gpu,serve] would install both packages, which overwrite each other."""
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    brings = {name for name, packages in extras.items() if "onnxruntime" in " ".join(packages)}
    assert brings == {"onnx", "onnx-gpu"}
    asks = {
        name
        for name, packages in extras.items()
        for package in packages
        if "clever-zoo" in package and "onnx" in re.split(r"[\[,\]]", package)
    }
    assert asks == {"all"}


def test_torch_is_never_imported_and_the_import_is_small(onnx_models: Path) -> None:
    in_subprocess("import clever_zoo; clever_zoo.OnnxEncoder")  # the first compiles bytecode
    out = in_subprocess(
        "import sys, time; started = time.perf_counter()\n"
        "from clever_zoo import OnnxEncoder\n"
        "print(f'import {time.perf_counter() - started:.2f} s', end=' ')\n"
        "resident = lambda: next(int(l.split()[1]) / 1024 for l in open('/proc/self/status')"
        " if l.startswith('VmRSS'))\n"
        "print(f'{resident():.0f} MB', end=' ')\n"
        f"encoder = OnnxEncoder.from_pretrained({str(onnx_models / 'resnet18.onnx')!r})\n"
        f"encoder.embed({[str(p) for p in pictures()]})\n"
        "print(f'with a ResNet-18, after 12 images {resident():.0f} MB')\n"
        "assert not {'torch', 'timm', 'onnx', 'huggingface_hub'} & set(sys.modules)\n"
    )
    print(f" [{out.strip()}] ", end="")
    assert float(re.search(r"s (\d+) MB", out)[1]) <= IMPORT_LIMIT_MB


def test_a_missing_runtime_names_the_pip_line() -> None:
    out = in_subprocess(
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import clever_zoo\n"
        "try: clever_zoo.OnnxEncoder\n"
        "except clever_zoo.CleverZooError as error: print(type(error).__name__, error)\n"
    )
    assert "BackendMissingError" in out
    assert 'pip install "clever-zoo[onnx]"' in out
