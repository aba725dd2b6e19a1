"""Find a model's files, wherever its source says they are, and verify them."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from clever_zoo.errors import DownloadError, IntegrityError, SourceError, SpecError
from clever_zoo.files import SUMS_FILENAME, read_sums, verify_file, verify_listed
from clever_zoo.hub import HubOptions, HubRepo
from clever_zoo.registry import HUB_PINS, model_info
from clever_zoo.sources import (
    HubSource,
    LocalSource,
    ReleasedSource,
    Source,
    is_onnx_path,
    parse_source,
)
from clever_zoo.spec import (
    CONFIG_FILENAME,
    ClassifierSpec,
    ModelSpec,
    WeightFile,
    is_classifier,
    read_json,
)

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
# In a wheel the released models lie inside the package, in a checkout beside it.
_MODEL_FOLDERS = (_PACKAGE / "model_cards", _PACKAGE.parent / "model_cards")
ONNX_FILENAME = "onnx/model.onnx"
_DEFAULTS = HubOptions()

Found = TypeVar("Found")


class Files(Protocol):
    """The files of one model, wherever they are."""

    def find(self, filename: str, expected: WeightFile | None = None) -> Path:
        """The path of a file, verified if its digest is known; see `HubRepo.find`."""

    def has(self, filename: str) -> bool:
        """Whether there is such a file."""

    def renew(self) -> bool:
        """Have everything fetched again from now on; False if that cannot be."""


class FolderFiles(NamedTuple):
    """The files of a model in a folder; a missing one is left to whoever reads it.

    If the folder has a SHA256SUMS, as published ones do, only what it lists is handed out.
    """

    folder: Path

    def find(self, filename: str, expected: WeightFile | None = None) -> Path:
        """See `Files`."""
        path, sums = self.folder / filename, self.folder / SUMS_FILENAME
        if expected is not None:
            verify_file(path, expected)
        elif path.is_file() and sums.is_file():
            verify_listed(path, filename, read_sums(sums))
        return path

    def has(self, filename: str) -> bool:
        """See `Files`."""
        return (self.folder / filename).is_file()

    def renew(self) -> bool:
        """See `Files`."""
        return False


@dataclasses.dataclass
class ReleasedFiles:
    """The files of a released model: those of this installation, then those of its pinned repo.

    Once they are renewed, of its pinned repo only.
    """

    packed: FolderFiles
    pinned: HubRepo
    renewed: bool = False

    def find(self, filename: str, expected: WeightFile | None = None) -> Path:
        """See `Files`."""
        return self._holder(filename).find(filename, expected)

    def has(self, filename: str) -> bool:
        """See `Files`; what is installed is not looked for in the network."""
        installed = self.packed.folder.is_dir()
        return self.packed.has(filename) if installed else self.pinned.has(filename)

    def renew(self) -> bool:
        """See `Files`."""
        self.renewed = self.pinned.renew()
        return self.renewed

    def _holder(self, filename: str) -> Files:
        return self.packed if self.packed.has(filename) and not self.renewed else self.pinned


def locate_model(source: str | Path, options: HubOptions = _DEFAULTS) -> tuple[ModelSpec, Path]:
    """Find a model's spec and its verified weights file.

    A file of the Hub cache that is not what it should be is fetched again, once.

    Args:
        source: See `parse_source`.
        options: For what is on the Hub.

    Raises:
        SourceError, UnknownModelError, SpecError, DownloadError: If it cannot be found.
        IntegrityError: If the weights are not the recorded ones.
    """
    parsed = parse_source(source, options.revision)
    files = _files(parsed, options)

    def read() -> tuple[ModelSpec, Path]:
        if isinstance(parsed, ReleasedSource):
            spec = model_info(parsed.name)
        else:
            spec = ModelSpec.read(files.find(CONFIG_FILENAME))
        return spec, _verified_weights(spec, files, source)

    return _repaired(read, files)


def locate_classifier(
    source: str | Path, options: HubOptions = _DEFAULTS
) -> tuple[ClassifierSpec, Path]:
    """Find a classifier's spec and its verified weights file; arguments as in `locate_model`.

    Raises:
        SpecError: If it is an encoder, or malformed.
        SourceError, UnknownModelError, DownloadError: If it cannot be found.
        IntegrityError: If the weights are not the recorded ones.
    """
    parsed = parse_source(source, options.revision)
    if isinstance(parsed, ReleasedSource):
        raise SpecError(
            f"{model_info(parsed.name).name!r} is an encoder; put a head on it with "
            f"clever_zoo.create_classifier({str(source)!r}, num_classes)"
        )
    files = _files(parsed, options)

    def read() -> tuple[ClassifierSpec, Path]:
        spec = ClassifierSpec.read(files.find(CONFIG_FILENAME))
        return spec, _verified_weights(spec.encoder, files, source)

    return _repaired(read, files)


def locate_onnx(source: str | Path, options: HubOptions = _DEFAULTS) -> tuple[Path, Path | None]:
    """Find an ONNX file, and the config.json of the model it was made from.

    Args:
        source: A path that ends in .onnx (its config.json stands inside it), or see
            `parse_source`.
        options: See `locate_model`.

    Raises:
        SourceError, UnknownModelError, SpecError: If the model cannot be found.
        DownloadError: If it has no ONNX file; says how to make one.
        IntegrityError: If a file is not the one that its repository lists.
    """
    if is_onnx_path(source):
        return Path(source), None
    parsed = parse_source(source, options.revision)
    files = _files(parsed, options)
    config, path = _repaired(lambda: (files.find(CONFIG_FILENAME), _onnx(files, source)), files)
    return path, config


def _onnx(files: Files, source: str | Path) -> Path:
    advice = (
        f"write one with `clever-zoo export {source} -o model.onnx` (needs the extras "
        "[export,onnx]) and pass its path"
    )
    try:
        path = files.find(ONNX_FILENAME)
    except DownloadError as error:
        raise DownloadError(f"{error}; if {source} has no ONNX file, {advice}") from error
    if not path.is_file():
        raise DownloadError(f"{source} has no ONNX file ({path} does not exist); {advice}")
    return path


def has_onnx(source: str | Path) -> bool:
    """Whether a model has an ONNX file; the Hub is asked for its small files only.

    Raises:
        CleverZooError: If the model cannot be found.
    """
    files = _files(parse_source(source), _DEFAULTS)
    return _repaired(lambda: files.has(ONNX_FILENAME), files)


def describes_classifier(source: str | Path, options: HubOptions = _DEFAULTS) -> bool:
    """Whether a source is a classifier and not an encoder; arguments as in `locate_model`."""
    parsed = parse_source(source, options.revision)
    if isinstance(parsed, ReleasedSource):
        return False
    files = _files(parsed, options)
    config = _repaired(lambda: files.find(CONFIG_FILENAME), files)
    return is_classifier(read_json(config))


def _files(source: Source, options: HubOptions) -> Files:
    if isinstance(source, HubSource):
        return HubRepo(source, options)
    if isinstance(source, ReleasedSource):
        spec = model_info(source.name)
        if pin := HUB_PINS.get(spec.name):
            packed = FolderFiles(_packed_folder(spec))
            return ReleasedFiles(packed, HubRepo(HubSource(*pin), options))
    return FolderFiles(_folder(source))


def _repaired(read: Callable[[], Found], files: Files) -> Found:
    """Read files; if one is bad, once more with everything fetched again."""
    try:
        return read()
    except IntegrityError as error:
        if not files.renew():
            raise
        logger.warning("%s; fetching the model again", error)
    return read()


def _verified_weights(spec: ModelSpec, files: Files, source: str | Path) -> Path:
    weights = spec.weights_file(source)
    path = files.find(weights.filename, weights)
    if isinstance(source, str) and source != spec.name:
        _log_resolution(source, spec.name, weights.sha256)
    return path


@functools.cache
def _log_resolution(source: str, name: str, sha256: str) -> None:
    """Cached, so that each source is logged once."""
    logger.info("%s resolves to %s, sha256 %s", source, name, sha256)


def model_folder(source: str | Path) -> Path:
    """The folder of a model on this machine.

    Raises:
        SourceError: If the source is malformed, no folder, or a Hub repository.
        UnknownModelError, DownloadError: If a released model cannot be found.
    """
    parsed = parse_source(source)
    if isinstance(parsed, HubSource):
        raise SourceError(
            f"{str(source)!r} is a repository on the Hub; download it "
            f"(`hf download {parsed.repo_id} --local-dir PATH`), then name 'local-dir:PATH'"
        )
    return _folder(parsed)


def _folder(source: LocalSource | ReleasedSource) -> Path:
    if isinstance(source, ReleasedSource):
        return released_folder(model_info(source.name))
    if not source.folder.is_dir():
        raise SourceError(f"{source.folder} is no folder; pass one that holds {CONFIG_FILENAME}")
    return source.folder


def released_folder(spec: ModelSpec) -> Path:
    """The folder of a released model in this installation.

    Raises:
        DownloadError: If it is not there.
    """
    folder = _packed_folder(spec)
    if not folder.is_dir():
        raise DownloadError(
            f"the weights of {spec.name!r} are not in this installation (looked in "
            f"{', '.join(map(str, _MODEL_FOLDERS))}) and not on the Hub yet; reinstall clever-zoo"
        )
    return folder


def _packed_folder(spec: ModelSpec) -> Path:
    """Where a released model is or would be."""
    folders = [base / spec.name for base in _MODEL_FOLDERS]
    return next(filter(Path.is_dir, folders), folders[0])
