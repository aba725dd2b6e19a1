"""Files on this machine: digests, verification, and writes that are whole or not there."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clever_zoo.errors import IntegrityError
from clever_zoo.spec import WeightFile


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_file(path: Path, expected: WeightFile) -> None:
    """Compare a file with its recorded size and digest.

    Raises:
        IntegrityError: Naming the path, what was expected and what is there.
    """
    if not path.is_file():
        raise IntegrityError(
            f"{path} is missing; expected {expected.size_bytes} bytes, fetch it again"
        )
    size = path.stat().st_size
    if size != expected.size_bytes:
        raise IntegrityError(
            f"{path} has {size} bytes, expected {expected.size_bytes}; it is truncated or "
            "another file, fetch it again"
        )
    digest = file_digest(path)
    if digest != expected.sha256:
        raise IntegrityError(
            f"{path} has sha256 {digest}, expected {expected.sha256}; it was altered, "
            "fetch it again"
        )


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """A temporary file to write to, renamed to `path` in one step if nothing was raised.

    Readers see the old file or the whole new one, never a part.

    Args:
        path: Target.
        folder: Where the temporary file lies, on the same file system; None for beside `path`.
    """
    folder = folder or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a whole file; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
