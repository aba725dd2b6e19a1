"""What the benchmark found, as a file, and as the README's table."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clever_zoo.errors import DataError
from clever_zoo.files import write_atomic
from clever_zoo.records import Environment
from clever_zoo.spec import problem_lines

RESULTS = Path(__file__).parent / "results.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Spread(_Frozen):
    """Median, least and greatest of the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Self:
        """Sum up the figures of the rounds."""
        return cls(median=median(figures), min=min(figures), max=max(figures))


class Row(_Frozen):
    """Ours beside one peer.

    Attributes:
        section: Command that measured it.
        subject, peer: What is compared, and with what.
        unit: Of the figures.
        ours, theirs: Over the rounds.
        ratio: Ours to theirs, round by round.
        required: The project's own requirement of the median ratio, None where there is none.
        at_most: Whether the ratio has to be at most that, as for times.
    """

    section: str
    subject: str
    peer: str
    unit: Literal["images/s", "ms", "s", "MB"]
    ours: Spread
    theirs: Spread
    ratio: Spread
    required: float | None = None
    at_most: bool = False

    @classmethod
    def of(
        cls,
        section: str,
        subject: str,
        peer: str,
        unit: Literal["images/s", "ms", "s", "MB"],
        ours: Sequence[float],
        theirs: Sequence[float],
        required: float | None = None,
        *,
        at_most: bool = False,
    ) -> Self:
        """Compare the figures of the same rounds."""
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        return cls(
            section=section,
            subject=subject,
            peer=peer,
            unit=unit,
            ours=Spread.of(ours),
            theirs=Spread.of(theirs),
            ratio=Spread.of(ratios),
            required=required,
            at_most=at_most,
        )

    @property
    def verdict(self) -> str:
        """The requirement, and whether the median meets it."""
        if self.required is None:
            return ""
        reached = self.ratio.median
        met = reached <= self.required if self.at_most else reached >= self.required
        sign = "≤" if self.at_most else "≥"
        return f"{sign} {self.required:g}: {'met' if met else '**missed**'}"


class BenchRecord(_Frozen):
    """All rows of a run.

    Attributes:
        environment: Commit, hardware, versions.
        rounds: Counted rounds of each section.
        canary_gflops: Of a fixed matrix product beside every round; where it varies, the machine
            was not quiet.
        rows: What was measured.
    """

    schema_version: Literal[1] = 1
    environment: Environment
    rounds: int = Field(ge=1)
    canary_gflops: Spread
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record.

        Raises:
            DataError: If it is missing or does not fit.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{path} does not exist; `make bench` writes it") from error
        except ValidationError as error:
            lines = "".join(f"\n  - {line}" for line in problem_lines(error))
            raise DataError(f"{path}:{lines}") from error

    def write(self, path: Path) -> None:
        """Write the record."""
        content = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
        write_atomic(path, content.encode())


def cells(row: Row) -> list[str]:
    """A row of the table."""
    return [
        row.subject,
        row.peer,
        *(f"{figure.median:.3g} {row.unit}" for figure in (row.ours, row.theirs)),
        f"{row.ratio.median:.2f} ({row.ratio.min:.2f}..{row.ratio.max:.2f})",
        row.verdict,
    ]


HEADS = ("what", "beside", "ours", "theirs", "ratio", "required")


def markdown(record: BenchRecord) -> str:
    """The README's table."""
    canary, e = record.canary_gflops, record.environment
    versions = ", ".join(f"{name} {version}" for name, version in e.versions.items())
    lines = [
        f"| {' | '.join(HEADS)} |",
        "|---|---|---:|---:|---:|---|",
        *(f"| {' | '.join(cells(row))} |" for row in record.rows),
        "",
        f"{e.hardware}; Python {e.python}, torch {e.torch}, {versions}; {record.rounds} rounds in "
        f"turns, medians (least..greatest); canary {canary.median:.0f} GFLOP/s "
        f"({canary.min:.0f}..{canary.max:.0f}); commit {e.commit[:7]}.",
    ]
    return "\n".join(lines)
