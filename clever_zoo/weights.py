"""What a safetensors file holds, read from its header and checked before any tensor is made."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from clever_zoo.errors import IntegrityError, SpecError, WeightsMismatchError
from clever_zoo.spec import MAX_JSON_BYTES, parse_json, problem_lines

_LENGTH_BYTES = 8
# Bytes of a value by safetensors' names of the types.
_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}


class StoredTensor(NamedTuple):
    """A tensor in a file: safetensors' name of its type, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class ExpectedTensor(NamedTuple):
    """A tensor that a file must hold, in one of these types and in this shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: list[NonNegativeInt]


_ENTRIES = TypeAdapter(dict[str, _Entry])


def check_tensors(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, ExpectedTensor], source: str
) -> None:
    """Compare the tensors that a file holds with those that it must hold.

    Raises:
        WeightsMismatchError: Naming `source`, and listing missing, unexpected, misshapen and
            mistyped tensors.
    """
    wrong = []
    for key in sorted(expected.keys() & stored.keys()):
        (dtypes, shape), found = expected[key], stored[key]
        if found.shape != shape:
            wrong.append(f"wrong shape: {key} is {found.shape}, expected {shape}")
        elif found.dtype not in dtypes:
            wrong.append(f"wrong type: {key} is {found.dtype}, expected {' or '.join(dtypes)}")
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys())
    if missing or unexpected or wrong:
        raise WeightsMismatchError(source, missing, unexpected, wrong)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, without reading them.

    Raises:
        IntegrityError: If the header is longer than 1 MiB or than the file, is no JSON of the
            right form, or its tensors do not fill the rest of the file one after the other.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        limit = max(0, min(MAX_JSON_BYTES, size - _LENGTH_BYTES))
        if length > limit:
            raise _damaged(path, f"its header would have {length} bytes, at most {limit} can be")
        entries = _entries(file.read(length), path)
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        width = _BYTES.get(entry.dtype)
        if width is None:
            raise _damaged(path, f"{key} has the type {entry.dtype!r}, none of {', '.join(_BYTES)}")
        bounds = [end, end + width * math.prod(entry.shape)]
        if entry.data_offsets != bounds:
            raise _damaged(path, f"{key} lies at bytes {entry.data_offsets}, not at {bounds}")
        end = bounds[1]
    if end != size - _LENGTH_BYTES - length:
        raise _damaged(path, f"its tensors end at byte {end} of {size - _LENGTH_BYTES - length}")
    return {key: StoredTensor(e.dtype, tuple(e.shape)) for key, e in entries.items()}


def _entries(header: bytes, path: Path) -> dict[str, _Entry]:
    try:
        content: Any = parse_json(header, "its header")
        if isinstance(content, dict):
            content.pop("__metadata__", None)
        return _ENTRIES.validate_python(content)
    except SpecError as error:
        raise _damaged(path, str(error)) from error
    except ValidationError as error:
        raise _damaged(path, f"its header is wrong at {problem_lines(error)[0]}") from error


def _damaged(path: Path, problem: str) -> IntegrityError:
    return IntegrityError(f"{path} is no safetensors file: {problem}; fetch it again")
