"""Files on this machine: digests, verification, and writes that are whole or not there."""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clever_zoo.errors import IntegrityError
from clever_zoo.spec import MAX_JSON_BYTES, WeightFile

SUMS_FILENAME = "SHA256SUMS"
# What may lie beside weights and holds for those alone.
DERIVED = (SUMS_FILENAME, "onnx/*.onnx", "results.json", "golden.json", "heads.safetensors")
# Names are paths below the folder, of parts that do not begin with a dot.
_SUMS_LINE = re.compile(r"([0-9a-f]{64})  ((?:[\w-][\w.-]*/)*[\w-][\w.-]*)", re.ASCII)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blob_digest(path: Path) -> str:
    """The digest by which git, and the Hub for its small files, knows a content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


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


def remove_derived(folder: Path) -> None:
    """Remove from a model folder what holds no longer once its weights are replaced."""
    for pattern in DERIVED:
        for path in folder.glob(pattern):
            path.unlink()


def folder_files(folder: Path) -> set[str]:
    """Every file of a folder at any depth but SHA256SUMS, with forward slashes."""
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in paths} - {SUMS_FILENAME}


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of all files of a folder; ``sha256sum -c`` reads it."""
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in sorted(folder_files(folder))]
    write_atomic(folder / SUMS_FILENAME, "".join(lines).encode())


def read_sums(path: Path) -> dict[str, str]:
    """File name -> digest of a SHA256SUMS file.

    Raises:
        IntegrityError: If it is none, names a file twice, or is larger than 1 MiB.
    """
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    lines = content.decode(errors="replace").splitlines()
    sums = {match[2]: match[1] for match in map(_SUMS_LINE.fullmatch, lines) if match}
    if not lines or len(sums) < len(lines) or len(content) > MAX_JSON_BYTES:
        raise IntegrityError(
            f"{path} is no list of digests with lines 'SHA256  NAME', each name once, in at most "
            f"{MAX_JSON_BYTES} bytes; fetch or build it again"
        )
    return sums


def verify_listed(path: Path, name: str, sums: dict[str, str]) -> None:
    """Compare a file with the digest that SHA256SUMS lists for its name.

    Raises:
        IntegrityError: If it is another file, or not listed.
    """
    if name not in sums:
        raise IntegrityError(
            f"{name} is not listed in {SUMS_FILENAME}, so it cannot be checked; remove it, or "
            "fetch or build the model again"
        )
    digest = file_digest(path)
    if digest != sums[name]:
        raise IntegrityError(
            f"{path} has sha256 {digest}, {SUMS_FILENAME} lists {sums[name]}; it was truncated or "
            "altered, fetch it again"
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
    temporary = folder / f".{path.name}.{secrets.token_hex(8)}.tmp"
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
