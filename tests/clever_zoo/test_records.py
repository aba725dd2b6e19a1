"""The results record: strict, round trip, bringing up to date."""

import json
from pathlib import Path

import pytest

from clever_zoo.errors import DataError
from clever_zoo.records import Environment, Network, Protocol, Record, Result

HERE = Environment(commit="0" * 40, device="cpu", hardware="a CPU", torch="2.9", python="3.11")
THERE = HERE.model_copy(update={"hardware": "another CPU"})


def row(network: str = "a", mean: float = 50.0, **fields) -> Result:
    protocol = Protocol(task="knn", perturbation=fields.pop("perturbation", "ori"))
    values = {"part": "full", "metric": "top1", "at": 20.0, "n": 100} | fields
    return Result(network=network, protocol=protocol, mean=mean, **values)


def record(*rows: Result, networks=(("a", "1"), ("b", "2")), environments=(HERE,)) -> Record:
    roles = ("model", "baseline")
    return Record(
        model="a",
        dataset="fashion-mnist",
        invariant_dim=3,
        images={"train": 10, "test": 100},
        tasks={"knn": "nearest neighbours"},
        perturbations={"ori": "none", "r": "rotation"},
        networks=tuple(
            Network(name=name, role=role, sha256=sha256)
            for (name, sha256), role in zip(networks, roles, strict=False)
        ),
        environments=environments,
        results=rows,
    )


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    written = record(row(), row("b", 40.5, perturbation="r", seeds=(0, 1), std=0.25))
    written.write(tmp_path / "results.json")
    assert Record.read(tmp_path / "results.json") == written
    lines = (tmp_path / "results.json").read_text().splitlines()
    assert sum('"knn"' in line and '"mean"' in line for line in lines) == 2


def test_numbers_are_found_by_their_key() -> None:
    r = record(row(mean=1), row(mean=2, at=10.0), row(mean=3, at=100.0, perturbation="r"))
    assert r.find("a", "knn", "top1", "full", at=20.0).mean == 1
    assert r.find("a", "knn", "top1", "full", at=100.0, perturbation="r").mean == 3
    assert r.find("a", "knn", "top1", "full") is None
    assert r.find("b", "knn", "top1", "full", at=20.0) is None
    assert r.network("baseline").name == "b"
    assert r.network("pixels") is None


def test_newer_rows_replace_older_ones_and_other_weights_take_theirs_along() -> None:
    old = record(row(mean=1), row(mean=2, at=10.0), row("b", 3))
    new = record(row(mean=9), networks=(("a", "1"), ("b", "other")), environments=(THERE,))
    both = old.updated(new)
    assert {(x.network, x.at): x.mean for x in both.results} == {("a", 20.0): 9, ("a", 10.0): 2}
    assert both.environments[both.find("a", "knn", "top1", "full", at=20.0).environment] == THERE
    assert both.environments[both.find("a", "knn", "top1", "full", at=10.0).environment] == HERE
    others = {"model": "other", "dataset": "other", "invariant_dim": 2, "images": {"train": 7}}
    for key, value in others.items():
        with pytest.raises(DataError, match=f"the record's {key} is .* write to another file"):
            old.updated(new.model_copy(update={key: value}))


def test_rows_of_other_images_are_not_mixed() -> None:
    old = record(row(mean=1)).model_copy(update={"digests": {"train": "1" * 64}})
    same = record(row(mean=2)).model_copy(update={"digests": {"train": "1" * 64, "test": "2" * 64}})
    assert old.updated(same).digests == same.digests
    assert old.updated(record(row(mean=2))).digests == old.digests
    other = same.model_copy(update={"digests": {"train": "3" * 64}})
    with pytest.raises(DataError, match=r"train images are others \(1{12}...\) than .*\(3{12}"):
        old.updated(other)


def test_rows_of_a_task_that_means_something_else_now_are_dropped() -> None:
    old = record(row(mean=1), row("b", 2))
    new = record(row(mean=3)).model_copy(update={"tasks": {"knn": "something else"}})
    assert [(x.network, x.mean) for x in old.updated(new).results] == [("a", 3)]
    texts = record(row(mean=3)).perturbations | {"ori": "something else"}
    new = record(row(mean=3)).model_copy(update={"perturbations": texts})
    assert [(x.network, x.mean) for x in old.updated(new).results] == [("a", 3)]


def test_another_baseline_takes_the_place_of_the_old_one() -> None:
    old = record(row(mean=1), row("b", 2))
    new = record(row("c", 4), networks=(("a", "1"), ("c", "3")))
    both = old.updated(new)
    assert both.network("baseline").name == "c"
    assert [(x.network, x.mean) for x in both.results] == [("a", 1), ("c", 4)]


def test_environments_that_no_row_names_are_dropped() -> None:
    both = record(row()).updated(record(row(), environments=(THERE,)))
    assert both.environments == (THERE,)


def test_facts_of_training_outlive_a_measurement_without_them() -> None:
    old = record(row())
    known = old.networks[0].model_copy(update={"training": {"seed": 0}})
    old = old.model_copy(update={"networks": (known, *old.networks[1:])})
    assert old.updated(record(row())).network("model").training == {"seed": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"results": "unknown"}, "results"),
        ({"schema_version": 2}, "schema_version"),
        ({"extra": 1}, "extra: unknown key"),
        ({"networks": []}, "no such network"),
        ({"environments": []}, "no environment 0"),
        ({"tasks": {}}, "task 'knn' is not defined"),
        ({"perturbations": {}}, "perturbation 'ori' is not defined"),
    ],
)
def test_a_record_with_mistakes_is_refused(tmp_path: Path, change, message) -> None:
    content = json.loads(record(row()).to_json()) | change
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        Record.read(tmp_path / "results.json")


def test_a_number_stands_once_and_is_finite() -> None:
    with pytest.raises(ValueError, match="stands twice"):
        record(row(), row(mean=51))
    with pytest.raises(ValueError, match="finite"):
        row(mean=float("nan"))
    with pytest.raises(DataError, match="does not exist; write it with python -m"):
        Record.read(Path("nowhere.json"))
