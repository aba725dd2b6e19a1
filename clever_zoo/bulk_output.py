"""The output of a bulk run: Parquet, streamed in row groups, or NumPy's .npz."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clever_zoo.bulk_parts import Part
from clever_zoo.embedding import Embedding, join_batches
from clever_zoo.errors import BackendMissingError, DataError
from clever_zoo.preprocess import batched
from clever_zoo.spec import ModelSpec

# Parts to a row group: some thousand rows, which readers load at once.
_PARTS_PER_ROW_GROUP = 8

WriteOutput = Callable[[Path, Iterable[Part], ModelSpec, dict[str, str]], int]


def output_writer(out: Path) -> WriteOutput:
    """The function that writes such a file; it returns the number of rows.

    Raises:
        DataError: If `out` has another suffix or is a folder.
        BackendMissingError: If pyarrow is missing for Parquet.
    """
    if out.suffix not in _WRITERS:
        raise DataError(f"{out} must end in {' or '.join(_WRITERS)}")
    if out.is_dir():
        raise DataError(f"{out} is a folder; name a file in it")
    if out.suffix == ".parquet":
        _import_pyarrow()
    return _WRITERS[out.suffix]


def _import_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise BackendMissingError(
            'Parquet files need pyarrow: pip install "clever-zoo[bulk]" (or write .npz)'
        ) from error
    return pyarrow


def _write_parquet(
    path: Path, parts: Iterable[Part], spec: ModelSpec, metadata: dict[str, str]
) -> int:
    pa = _import_pyarrow()
    # -1: pyarrow has no fixed size 0, which is the equivariant half of an encoder without a split.
    widths = {"invariant": spec.invariant_dim or -1, "equivariant": spec.equivariant_dim or -1}
    halves = [pa.field(name, pa.list_(pa.float32(), width)) for name, width in widths.items()]
    schema = pa.schema([pa.field("path", pa.string()), *halves], metadata=metadata)

    def column(half: NDArray[np.float32], field: Any) -> Any:
        if half.shape[1] == 0:
            return pa.array([[]] * len(half), field.type)
        return pa.FixedSizeListArray.from_arrays(half.ravel(), half.shape[1])

    rows = 0
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for group in batched(parts, _PARTS_PER_ROW_GROUP):
            paths, embedding = _join(group, spec)
            columns = [pa.array(paths, pa.string()), *map(column, embedding, halves)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            rows += len(paths)
    return rows


def _write_npz(path: Path, parts: Iterable[Part], spec: ModelSpec, metadata: dict[str, str]) -> int:
    paths, embedding = _join(parts, spec)
    texts: dict[str, Any] = {key: np.array(value) for key, value in metadata.items()}
    with path.open("wb") as file:
        np.savez(file, path=np.array(paths, dtype=str), **embedding._asdict(), **texts)
    return len(paths)


def _join(
    parts: Iterable[Part], spec: ModelSpec
) -> tuple[list[str], Embedding[NDArray[np.float32]]]:
    paths: list[str] = []
    batches = []
    for part in parts:
        paths += part.paths
        batches.append(part.embedding)
    return paths, join_batches(batches, spec.invariant_dim, spec.equivariant_dim)


_WRITERS: dict[str, WriteOutput] = {".parquet": _write_parquet, ".npz": _write_npz}
