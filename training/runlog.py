"""The record of a run: one JSON object a line, TensorBoard curves, a progress bar for people."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
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
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from clever_zoo.errors import DataError

LOG, TENSORBOARD = "log.jsonl", "tensorboard"  # names in the folder of a run
WRITE_EVERY_S = 0.2
TENSORBOARD_EVERY_STEPS = 10

# `json.dumps` would build an encoder anew for every line.
_encode = json.JSONEncoder(allow_nan=False).encode


def _whole_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each line ends (bytes) and what it says; a torn last line is left out."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                values = json.loads(line)
                values["step"] + 0
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}, line {number} is damaged ({error!r}); every line must be a JSON "
                    "object with a `step`. Remove the line, or the log to begin a new one"
                ) from error
            yield end, values


def read_log(path: Path) -> list[dict[str, Any]]:
    """What `RunLog` wrote, one dictionary a step; a line that is only half written is left out.

    Raises:
        DataError: If another line than the last is damaged.
        OSError: If the file cannot be read.
    """
    return [values for _, values in _whole_lines(path)]


def _drop_from(path: Path, first_step: int) -> None:
    """Cut the log after the last line before `first_step`, in place: a log can be large."""
    kept = 0
    for end, values in _whole_lines(path):
        if values["step"] >= first_step:
            break
        kept = end
    os.truncate(path, kept)


def _status(values: Mapping[str, Any]) -> str:
    parts = [f"loss {values['loss']:.3f}"]
    if "images_per_s" in values:
        parts.append(f"{values['images_per_s']:,.0f} images/s")
    if {"data_s", "step_s"} <= values.keys():
        parts.append(f"data {values['data_s'] / values['step_s']:.0%}")
    return " · ".join(parts)


class RunLog:
    """Records a run's steps in three places; use it as a context manager.

    - `path`, the record: one JSON object a line. A value that is not finite is written as null.
    - the folder `tensorboard` beside it: the numbers of every tenth step as scalars.
    - a bar over all steps: loss, images/s, share of time spent waiting for data, time left.

    On resuming at step k, what was recorded from step k on (after the checkpoint was written,
    the last line perhaps torn by a kill) is dropped, so that every step is recorded once.

    Steps that are shorter than `WRITE_EVERY_S` are written several at a time, so that recording
    takes microseconds of each; `flush` before a checkpoint is saved.

    Args:
        path: The log, such as OUT/log.jsonl.
        first_step: The step to go on with; 0 begins a new log.
        total_steps: Steps of the whole run.
        enabled: False on all ranks but the first: then nothing is written or shown.

    Raises:
        DataError: On entering, if a line of an earlier log is damaged.
        OSError: If lines cannot be written, such as on a full disk; earlier lines are intact.
    """

    def __init__(
        self, path: Path, *, first_step: int, total_steps: int, enabled: bool = True
    ) -> None:
        self._path, self._enabled = path, enabled
        self._first_step, self._total_steps = first_step, total_steps
        self._pending: list[Mapping[str, float]] = []
        self._written_at = -math.inf
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if not self._enabled:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            _drop_from(self._path, self._first_step)
        with ExitStack() as stack:
            self._file = stack.enter_context(self._path.open("ab"))
            self._curves = stack.enter_context(
                SummaryWriter(str(self._path.parent / TENSORBOARD), purge_step=self._first_step)
            )
            self._bar = stack.enter_context(
                Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    refresh_per_second=2,
                )
            )
            self._task = self._bar.add_task(
                "train", total=self._total_steps, completed=self._first_step
            )
            stack.callback(self.flush)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def step(self, values: Mapping[str, float]) -> None:
        """Record one step.

        Args:
            values: Numbers by name, `step` and `loss` among them. Shown in the bar if there:
                `images_per_s`, and `data_s` of the `step_s` seconds of the whole step.
        """
        if self._enabled:
            self._pending.append(values)
            if time.monotonic() - self._written_at > WRITE_EVERY_S:
                self.flush()

    def flush(self) -> None:
        """Write the steps that are not written yet."""
        steps, self._pending = self._pending, []
        if not steps:
            return
        lines = [
            _encode({k: v if math.isfinite(v) else None for k, v in values.items()})
            for values in steps
        ]
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        for values in steps:
            if values["step"] % TENSORBOARD_EVERY_STEPS == 0:
                self._add_scalars(values)
        last = steps[-1]
        self._bar.update(self._task, completed=last["step"] + 1, description=_status(last))
        self._written_at = time.monotonic()

    def _add_scalars(self, values: Mapping[str, float]) -> None:
        # One event for all scalars: `add_scalar` for each takes ten times as long.
        scalars = [Summary.Value(tag=k, simple_value=v) for k, v in values.items() if k != "step"]
        self._curves.file_writer.add_summary(Summary(value=scalars), values["step"])
