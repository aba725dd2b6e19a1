"""The written repository in a real Triton 2.51, the one inside nvidia-pytriton (make test-triton).

That Triton has the Python backend and not the ONNX Runtime one, for which a stand-in is put. It
wants a Python with libpython as a shared library, such as Debian's, and NumPy 1.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

import clever_zoo
from clever_zoo.embedding import Embedding
from clever_zoo.onnx_encoder import OnnxEncoder
from clever_zoo.onnx_export import export_onnx
from clever_zoo.preprocess import image_pixels
from clever_zoo.samples import sample_paths
from clever_zoo.serve.triton import write_triton_repository

pytestmark = pytest.mark.triton

NAME = "clever-resnet18.fmnist"
STAND_IN = Path(__file__).parent / "triton_onnxruntime"
PYTHON = Path("/usr/bin/python3")
CHECKOUT = Path(__file__).parents[2]
START_S = 60


@pytest.fixture(scope="module")
def environment(pytestconfig: pytest.Config) -> Path:
    """A virtual environment with Triton and this checkout, kept in pytest's cache."""
    folder = pytestconfig.cache.mkdir("triton-environment")
    made = subprocess.run([PYTHON, "-m", "venv", folder], capture_output=True, text=True)
    assert made.returncode == 0, f"needs Debian's python3-venv: {made.stdout}{made.stderr}"
    packages = ["nvidia-pytriton==0.7.0", "numpy<2", "--editable", f"{CHECKOUT}[onnx]"]
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *packages], check=True)
    return folder


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_onnx(clever_zoo.from_pretrained("clever-resnet18"), path)
    return path


@pytest.fixture(scope="module")
def encoder(graph: Path) -> OnnxEncoder:
    return OnnxEncoder.from_pretrained(graph)


