"""Many image files -> one file of embeddings, in constant memory, resumable after a kill."""

import functools
import glob
import hashlib
import heapq
import itertools
import logging
import operator
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

import clever_zoo
from clever_zoo.ahead import map_ahead, usable_cores
from clever_zoo.bulk_output import output_writer
from clever_zoo.bulk_parts import Chunk, Part, PartFolder
from clever_zoo.embedder import ImageEmbedder, Progress
from clever_zoo.embedding import NOT_FINITE, Embedding, finite_rows, join_batches
from clever_zoo.errors import DataError, ImageError, check_choice
from clever_zoo.files import replacing
from clever_zoo.preprocess import (
    IMAGE_SUFFIXES,
    Decoder,
    batched,
    check_batch_size,
    pixel_loader,
)

logger = logging.getLogger(__name__)

OnError = Literal["skip", "raise"]

# Files to a part, rounded up to whole batches: what a killed run may lose.
PART_IMAGES = 1024


class Options(NamedTuple):
    """How files are embedded; see `embed_files`."""

    batch_size: int
    threads: int | None
    on_error: OnError
    decoder: Decoder


class Engine(Protocol):
    """Where chunks are embedded: `embed_chunks` with an encoder, or `bulk_ray.RayEngine`."""

    def __call__(
        self, chunks: Iterable[Chunk], options: Options, on_progress: Progress
    ) -> Iterator[tuple[int, bytes]]:
        """Chunks -> number and packed part of each, in any order."""
        ...


class BulkReport(NamedTuple):
    """What `embed_files` did.

    Attributes:
        written: Number of images in the output.
        unreadable: Number of files that are no usable image.
        resumed: Number of files, readable or not, that an earlier run had done.
        errors_path: Where the unreadable ones are listed, None if there were none.
    """

    written: int
    unreadable: int
    resumed: int
    errors_path: Path | None


def find_images(inputs: Iterable[str | Path]) -> Iterator[Path]:
    """Expand folders (recursively), glob patterns and files into image paths, each once.

    A folder gives the files whose suffix is an image's, sorted; links to folders in it are not
    followed. A file named outright is always taken. A file is known again by its absolute path,
    so that a link counts as another. Memory holds the names in one folder at a time, all matches
    of a glob pattern, and with several inputs 16 bytes for each path.

    Raises:
        DataError: If an input does not exist or nothing is found.
        OSError: If a folder cannot be read.
    """
    items = [str(item) for item in inputs]
    paths = itertools.chain.from_iterable(map(_expand, items))
    first = next(paths, None)
    if first is None:
        raise DataError(f"no images in {', '.join(items)}; looked for {' '.join(IMAGE_SUFFIXES)}")
    paths = itertools.chain([first], paths)
    yield from paths if len(items) == 1 else _distinct(paths)


def _expand(item: str) -> Iterator[Path]:
    if Path(item).is_dir():
        yield from _walk(Path(item))
    elif Path(item).exists():
        yield Path(item)
    elif matches := sorted(set(glob.iglob(item, recursive=True))):  # noqa: PTH207, absolute too
        yield from (Path(match) for match in matches if Path(match).is_file())
    else:
        raise DataError(f"{item} is no file, no folder and matches nothing; check the path")


def _walk(folder: Path) -> Iterator[Path]:
    images, folders = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.add(entry.name)
            elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
                images.append(entry.name)
    images.sort()
    for name in heapq.merge(images, sorted(folders)):
        if name in folders:
            yield from _walk(folder / name)
        else:
            yield folder / name


def _distinct(paths: Iterable[Path]) -> Iterator[Path]:
    seen = set()
    for path in paths:
        digest = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield path


def embed_files(
    paths: Iterable[str | Path],
    encoder: ImageEmbedder,
    out: Path,
    *,
    batch_size: int = 32,
    threads: int | None = None,
    on_error: OnError = "skip",
    decoder: Decoder = "pillow",
    resume: bool = False,
    on_progress: Progress | None = None,
    engine: Engine | None = None,
) -> BulkReport:
    """Embed image files into a .parquet or .npz file.

    Columns (or arrays) `path`, `invariant` and `equivariant`; the model's full name, the digest
    of its weights, the precision it ran in and the decoder are in the Parquet schema's metadata,
    or in the arrays `model`, `sha256`, `precision` and `decoder`; for ONNX the digest of the file
    is in `graph_sha256`. Memory does not grow with the number of files, except that a .npz is put
    together in memory.

    What is done is kept in parts in the folder `.NAME.parts` beside the output, until all is and
    the output is made of them. One run at a time may write an output: it holds `.NAME.lock`.

    Args:
        paths: The images, read lazily.
        encoder: A loaded encoder.
        out: Target; appears in one step when all is done.
        batch_size: Images per forward pass.
        threads: Threads that load images ahead; None for one per core (one per Ray worker).
        on_error: "skip" lists unreadable images, and those with values that are not finite,
            beside the output in NAME.errors.jsonl (out.parquet.errors.jsonl); "raise" stops at
            the first.
        decoder: "fast" decodes and resizes JPEG files 1.5 times as fast, with pixels up to 1 of
            255 away, rarely 2; see `clever_zoo.fast_pixels`.
        resume: Go on from the parts of an interrupted run. Its paths, model and batch size
            have to be the same; whether the content of a file changed is not looked at. Without
            it such parts are removed.
        on_progress: Called with the number of files done, readable or not, resumed ones included.
        engine: Where to embed; None for this process, with `encoder`.

    Raises:
        ImageError: With on_error="raise".
        SpecError: For another `on_error` or `decoder`.
        DataError: If `out` has another suffix or is a folder, another run is writing it, or the
            interrupted run was another.
        BackendMissingError: If pyarrow is missing for Parquet, or simplejpeg or torch for the
            fast decoder.
        ShapeError: If `batch_size` is under 1.
        NonFiniteError: If a weight is not finite.
    """
    check_batch_size(batch_size)
    check_choice("on_error", on_error, get_args(OnError))
    write = output_writer(out)
    # What is wrong with the decoder or the first path is said before anything is removed.
    pixel_loader(decoder)
    paths = iter(paths)
    paths = itertools.chain([*itertools.islice(paths, 1)], paths)
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = _metadata(encoder, decoder)
    folder = PartFolder(out, metadata | _settings(encoder, batch_size))
    done = resumed = count = 0

    def missing() -> Iterator[Chunk]:
        nonlocal done, resumed, count
        for chunk in _chunks(paths, batch_size):
            count += 1
            if folder.has(chunk, flawless=on_error == "raise"):
                resumed += len(chunk.paths)
                done += len(chunk.paths)
            else:
                yield chunk

    def advance(files: int) -> None:
        nonlocal done
        done += files
        if on_progress is not None:
            on_progress(done)

    run = engine or functools.partial(embed_chunks, encoder)
    options = Options(batch_size, threads, on_error, decoder)
    with folder.locked():
        folder.open(resume=resume)
        try:
            for number, content in run(missing(), options, advance):
                folder.save(number, content)
            unreadable, errors_path = _write_errors(folder, count, out)
            with replacing(out, folder.path) as temporary:
                written = write(temporary, folder.parts(count), encoder.spec, metadata)
            folder.remove()
        finally:
            if folder.path.exists():
                logger.warning("what is done is kept in %s, resume goes on from there", folder.path)
    return BulkReport(written, unreadable, resumed, errors_path)


