"""KServe V2 / Open Inference Protocol: bodies of requests and answers, no HTTP server in it."""

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clever_zoo import __version__
from clever_zoo.embedding import NOT_FINITE
from clever_zoo.errors import RequestError
from clever_zoo.serve.model import Outputs, ServedModel
from clever_zoo.spec import problem_lines

HEADER_LENGTH = "Inference-Header-Content-Length"
VERSION = "1"
_INPUT = "pixels"
# Python's lists take many times the room of their text, so tensors as JSON are for small requests.
_MAX_JSON_BYTES = 16 << 20
_MAX_MESSAGE_CHARS = 1000


class InferRequest(NamedTuple):
    """A request that fits the model.

    Attributes:
        id: The client's name for it, or None.
        pixels: (B, size, size, 3) uint8.
        outputs: Names in the order asked for -> whether to answer in binary.
    """

    id: str | None
    pixels: NDArray[np.uint8]
    outputs: Mapping[str, bool]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _InputParameters(_Strict):
    binary_data_size: int | None = None


class _Input(_Strict):
    name: str
    shape: list[int]
    datatype: str
    parameters: _InputParameters = _InputParameters()
    data: list[Any] | None = None


class _OutputParameters(_Strict):
    binary_data: bool | None = None


class _Output(_Strict):
    name: str
    parameters: _OutputParameters = _OutputParameters()


class _Parameters(BaseModel):
    """Others, such as priority, are the client's own and change nothing."""

    model_config = ConfigDict(strict=True)

    binary_data_output: bool = False


class _Body(_Strict):
    id: str | None = None
    parameters: _Parameters = _Parameters()
    inputs: list[_Input]
    outputs: list[_Output] = Field(default=[])


def server_metadata() -> dict[str, Any]:
    """The answer to GET /v2."""
    return {"name": "clever-zoo", "version": __version__, "extensions": ["binary_tensor_data"]}


def model_metadata(model: ServedModel) -> dict[str, Any]:
    """The answer to GET /v2/models/NAME."""
    size = model.preprocess.input_size_px
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": model.platform,
        "inputs": [{"name": _INPUT, "datatype": "UINT8", "shape": [-1, size, size, 3]}],
        "outputs": [
            {"name": name, "datatype": "FP32", "shape": [-1, width]}
            for name, width in model.outputs.items()
        ],
        "parameters": {"sha256": model.sha256},
    }