@pytest.fixture(scope="module")
def url(environment: Path, graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Triton that serves the repository."""
    folder = tmp_path_factory.mktemp("triton")
    write_triton_repository(graph, folder / "repository")
    library = next(environment.glob("lib/python3.*"))
    packages = library / "site-packages"
    triton = packages / "pytriton" / "tritonserver"
    stubs = triton / "python_backend_stubs" / library.name.removeprefix("python")
    shutil.copytree(triton / "backends" / "python", folder / "backends" / "python")
    shutil.copytree(stubs, folder / "backends" / "python", dirs_exist_ok=True)
    shutil.copytree(STAND_IN, folder / "backends" / "onnxruntime")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        triton / "bin" / "tritonserver",
        f"--model-repository={folder / 'repository'}",
        f"--backend-directory={folder / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
    ]
    # Triton's Python is that of the first python3 in PATH.
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    libraries = str(packages / "nvidia_pytriton.libs")
    variables = os.environ | {"PATH": path, "LD_LIBRARY_PATH": libraries}
    log = folder / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(f"127.0.0.1:{port}", server, log)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        assert server.wait(START_S) == 0


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(ConnectionRefusedError), InferenceServerClient(url) as client:
            if client.is_server_ready():
                return
        time.sleep(0.2)
    pytest.fail(f"Triton did not get ready: {log.read_text()[-5000:]}")


def ask(url: str, model: str, name: str, tensor: np.ndarray) -> Embedding[np.ndarray]:
    tensor_type = {"pixels": "UINT8", "images": "BYTES"}[name]
    request = InferInput(name, tensor.shape, tensor_type)
    request.set_data_from_numpy(tensor)
    with InferenceServerClient(url) as client:
        answer = client.infer(model, [request])
    return Embedding(*(answer.as_numpy(half) for half in Embedding._fields))


def ask_files(url: str, contents: list[bytes]) -> Embedding[np.ndarray]:
    return ask(url, f"{NAME}-jpeg", "images", np.array(contents, dtype=object)[:, None])


def assert_equal(actual: Embedding[np.ndarray], expected: Embedding[np.ndarray]) -> None:
    for half, wanted in zip(actual, expected, strict=True):
        assert half.shape == wanted.shape
        assert np.abs(half - wanted).max() <= 1e-5 * np.abs(wanted).max()


def photos(folder: Path, suffix: str) -> list[Path]:
    """Pictures that are no squares and larger than the network's input, as files."""
    paths = [folder / f"{i}.{suffix}" for i in range(6)]
    for i, (sample, path) in enumerate(zip(sample_paths()[::50], paths, strict=False)):
        Image.open(sample).convert("RGB").resize((80 + 10 * i, 90)).save(path)
    return paths


def test_all_models_are_ready(url: str) -> None:
    with InferenceServerClient(url) as client:
        states = {m["name"]: m["state"] for m in client.get_model_repository_index()}
        assert states == {NAME + suffix: "READY" for suffix in ("", "-decode", "-jpeg")}
        config = client.get_model_config(NAME)
    assert config["platform"] == "onnxruntime_onnx"
    assert config["max_batch_size"] == 32
    assert len(config["model_warmup"]) == 2


@pytest.mark.parametrize("count", [1, 5, 32])
def test_pixels_give_the_encoders_values(url: str, encoder: OnnxEncoder, count: int) -> None:
    paths = sample_paths()[:count]
    pixels = np.stack([image_pixels(path, encoder.spec.preprocess) for path in paths])
    assert_equal(ask(url, NAME, "pixels", pixels), encoder.embed_pixels(pixels))


@pytest.mark.parametrize("suffix", ["jpeg", "png", "webp"])
def test_files_give_the_encoders_values(
    url: str, encoder: OnnxEncoder, tmp_path: Path, suffix: str
) -> None:
    paths = photos(tmp_path, suffix)
    assert_equal(ask_files(url, [path.read_bytes() for path in paths]), encoder.embed(paths))


def test_a_bad_image_fails_its_own_request_only(
    url: str, encoder: OnnxEncoder, tmp_path: Path
) -> None:
    paths = photos(tmp_path, "jpeg")
    good = [path.read_bytes() for path in paths]
    bad = {3: [good[0], b"no image"], 11: [b""], 17: [good[1], good[2][:200]]}
    requests = [bad.get(i, [good[i % 6], good[(i + 1) % 6]]) for i in range(24)]

    def attempt(contents: list[bytes]) -> Embedding[np.ndarray] | InferenceServerException:
        try:
            return ask_files(url, contents)
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(attempt, requests))
    expected = encoder.embed(paths)
    for i, answer in enumerate(answers):
        if i in bad:
            assert isinstance(answer, InferenceServerException)
            assert answer.status() == "400"
            assert f"image {len(bad[i]) - 1} ({len(bad[i][-1])} bytes)" in str(answer)
        else:
            assert isinstance(answer, Embedding)
            assert_equal(answer, Embedding(*(half[[i % 6, (i + 1) % 6]] for half in expected)))


def test_requests_are_batched(url: str, encoder: OnnxEncoder) -> None:
    squares = [image_pixels(path, encoder.spec.preprocess)[None] for path in sample_paths()[:64]]
    before = counts(url)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pixels: ask(url, NAME, "pixels", pixels), squares))
    inferences, executions = (after - b for after, b in zip(counts(url), before, strict=True))
    assert inferences == 64
    assert executions < 64
    joined = Embedding(*(np.concatenate(halves) for halves in zip(*answers, strict=True)))
    assert_equal(joined, encoder.embed_pixels(np.concatenate(squares)))


def counts(url: str) -> tuple[int, int]:
    """Images that the model has embedded, and its runs."""
    with InferenceServerClient(url) as client:
        (stats,) = client.get_inference_statistics(NAME)["model_stats"]
    return stats["inference_count"], stats["execution_count"]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((33, 32, 32, 3), np.uint8),
        np.zeros((1, 31, 32, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
    ],
    ids=["too many", "too small", "no batch"],
)
def test_pixels_of_another_shape_are_refused(url: str, pixels: np.ndarray) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(url, NAME, "pixels", pixels)
    assert caught.value.status() == "400"
