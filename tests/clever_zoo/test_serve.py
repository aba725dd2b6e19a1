"""The service in this process: its protocol, batching, limits and bad input, with real clients."""

import gzip
import http.client
import io
import json
import re
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from bench.load import binary_request
from clever_zoo import OnnxClassifier, OnnxEncoder, create_encoder, model_info
from clever_zoo.errors import RequestError, SettingError
from clever_zoo.preprocess import decode_image
from clever_zoo.samples import sample_paths
from clever_zoo.serve import decoder
from clever_zoo.serve.app import Limits, create_app
from clever_zoo.serve.model import ServedModel, load_served_model
from clever_zoo.serve.protocol import HEADER_LENGTH, parse_request
from clever_zoo.serve.server import DrainingServer, open_socket

NAME = "clever-resnet18.fmnist"
DEFAULTS = Limits()
INFER = f"/v2/models/{NAME}/infer"


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


@contextmanager
def serving(
    model: ServedModel, limits: Limits = DEFAULTS, token: str | None = None, **options: Any
) -> Iterator[str]:
    """A service in a thread, as host:port; options are those of the server."""
    server = DrainingServer(create_app(model, limits, token), log_level="critical", **options)
    listening = open_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def send(
    address: str,
    path: str,
    body: bytes | Iterator[bytes] | None = None,
    headers: Mapping[str, str] = {},
    method: str | None = None,
) -> Answer:
    connection = http.client.HTTPConnection(address, timeout=60)
    chunked = body is not None and not isinstance(body, bytes)
    connection.request(
        method or ("GET" if body is None else "POST"),
        path,
        body,
        dict(headers),
        encode_chunked=chunked,
    )
    response = connection.getresponse()
    answer = Answer(response.status, response.headers, response.read())
    connection.close()
    return answer


