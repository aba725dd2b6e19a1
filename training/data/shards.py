"""WebDataset shards: plain tar files of KEY.jpg and KEY.cls pairs, read by index."""

import http.client
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand
from filelock import FileLock
from numpy.typing import NDArray
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)

from clever_zoo.errors import DataError, ImageError
from clever_zoo.files import replacing
from clever_zoo.preprocess import decode_image
from training.data.sources import data_error, sha256, some

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CLASS_EXTENSION = "cls"
_DOWNLOADS = 4  # at once
_TIMEOUT_S = 60
_HF_URL = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<path>.+)")


class _Sample(NamedTuple):
    key: str
    offset: int
    size_bytes: int
    label: int


class ShardSource:
    """Samples of tar shards, in the order of the shards and of the images in each.

    As in WebDataset a key is a member's path up to the first dot of its name. A sample is one
    image and KEY.cls, an integer written in digits; other members are left alone. A key may come
    again in another shard, not in the same one.
    """

    def __init__(self, paths: list[Path]) -> None:
        """Read the headers and classes of all shards.

        Args:
            paths: Uncompressed tar files; see `find_shards`.

        Raises:
            DataError: If a shard is cut short or no tar, or a sample lacks its image or class;
                lists the problems of all shards.
        """
        problems: list[str] = []
        found = [_index_shard(p, problems) for p in track(paths, "index shards", transient=True)]
        samples = [sample for shard in found for sample in shard]
        if not samples and not problems:
            problems.append(f"no sample (KEY.{'|'.join(IMAGE_EXTENSIONS)} with KEY.cls)")
        if problems:
            raise data_error(f"shards {some([path.name for path in paths])}", problems)
        self._paths = paths
        self._shards = np.repeat(np.arange(len(paths)), [len(shard) for shard in found])
        # Arrays, because workers that touch a million Python objects would copy them all.
        self._keys = np.array([os.fsencode(sample.key) for sample in samples])
        self._places = np.array([(sample.offset, sample.size_bytes) for sample in samples])
        self.labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        self.class_names = tuple(map(str, range(int(self.labels.max()) + 1)))

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> NDArray[np.uint8]:
        """See `ImageSource`."""
        path = self._paths[self._shards[index]]
        offset, size_bytes = map(int, self._places[index])
        name = f"{path}, member {os.fsdecode(self._keys[index])}"
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(size_bytes)
        except OSError as error:
            raise ImageError(name, index, f"the shard cannot be read: {error}") from error
        return np.asarray(decode_image(content, name, index))

    def digest(self) -> str:
        """See `ImageSource`."""
        names = "\0".join(path.name for path in self._paths)
        return sha256(names.encode(), self._shards, self._keys, self._places, self.labels.numpy())


def _index_shard(path: Path, problems: list[str]) -> list[_Sample]:
    images: dict[str, tarfile.TarInfo] = {}
    classes: dict[str, tarfile.TarInfo] = {}
    end = 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key, extension = folder + slash + stem, extension.lower()
                if member.isfile() and extension in (*IMAGE_EXTENSIONS, CLASS_EXTENSION):
                    there = classes if extension == CLASS_EXTENSION else images
                    if key in there:
                        problems.append(f"{path}: duplicate key {key!r} ({member.name})")
                    there[key] = member
            file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                problems.append(f"{path} is cut short: no end mark; delete it to fetch it again")
                return []
            labels = {key: _read_class(file, member) for key, member in classes.items()}
    except FileNotFoundError:
        problems.append(f"{path}: no such file")
        return []
    except (tarfile.TarError, OSError) as error:
        problems.append(f"{path} is no whole, uncompressed tar file: {error}")
        return []
    bad = [f"{key}.cls" for key, label in labels.items() if label is None]
    for what, keys in (
        ("images without .cls", sorted(images.keys() - labels.keys())),
        (".cls members without an image", sorted(labels.keys() - images.keys())),
        (".cls members that hold no class number", sorted(bad)),
    ):
        if keys:
            problems.append(f"{path}: {len(keys)} {what}: {some(keys)}")
    return [
        _Sample(member.name, member.offset_data, member.size, label)
        for key, member in images.items()
        if (label := labels.get(key)) is not None
    ]


def _read_class(file: BinaryIO, member: tarfile.TarInfo) -> int | None:
    file.seek(member.offset_data)
    digits = file.read(member.size).strip()
    return int(digits) if digits.isdigit() else None


def find_shards(pattern: str, root: Path | None, cache_folder: Path | None) -> list[Path]:
    """Turn a brace pattern into local files, fetching those that lie elsewhere.

    Args:
        pattern: Such as "train-{000000..000146}.tar", relative to `root`; an http(s):// URL; or
            hf://datasets/ORG/NAME[@REVISION]/PATH on the Hugging Face Hub.
        root: The folder of the data.
        cache_folder: Where shards from http(s) are kept, each downloaded once. Those of the Hub
            are in its own cache.

    Raises:
        DataError: If the pattern is malformed or a shard is missing or cut short; lists all.
    """
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"data.shards is {pattern!r}: {error}") from error
    if len(set(names)) < len(names):
        raise DataError(f"data.shards is {pattern!r}, which names a shard twice")
    if pattern.startswith(("http://", "https://")):
        if cache_folder is None:
            raise DataError("shards from the net are kept in a folder: pass --data DIR")
        return _fetch_all(names, partial(_download, folder=cache_folder / "shards"))
    if pattern.startswith("hf://"):
        return _fetch_all(names, _download_from_hub)
    if root is None:
        raise DataError("shards need their folder: pass --data DIR")
    paths = [root / name for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        there = sorted(path.name for path in root.rglob("*.tar"))
        raise DataError(
            f"{len(missing)} of the {len(paths)} shards that {pattern!r} names are not in {root}: "
            f"{some(missing)}; there are {some(there) or 'no .tar files'}"
        )
    return paths


def _fetch_all(urls: list[str], fetch: Callable[..., Path]) -> list[Path]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    problems: list[str] = []

    def attempt(url: str) -> Path:
        try:
            return fetch(url, progress=progress)
        except DataError as error:
            problems.append(str(error))
            return Path()

    with Progress(*columns, TimeRemainingColumn()) as progress, ThreadPoolExecutor(_DOWNLOADS) as p:
        paths = list(p.map(attempt, urls))
    if problems:
        raise data_error(f"{len(urls)} shards", sorted(problems))
    return paths


def _download(url: str, *, folder: Path, progress: Progress) -> Path:
    parts = urllib.parse.urlsplit(url)
    path = folder / parts.netloc.replace(":", "_") / parts.path.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            with replacing(path) as temporary:
                _download_to(url, temporary, progress)
    return path


def _download_to(url: str, path: Path, progress: Progress) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, path.open("wb") as file:
            expected = response.length  # Content-Length; None if the server sends none
            task = progress.add_task(url.rpartition("/")[2], total=expected)
            shutil.copyfileobj(progress.wrap_file(response, total=expected, task_id=task), file)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url} could not be fetched: {error}") from error
    size = path.stat().st_size
    if expected is not None and size != expected:
        raise DataError(
            f"{url} was cut short: {size} of {expected} bytes came; nothing was kept, try again"
        )


def _download_from_hub(url: str, *, progress: Progress) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    match = _HF_URL.fullmatch(url)
    if match is None:
        raise DataError(f"{url} is malformed; write hf://datasets/ORG/NAME[@REVISION]/PATH.tar")
    try:
        path = hf_hub_download(
            match["repo"], match["path"], repo_type="dataset", revision=match["revision"]
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DataError(f"{url} could not be fetched: {error}") from error
    return Path(path)
