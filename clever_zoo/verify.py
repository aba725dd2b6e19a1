"""Check a model folder against everything that is recorded of it: one verdict per check."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from clever_zoo.errors import CleverZooError, IntegrityError, SourceError, SpecError
from clever_zoo.files import SUMS_FILENAME, read_sums, verify_file, verify_listed
from clever_zoo.golden import GOLDEN_FILENAME, compare_golden
from clever_zoo.locate import ONNX_FILENAME, released_folder
from clever_zoo.registry import RELEASED, model_info
from clever_zoo.sources import HubSource, LocalSource, parse_source
from clever_zoo.spec import (
    CONFIG_FILENAME,
    ClassifierSpec,
    ModelSpec,
    WeightFile,
    is_classifier,
    read_json,
)

Verdict = Literal["ok", "FAILED", "skipped"]


class Check(NamedTuple):
    """One thing that was checked.

    Attributes:
        verdict: "skipped" if there is nothing to compare with, or no runtime to compare in.
        subject: What was checked.
        detail: What was found, or why it failed or was skipped.
    """

    verdict: Verdict
    subject: str
    detail: str


def verify_model(source: str | Path) -> list[Check]:
    """Check a model's files and, on this machine, its values.

    Args:
        source: A released name, "local-dir:PATH" or a Path.

    Raises:
        SourceError: If it is malformed, no folder, or a Hub repository.
        UnknownModelError, DownloadError: If a released model cannot be found.
    """
    folder = _find_folder(source)
    try:
        spec, is_classifier = _read_spec(folder / CONFIG_FILENAME)
    except SpecError as error:
        return [Check("FAILED", CONFIG_FILENAME, str(error)), *_check_sums(folder)]
    return [
        Check("ok", CONFIG_FILENAME, f"describes {spec.name}"),
        _check_registry(spec, folder),
        _attempt("weights", functools.partial(_verified_weights, spec, folder)),
        *_check_sums(folder),
        *_check_values(spec, folder, is_classifier),
    ]


def _find_folder(source: str | Path) -> Path:
    parsed = parse_source(source)
    if isinstance(parsed, HubSource):
        raise SourceError(
            f"{str(source)!r} is a Hub repository; download it, then verify 'local-dir:PATH'"
        )
    if not isinstance(parsed, LocalSource):
        return released_folder(model_info(parsed.name))
    if not parsed.folder.is_dir():
        raise SourceError(f"{parsed.folder} is no folder; pass one that holds {CONFIG_FILENAME}")
    return parsed.folder


def _read_spec(path: Path) -> tuple[ModelSpec, bool]:
    """The encoder's spec, and whether it is inside a classifier."""
    config = read_json(path)
    if is_classifier(config):
        return ClassifierSpec.from_config(config, str(path)).encoder, True
    return ModelSpec.from_config(config, str(path)), False


def _attempt(subject: str, check: Callable[[], str]) -> Check:
    try:
        return Check("ok", subject, check())
    except (CleverZooError, OSError) as error:
        return Check("FAILED", subject, str(error))


def _check_registry(spec: ModelSpec, folder: Path) -> Check:
    released = _released(spec.name)
    if released is None:
        return Check("skipped", "registry", f"{spec.name} is no released model")
    if released != spec:
        problem = f"{folder / CONFIG_FILENAME} is not what this release records of {spec.name}"
        return Check("FAILED", "registry", problem)
    return Check("ok", "registry", f"{CONFIG_FILENAME} is as this release records it")


def _released(name: str) -> ModelSpec | None:
    return next((spec for spec in RELEASED if spec.name == name), None)


def _recorded_weights(spec: ModelSpec) -> WeightFile:
    if spec.weights is None:
        raise SpecError(f"{CONFIG_FILENAME} records no weights file")
    return spec.weights


def _verified_weights(spec: ModelSpec, folder: Path) -> str:
    weights = _recorded_weights(spec)
    verify_file(folder / weights.filename, weights)
    return f"{weights.size_bytes} bytes, sha256 {weights.sha256}"


def _check_sums(folder: Path) -> Iterator[Check]:
    path = folder / SUMS_FILENAME
    if not path.is_file():
        yield Check("skipped", SUMS_FILENAME, "the folder has none")
        return
    try:
        sums = read_sums(path)
    except IntegrityError as error:
        yield Check("FAILED", SUMS_FILENAME, str(error))
        return
    for name in sums:
        yield _attempt(f"digest of {name}", functools.partial(_verified_sum, folder, name, sums))


def _verified_sum(folder: Path, name: str, sums: dict[str, str]) -> str:
    verify_listed(folder / name, name, sums)
    return f"as in {SUMS_FILENAME}"


def _check_values(spec: ModelSpec, folder: Path, is_classifier: bool) -> Iterator[Check]:
    if is_classifier:
        yield Check("skipped", "values", "none are recorded of a classifier")
        return
    if not (folder / GOLDEN_FILENAME).is_file():
        verdict: Verdict = "FAILED" if _released(spec.name) else "skipped"
        yield Check(verdict, "values", f"the folder has no {GOLDEN_FILENAME}")
        return
    yield _in_runtime("torch", functools.partial(_torch_values, spec, folder))
    if (folder / ONNX_FILENAME).is_file():
        yield _in_runtime("onnxruntime", functools.partial(_onnx_values, folder))


def _in_runtime(package: str, check: Callable[[], str]) -> Check:
    subject = f"values in {package}"
    if importlib.util.find_spec(package) is None:
        return Check("skipped", subject, f"{package} is not installed")
    return _attempt(subject, check)


def _torch_values(spec: ModelSpec, folder: Path) -> str:
    from clever_zoo.encoder import Encoder

    encoder = Encoder.load(spec, folder / _recorded_weights(spec).filename)
    return _difference(compare_golden(encoder, folder / GOLDEN_FILENAME))


def _onnx_values(folder: Path) -> str:
    from clever_zoo.onnx_encoder import OnnxEncoder

    encoder = OnnxEncoder.from_pretrained(folder)
    return _difference(compare_golden(encoder, folder / GOLDEN_FILENAME))


def _difference(worst: float) -> str:
    return f"within {worst:.1e} of {GOLDEN_FILENAME}"
