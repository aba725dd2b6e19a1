"""Model sources: what a name, a Hub repository or a folder given by a user means."""

import re
from pathlib import Path
from typing import NamedTuple

from clever_zoo.errors import SourceError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubSource(NamedTuple):
    """A repository on the Hugging Face Hub, `revision` None for its main branch."""

    repo_id: str
    revision: str | None


class LocalSource(NamedTuple):
    """A folder that holds config.json and a weights file."""

    folder: Path


class ReleasedSource(NamedTuple):
    """A name of the registry."""

    name: str


Source = HubSource | LocalSource | ReleasedSource


def parse_source(source: str | Path, revision: str | None = None) -> Source:
    """Decide what a source means, without guessing.

    Args:
        source: A released name; "org/repo" or "hf-hub:org/repo[@revision]"; "local-dir:PATH" or
            a Path.
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        SourceError: If the source is malformed or has two readings; names both.
    """
    parsed = _parse(source, revision)
    if revision is not None and not isinstance(parsed, HubSource):
        raise SourceError(
            f"revision {revision!r} was given, but {str(source)!r} is no Hub repository; "
            "leave revision out or write 'hf-hub:org/repo'"
        )
    return parsed


def _parse(source: str | Path, revision: str | None) -> Source:
    if isinstance(source, Path):
        return LocalSource(source)
    scheme, separator, rest = source.partition(":")
    if separator and scheme == "local-dir":
        if not rest:
            raise SourceError("'local-dir:' names no folder; write 'local-dir:PATH'")
        return LocalSource(Path(rest))
    if separator and scheme == "hf-hub":
        repo_id, at, tagged = rest.partition("@")
        if not _HUB_ID.fullmatch(repo_id) or (at and not tagged):
            raise SourceError(
                f"{source!r} is malformed; write 'hf-hub:org/repo' or 'hf-hub:org/repo@revision'"
            )
        if tagged and revision not in (None, tagged):
            raise SourceError(
                f"{source!r} and revision={revision!r} name two revisions; give one of them"
            )
        return HubSource(repo_id, tagged or revision)
    if _HUB_ID.fullmatch(source) and not source.startswith("."):
        if Path(source).exists():
            raise SourceError(
                f"{source!r} could be a Hub repository or the local folder of that name; "
                f"write 'hf-hub:{source}' or 'local-dir:{source}'"
            )
        return HubSource(source, revision)
    if not source or re.search(r"[/\\:@\s]", source):
        raise SourceError(
            f"{source!r} is neither a model name nor 'org/repo'; for a folder write "
            f"'local-dir:{source}', for a Hub repository 'hf-hub:org/repo[@revision]'"
        )
    return ReleasedSource(source)


def is_onnx_path(source: str | Path) -> bool:
    """Whether a model source is the path of an ONNX file."""
    prefixed = isinstance(source, str) and source.startswith(("hf-hub:", "local-dir:"))
    return not prefixed and Path(source).suffix == ".onnx"