def model_config(model: ServedModel, max_batch: int, max_delay_s: float) -> dict[str, Any]:
    """The answer to Triton's GET /v2/models/NAME/config."""
    size = model.preprocess.input_size_px
    return {
        "name": model.name,
        "platform": model.platform,
        "max_batch_size": max_batch,
        "input": [{"name": _INPUT, "data_type": "TYPE_UINT8", "dims": [size, size, 3]}],
        "output": [
            {"name": name, "data_type": "TYPE_FP32", "dims": [width]}
            for name, width in model.outputs.items()
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": round(max_delay_s * 1e6)},
    }


def parse_request(
    body: bytes | bytearray, header_length: str | None, model: ServedModel, max_images: int
) -> InferRequest:
    """Read the body of an inference request; binary pixels are not copied.

    Args:
        body: JSON, followed by the binary tensor if there is one.
        header_length: Value of the header `HEADER_LENGTH`: bytes of JSON, None if all is JSON.
        model: What it is for.
        max_images: Largest number of images of one request.

    Raises:
        RequestError: Saying what does not fit.
    """
    json_bytes = _json_length(body, header_length)
    request = _parse_json(body[:json_bytes], header_length)
    if len(request.inputs) != 1 or request.inputs[0].name != _INPUT:
        names = ", ".join(repr(tensor.name) for tensor in request.inputs) or "none"
        raise RequestError(f"inputs are {_short(names)}; pass exactly one, {_INPUT!r}")
    tensor = request.inputs[0]
    _check_tensor(tensor, model.preprocess.input_size_px, max_images)
    binary = memoryview(body)[json_bytes:]
    pixels = (
        _json_pixels(tensor, tensor.data, binary) if tensor.data else _binary_pixels(tensor, binary)
    )
    return InferRequest(request.id, pixels.reshape(tensor.shape), _wanted_outputs(request, model))


def _json_length(body: bytes | bytearray, header_length: str | None) -> int:
    if header_length is None:
        length = len(body)
    elif header_length.isascii() and header_length.isdigit() and len(header_length) < 20:
        length = int(header_length)
    else:
        raise RequestError(
            f"{HEADER_LENGTH} is {_short(header_length)!r}; it is the number of bytes of JSON "
            "before the binary data"
        )
    if length > len(body):
        raise RequestError(
            f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes; "
            "it counts the JSON only"
        )
    if length > _MAX_JSON_BYTES:
        raise RequestError(
            f"{length} bytes of JSON, at most {_MAX_JSON_BYTES} are read; send binary tensors", 413
        )
    return length


def _parse_json(text: bytes | bytearray, header_length: str | None) -> _Body:
    try:
        return _Body.model_validate_json(bytes(text))
    except ValidationError as error:
        hint = "" if header_length else f" (before binary data, {HEADER_LENGTH} gives its length)"
        lines = "; ".join(problem_lines(error))
        raise RequestError(
            f"the request's JSON{hint} does not fit the protocol: {_short(lines)}"
        ) from error


def _short(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE_CHARS else f"{text[:_MAX_MESSAGE_CHARS]}..."


def _check_tensor(tensor: _Input, size_px: int, max_images: int) -> None:
    if tensor.datatype != "UINT8":
        raise RequestError(f"{_INPUT} has datatype {_short(tensor.datatype)!r}; send UINT8, 0..255")
    if len(tensor.shape) != 4 or tensor.shape[1:] != [size_px, size_px, 3] or tensor.shape[0] < 1:
        raise RequestError(
            f"{_INPUT} has shape {_short(str(tensor.shape))}; send [B, {size_px}, {size_px}, 3], "
            "RGB in the last axis, B at least 1"
        )
    if tensor.shape[0] > max_images:
        raise RequestError(
            f"{_short(str(tensor.shape[0]))} images in one request, at most {max_images} are "
            "taken; send several"
        )


def _binary_pixels(tensor: _Input, binary: memoryview) -> NDArray[np.uint8]:
    size, expected = tensor.parameters.binary_data_size, math.prod(tensor.shape)
    if size is None:
        raise RequestError(
            f"{_INPUT} has no data; give 'data', or binary data and 'binary_data_size'"
        )
    if size != expected or len(binary) != expected:
        raise RequestError(
            f"shape {tensor.shape} of UINT8 takes {expected} bytes; binary_data_size is {size} "
            f"and {len(binary)} bytes follow the JSON of {HEADER_LENGTH}"
        )
    return np.frombuffer(binary, dtype=np.uint8)


def _json_pixels(tensor: _Input, data: list[Any], binary: memoryview) -> NDArray[np.uint8]:
    if len(binary) or tensor.parameters.binary_data_size is not None:
        raise RequestError(f"{_INPUT} has 'data' and binary data; send one of them")
    values, expected = _flat(data), math.prod(tensor.shape)
    if len(values) != expected:
        raise RequestError(
            f"'data' has {len(values)} values, shape {tensor.shape} takes {expected}"
        )
    # Before NumPy sees them: with text among them, it would make all as wide as the longest.
    if others := {type(value).__name__ for value in values} - {"int"}:
        raise RequestError(
            f"'data' holds {', '.join(sorted(others))}; UINT8 takes whole numbers 0..255, "
            "no fractions, no NaN, no text"
        )
    least, greatest = min(values), max(values)
    if least < 0 or greatest > 255:
        raise RequestError(
            f"'data' runs from {_short(str(least))} to {_short(str(greatest))}; "
            "UINT8 takes whole numbers 0..255"
        )
    return np.frombuffer(bytes(values), dtype=np.uint8)


def _flat(data: list[Any]) -> list[Any]:
    """Values without their nesting."""
    while data and isinstance(data[0], list):
        if {type(row) for row in data} != {list} or len({len(row) for row in data}) > 1:
            raise RequestError("'data' is ragged; send a full array, or a flat one")
        data = list(itertools.chain.from_iterable(data))
    return data


def _wanted_outputs(request: _Body, model: ServedModel) -> dict[str, bool]:
    default = request.parameters.binary_data_output
    if not request.outputs:
        return dict.fromkeys(model.outputs, default)
    wanted: dict[str, bool] = {}
    for output in request.outputs:
        if output.name not in model.outputs:
            raise RequestError(
                f"unknown output {_short(output.name)!r}; {model.name} has "
                f"{', '.join(map(repr, model.outputs))}"
            )
        binary = output.parameters.binary_data
        wanted[output.name] = default if binary is None else binary
    return wanted


def encode_response(
    model: ServedModel, request: InferRequest, outputs: Outputs
) -> tuple[bytes, dict[str, str]]:
    """The answer's body and headers.

    Raises:
        RequestError: If a value is not finite, which JSON cannot say and nobody can use.
    """
    if not all(np.isfinite(outputs[name]).all() for name in request.outputs):
        raise RequestError(f"an image of the request is not embedded: {NOT_FINITE}", 500)
    tensors, binary = [], []
    for name, as_binary in request.outputs.items():
        values = outputs[name]
        tensor: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
        if as_binary:
            tensor["parameters"] = {"binary_data_size": values.nbytes}
            binary.append(values.astype("<f4", copy=False).tobytes())
        else:
            tensor["data"] = values.ravel().tolist()
        tensors.append(tensor)
    answer = {"model_name": model.name, "model_version": VERSION, "outputs": tensors}
    if request.id is not None:
        answer["id"] = request.id
    text = json.dumps(answer).encode()
    if not binary:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *binary]), headers
