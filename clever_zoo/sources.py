"""Model sources: what a name, a Hub repository or a folder given by a user means."""

import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from clever_zoo.errors import SourceError

_MAX_REFERENCE_LENGTH = 193  # org/repo, each at most 96: the Hub's limit, kept for names too
_MAX_REVISION_LENGTH = 255
_MAX_PATH_BYTES = 4095  # Linux: 4096 with the byte that ends it
_MAX_FILENAME_BYTES = 255

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REPO_ID = re.compile(r"\w(?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_REVISION = re.compile(r"[\w.@+=][\w.@+=-]*(?:/[\w.@+=-]+)*", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:(?:[\\/]|$)")

_USE = (
    "; write a model's name, 'hf-hub:org/repo[@revision]' for a Hub repository, or "
    "'local-dir:PATH' for a folder"
)


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
        return _local(str(source))
    scheme, _, rest = source.partition(":")
    if scheme == "local-dir":
        return _local(rest)
    if scheme == "hf-hub":
        repo_id, at, tagged = rest.partition("@")
        if at and revision not in (None, tagged):
            raise SourceError(
                f"{_shown(source)} and revision={revision!r} name two revisions; give one of them"
            )
        return _hub(repo_id, tagged if at else revision)
    if problem := _reference_problem(source):
        raise SourceError(f"{_shown(source)} {problem}{_USE}")
    if "/" not in source:
        if Path(source).is_dir():
            raise _ambiguous(source, "a released model", "rename the folder or start elsewhere")
        return ReleasedSource(source)
    parsed = _hub(source, revision)
    if Path(source).exists():
        raise _ambiguous(source, "a Hub repository", f"write 'hf-hub:{source}'")
    return parsed


def _ambiguous(source: str, reading: str, advice: str) -> SourceError:
    return SourceError(
        f"{source!r} could be {reading} or the local folder of that name; write "
        f"'local-dir:{source}' for the folder, or {advice} for the other"
    )


def _local(path: str) -> LocalSource:
    """A folder may have any name that the file system allows."""
    if not path:
        raise SourceError("'local-dir:' names no folder; write 'local-dir:PATH'")
    if problem := _path_problem(path):
        raise SourceError(f"the folder {_shown(path)} {problem}; give the path of a model folder")
    return LocalSource(Path(path))


def _hub(repo_id: str, revision: str | None) -> HubSource:
    if problem := _repo_problem(repo_id):
        raise SourceError(
            f"{_shown(repo_id)} is no valid name of a Hub repository: it {problem}; write "
            "'hf-hub:org/repo[@revision]', or 'local-dir:PATH' for a folder"
        )
    if revision is not None and (problem := _revision_problem(revision)):
        raise SourceError(
            f"{_shown(revision)} is no valid revision: it {problem}; write a branch, a tag or a "
            f"commit, as in 'hf-hub:{repo_id}@main'"
        )
    return HubSource(repo_id, revision)


def _reference_problem(text: str) -> str | None:
    """What keeps a text without a scheme from being a model's name or 'org/repo'."""
    if problem := _ascii_problem(text, _MAX_REFERENCE_LENGTH):
        return problem
    if _DRIVE.match(text):
        return "begins with a drive letter, so it looks like a path"
    if text.count("/") > 1 or "\\" in text or text.startswith(("/", "./", "../", "~")):
        return "looks like a path"
    if ":" in text:
        return f"begins with {text.partition(':')[0]!r}, which is no scheme"
    if "/" not in text and not _NAME.fullmatch(text):
        return "is no model's name: those have up to 96 letters, digits, '-', '_' and '.'"
    return None


def _repo_problem(repo_id: str) -> str | None:
    """The Hub's own rules, and a named organisation."""
    if problem := _ascii_problem(repo_id, _MAX_REFERENCE_LENGTH):
        return problem
    if repo_id.endswith("/"):
        return "ends in a slash"
    if "--" in repo_id or repo_id.endswith(".git"):
        return "contains '--' or ends in '.git'"
    if not _REPO_ID.fullmatch(repo_id):
        return (
            "is not of the form org/repo, each of up to 96 letters, digits, '-', '_' and '.', with "
            "no '-' or '.' at its beginning or end"
        )
    return None


def _revision_problem(revision: str) -> str | None:
    if problem := _ascii_problem(revision, _MAX_REVISION_LENGTH):
        return problem
    if not _REVISION.fullmatch(revision):
        return "has other characters than letters, digits and '-_.@+=', in parts divided by '/'"
    return None


def _ascii_problem(text: str, limit: int) -> str | None:
    """What is wrong with a text that must be plain ASCII and no relative path."""
    if problem := _text_problem(text, limit):
        return problem
    if found := next((c for c in text if not c.isascii()), None):
        name = unicodedata.name(found, "unnamed")
        return f"contains {found!r} (U+{ord(found):04X} {name}), but only ASCII is allowed"
    if found := next((c for c in text if c in "#?%" or c.isspace()), None):
        return f"contains {found!r}, which is not allowed"
    if ".." in text:
        return "contains '..', which is not allowed"
    return None


def _path_problem(path: str) -> str | None:
    """What keeps a text from being a path on this system."""
    try:
        sizes = [len(os.fsencode(part)) for part in (path, *Path(path).parts)]
    except UnicodeEncodeError as error:
        return f"cannot be written in {error.encoding}: {error.reason}"
    if sizes[0] > _MAX_PATH_BYTES:
        return f"has {sizes[0]} bytes, at most {_MAX_PATH_BYTES} are allowed"
    if any(size > _MAX_FILENAME_BYTES for size in sizes[1:]):
        return f"has a part of more than {_MAX_FILENAME_BYTES} bytes"
    return _control_problem(path)


def _text_problem(text: str, limit: int) -> str | None:
    if not text:
        return "is empty"
    if len(text) > limit:
        return f"has {len(text)} characters, at most {limit} are allowed"
    return _control_problem(text)


def _control_problem(text: str) -> str | None:
    if found := next((c for c in text if unicodedata.category(c) == "Cc"), None):
        return f"contains the control character {found!r}"
    return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}...")


def is_onnx_path(source: str | Path) -> bool:
    """Whether a model source is the path of an ONNX file."""
    prefixed = isinstance(source, str) and source.startswith(("hf-hub:", "local-dir:"))
    return not prefixed and Path(source).suffix == ".onnx"
