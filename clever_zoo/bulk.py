"""A folder of pictures -> one file of embeddings, in constant memory for Parquet."""

import glob
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from clever_zoo.embedding import Embedding, join_batches
from clever_zoo.errors import BackendMissingError, DataError, ImageError
from clever_zoo.files import replacing, write_atomic
from clever_zoo.preprocess import IMAGE_SUFFIXES, batched, image_pixels
from clever_zoo.spec import ModelSpec

OnError = Literal["skip", "raise"]
Write = Callable[[list[str], Embedding[NDArray[np.float32]]], None]


class PixelEncoder(Protocol):
    """What bulk needs of an encoder, whatever its runtime."""

    spec: ModelSpec

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> Embedding[NDArray[np.float32]]:
        """(B, size, size, 3) uint8 -> the two halves."""
        ...


class BulkReport(NamedTuple):
    """What `embed_files` did.

    Attributes:
        written: Number of images in the output.
        errors: The unreadable ones.
        errors_path: Where they are listed, None if there were none.
    """

    written: int
    errors: list[ImageError]
    errors_path: Path | None


def find_images(inputs: Iterable[str | Path]) -> list[Path]:
    """Expand folders (recursively), glob patterns and files into image paths.

    A folder gives the files whose suffix is an image's; a file named outright is always taken.

    Raises:
        DataError: If an input does not exist or nothing is found.
    """
    found: list[Path] = []
    for item in map(str, inputs):
        if Path(item).is_dir():
            inside = sorted(p for p in Path(item).rglob("*") if p.is_file())
            found += [p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES]
        elif Path(item).exists():
            found.append(Path(item))
        elif matches := sorted(glob.glob(item, recursive=True)):  # noqa: PTH207, absolute patterns too
            found += [Path(p) for p in matches if Path(p).is_file()]
        else:
            raise DataError(f"{item} is no file, no folder and matches nothing; check the path")
    if not found:
        raise DataError(
            f"no images in {', '.join(map(str, inputs))}; looked for {' '.join(IMAGE_SUFFIXES)}"
        )
    return list(dict.fromkeys(found))


def embed_files(
    paths: Iterable[Path],
    encoder: PixelEncoder,
    out: Path,
    *,
    batch_size: int = 32,
    on_error: OnError = "skip",
    on_progress: Callable[[int], None] | None = None,
) -> BulkReport:
    """Embed image files into a .parquet or .npz file.

    Columns (or arrays) `path`, `invariant` and `equivariant`; the model's full name and the
    digest of its weights are in the Parquet schema's metadata, or in the arrays `model` and
    `sha256`.

    Args:
        paths: The images.
        encoder: A loaded encoder.
        out: Target; appears in one step when all is written.
        on_error: "skip" lists unreadable images beside the output in NAME.errors.jsonl;
            "raise" stops at the first.
        on_progress: Called with the number of files done, readable or not.

    Raises:
        ImageError: With on_error="raise".
        DataError: If `out` has another suffix or is a folder.
        BackendMissingError: If pyarrow is missing for Parquet.
    """
    if out.suffix not in _WRITERS:
        raise DataError(f"{out} must end in {' or '.join(_WRITERS)}")
    if out.is_dir():
        raise DataError(f"{out} is a folder; name a file in it")
    errors_path = out.with_suffix(".errors.jsonl")
    errors: list[ImageError] = []
    written = done = 0
    with replacing(out) as temporary, _WRITERS[out.suffix](temporary, encoder.spec) as write:
        for batch in batched(paths, batch_size):
            good, pixels = [], []
            for path in batch:
                done += 1
                try:
                    _check_name(path, done - 1)
                    pixels.append(image_pixels(path, encoder.spec.preprocess, done - 1))
                    good.append(str(path))
                except ImageError as error:
                    if on_error == "raise":
                        raise
                    errors.append(error)
            if good:
                write(good, encoder.embed_pixels(np.stack(pixels)))
                written += len(good)
            if on_progress is not None:
                on_progress(done)
    errors_path.unlink(missing_ok=True)
    if not errors:
        return BulkReport(written, errors, None)
    lines = [json.dumps({"path": e.source, "reason": e.reason}) for e in errors]
    write_atomic(errors_path, "".join(f"{line}\n" for line in lines).encode())
    return BulkReport(written, errors, errors_path)


def _check_name(path: Path, index: int) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ImageError(str(path), index, "the file name is not valid UTF-8; rename it") from error


def _metadata(spec: ModelSpec) -> dict[str, str]:
    return {"model": spec.name, "sha256": spec.weights.sha256 if spec.weights else ""}


@contextmanager
def _parquet_writer(path: Path, spec: ModelSpec) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise BackendMissingError(
            'Parquet files need pyarrow: pip install "clever-zoo[bulk]" (or write .npz)'
        ) from error
    widths = {"invariant": spec.invariant_dim, "equivariant": spec.equivariant_dim}
    # -1: pyarrow has no fixed size 0, which is the equivariant half of an encoder without a split.
    types = {name: pa.list_(pa.float32(), width or -1) for name, width in widths.items()}
    halves = [pa.field(name, kind) for name, kind in types.items()]
    schema = pa.schema([pa.field("path", pa.string()), *halves], metadata=_metadata(spec))
    with pq.ParquetWriter(path, schema) as writer:

        def write(paths: list[str], embedding: Embedding[NDArray[np.float32]]) -> None:
            columns = [pa.array(paths)]
            for half, field in zip(embedding, halves, strict=True):
                columns.append(
                    pa.FixedSizeListArray.from_arrays(half.ravel(), half.shape[1])
                    if half.shape[1]
                    else pa.array([[]] * len(half), field.type)
                )
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))

        yield write


@contextmanager
def _npz_writer(path: Path, spec: ModelSpec) -> Iterator[Write]:
    names: list[str] = []
    batches: list[Embedding[NDArray[np.float32]]] = []

    def write(paths: list[str], embedding: Embedding[NDArray[np.float32]]) -> None:
        names.extend(paths)
        batches.append(embedding)

    yield write
    halves = join_batches(batches, spec.invariant_dim, spec.equivariant_dim)
    with path.open("wb") as file:
        np.savez(
            file,
            path=np.array(names, dtype=str),
            **halves._asdict(),
            **{key: np.array(value) for key, value in _metadata(spec).items()},  # type: ignore[arg-type]
        )


_WRITERS = {".parquet": _parquet_writer, ".npz": _npz_writer}
