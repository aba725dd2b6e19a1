"""Check a model folder against everything that is recorded of it: one verdict per check."""

import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from clever_zoo.errors import CleverZooError, IntegrityError, SpecError
from clever_zoo.files import SUMS_FILENAME, folder_files, read_sums, verify_file, verify_listed
from clever_zoo.golden import GOLDEN_FILENAME, check_golden, compare_golden
from clever_zoo.locate import ONNX_FILENAME, model_folder
from clever_zoo.registry import released
from clever_zoo.spec import (
    CARD_FILENAME,
    CONFIG_FILENAME,
    ClassifierSpec,
    ModelSpec,
    encoder_spec,
    read_config,
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
    folder = model_folder(source)
    path = folder / CONFIG_FILENAME
    try:
        described = read_config(read_json(path), str(path))
    except SpecError as error:
        return [Check("FAILED", CONFIG_FILENAME, str(error)), *_check_sums(folder)]
    spec = encoder_spec(described)
    return [
        Check("ok", CONFIG_FILENAME, f"describes {spec.name}"),
        _check_registry(spec, folder),
        _attempt("weights", functools.partial(_verified_weights, spec, folder)),
        *_check_sums(folder),
        *_check_values(described, folder),
    ]


def _attempt(subject: str, check: Callable[[], str]) -> Check:
    try:
        return Check("ok", subject, check())
    except (CleverZooError, OSError) as error:
        return Check("FAILED", subject, str(error))


def _check_registry(spec: ModelSpec, folder: Path) -> Check:
    registered = released(spec.name)
    if registered is None:
        return Check("skipped", "registry", f"{spec.name} is no released model")
    if _is_stored_otherwise(spec):
        check = functools.partial(_verified_copy, registered, spec, folder)
        return _in_runtime("torch", check, "registry")
    if registered != spec:
        problem = f"{folder / CONFIG_FILENAME} is not what this release records of {spec.name}"
        return Check("FAILED", "registry", problem)
    return Check("ok", "registry", f"{CONFIG_FILENAME} is as this release records it")


def _is_stored_otherwise(spec: ModelSpec) -> bool:
    """Whether it is a released model but for its weights file, as `save_pretrained` writes it."""
    registered = released(spec.name)
    if registered is None or registered == spec:
        return False
    return registered == spec.model_copy(update={"weights": registered.weights})


def _verified_copy(registered: ModelSpec, spec: ModelSpec, folder: Path) -> str:
    from clever_zoo.encoder import Encoder, current_weights

    encoder = Encoder.load(spec, folder / spec.weights_file(folder).filename)
    if current_weights(encoder.backbone, registered.weights) != registered.weights:
        raise IntegrityError(
            f"{folder / CONFIG_FILENAME} says {spec.name}, but these are other weights than this "
            "release records of it; save them under another name, or load the released ones"
        )
    return "the released weights, stored in another type"


def _verified_weights(spec: ModelSpec, folder: Path) -> str:
    weights = spec.weights_file(folder)
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
    # What begins with a dot is the Hub's, and a card that is not listed its owner's to change.
    shown = {name for name in folder_files(folder) if not re.search(r"(^|/)\.", name)}
    for name in sorted(sums.keys() | shown - {CARD_FILENAME}):
        yield _attempt(f"digest of {name}", functools.partial(_verified_sum, folder, name, sums))


def _verified_sum(folder: Path, name: str, sums: dict[str, str]) -> str:
    verify_listed(folder / name, name, sums)
    return f"as in {SUMS_FILENAME}"


def _check_values(spec: ModelSpec | ClassifierSpec, folder: Path) -> Iterator[Check]:
    if isinstance(spec, ClassifierSpec):
        yield Check("skipped", "values", "none are recorded of a classifier")
        return
    if not (folder / GOLDEN_FILENAME).is_file():
        missing = released(spec.name) is not None and not _is_stored_otherwise(spec)
        verdict: Verdict = "FAILED" if missing else "skipped"
        yield Check(verdict, "values", f"the folder has no {GOLDEN_FILENAME}")
        return
    yield _in_runtime("torch", lambda: _difference(check_golden(folder)), "values in torch")
    if (folder / ONNX_FILENAME).is_file():
        check = functools.partial(_onnx_values, folder)
        yield _in_runtime("onnxruntime", check, "values in onnxruntime")


def _in_runtime(package: str, check: Callable[[], str], subject: str) -> Check:
    if importlib.util.find_spec(package) is None:
        return Check("skipped", subject, f"{package} is not installed")
    return _attempt(subject, check)


def _onnx_values(folder: Path) -> str:
    from clever_zoo.onnx_encoder import OnnxEncoder

    encoder = OnnxEncoder.from_pretrained(folder)
    return _difference(compare_golden(encoder, folder / GOLDEN_FILENAME))


def _difference(worst: float) -> str:
    return f"within {worst:.1e} of {GOLDEN_FILENAME}"
