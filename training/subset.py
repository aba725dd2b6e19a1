"""Which training images a semi-supervised evaluation may use: a list made by seed, in a file."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clever_zoo.errors import DataError
from clever_zoo.files import write_atomic

SUBSET = "subset.txt"  # name in the folder of a run
_HEADER = re.compile(r"# seed (\d+), fraction (\S+), data ([0-9a-f]{64})")


class Subset(NamedTuple):
    """Some images of a data set.

    Attributes:
        indices: Their places in the training split, (n,) ascending.
        seed, fraction: What they were drawn with.
        data_digest: Names the data set they belong to.
    """

    indices: NDArray[np.int64]
    seed: int
    fraction: float
    data_digest: str


def draw_subset(labels: Tensor, fraction: float, seed: int, data_digest: str) -> Subset:
    """A share of every class: round(fraction * images of the class), at least one.

    With one seed a smaller fraction gives a part of what a larger one does.

    Args:
        labels: Classes (N,).
        fraction: In (0, 1].
        seed: With the class, the key of the draw.
        data_digest: Names the data set.
    """
    classes = labels.numpy()
    chosen = []
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        count = max(1, round(fraction * len(members)))
        chosen.append(np.random.default_rng([seed, label]).permutation(members)[:count])
    return Subset(np.sort(np.concatenate(chosen)), seed, fraction, data_digest)


def write_subset(path: Path, subset: Subset, labels: Tensor, class_names: tuple[str, ...]) -> None:
    """A header with seed, fraction and data digest; then a line per image: index, tab, class."""
    lines = [f"# seed {subset.seed}, fraction {subset.fraction!r}, data {subset.data_digest}"]
    classes = labels[subset.indices].tolist()
    rows = zip(subset.indices.tolist(), classes, strict=True)
    lines += [f"{index}\t{class_names[label]}" for index, label in rows]
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())


def read_subset(
    path: Path, labels: Tensor, class_names: tuple[str, ...], data_digest: str
) -> Subset:
    """Read what `write_subset` wrote, for the same data set.

    Raises:
        DataError: If it cannot be read, belongs to other data, or a line does not fit.
    """
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    facts = _HEADER.fullmatch(header)
    if facts is None:
        raise DataError(
            f"{path} begins with {header!r}; a subset file begins with '# seed S, fraction F, "
            "data DIGEST', as training.finetune writes it"
        )
    if facts[3] != data_digest:
        raise DataError(
            f"{path} was made for data {facts[3][:12]}..., these are {data_digest[:12]}...; "
            "pass the data set it was made for, or leave it out to draw a new one"
        )
    indices = [_index(line, path, labels, class_names) for line in lines]
    if not indices or len(set(indices)) < len(indices):
        raise DataError(f"{path} lists {len(indices)} images; list some, each once")
    return Subset(np.array(sorted(indices)), int(facts[1]), float(facts[2]), facts[3])


def _index(line: str, path: Path, labels: Tensor, class_names: tuple[str, ...]) -> int:
    index, _, name = line.partition("\t")
    if not index.isdecimal() or int(index) >= len(labels):
        raise DataError(f"{path}: {line!r}; write INDEX<tab>CLASS with 0 <= INDEX < {len(labels)}")
    if class_names[int(labels[int(index)])] != name:
        there = class_names[int(labels[int(index)])]
        raise DataError(f"{path}: image {index} is listed as {name!r}, but its class is {there!r}")
    return int(index)
