"""Model files on the Hugging Face Hub, through huggingface_hub: what is read is verified.

Proxies, tokens, HF_ENDPOINT, HF_HOME and the layout of the cache are huggingface_hub's own.
"""

import logging
import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import clever_zoo
from clever_zoo.errors import (
    DownloadError,
    IntegrityError,
    SettingError,
    SourceError,
    SpecError,
)
from clever_zoo.files import SUMS_FILENAME, read_sums, verify_file, verify_listed
from clever_zoo.sources import HubSource
from clever_zoo.spec import WeightFile, read_json

logger = logging.getLogger(__name__)

# Before another attempt at a transfer that broke off in a way huggingface_hub does not resume.
_PAUSES_S = (1, 2)
_OFFLINE = "no request may be made (local_files_only or HF_HUB_OFFLINE)"
LIBRARY_NAME = "clever-zoo"


class HubRepo:
    """The files of one repository, all of one commit, each verified before it is handed out.

    The first file that is asked for decides the commit.

    Args:
        source: The repository and its revision.
        cache_dir, local_files_only, token: As in huggingface_hub.
    """

    def __init__(
        self,
        source: HubSource,
        *,
        cache_dir: Path | None,
        local_files_only: bool,
        token: str | bool | None,
    ) -> None:
        self.source, self.cache_dir, self.token = source, cache_dir, token
        self.local_files_only = local_files_only
        self._fetch_again = False
        self._revision = source.revision
        self._sums: dict[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.source.repo_id!r} at {self._revision or 'main'}"

    @property
    def offline(self) -> bool:
        """Whether no request may be made."""
        from huggingface_hub.constants import HF_HUB_OFFLINE

        return self.local_files_only or HF_HUB_OFFLINE

    def find(self, filename: str, expected: WeightFile | None = None) -> Path:
        """The path of a file in the cache, fetched if it is not there.

        Args:
            filename: With forward slashes.
            expected: Its size and digest; without, SHA256SUMS of the repository says them, if
                there is one.

        Raises:
            SourceError: If the repository's name is not valid.
            DownloadError: If it cannot be had.
            IntegrityError: If it is not what it should be.
        """
        path = self._get(filename)
        if path is None:
            raise DownloadError(self._absence(filename))
        try:
            self._verify(path, filename, expected)
        except IntegrityError as error:
            raise IntegrityError(f"{error}{self._advice()}") from error
        return path

    def has(self, filename: str) -> bool:
        """Whether SHA256SUMS lists a file; offline, whether it is in the cache, too."""
        if filename not in self._listed():
            return False
        return not self.offline or self._get(filename) is not None

    def renew(self) -> bool:
        """Have everything fetched again from now on; False if that cannot be."""
        if self.offline or self._fetch_again:
            return False
        self._fetch_again, self._revision, self._sums = True, self.source.revision, None
        return True

    def _verify(self, path: Path, filename: str, expected: WeightFile | None) -> None:
        if expected is not None:
            verify_file(path, expected)
        elif sums := self._listed():
            verify_listed(path, filename, sums)
        elif path.suffix == ".json":
            _check_json(path)

    def _listed(self) -> dict[str, str]:
        """The content of SHA256SUMS; empty if the repository has none."""
        if self._sums is None:
            path = self._get(SUMS_FILENAME)
            self._sums = {} if path is None else read_sums(path)
        return self._sums

    def _get(self, filename: str) -> Path | None:
        """A file from the cache or the Hub; None if the repository, or offline the cache, has none.

        What needs no request is read from the cache here, because hf_hub_download makes one even
        with local_files_only.
        """
        check_endpoint()
        from huggingface_hub import _CACHED_NO_EXIST

        cached, path = self._cached(filename), None
        settled = self.offline or (self._is_commit() and not self._fetch_again)
        if settled and isinstance(cached, str):
            path = Path(cached)
        elif not self.offline and not (settled and cached is _CACHED_NO_EXIST):
            path = self._fetch(filename)
        if path is not None:
            # Of the form .../snapshots/COMMIT/FILENAME.
            self._revision = path.parents[filename.count("/")].name
        return path

    def _is_commit(self) -> bool:
        return re.fullmatch("[0-9a-f]{40}", self._revision or "") is not None

    def _cached(self, filename: str) -> Any:
        """A path, a mark that the repository has no such file, or None for not known."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        repo_id = self.source.repo_id
        try:
            return try_to_load_from_cache(repo_id, filename, self.cache_dir, self._revision)
        except HFValidationError as error:
            raise invalid_name(repo_id, error) from error

    def _fetch(self, filename: str) -> Path | None:
        """Ask the Hub; None if the repository has no such file."""
        from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError

        pauses_s = iter(_PAUSES_S)
        while True:
            try:
                return self._transfer(filename)
            except RemoteEntryNotFoundError:
                return None
            except (HTTPError, OSError, ValueError) as error:
                pause_s = next(pauses_s, None)
                if pause_s is None or not _is_transient(error):
                    raise self._failure(filename, error) from error
                logger.warning("%s of %s: %s; trying again", filename, self, error)
                time.sleep(pause_s)

    def _transfer(self, filename: str) -> Path:
        from huggingface_hub import hf_hub_download

        if self._fetch_again:
            self._drop_copy(filename)
        path = hf_hub_download(
            self.source.repo_id,
            filename,
            revision=self._revision,
            cache_dir=self.cache_dir,
            token=self.token,
            force_download=self._fetch_again,
            library_name=LIBRARY_NAME,
            library_version=clever_zoo.__version__,
        )
        return Path(path)

    def _drop_copy(self, filename: str) -> None:
        """Where the cache holds copies, not symbolic links, force_download leaves the old one."""
        cached = self._cached(filename)
        if isinstance(cached, str) and not Path(cached).is_symlink():
            Path(cached).unlink()

    def _absence(self, filename: str) -> str:
        if self.offline:
            return (
                f"{filename} of {self} is not in the Hub cache and {_OFFLINE}; connect and load "
                "it once, or check HF_HOME and cache_dir"
            )
        return (
            f"{self} has no {filename}, so it is no complete model of this project; check its name "
            "and revision, or have its owner push it again"
        )

    def _advice(self) -> str:
        if self.offline:
            return f"; {_OFFLINE}, so connect and load it once"
        if self._fetch_again:
            return "; it was fetched again and is no better, so tell the repository's owner"
        return ""

    def _failure(self, filename: str, error: Exception) -> DownloadError:
        if isinstance(error, OSError) and error.errno:
            return DownloadError(
                f"{filename} of {self} could not be written to the Hub cache: {error}; free space "
                "or permit writing, or name another folder with HF_HOME or cache_dir"
            )
        return DownloadError(f"{filename} of {self} could not be fetched: {reason_of(error)}")


def _check_json(path: Path) -> None:
    try:
        read_json(path)
    except SpecError as error:
        raise IntegrityError(str(error)) from error


def check_endpoint() -> None:
    """Refuse an HF_ENDPOINT with which huggingface_hub cannot even be imported.

    Raises:
        SettingError: If it is no URL.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        urlsplit(endpoint)
    except ValueError as error:
        raise SettingError(
            f"HF_ENDPOINT is {endpoint!r}, which is no URL ({error}); set it to one such as "
            "https://huggingface.co, or not at all"
        ) from error


