"""The parts of a bulk run: files that are whole or absent, from which a killed run goes on."""

import hashlib
import io
import json
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from clever_zoo.embedding import Embedding
from clever_zoo.errors import DataError, ImageError
from clever_zoo.files import write_atomic

logger = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """Consecutive input files that are embedded, stored and resumed together.

    Attributes:
        number: Position among the chunks.
        first: Position of its first file among all files.
        paths: The files.
    """

    number: int
    first: int
    paths: Sequence[str]

    def digest(self) -> str:
        """SHA-256 of the paths, which says whether a stored part is of these files."""
        return hashlib.sha256(os.fsencode("\0".join(self.paths))).hexdigest()


class Part(NamedTuple):
    """What became of a chunk.

    Shapes: `paths` B readable files, `embedding` of B rows; `errors` one JSON line for each
    unreadable file.
    """

    paths: list[str]
    embedding: Embedding[NDArray[np.float32]]
    errors: list[str]

    @classmethod
    def of(
        cls,
        paths: list[str],
        embedding: Embedding[NDArray[np.float32]],
        errors: list[ImageError],
    ) -> Self:
        """Put together what was read, what it gave, and what could not be read."""
        lines = [json.dumps({"path": error.source, "reason": error.reason}) for error in errors]
        return cls(paths, embedding, lines)

    def pack(self, chunk: Chunk) -> bytes:
        """The content of a part file."""
        file = io.BytesIO()
        np.savez(
            file,
            files=np.array(chunk.digest()),
            path=np.array(self.paths, dtype=str),
            error=np.array(self.errors, dtype=str),
            **self.embedding._asdict(),
        )
        return file.getvalue()


class PartFolder:
    """The folder beside an output in which its run keeps what is done, `.NAME.parts`.

    Args:
        out: The output.
        settings: What has to be equal for parts of two runs to fit together.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path = out.with_name(f".{out.name}.parts")
        self._settings = json.loads(json.dumps(settings))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs away from the folder and the output.

        Raises:
            DataError: If another run is at work there.
        """
        path = self.path.with_suffix(".lock")
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise DataError(
                f"another run holds {path} and writes the same output; wait until it is done, or "
                "name another output"
            ) from error
        try:
            yield
        finally:
            with suppress(PermissionError):  # Windows deletes no open file
                path.unlink(missing_ok=True)
            lock.release()

    def open(self, *, resume: bool) -> None:
        """Check the parts of an earlier run, or remove them.

        Raises:
            DataError: If they were made with other settings.
        """
        if resume and self._settings_path.exists():
            self._check_settings(json.loads(self._settings_path.read_text(encoding="utf-8")))
        elif self.path.exists():
            logger.warning("removing %s of an interrupted run, which resume would use", self.path)
            self.remove()

    def _check_settings(self, stored: dict[str, Any]) -> None:
        differing = [
            f"{key} was {stored.get(key)!r} and is {self._settings.get(key)!r}"
            for key in sorted(stored.keys() | self._settings.keys())
            if stored.get(key) != self._settings.get(key)
        ]
        if differing:
            raise DataError(
                f"{self.path} is of a run with other settings: {'; '.join(differing)}; "
                "set them as they were, or start again without resume"
            )

    def has(self, chunk: Chunk, *, flawless: bool) -> bool:
        """Whether a chunk is done; if `flawless`, with all of its files readable.

        Raises:
            DataError: If its part is of other files, or damaged.
        """
        path = self._part_path(chunk.number)
        if not path.exists():
            return False
        stored = _read(path, "files", "error")
        if str(stored["files"]) != chunk.digest():
            last = chunk.first + len(chunk.paths) - 1
            raise DataError(
                f"{path} is not of the files {chunk.first} to {last} that are asked for now: the "
                "list changed; restore it, or start again without resume"
            )
        return not (flawless and stored["error"].size)

    def save(self, number: int, content: bytes) -> None:
        """Store the part of a chunk in one step."""
        if not self._settings_path.exists():
            write_atomic(self._settings_path, json.dumps(self._settings).encode())
        write_atomic(self._part_path(number), content)

    def parts(self, count: int) -> Iterator[Part]:
        """Read the parts of the first `count` chunks, one after the other."""
        for number in range(count):
            path = self._part_path(number)
            arrays = _read(path, "path", "error", *Embedding._fields)
            halves = Embedding(*(arrays[name] for name in Embedding._fields))
            yield Part(arrays["path"].tolist(), halves, arrays["error"].tolist())

    def errors(self, count: int) -> Iterator[str]:
        """Read the error lines of the first `count` chunks."""
        for number in range(count):
            yield from _read(self._part_path(number), "error")["error"].tolist()

    def remove(self) -> None:
        """Delete the folder and all that is in it."""
        shutil.rmtree(self.path)

    @property
    def _settings_path(self) -> Path:
        return self.path / "settings.json"

    def _part_path(self, number: int) -> Path:
        return self.path / f"part-{number:08d}.npz"


def _read(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in names}
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is damaged ({error}); delete it and resume, its files are embedded again"
        ) from error
