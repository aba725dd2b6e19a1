"""The record of a run: one JSON object a line, and a progress bar for people."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from clever_zoo.files import write_atomic


class RunLog:
    """Appends to `path` and shows a bar over all steps; use it as a context manager.

    On resuming at step k, the lines after it (written after the checkpoint, the last perhaps
    torn by a kill) are dropped, so that every step stands in the log once.
    """

    def __init__(
        self, path: Path, *, first_step: int, total_steps: int, enabled: bool = True
    ) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = "".join(f"{line}\n" for line in lines[:first_step])
        write_atomic(path, kept.encode())
        self._file = path.open("a", encoding="utf-8")
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._file.close()

    def step(self, values: dict[str, Any]) -> None:
        """Record one step; `values` must hold `step` and `loss`."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self._bar.update(
            self._task, completed=values["step"] + 1, description=f"loss {values['loss']:.3f}"
        )