def _chunks(paths: Iterable[str | Path], batch_size: int) -> Iterator[Chunk]:
    size = -(-PART_IMAGES // batch_size) * batch_size
    for number, chunk in enumerate(batched(map(str, paths), size)):
        yield Chunk(number, number * size, chunk)


def _settings(encoder: ImageEmbedder, batch_size: int) -> dict[str, object]:
    """What else changes the numbers in a part, or which files are in it."""
    return {
        "encoder": type(encoder).__name__,
        "preprocess": encoder.spec.preprocess.model_dump(mode="json"),
        "invariant_dim": encoder.spec.invariant_dim,
        "batch_size": batch_size,
        "version": clever_zoo.__version__,
    }


def _metadata(encoder: ImageEmbedder, decoder: Decoder) -> dict[str, str]:
    return {
        "model": encoder.spec.name,
        **encoder.digests(),
        "precision": encoder.precision,
        "decoder": decoder,
    }


def _write_errors(folder: PartFolder, count: int, out: Path) -> tuple[int, Path | None]:
    path = out.with_name(f"{out.name}.errors.jsonl")
    errors = folder.errors(count)
    first = next(errors, None)
    if first is None:
        path.unlink(missing_ok=True)
        return 0, None
    lines = 0
    with replacing(path, folder.path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in itertools.chain([first], errors):
            file.write(f"{line}\n")
            lines += 1
    return lines, path


class _Loaded(NamedTuple):
    chunk: Chunk
    place: int  # among all files
    path: str
    pixels: NDArray[np.uint8] | None
    error: ImageError | None


def embed_chunks(
    encoder: ImageEmbedder,
    chunks: Iterable[Chunk],
    options: Options,
    on_progress: Progress = lambda files: None,
) -> Iterator[tuple[int, bytes]]:
    """Embed chunks here, one after the other: the operator that every engine runs.

    Images are loaded in threads, up to two batches ahead of the network.

    Args:
        encoder: A loaded encoder.
        chunks: What to embed, read lazily.
        options: How.
        on_progress: Called after each batch with the number of its files.

    Yields:
        The number of each chunk and its packed part.

    Raises:
        ImageError: With on_error="raise".
    """
    spec, batch_size = encoder.spec, options.batch_size
    load_pixels = pixel_loader(options.decoder)

    def load(item: tuple[Chunk, int]) -> _Loaded:
        chunk, i = item
        path, index = chunk.paths[i], chunk.first + i
        try:
            _check_name(path, index)
            return _Loaded(chunk, index, path, load_pixels(path, spec.preprocess, index), None)
        except ImageError as error:
            if options.on_error == "raise":
                raise
            return _Loaded(chunk, index, path, None, error)

    items = ((chunk, i) for chunk in chunks for i in range(len(chunk.paths)))
    threads = usable_cores() if options.threads is None else options.threads
    loaded = map_ahead(load, items, threads=threads, ahead=2 * batch_size)
    for chunk, files in itertools.groupby(loaded, key=operator.attrgetter("chunk")):
        paths, errors, batches = [], [], []
        for batch in batched(files, batch_size):
            pixels = [item.pixels for item in batch if item.pixels is not None]
            usable: Iterator[np.bool_] = iter(())
            if pixels:
                rows = encoder.embed_pixels(np.stack(pixels))
                finite = finite_rows(rows)
                batches.append(Embedding(*(half[finite] for half in rows)))
                usable = iter(finite)
            for item in batch:
                if item.error is None and next(usable):
                    paths.append(item.path)
                else:
                    errors.append(item.error or _not_finite(item, options))
            on_progress(len(batch))
        embedding = join_batches(batches, spec.invariant_dim, spec.equivariant_dim)
        yield chunk.number, Part.of(paths, embedding, errors).pack(chunk)


def _not_finite(item: _Loaded, options: Options) -> ImageError:
    error = ImageError(item.path, item.place, NOT_FINITE)
    if options.on_error == "raise":
        raise error
    return error


def _check_name(path: str, index: int) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ImageError(path, index, "the file name is not valid UTF-8; rename it") from error