def _is_transient(error: Exception) -> bool:
    """Whether the connection broke or the server failed, so that another attempt may succeed.

    Failures before the transfer, huggingface_hub has tried again itself and made others of.
    """
    from huggingface_hub.errors import HTTPError

    response = getattr(error, "response", None)
    return isinstance(error, HTTPError) and (response is None or response.status_code >= 500)


def reason_of(error: BaseException) -> str:
    """What went wrong between us and the Hub, and what to do next."""
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError

    cause = error if hasattr(error, "response") else error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, RevisionNotFoundError):
        advice = "it has no such branch, tag or commit; check the revision"
    elif status in (401, 403, 404):
        advice = (
            "it does not exist, or this token may not do that; check the name, and log in with "
            "`hf auth login`, set HF_TOKEN or pass token"
        )
    elif status == 429:
        advice = "the Hub limits the number of requests; wait a while, or log in"
    elif status is not None:
        advice = f"the Hub failed with status {status}; try again later"
    elif isinstance(cause, HTTPError | OSError):
        advice = "check the connection, the proxy and HF_ENDPOINT"
    else:
        advice = "huggingface_hub refuses it"
    return f"{advice} ({' '.join(str(cause).split())})"


def invalid_name(repo_id: str, error: Exception) -> SourceError:
    """The error for a name that huggingface_hub refuses."""
    return SourceError(f"{repo_id!r} is no valid name of a Hub repository: {error}")
