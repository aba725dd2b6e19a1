"""Every exception of the package: one root, each also a fitting builtin.

A message says what happened with the actual value, what is allowed, and what to do next.
"""

from collections.abc import Mapping, Sequence

_LISTED = 10  # tensors of a kind that a message names


class CleverZooError(Exception):
    """Root of all errors raised on purpose by clever_zoo and training."""


class UnknownModelError(CleverZooError, ValueError):
    """A name that is no released model, with close matches or the recipe that would make it."""


class SpecError(CleverZooError, ValueError):
    """A config.json or spec with unknown, missing or contradictory fields."""


class BackendMissingError(CleverZooError, ImportError):
    """An optional package is not installed; the message holds the pip line."""


class DownloadError(CleverZooError, OSError):
    """A file could not be fetched from the Hub or found in its cache."""


class UploadError(CleverZooError, OSError):
    """A model could not be sent to the Hub; the files there are as they were."""


class IntegrityError(CleverZooError, OSError):
    """A file's size or digest is not the recorded one."""


class WeightsMismatchError(CleverZooError, ValueError):
    """A weights file does not fit its backbone.

    Attributes:
        missing, unexpected: Names of tensors, sorted.
        wrong: A line for each tensor of another shape or type.
    """

    def __init__(
        self,
        source: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        wrong: Sequence[str] = (),
    ) -> None:
        kinds = {"missing: ": missing, "unexpected: ": unexpected, "": wrong}
        lines = [line for prefix, names in kinds.items() for line in _some(prefix, names)]
        super().__init__(f"{source} does not fit its backbone:{''.join(lines)}")
        self.source = source
        self.missing, self.unexpected, self.wrong = map(tuple, (missing, unexpected, wrong))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.source, self.missing, self.unexpected, self.wrong)


def _some(prefix: str, names: Sequence[str]) -> list[str]:
    """A line for each of the first names, and how many more there are."""
    lines = [f"\n  - {prefix}{name}" for name in names[:_LISTED]]
    rest = len(names) - _LISTED
    return [*lines, f"\n  - {prefix}{rest} more"] if rest > 0 else lines


class ImageError(CleverZooError, ValueError):
    """An input that is no usable image.

    Attributes:
        source: Path or description of the image.
        index: Position in the batch that was passed in.
        reason: What is wrong with it.
    """

    def __init__(self, source: str, index: int, reason: str) -> None:
        super().__init__(f"image {index} ({source}): {reason}")
        self.source, self.index, self.reason = source, index, reason

    def __reduce__(self) -> tuple[type, tuple[str, int, str]]:
        return type(self), (self.source, self.index, self.reason)


class ShapeError(CleverZooError, ValueError):
    """A tensor or array of the wrong rank, size or type."""


class ExportParityError(CleverZooError, RuntimeError):
    """An exported graph does not give the model's values; it was not written."""


class SourceError(CleverZooError, ValueError):
    """A model source that is malformed or could be read in two ways."""


class DataError(CleverZooError, ValueError):
    """A data folder, label file or index that cannot be used."""


class EngineError(CleverZooError, RuntimeError):
    """Workers of a bulk run failed for another reason than its input."""


class NonFiniteError(CleverZooError, ArithmeticError):
    """A loss term became NaN or infinite; names the term and the step."""


class CheckpointError(CleverZooError, RuntimeError):
    """A checkpoint that belongs to another recipe or cannot be read."""


class RecipeError(CleverZooError, ValueError):
    """A recipe with mistakes, all of them listed.

    Attributes:
        problems: One line per mistake.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"{source}: {len(problems)} problem(s){lines}")
        self.source, self.problems = source, tuple(problems)

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (self.source, self.problems)


class RequestError(CleverZooError, ValueError):
    """A request that the service refuses.

    Attributes:
        status: HTTP status, 4xx, 500 or 503.
        headers: Headers of the answer.
    """

    def __init__(
        self, message: str, status: int = 400, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class SettingError(CleverZooError, ValueError):
    """A setting with which the service would not do what it says, or the Hub's client not start."""


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse an argument that is none of the allowed texts.

    Raises:
        SpecError: Naming the argument, its value and what is allowed.
    """
    if value not in allowed:
        raise SpecError(f"{name} is {value!r}; use {' or '.join(map(repr, allowed))}")
