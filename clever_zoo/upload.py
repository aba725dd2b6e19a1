"""Folders to repositories on the Hugging Face Hub, each in one commit."""

import contextlib
import fnmatch
import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import clever_zoo
from clever_zoo.errors import UploadError
from clever_zoo.files import SUMS_FILENAME, file_digest, folder_files, write_atomic, write_sums
from clever_zoo.hub import LIBRARY_NAME, check_endpoint, invalid_name, reason_of
from clever_zoo.spec import CARD_FILENAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

# What `publish.push` may have put there and describes the weights that are replaced.
_DERIVED = ("onnx/*", "figures/*", "results.json", "golden.json")


class UploadPlan(NamedTuple):
    """What an upload does to a repository.

    Attributes:
        exists: Whether the repository does, as far as this token may see.
        added, changed, removed, unchanged: Names of files.
    """

    exists: bool
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]


class Upload(NamedTuple):
    """What an upload did.

    Attributes:
        plan: Its files.
        url: Of the commit, or of the pull request.
        commit: The commit that holds them.
    """

    plan: UploadPlan
    url: str
    commit: str


def plan_upload(
    folder: Path,
    repo_id: str,
    *,
    removable: Sequence[str] = ("*",),
    revision: str | None = None,
    token: str | bool | None = None,
) -> UploadPlan:
    """Compare a folder with a repository; nothing is written there.

    Args:
        folder: What the repository is to hold.
        repo_id: "org/name".
        removable: Patterns of files in the repository that go if the folder lacks them.
        revision: Branch to compare with, None for the main one.
        token: As in huggingface_hub.

    Raises:
        SourceError: If the name is not valid.
        UploadError: If the repository cannot be read.
    """
    api = _api(token)
    with _uploading(repo_id):
        return _plan(api, folder, repo_id, removable, revision)


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    removable: Sequence[str] = ("*",),
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> Upload:
    """Make a repository hold a folder, in one commit; it is created if it does not exist.

    Args:
        folder, repo_id, removable, revision, token: See `plan_upload`.
        message: First line of the commit.
        private: None for the owner's default; True is refused where the repository is public.
        create_pr: Open a pull request instead.

    Raises:
        SourceError: If the name is not valid.
        UploadError: If it fails; the files there are as they were.
    """
    api = _api(token)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with _uploading(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise UploadError(f"{repo_id} is public already; make it private there first")
        plan = _plan(api, folder, repo_id, removable, revision)
        done = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in plan.added + plan.changed),
                *(CommitOperationDelete(name, is_folder=False) for name in plan.removed),
            ],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    return Upload(plan, done.pr_url or done.commit_url, done.oid)


def _api(token: str | bool | None) -> "HfApi":
    check_endpoint()
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name=LIBRARY_NAME, library_version=clever_zoo.__version__)


@contextlib.contextmanager
def _uploading(repo_id: str) -> Iterator[None]:
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except HFValidationError as error:
        raise invalid_name(repo_id, error) from error
    except UploadError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # RuntimeError, ValueError: what huggingface_hub makes of a failed transfer or bad metadata.
        raise UploadError(f"{repo_id} was not changed: {reason_of(error)}") from error


def _plan(
    api: "HfApi", folder: Path, repo_id: str, removable: Sequence[str], revision: str | None
) -> UploadPlan:
    remote = _remote_files(api, repo_id, revision)
    names = sorted(folder_files(folder) | {SUMS_FILENAME})
    there = remote or {}
    same = {name for name in names if name in there and _is_same(folder / name, there[name])}
    gone = there.keys() - set(names) - {".gitattributes"}
    return UploadPlan(
        exists=remote is not None,
        added=tuple(name for name in names if name not in there),
        changed=tuple(name for name in names if name in there and name not in same),
        removed=tuple(n for n in sorted(gone) if any(fnmatch.fnmatch(n, p) for p in removable)),
        unchanged=tuple(sorted(same)),
    )


def _remote_files(api: "HfApi", repo_id: str, revision: str | None) -> "dict[str, RepoFile] | None":
    """Every file of a repository; None if there is no repository."""
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    except RepositoryNotFoundError:
        return None
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_same(path: Path, remote: "RepoFile") -> bool:
    if remote.lfs is not None:
        return remote.lfs.sha256 == file_digest(path)
    content = path.read_bytes()
    # A file that is not in large storage is known by the digest of its git blob.
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return remote.blob_id == blob.hexdigest()


class PushToHub(ABC):
    """What `Encoder` and `Classifier` have in common with other models on the Hub."""

    _loader: str  # how the card says it is loaded

    @abstractmethod
    def save_pretrained(
        self, folder: str | Path, *, dtype: Literal["float32", "float16"] = "float32"
    ) -> Any:
        """Write config.json and the weights."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> str:
        """Save the model to a repository on the Hub, in one commit.

        It holds config.json, model.safetensors, SHA256SUMS and a short card. An ONNX file and
        results of weights that were there before are removed; other files stay. A released model
        with all that belongs to it is published with `clever-zoo publish`.

        Args:
            repo_id: "org/name"; created if it does not exist.
            commit_message: First line of the commit.
            private: None for the owner's default; True is refused where the repository is public.
            token: As in huggingface_hub.
            revision: Branch, None for the main one.
            create_pr: Open a pull request instead.
            dtype: Storage type, see `save_pretrained`.

        Returns:
            The URL of the commit or of the pull request.

        Raises:
            NonFiniteError: If a value does not fit the storage type.
            SourceError: If the repository's name is not valid.
            UploadError: If it fails; the files there are as they were.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder, dtype=dtype)
            write_atomic(folder / CARD_FILENAME, _short_card(repo_id, self._loader).encode())
            write_sums(folder)
            done = upload_folder(
                folder,
                repo_id,
                message=commit_message or f"Upload {type(self).__name__} with clever-zoo",
                removable=_DERIVED,
                private=private,
                revision=revision,
                create_pr=create_pr,
                token=token,
            )
        return done.url


def _short_card(repo_id: str, loader: str) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="clever-zoo",
        pipeline_tag="image-feature-extraction",
        tags=["clever-zoo", "timm", "image-embeddings"],
    )
    return f"""---
{data.to_yaml()}
---
# {repo_id.rpartition("/")[2]}

Made with clever-zoo: image embeddings in two labelled halves, one meant for what is in the
picture, the other for how it was seen. What this model was trained on and how good it is, its
owner has not written down here yet.

```python
import clever_zoo

model = {loader}("{repo_id}")
```

config.json says how wide each half is and how pictures are prepared. `sha256sum -c SHA256SUMS`
checks the files.
"""
