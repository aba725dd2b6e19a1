"""Model repositories for the Hub: `build` a folder offline, `push` it in a second, thin step."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple, Self

import clever_zoo
from clever_zoo.cards import card_figures, render_card
from clever_zoo.errors import DataError, IntegrityError
from clever_zoo.files import (
    SUMS_FILENAME,
    folder_files,
    read_sums,
    verify_file,
    verify_listed,
    write_sums,
)
from clever_zoo.golden import GOLDEN_FILENAME, compare_golden
from clever_zoo.locate import ONNX_FILENAME, model_folder, released_folder
from clever_zoo.records import RESULTS_FILENAME, Record
from clever_zoo.registry import released
from clever_zoo.spec import CARD_FILENAME, CONFIG_FILENAME, ModelSpec, WeightFile
from clever_zoo.upload import Upload, UploadPlan, plan_upload, upload_folder


def build(source: str | Path, folder: str | Path) -> ModelSpec:
    """Write the Hub repository of a released model: everything that goes up, and nothing else.

    The files are README.md (the card), config.json, model.safetensors, onnx/model.onnx,
    results.json, golden.json, figures/*.svg and SHA256SUMS. No network is used, and the same
    machine writes the same bytes each time.

    Args:
        source: A released name, or "local-dir:PATH" or a Path of a folder such as
            `training.release` writes.
        folder: Target, created; it must not exist or be empty, and not be the current one.

    Raises:
        SourceError, UnknownModelError, DownloadError: If the model is not on this machine.
        DataError: If a file of it is missing, or the target is not empty or has no name.
        IntegrityError: If its files do not fit together, or give other values than golden.json.
        ExportParityError: If the ONNX file would not give torch's values.
        BackendMissingError: Without the extras [export] and [onnx].
    """
    from clever_zoo.encoder import from_pretrained
    from clever_zoo.onnx_encoder import OnnxEncoder
    from clever_zoo.onnx_export import export_onnx

    origin = model_folder(source)
    release = _Release.read(origin)
    if absent := sorted(release.files() - folder_files(origin)):
        raise DataError(
            f"{origin} lacks {', '.join(absent)}; `python -m training.release` and `make tables` "
            "write them"
        )
    release.check()
    with _new_folder(Path(folder)) as temporary:
        for name in sorted(release.files()):
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(origin / name, temporary / name)
        encoder = from_pretrained(temporary)
        compare_golden(encoder, temporary / GOLDEN_FILENAME)
        export_onnx(encoder, temporary / ONNX_FILENAME)
        compare_golden(OnnxEncoder.from_pretrained(temporary), temporary / GOLDEN_FILENAME)
        write_sums(temporary)
    return release.spec


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> Upload:
    """Make a Hub repository hold what `build` wrote, in one commit.

    Args:
        folder: From `build`; checked first, without a request.
        repo_id: "org/name"; created if it does not exist.
        private: None for the owner's default.
        revision: Branch, None for the main one.
        create_pr: Open a pull request instead.
        token: As in huggingface_hub.

    Raises:
        DataError: If a file is missing or one too many.
        SpecError, IntegrityError: If a digest, the card, the record, the released files or the
            values of torch or of the ONNX file do not fit.
        BackendMissingError: Without the extras [torch] and [onnx].
        SourceError: If the repository's name is not valid.
        UploadError: If it fails; the files there are as they were.
    """
    spec = check_built(folder)
    return upload_folder(
        Path(folder),
        repo_id,
        message=f"{spec.name}, built with clever-zoo {clever_zoo.__version__}",
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )


def plan_push(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> UploadPlan:
    """What `push` would change; arguments and errors as there. Nothing is written."""
    check_built(folder)
    return plan_upload(Path(folder), repo_id, revision=revision, token=token)


def check_built(folder: str | Path) -> ModelSpec:
    """Check that a folder is what `build` writes; see `push` for what is raised."""
    from clever_zoo.encoder import from_pretrained
    from clever_zoo.onnx_encoder import OnnxEncoder

    folder = Path(folder)
    if not (folder / SUMS_FILENAME).is_file():
        raise DataError(f"{folder} has no {SUMS_FILENAME}; make it with `clever-zoo publish build`")
    files, sums = folder_files(folder), read_sums(folder / SUMS_FILENAME)
    _check_names(folder, files, sums.keys())
    for name in sorted(files):
        verify_listed(folder / name, name, sums)
    release = _Release.read(folder)
    _check_names(folder, files, release.files() | {ONNX_FILENAME})
    release.check()
    for encoder in (from_pretrained(folder), OnnxEncoder.from_pretrained(folder)):
        compare_golden(encoder, folder / GOLDEN_FILENAME)
    return release.spec


def _check_names(folder: Path, files: AbstractSet[str], expected: AbstractSet[str]) -> None:
    if files != expected:
        missing, surplus = sorted(expected - files), sorted(files - expected)
        raise DataError(
            f"{folder} is not as `clever-zoo publish build` left it (missing: "
            f"{', '.join(missing) or 'none'}; surplus: {', '.join(surplus) or 'none'}); "
            "build it again"
        )


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling, renamed to `folder` if nothing was raised."""
    if not folder.name or ".." in folder.parts:
        raise DataError(f"'{folder}' names no new folder; give it a name of its own, without '..'")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty; name another folder, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as outer:
        temporary = Path(outer) / folder.name
        temporary.mkdir()  # inside, because only its owner can read the outer one
        yield temporary
        temporary.replace(folder)


class _Release(NamedTuple):
    """A released model in a folder, before the ONNX file and SHA256SUMS are added."""

    folder: Path
    spec: ModelSpec
    weights: WeightFile
    record: Record

    @classmethod
    def read(cls, folder: Path) -> Self:
        spec = ModelSpec.read(folder / CONFIG_FILENAME)
        record = Record.read(folder / RESULTS_FILENAME)
        return cls(folder, spec, spec.weights_file(folder), record)

    def files(self) -> set[str]:
        """Names of what it consists of."""
        names = {CARD_FILENAME, CONFIG_FILENAME, GOLDEN_FILENAME, RESULTS_FILENAME}
        figures = {f"figures/{name}.svg" for name in card_figures(self.record)}
        return names | {self.weights.filename} | figures

    def check(self) -> None:
        """Check that weights, registry, record and card speak of one model, the released one."""
        name, config = self.spec.name, self.folder / CONFIG_FILENAME
        verify_file(self.folder / self.weights.filename, self.weights)
        registered = released(name)
        if registered not in (None, self.spec):
            raise IntegrityError(
                f"{config} differs from the registry's entry of {name!r}; correct one of them"
            )
        measured = self.record.network("model")
        if (
            measured is None
            or measured.name != name
            or measured.sha256 not in (None, self.weights.sha256)
        ):
            raise IntegrityError(
                f"{self.folder / RESULTS_FILENAME} is of another network than {name} with sha256 "
                f"{self.weights.sha256}; evaluate these weights"
            )
        card = self.folder / CARD_FILENAME
        if card.read_bytes() != render_card(self.spec, self.record).encode():
            raise IntegrityError(
                f"{card} is not the card of its config.json and results.json; write it with "
                "`make tables`"
            )
        if registered is not None:
            self._check_same_as(released_folder(registered))

    def _check_same_as(self, original: Path) -> None:
        for name in sorted(self.files() & folder_files(original)):
            if (self.folder / name).read_bytes() != (original / name).read_bytes():
                raise IntegrityError(
                    f"{self.folder / name} differs from {original / name}, which is released under "
                    "this name; build it again, or release it under another name"
                )