def form(*files: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    parts = [
        f'--cut\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in files
    ]
    return b"".join([*parts, b"--cut--\r\n"]), {"Content-Type": "multipart/form-data; boundary=cut"}


def pixels_input(pixels: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("pixels", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    return tensor


@pytest.fixture(scope="module")
def encoder(onnx_models: Path) -> OnnxEncoder:
    return OnnxEncoder.from_pretrained(onnx_models / "resnet18.onnx", threads=1)


@pytest.fixture(scope="module")
def address(onnx_models: Path) -> Iterator[str]:
    model = load_served_model(str(onnx_models / "resnet18.onnx"), threads=1)
    with serving(model, Limits(max_image_pixels=1_000_000, max_body_bytes=1 << 20)) as address:
        yield address


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([np.asarray(Image.open(p).convert("RGB").resize((32, 32))) for p in
                     sample_paths()[:3]])  # fmt: skip


class SlowModel:
    """Runs a batch only when told to, and notes its pixels' first values."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.batches: list[list[int]] = []
        self.served = ServedModel(model_info(NAME), "slow", "fake", {"invariant": 1}, self.run)

    def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        self.batches.append(pixels[:, 0, 0, 0].tolist())
        assert self.go.wait(30)
        first = pixels[:, 0, 0].astype(np.float32)
        return {"invariant": first[:, :1], "equivariant": first[:, :0]}

    def wait_for_batches(self, count: int) -> None:
        deadline_s = time.monotonic() + 20
        while len(self.batches) < count:
            assert time.monotonic() < deadline_s, self.batches
            time.sleep(0.005)


def numbered(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 32, 32, 3), value, dtype=np.uint8)


def infer_numbered(address: str, value: int, count: int = 1) -> Answer:
    return send(address, INFER, *binary_request(numbered(value, count)))


def metric(address: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", send(address, "/metrics").body.decode(), re.M)
    return float(found[1]) if found else 0.0  # labels appear with their first value


def wait_for_metric(address: str, name: str, value: float) -> None:
    deadline_s = time.monotonic() + 20
    while metric(address, name) != value:
        assert time.monotonic() < deadline_s, metric(address, name)
        time.sleep(0.01)


# ---- the standard client


def test_triton_client_reads_the_service(address: str, encoder: OnnxEncoder) -> None:
    client = triton.InferenceServerClient(address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, "1")
    assert not client.is_model_ready(NAME, "2")
    assert not client.is_model_ready("clever-resnet50")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata(NAME, "1")
    assert metadata["inputs"] == [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    assert metadata["outputs"] == [
        {"name": "invariant", "datatype": "FP32", "shape": [-1, 409]},
        {"name": "equivariant", "datatype": "FP32", "shape": [-1, 103]},
    ]
    assert encoder.spec.weights is not None
    assert metadata["parameters"] == {"sha256": encoder.spec.weights.sha256}
    config = client.get_model_config("resnet18")
    assert config["max_batch_size"] == 32
    assert config["output"][1] == {"name": "equivariant", "data_type": "TYPE_FP32", "dims": [103]}
    with pytest.raises(InferenceServerException, match=r"/stats.*openapi"):
        client.get_inference_statistics(NAME)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_triton_client_infers(address, encoder, pixels, binary_in, compression) -> None:
    client = triton.InferenceServerClient(address)
    expected = encoder.embed_pixels(pixels)
    outputs = [
        triton.InferRequestedOutput("equivariant", binary_data=False),
        triton.InferRequestedOutput("invariant", binary_data=True),
    ]
    result = client.infer(
        NAME,
        [pixels_input(pixels, binary=binary_in)],
        outputs=outputs,
        request_id="seven",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    response = result.get_response()
    assert response["id"] == "seven"
    assert response["model_name"] == NAME
    assert [output["name"] for output in response["outputs"]] == ["equivariant", "invariant"]
    for name, half in expected._asdict().items():
        np.testing.assert_allclose(result.as_numpy(name), half, rtol=1e-4, atol=1e-5)


def test_triton_client_infers_without_naming_outputs_and_asynchronously(
    address, encoder, pixels
) -> None:
    client = triton.InferenceServerClient(address, concurrency=4)
    requests = [
        client.async_infer("resnet18", [pixels_input(pixels[i : i + 1])], model_version="1")
        for i in range(3)
    ]
    rows = np.concatenate([request.get_result().as_numpy("invariant") for request in requests])
    np.testing.assert_allclose(rows, encoder.embed_pixels(pixels).invariant, rtol=1e-4, atol=1e-5)


def test_json_alone_is_answered_in_json(address, encoder, pixels) -> None:
    tensor = {"name": "pixels", "shape": [1, 32, 32, 3], "datatype": "UINT8"}
    body = json.dumps({"inputs": [tensor | {"data": pixels[:1].tolist()}]}).encode()
    answer = send(address, INFER, body, {"Content-Type": "application/json"})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    invariant = next(o for o in answer.json["outputs"] if o["name"] == "invariant")
    expected = encoder.embed_pixels(pixels[:1]).invariant
    np.testing.assert_allclose([invariant["data"]], expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_answers_logits_and_has_no_embedding(onnx_models: Path) -> None:
    path = onnx_models / "classifier.onnx"
    pixels = numbered(7, 2)
    with serving(load_served_model(str(path), threads=1)) as address:
        client = triton.InferenceServerClient(address)
        logits = client.infer("classifier", [pixels_input(pixels)]).as_numpy("logits")
        answer = send(address, "/embed", *form(("a.png", sample_paths()[0].read_bytes())))
    expected = OnnxClassifier.from_pretrained(path, threads=1).logits(pixels)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert answer.status == 404
    assert "is a classifier" in answer.json["error"]


def test_torch_serves_a_model_without_a_graph(tmp_path: Path) -> None:
    import torch

    import clever_zoo

    torch.manual_seed(0)
    vit = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8, invariant_dim=192)
    vit.save_pretrained(tmp_path)
    model = load_served_model(f"local-dir:{tmp_path}")
    pixels = numbered(9, 2)
    with serving(model) as address:
        client = triton.InferenceServerClient(address)
        assert client.get_model_metadata("vit_tiny")["platform"] == "torch"
        assert client.get_model_metadata(tmp_path.name)["name"] == "vit_tiny"  # of its folder
        result = client.infer("vit_tiny", [pixels_input(pixels)])
        file = send(
            address, "/embed", sample_paths()[0].read_bytes(), {"Content-Type": "image/png"}
        )
    # The empty half is left out of the tensors, and empty in /embed.
    assert [output["name"] for output in result.get_response()["outputs"]] == ["invariant"]
    np.testing.assert_allclose(
        result.as_numpy("invariant"), vit.embed_pixels(pixels).invariant, rtol=1e-4, atol=1e-5
    )
    assert file.json["images"][0]["equivariant"] == []


# ---- image files


def test_embed_answers_the_good_files_among_bad_ones(address, encoder) -> None:
    paths = sample_paths()[:2]
    bomb = io.BytesIO()
    Image.new("L", (2000, 1000)).save(bomb, "PNG")
    files = [
        ("boot.png", paths[0].read_bytes()),
        ("notes.txt", b"no image"),
        ("bomb.png", bomb.getvalue()),
        ("half.png", paths[1].read_bytes()[:200]),
        ("second.png", paths[1].read_bytes()),
    ]
    answer = send(address, "/embed", *form(*files))
    assert answer.status == 200
    images = answer.json["images"]
    assert [image["name"] for image in images] == [name for name, _ in files]
    assert ["error" in image for image in images] == [False, True, True, True, False]
    assert "cannot be read as an image" in images[1]["error"]
    assert " 0x" not in images[1]["error"]  # nor an address in memory
    assert "2000x1000 pixels, at most 1000000" in images[2]["error"]
    assert answer.json["model"] == NAME
    assert answer.json["sha256"] == encoder.spec.weights.sha256
    expected = encoder.embed(paths)
    for half in ("invariant", "equivariant"):
        rows = [images[0][half], images[4][half]]
        np.testing.assert_allclose(rows, getattr(expected, half), rtol=1e-4, atol=1e-5)


def test_embed_takes_one_file_as_the_body(address, encoder) -> None:
    path = sample_paths()[5]
    answer = send(address, "/embed", path.read_bytes(), {"Content-Type": "image/png"})
    assert answer.status == 200
    np.testing.assert_allclose(
        [answer.json["images"][0]["invariant"]],
        encoder.embed([path]).invariant,
        rtol=1e-4,
        atol=1e-5,
    )


def test_header_values_are_read_in_any_case(address: str) -> None:
    picture = sample_paths()[0].read_bytes()
    body, headers = form(("a.png", picture))
    cased = {"Content-Type": headers["Content-Type"].replace("multipart/form", "Multipart/Form")}
    for request in ((picture, {"Content-Type": "Image/PNG"}), (body, cased)):
        assert send(address, "/embed", *request).status == 200
    pixels, headers = binary_request(numbered(1))
    packed = gzip.compress(pixels)
    assert send(address, INFER, packed, headers | {"Content-Encoding": "GZip"}).status == 200


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"no image", {"Content-Type": "image/png"}, 400, "no file is a readable image"),
        (b"x", {"Content-Type": "text/plain"}, 415, "multipart/form-data"),
        (b"x", {"Content-Type": "image/png", "Content-Encoding": "gzip"}, 415, "as they are"),
        (b"x", {"Content-Type": "multipart/form-data"}, 400, "boundary"),
        (b"x", {"Content-Type": "multipart/form-data; boundary=cut"}, 400, "multipart"),
        (*form(), 400, "no file"),
        (*form(*[("a", b"")] * 257), 400, "Too many files"),
    ],
)
def test_embed_refuses(address, body, headers, status, message) -> None:
    answer = send(address, "/embed", body, headers)
    assert answer.status == status
    assert message in answer.json["error"]


# ---- bad tensors


def tensor_json(**changes: Any) -> bytes:
    tensor = {"name": "pixels", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [0] * 3072}
    return json.dumps({"inputs": [tensor | changes]}).encode()


def binary_body(size: int, **changes: Any) -> tuple[bytes, dict[str, str]]:
    parameters = {"binary_data_size": changes.pop("binary_data_size", size)}
    tensor = {"name": "pixels", "shape": [1, 32, 32, 3], "datatype": "UINT8"}
    text = json.dumps({"inputs": [tensor | {"parameters": parameters} | changes]}).encode()
    return text + bytes(size), {HEADER_LENGTH: str(len(text))}


_FULL, _FULL_HEADERS = binary_body(3072)
BAD_TENSORS: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "dtype": (tensor_json(datatype="FP32"), {}, 400, "datatype 'FP32'; send UINT8"),
    "rank": (tensor_json(shape=[32, 32, 3]), {}, 400, "[B, 32, 32, 3]"),
    "channels": (tensor_json(shape=[1, 32, 32, 4]), {}, 400, "[B, 32, 32, 3]"),
    "channels first": (tensor_json(shape=[1, 3, 32, 32]), {}, 400, "[B, 32, 32, 3]"),
    "no image": (tensor_json(shape=[0, 32, 32, 3], data=[0]), {}, 400, "B at least 1"),
    "negative": (tensor_json(shape=[-1, 32, 32, 3]), {}, 400, "B at least 1"),
    "too many": (tensor_json(shape=[257, 32, 32, 3]), {}, 400, "at most 256"),
    "name": (tensor_json(name="image"), {}, 400, "'image'; pass exactly one, 'pixels'"),
    "no input": (b'{"inputs": []}', {}, 400, "pass exactly one"),
    "unknown key": (tensor_json(dtype="UINT8"), {}, 400, "dtype: unknown key"),
    "shared memory": (
        tensor_json(parameters={"shared_memory_region": "r"}),
        {},
        400,
        "shared_memory_region: unknown key",
    ),
    "nan": (tensor_json(data=[float("nan")] * 3072), {}, 400, "no NaN"),
    "fraction": (tensor_json(data=[0.5] * 3072), {}, 400, "whole numbers"),
    "text": (tensor_json(data=["0"] * 3072), {}, 400, "holds str; UINT8 takes whole numbers"),
    "one text": (tensor_json(data=[0] * 3071 + ["0"]), {}, 400, "holds str"),
    "truth": (tensor_json(data=[True] * 3072), {}, 400, "holds bool"),
    "too bright": (tensor_json(data=[256] * 3072), {}, 400, "from 256 to 256"),
    "below zero": (tensor_json(data=[-1] * 3072), {}, 400, "from -1 to -1"),
    "huge number": (tensor_json(data=[0] * 3071 + [10**999]), {}, 400, "whole numbers 0..255"),
    "too few": (tensor_json(data=[0] * 3071), {}, 400, "3071 values"),
    "ragged": (tensor_json(data=[[0], [0, 0]]), {}, 400, "ragged"),
    "ragged inside": (tensor_json(data=[[0], 0]), {}, 400, "ragged"),
    "mixed": (tensor_json(data=[0] * 3071 + [[0]]), {}, 400, "holds list"),
    "empty rows": (tensor_json(data=[[], []]), {}, 400, "0 values"),
    "no data": (tensor_json(data=[]), {}, 400, "no data"),
    "deep": (b"[" * 100_000, {}, 400, "recursion limit"),
    "no json": (b"{", {}, 400, "Invalid JSON"),
    "empty": (b"", {}, 400, "Invalid JSON"),
    "no object": (b"[]", {}, 400, "does not fit the protocol"),
    "no length header": (_FULL, {}, 400, HEADER_LENGTH),
    "length over body": (_FULL, {HEADER_LENGTH: "99999"}, 400, "99999, but the body has"),
    "length of words": (_FULL, {HEADER_LENGTH: "many"}, 400, "'many'"),
    "length below zero": (_FULL, {HEADER_LENGTH: "-5"}, 400, "'-5'"),
    "short binary": (*binary_body(3071, binary_data_size=3072), 400, "takes 3072 bytes"),
    "long binary": (*binary_body(3073, binary_data_size=3072), 400, "3073 bytes follow"),
    "other size": (*binary_body(3072, binary_data_size=1), 400, "binary_data_size is 1"),
    "data twice": (*binary_body(3072, data=[0]), 400, "send one of them"),
    "encoding": (_FULL, {"Content-Encoding": "br"}, 415, "'br'; use gzip"),
    "no gzip": (_FULL, {"Content-Encoding": "gzip"}, 400, "is not gzip"),
    "half gzip": (gzip.compress(_FULL)[:-9], {"Content-Encoding": "gzip"}, 400, "one whole gzip"),
    "gzip bomb": (gzip.compress(bytes(20 << 20)), {"Content-Encoding": "gzip"}, 413, "unpacks to"),
    "deflate bomb": (
        zlib.compress(bytes(20 << 20)),
        {"Content-Encoding": "deflate"},
        413,
        "unpacks to more than 1048576",
    ),
    "over the limit": (bytes(1_100_000), {}, 413, "at most 1048576"),
    "unknown output": (
        json.dumps({"inputs": json.loads(tensor_json())["inputs"], "outputs": [{"name": "x"}]})
        .encode(),
        {},
        400,
        "unknown output 'x'; clever-resnet18.fmnist has 'invariant', 'equivariant'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors_are_refused_with_a_reason(address, kind) -> None:
    body, headers, status, message = BAD_TENSORS[kind]
    answer = send(address, INFER, body, headers)
    assert (answer.status, message in answer.json["error"]) == (status, True), answer.json
    assert len(answer.body) < 2000


def test_long_text_among_numbers_takes_no_memory() -> None:
    body = tensor_json(data=["a" * 10_000] + [0] * 3071)  # 40 KB of text for each of 3072 values
    tracemalloc.start()
    with pytest.raises(RequestError, match="holds str"):
        parse_request(body, None, SlowModel().served, max_images=1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5e6


@pytest.mark.parametrize("shape", [(3072,), (1, 3072), (1, 32, 32, 3)])
def test_json_may_be_flat_or_nested(shape: tuple[int, ...]) -> None:
    values = np.arange(3072, dtype=np.uint8)  # wraps round
    body = tensor_json(data=values.reshape(shape).tolist())
    pixels = parse_request(body, None, SlowModel().served, max_images=1).pixels
    np.testing.assert_array_equal(pixels, values.reshape(1, 32, 32, 3))


def test_a_chunked_body_over_the_limit_is_refused_while_it_arrives(address: str) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(40):
            sent += 65536
            yield bytes(65536)

    answer = send(address, INFER, chunks())
    assert answer.status == 413
    assert "at most 1048576" in answer.json["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v2/models/clever-resnet50/infer", 404, "'clever-resnet50' is not served here"),
        ("POST", f"/v2/models/{NAME}/versions/3/infer", 404, "only '1'"),
        ("GET", "/nothing", 404, "openapi.json"),
        ("GET", INFER, 405, "Method Not Allowed"),
    ],
)
def test_wrong_paths_are_refused_in_json(address, method, path, status, message) -> None:
    answer = send(address, path, *binary_request(numbered(1)), method=method)
    assert answer.status == status
    assert message in answer.json["error"]


def test_endless_headers_are_cut_off(address: str) -> None:
    host, port = address.split(":")
    lines = b"".join(f"x-{i}: {'y' * 100}\r\n".encode() for i in range(100_000))
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\n")
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            connection.sendall(lines)


def test_a_wrong_token_is_refused_and_health_stays_open(onnx_models: Path) -> None:
    model = load_served_model(str(onnx_models / "resnet18.onnx"), threads=1)
    with serving(model, token="sesame") as address:
        client = triton.InferenceServerClient(address)
        assert client.is_server_live()
        assert client.is_server_ready()
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
            for path in (INFER, "/embed"):
                answer = send(address, path, *_with(binary_request(numbered(1)), wrong))
                assert answer.status == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert "Authorization: Bearer" in answer.json["error"]
            assert send(address, "/metrics", headers=wrong).status == 401
            assert send(address, "/v2", headers=wrong).status == 401
            assert send(address, "/openapi.json", headers=wrong).status == 401
        right = {"Authorization": "Bearer sesame"}
        assert client.infer(NAME, [pixels_input(numbered(1))], headers=right)
        assert send(address, "/metrics", headers=right).status == 200
        assert send(address, "/openapi.json", headers=right).status == 200


@pytest.mark.parametrize("token", ["", " ", "secret\n", "two words", "süß"])
def test_a_token_that_no_header_carries_is_refused(token: str) -> None:
    with pytest.raises(SettingError, match=f"has {len(token)} characters") as refused:
        create_app(SlowModel().served, token=token)
    assert "secret" not in str(refused.value)


def _with(request: tuple[bytes, dict[str, str]], headers: dict[str, str]) -> tuple[bytes, Any]:
    return request[0], request[1] | headers


# ---- batching, overload, clients that leave


def test_64_clients_share_batches_and_each_gets_its_own_rows() -> None:
    model = SlowModel()
    model.go.set()
    limits = Limits(max_batch=16, max_delay_s=0.05)
    with serving(model.served, limits) as address, ThreadPoolExecutor(64) as clients:

        def ask(value: int) -> list[float]:
            client = triton.InferenceServerClient(address)
            rows = [
                client.infer("slow", [pixels_input(numbered(value))]).as_numpy("invariant")
                for _ in range(3)
            ]
            return np.concatenate(rows).ravel().tolist()

        answers = list(clients.map(ask, range(64)))
        assert metric(address, "clever_zoo_images_total") == 192
        assert metric(address, "clever_zoo_batch_images_sum") == 192
        done = 'clever_zoo_requests_total{handler="infer",status="200"}'
        wait_for_metric(address, done, 192)
    assert answers == [[value] * 3 for value in range(64)]
    sizes = list(map(len, model.batches))
    assert max(sizes) <= 16
    assert np.mean(sizes) > 2


def test_requests_are_kept_whole_or_split_if_larger_than_a_batch() -> None:
    model = SlowModel()
    limits = Limits(max_batch=4, max_delay_s=0.0)
    with serving(model.served, limits) as address, ThreadPoolExecutor(4) as clients:
        first = clients.submit(infer_numbered, address, 1)
        model.wait_for_batches(1)
        waiting = []
        for value, count in ((2, 3), (3, 2), (4, 9)):
            queued = metric(address, "clever_zoo_queued_images")
            waiting.append(clients.submit(infer_numbered, address, value, count))
            wait_for_metric(address, "clever_zoo_queued_images", queued + count)
        model.go.set()
        answers = [future.result() for future in [first, *waiting]]
    assert model.batches == [[1], [2, 2, 2], [3, 3], [4, 4, 4, 4], [4, 4, 4, 4], [4]]
    for answer, (value, count) in zip(answers, ((1, 1), (2, 3), (3, 2), (4, 9)), strict=True):
        values = np.frombuffer(answer.body[int(answer.headers[HEADER_LENGTH]) :], "<f4")
        assert values.tolist() == [value] * count


def test_overload_is_answered_at_once_with_503_and_retry_after() -> None:
    model = SlowModel()
    limits = Limits(max_batch=2, max_delay_s=0.0, max_queue=4)
    with serving(model.served, limits) as address, ThreadPoolExecutor(8) as clients:
        accepted = [clients.submit(infer_numbered, address, 0)]
        model.wait_for_batches(1)
        accepted += [clients.submit(infer_numbered, address, value) for value in range(1, 4)]
        wait_for_metric(address, "clever_zoo_queued_images", 3)
        start_s = time.monotonic()
        refused = [infer_numbered(address, 9, 2)]  # its two images do not fit
        accepted.append(clients.submit(infer_numbered, address, 4))
        wait_for_metric(address, "clever_zoo_queued_images", 4)
        refused += [infer_numbered(address, 9) for _ in range(3)]
        refused.append(send(address, "/embed", *form(("a", b"never read"))))
        assert time.monotonic() - start_s < 5
        for answer in refused:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert "images are waiting, 4 may" in answer.json["error"]
        model.go.set()
        assert [future.result().status for future in accepted] == [200] * 5
        assert infer_numbered(address, 5).status == 200
    assert 9 not in [value for batch in model.batches for value in batch]


def test_bodies_in_work_share_a_budget() -> None:
    model = SlowModel()
    limits = Limits(max_batch=1, max_delay_s=0.0, max_body_bytes=4000)
    with serving(model.served, limits) as address, ThreadPoolExecutor(8) as clients:
        accepted = [clients.submit(infer_numbered, address, value) for value in range(5)]
        model.wait_for_batches(1)
        wait_for_metric(address, "clever_zoo_queued_images", 3)
        # Five bodies of 3 KB do not fit into four times 4000 bytes.
        model.go.set()
        statuses = sorted(future.result().status for future in accepted)
    assert statuses == [200, 200, 200, 200, 503]


class SlowDecoder:
    """Decodes only when told to, and notes the names of the files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.names: list[str] = []
        monkeypatch.setattr(decoder, "decode_image", self.decode)
        monkeypatch.setattr(decoder, "usable_cores", lambda: 1)

    def decode(self, content: bytes, name: str, *args: Any, **options: Any) -> Image.Image:
        self.names.append(name)
        assert self.go.wait(30)
        return decode_image(content, name, *args, **options)


def test_decoding_refuses_what_is_too_much_and_stops_no_tensors(monkeypatch) -> None:
    picture = sample_paths()[0].read_bytes()
    slow, model = SlowDecoder(monkeypatch), SlowModel()
    model.go.set()

    def embed(*names: str) -> Answer:
        return send(address, "/embed", *form(*((name, picture) for name in names)))

    limits = Limits(max_queue=3)
    with serving(model.served, limits) as address, ThreadPoolExecutor(4) as clients:
        accepted = [clients.submit(embed, "a", "b")]
        wait_for_metric(address, "clever_zoo_decoding_files", 2)
        refused = [embed("c", "d")]  # its two files do not fit
        accepted.append(clients.submit(embed, "e"))
        wait_for_metric(address, "clever_zoo_decoding_files", 3)
        refused.append(embed("f"))
        assert infer_numbered(address, 1).status == 200
        for answer, count in zip(refused, (2, 3), strict=True):
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert f"{count} files are being decoded, 3 may" in answer.json["error"]
        slow.go.set()
        assert [future.result().status for future in accepted] == [200, 200]
        assert embed("g", "h", "i").status == 200
    assert slow.names == ["a", "b", "e", "g", "h", "i"]


def test_files_of_a_client_that_hung_up_are_not_decoded(monkeypatch) -> None:
    slow, model = SlowDecoder(monkeypatch), SlowModel()
    files = [(name, sample_paths()[0].read_bytes()) for name in "abcd"]
    with serving(model.served) as address:
        leaving = raw_request(address, *form(*files), path="/embed")
        wait_for_metric(address, "clever_zoo_decoding_files", 4)
        leaving.close()
        wait_for_metric(address, "clever_zoo_decoding_files", 0)
        assert metric(address, 'clever_zoo_requests_total{handler="embed",status="499"}') == 1
        slow.go.set()
    assert slow.names == ["a"]
    assert model.batches == []


def test_work_of_a_client_that_hung_up_is_dropped() -> None:
    model = SlowModel()
    limits = Limits(max_batch=1, max_delay_s=0.0)
    with serving(model.served, limits) as address, ThreadPoolExecutor(2) as clients:
        first = clients.submit(infer_numbered, address, 1)
        model.wait_for_batches(1)
        leaving = raw_request(address, *binary_request(numbered(2, 3)))
        wait_for_metric(address, "clever_zoo_queued_images", 3)
        staying = clients.submit(infer_numbered, address, 3)
        wait_for_metric(address, "clever_zoo_queued_images", 4)
        leaving.close()
        wait_for_metric(address, "clever_zoo_queued_images", 1)
        gone = 'clever_zoo_requests_total{handler="infer",status="499"}'
        assert metric(address, gone) == 1
        model.go.set()
        assert [first.result().status, staying.result().status] == [200, 200]
    assert model.batches == [[1], [3]]


def raw_request(
    address: str, body: bytes, headers: Mapping[str, str], *, cut: int = 0, path: str = INFER
) -> socket.socket:
    """Send a request by hand, without its last `cut` bytes, and leave the connection open."""
    host, port = address.split(":")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{lines}\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + body[: len(body) - cut])
    return connection


def test_clients_that_hang_up_mid_body_leave_nothing_behind(address: str) -> None:
    for abort in (False, True):
        connection = raw_request(address, *binary_request(numbered(1, 20)), cut=1000)
        if abort:  # a reset instead of an orderly end
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
    wait_for_metric(address, 'clever_zoo_requests_total{handler="infer",status="499"}', 2)
    assert infer_numbered(address, 1).status == 200


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    model = SlowModel()
    with serving(model.served, Limits(body_timeout_s=0.2)) as address:
        connection = raw_request(address, *binary_request(numbered(1)), cut=1)
        connection.settimeout(30)
        answer = b""
        while not answer.endswith(b"}") and (more := connection.recv(65536)):
            answer += more
        connection.close()
    assert b" 408 " in answer
    assert b"did not arrive within 0.2 s" in answer


def test_a_connection_without_a_request_is_closed() -> None:
    model = SlowModel()
    ask = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
    with serving(model.served, idle_timeout_s=1) as address, ThreadPoolExecutor(4) as clients:
        host, port = address.split(":")
        asked = clients.submit(infer_numbered, address, 1)
        silent, dripping, again = (socket.create_connection((host, int(port))) for _ in range(3))
        again.sendall(ask + b"\r\n" + ask)  # a whole request, and one without its end
        ended = [clients.submit(read_to_end, silent), clients.submit(read_to_end, again)]
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            drip(dripping, ask)
        assert ended[0].result() == b""
        assert ended[1].result().count(b"200 OK") == 1
        # A request in work may take longer.
        model.go.set()
        assert asked.result().status == 200


def test_a_refused_body_cannot_keep_its_connection() -> None:
    with serving(SlowModel().served, Limits(max_body_bytes=100), idle_timeout_s=1) as address:
        connection = raw_request(address, bytes(10_000), {}, cut=9999)
        assert b" 413 " in connection.recv(65536)
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            drip(connection, b"")


def drip(connection: socket.socket, start: bytes) -> None:
    """Send a byte now and then for as long as the service lets us."""
    connection.sendall(start)
    deadline_s = time.monotonic() + 15
    while time.monotonic() < deadline_s:
        connection.sendall(b"x")
        time.sleep(0.05)


def read_to_end(connection: socket.socket) -> bytes:
    connection.settimeout(15)
    with connection, connection.makefile("rb") as stream:
        return stream.read()


def test_a_model_that_fails_is_a_500_and_the_service_goes_on() -> None:
    model = SlowModel()
    model.go.set()

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        if pixels[0, 0, 0, 0] == 13:
            raise RuntimeError("out of luck")
        return model.run(pixels)

    with serving(model.served._replace(run=run)) as address:
        answer = infer_numbered(address, 13)
        assert answer.status == 500
        assert "internal error" in answer.json["error"]
        assert metric(address, 'clever_zoo_requests_total{handler="infer",status="500"}') == 1
        assert infer_numbered(address, 1).status == 200


def test_values_that_are_not_finite_are_no_answer() -> None:
    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        values = np.ones((len(pixels), 2), dtype=np.float32)
        values[0] = np.nan
        return {"invariant": values[:, :1], "equivariant": values[:, 1:]}

    picture = sample_paths()[0].read_bytes()
    with serving(SlowModel().served._replace(run=run)) as address:
        answer = infer_numbered(address, 1)
        assert (answer.status, "not finite" in answer.json["error"]) == (500, True)
        answer = send(address, "/embed", *form(("a", picture), ("b", picture)))
        assert answer.status == 200
        bad, good = answer.json["images"]
        assert "not finite" in bad["error"]
        assert bad.keys() == {"name", "error"}
        assert good["equivariant"] == [1.0]


@pytest.mark.parametrize("source", ["local-dir:my-model", "local-dir:./my-model/"])
def test_a_folder_is_served_under_its_name(tmp_path: Path, monkeypatch, source: str) -> None:
    create_encoder("vit_tiny", img_size=32, patch_size=8).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    assert load_served_model(source).alias == "my-model"


# ---- what describes and measures it


def test_openapi_describes_the_paths_without_a_cdn(address: str) -> None:
    described = send(address, "/openapi.json").json
    assert set(described["paths"]) >= {
        "/embed",
        "/metrics",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{name}",
        "/v2/models/{name}/infer",
    }
    body = described["paths"]["/embed"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "image/*"}
    assert send(address, "/docs").status == 404


def test_metrics_keep_unknown_paths_apart(address: str) -> None:
    for path in ("/a", "/b"):
        send(address, path)
    text = send(address, "/metrics").body.decode()
    assert 'handler="unknown",status="404"' in text
    assert 'handler="/a"' not in text
    assert metric(address, "clever_zoo_inference_seconds_count") >= 1
    assert metric(address, "clever_zoo_queue_seconds_count") >= 1
    assert metric(address, "clever_zoo_queued_images") == 0
