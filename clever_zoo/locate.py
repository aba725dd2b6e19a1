"""Find a model's files, wherever its source says they are, and verify them."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from clever_zoo.errors import DownloadError, SourceError, SpecError
from clever_zoo.files import verify_file
from clever_zoo.registry import model_info
from clever_zoo.sources import (
    HubSource,
    LocalSource,
    ReleasedSource,
    is_onnx_path,
    parse_source,
)
from clever_zoo.spec import (
    CLASSIFIER_KEY,
    CONFIG_FILENAME,
    ClassifierSpec,
    ModelSpec,
    WeightFile,
    read_json,
)

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
# In a wheel the released models lie inside the package, in a checkout beside it.
_MODEL_FOLDERS = (_PACKAGE / "model_cards", _PACKAGE.parent / "model_cards")
ONNX_FILENAME = "onnx/model.onnx"

Finder = Callable[[str], Path]


def locate_model(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> tuple[ModelSpec, Path]:
    """Find a model's spec and its verified weights file.

    Args:
        source, revision: See `parse_source`.
        cache_dir, local_files_only, token: As in huggingface_hub; used for Hub sources only.

    Raises:
        SourceError, UnknownModelError, SpecError, DownloadError: If it cannot be found.
        IntegrityError: If the weights are not the recorded ones.
    """
    parsed = parse_source(source, revision)
    if isinstance(parsed, ReleasedSource):
        spec = model_info(parsed.name)
        find: Finder = released_folder(spec).joinpath
    else:
        find = _finder(parsed, cache_dir, local_files_only, token)
        spec = ModelSpec.read(find(CONFIG_FILENAME))
    return spec, _verified_weights(spec, find, source)


def locate_classifier(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> tuple[ClassifierSpec, Path]:
    """Find a classifier's spec and its verified weights file; arguments as in `locate_model`.

    Raises:
        SpecError: If it is an encoder, or malformed.
        SourceError, UnknownModelError, DownloadError: If it cannot be found.
        IntegrityError: If the weights are not the recorded ones.
    """
    parsed = parse_source(source, revision)
    if isinstance(parsed, ReleasedSource):
        raise SpecError(
            f"{model_info(parsed.name).name!r} is an encoder; put a head on it with "
            f"clever_zoo.create_classifier({str(source)!r}, num_classes)"
        )
    find = _finder(parsed, cache_dir, local_files_only, token)
    spec = ClassifierSpec.read(find(CONFIG_FILENAME))
    return spec, _verified_weights(spec.encoder, find, source)


def locate_onnx(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> tuple[Path, Path | None]:
    """Find an ONNX file, and the config.json of the model it was made from.

    Args:
        source: A path that ends in .onnx (its config.json stands inside it), or see
            `parse_source`.
        revision, cache_dir, local_files_only, token: See `locate_model`.

    Raises:
        SourceError, UnknownModelError, SpecError: If the model cannot be found.
        DownloadError: If it has no ONNX file; says how to make one.
    """
    if is_onnx_path(source):
        return Path(source), None
    parsed = parse_source(source, revision)
    if isinstance(parsed, ReleasedSource):
        find: Finder = released_folder(model_info(parsed.name)).joinpath
    else:
        find = _finder(parsed, cache_dir, local_files_only, token)
    config = find(CONFIG_FILENAME)
    advice = (
        f"write one with `clever-zoo export {source} -o model.onnx` (needs the extra [export]) and "
        "pass its path"
    )
    try:
        path = find(ONNX_FILENAME)
    except DownloadError as error:
        raise DownloadError(f"{error}; if {source} has no ONNX file, {advice}") from error
    if not path.is_file():
        raise DownloadError(f"{source} has no ONNX file ({path} does not exist); {advice}")
    return path, config


def describes_classifier(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> bool:
    """Whether a source is a classifier and not an encoder; arguments as in `locate_model`."""
    parsed = parse_source(source, revision)
    if isinstance(parsed, ReleasedSource):
        return False
    find = _finder(parsed, cache_dir, local_files_only, token)
    return CLASSIFIER_KEY in read_json(find(CONFIG_FILENAME))


def _finder(
    source: HubSource | LocalSource,
    cache_dir: Path | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Finder:
    """How to get a file of a model by its name."""
    if isinstance(source, HubSource):
        return functools.partial(
            _hub_file,
            source.repo_id,
            source.revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
    if not source.folder.is_dir():
        raise SourceError(f"{source.folder} is no folder; pass one that holds {CONFIG_FILENAME}")
    return source.folder.joinpath


def _verified_weights(spec: ModelSpec, find: Finder, source: str | Path) -> Path:
    weights = _weights_of(spec, str(source))
    path = find(weights.filename)
    verify_file(path, weights)
    if isinstance(source, str) and source != spec.name:
        _log_resolution(source, spec.name, weights.sha256)
    return path


@functools.cache
def _log_resolution(source: str, name: str, sha256: str) -> None:
    """Cached, so that each source is logged once."""
    logger.info("%s resolves to %s, sha256 %s", source, name, sha256)


def _weights_of(spec: ModelSpec, source: str) -> WeightFile:
    if spec.weights is None:
        raise SpecError(
            f"{source}: the spec of {spec.name!r} records no weights file; save the model again "
            "with its save_pretrained"
        )
    return spec.weights


def released_folder(spec: ModelSpec) -> Path:
    """The folder of a released model in this installation.

    Raises:
        DownloadError: If it is not there.
    """
    for base in _MODEL_FOLDERS:
        if (base / spec.name).is_dir():
            return base / spec.name
    raise DownloadError(
        f"the weights of {spec.name!r} are not in this installation (looked in "
        f"{', '.join(map(str, _MODEL_FOLDERS))}) and not on the Hub yet; reinstall clever-zoo"
    )


def _hub_file(
    repo_id: str,
    revision: str | None,
    filename: str,
    *,
    cache_dir: Path | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        path = hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
    except HFValidationError as error:
        raise SourceError(f"{repo_id!r} is no valid name of a Hub repository: {error}") from error
    except LocalEntryNotFoundError as error:
        raise DownloadError(
            f"{filename} of {repo_id!r} is not in the Hub cache and could not be fetched "
            f"({error}); connect once, or check HF_HOME and local_files_only"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise DownloadError(
            f"{filename} of {repo_id!r} at revision {revision or 'main'} could not be fetched: "
            f"{error}"
        ) from error
    return Path(path)
