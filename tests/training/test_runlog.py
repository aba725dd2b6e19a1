"""The record of a run: resuming, torn lines, TensorBoard read back, a full disk."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clever_zoo.errors import DataError
from training.runlog import LOG, TENSORBOARD, RunLog, read_log


def record(path: Path, first: int, end: int, **more: float) -> None:
    with RunLog(path, first_step=first, total_steps=100) as log:
        for step in range(first, end):
            log.step({"step": step, "loss": first + step / 8, **more})


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / TENSORBOARD), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_one_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / LOG
    record(path, 0, 25, lr=0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": i, "loss": i / 8, "lr": 0.5} for i in range(25)]
    assert read_log(path) == lines


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / LOG
    record(path, 0, 40)
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [line["step"] for line in read_log(path)] == list(range(40))
    before = path.read_text().splitlines()
    time.sleep(1.01 - time.time() % 1)  # TensorBoard reads its files in the order of full seconds
    record(path, 25, 60)
    after = path.read_text().splitlines()
    assert after[:25] == before[:25]
    assert [json.loads(line)["step"] for line in after] == list(range(60))
    assert json.loads(after[25])["loss"] == 25 + 25 / 8

    curve = scalars(tmp_path, "loss")
    assert [step for step, _ in curve] == [0, 10, 20, 30, 40, 50]
    assert [value for _, value in curve] == [s / 8 + (25 if s >= 25 else 0) for s, _ in curve]


def test_a_run_begun_anew_has_a_new_log(tmp_path: Path) -> None:
    record(tmp_path / LOG, 0, 30)
    record(tmp_path / LOG, 0, 2)
    assert [line["step"] for line in read_log(tmp_path / LOG)] == [0, 1]


def test_tensorboard_has_every_number_under_its_name(tmp_path: Path) -> None:
    record(tmp_path / LOG, 0, 11, lr=0.25, invariant_std=0.5)
    assert scalars(tmp_path, "lr") == [(0, 0.25), (10, 0.25)]
    assert scalars(tmp_path, "invariant_std") == [(0, 0.5), (10, 0.5)]


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    record(tmp_path / LOG, 0, 1, grad_norm=float("inf"), lr=float("nan"))

    def refuse(token: str) -> None:
        raise AssertionError(token)

    (line,) = (tmp_path / LOG).read_text().splitlines()
    values = json.loads(line, parse_constant=refuse)
    assert values == {"step": 0, "loss": 0.0, "grad_norm": None, "lr": None}


def test_other_ranks_write_and_show_nothing(tmp_path: Path, capsys) -> None:
    path = tmp_path / "run" / LOG
    with RunLog(path, first_step=0, total_steps=3, enabled=False) as log:
        log.step({"step": 0, "loss": 1.0})
        log.flush()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_bar_shows_loss_speed_and_data_share(tmp_path: Path, capsys) -> None:
    with RunLog(tmp_path / LOG, first_step=0, total_steps=2) as log:
        log.step({"step": 0, "loss": 4.5, "images_per_s": 1234.4, "step_s": 0.2, "data_s": 0.05})
    assert "loss 4.500 · 1,234 images/s · data 25%" in " ".join(capsys.readouterr().out.split())


def test_flush_writes_at_once_and_an_error_loses_no_step(tmp_path: Path) -> None:
    def fail_at_the_third() -> None:
        with RunLog(tmp_path / LOG, first_step=0, total_steps=9) as log:
            for step in range(3):
                log.step({"step": step, "loss": 1.0})
            log.flush()
            assert len(read_log(tmp_path / LOG)) == 3
            log.step({"step": 3, "loss": 1.0})
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail_at_the_third()
    assert len(read_log(tmp_path / LOG)) == 4


@pytest.mark.parametrize("damage", ['{"step": 1, "lo', "[1]", '{"loss": 1.0}', '{"step": "1"}'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / LOG
    path.write_text(f'{{"step": 0, "loss": 1.0}}\n{damage}\n{{"step": 2, "loss": 1.0}}\n')
    before = path.read_text()
    with pytest.raises(DataError, match="line 2 is damaged"):
        read_log(path)
    with pytest.raises(DataError, match="line 2 is damaged"):
        record(path, 3, 4)
    assert path.read_text() == before


@contextmanager
def files_end_at(size_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow further, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_an_error_and_earlier_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / LOG
    record(path, 0, 20)
    with pytest.raises(OSError, match="too large"), files_end_at(path.stat().st_size + 100):
        record(path, 20, 100)
    steps = [line["step"] for line in read_log(path)]
    assert steps == list(range(len(steps)))
    assert 20 <= len(steps) < 30
    record(path, 20, 22)
    assert [line["step"] for line in read_log(path)] == list(range(22))
