"""Four data sets for transfer, in the layout of their official archives; nothing is downloaded."""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clever_zoo.errors import DataError
from clever_zoo.preprocess import load_image
from training.data.sources import Split, data_error, sha256, some


class Listing(NamedTuple):
    """The images of one split: paths relative to the data set's folder, and classes from 0."""

    names: Sequence[str]
    labels: Sequence[int]
    class_names: Sequence[str]


class ListedSource:
    """Images that a data set's own lists name."""

    def __init__(self, folder: Path, listing: Listing, where: str) -> None:
        """Check the listing; decode nothing.

        Args:
            folder: Where the names start.
            listing: What the lists say.
            where: Data set and split, for messages.

        Raises:
            DataError: If there is no image, an image is missing, or a class has none.
        """
        self.folder = folder
        self.class_names = tuple(listing.class_names)
        self.labels = torch.tensor(listing.labels, dtype=torch.int64)
        self._names = np.array([os.fsencode(name) for name in listing.names])
        sizes = [_size(folder / name) for name in listing.names]
        self._sizes = np.array(sizes, dtype=np.int64)
        if problems := self._problems(listing, sizes):
            raise data_error(where, problems)

    def _problems(self, listing: Listing, sizes: list[int]) -> list[str]:
        if not sizes:
            return ["lists no image"]
        problems = []
        counts = torch.bincount(self.labels, minlength=len(self.class_names))
        empty = [n for n, count in zip(self.class_names, counts.tolist(), strict=True) if not count]
        if empty:
            problems.append(f"{len(empty)} classes without an image: {some(empty)}")
        gone = [n for n, size in zip(listing.names, sizes, strict=True) if size < 0]
        if gone:
            problems.append(f"{len(gone)} listed images are not in {self.folder}: {some(gone)}")
        return problems

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> NDArray[np.uint8]:
        """See `ImageSource`."""
        return np.asarray(load_image(self.folder / os.fsdecode(self._names[index]), index))

    def digest(self) -> str:
        """See `ImageSource`."""
        classes = "\0".join(self.class_names).encode()
        return sha256(classes, self._names, self._sizes, self.labels.numpy())


def _size(path: Path) -> int:
    """In bytes; -1 if there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _rows(path: Path, columns: int) -> list[list[str]]:
    """The words of each line that is neither empty nor a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    wrong = [" ".join(row) for row in rows if len(row) != columns]
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} lines do not have {columns} words: {some(wrong)}; unpack the "
            "official archive again"
        )
    return rows


def _whole(text: str, path: Path) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"{path}: {text!r} stands where a whole number is expected") from error


def _zero_based(numbers: Sequence[int], count: int, path: Path) -> list[int]:
    """Class numbers 1..count as 0..count - 1."""
    if wrong := sorted({number for number in numbers if not 1 <= number <= count}):
        raise DataError(f"{path}: class {some(wrong)}; there are the classes 1 to {count}")
    return [number - 1 for number in numbers]


def _read_cub(folder: Path, split: Split) -> Listing:
    class_names = [name for _, name in _rows(folder / "classes.txt", 2)]
    images = dict(_rows(folder / "images.txt", 2))
    in_train = dict(_rows(folder / "train_test_split.txt", 2))
    labels_file = folder / "image_class_labels.txt"
    classes = dict(_rows(labels_file, 2))
    if not images.keys() == in_train.keys() == classes.keys():
        raise DataError(
            f"{folder}: images.txt, train_test_split.txt and image_class_labels.txt list "
            f"{len(images)}, {len(in_train)} and {len(classes)} images, not the same ones"
        )
    if wrong := sorted(set(in_train.values()) - {"0", "1"}):
        raise DataError(f"{folder / 'train_test_split.txt'}: {some(wrong)}; use 1 (train) or 0")
    chosen = [key for key in images if (in_train[key] == "1") == (split == "train")]
    numbers = [_whole(classes[key], labels_file) for key in chosen]
    names = [f"images/{images[key]}" for key in chosen]
    return Listing(names, _zero_based(numbers, len(class_names), labels_file), class_names)


def _read_mat(path: Path, key: str) -> NDArray[np.int64]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    unreadable = (OSError, ValueError, TypeError, NotImplementedError, zlib.error, MatReadError)
    try:
        content = loadmat(path)
    except unreadable as error:
        raise DataError(f"{path} is no MATLAB file: {error}") from error
    if key not in content:
        there = ", ".join(name for name in content if not name.startswith("__"))
        raise DataError(f"{path} holds no {key!r}; there is {there or 'nothing'}")
    return content[key].ravel().astype(np.int64)


def _read_flowers(folder: Path, split: Split) -> Listing:
    labels_file, split_file = folder / "imagelabels.mat", folder / "setid.mat"
    classes = _read_mat(labels_file, "labels")
    images = _read_mat(split_file, "trnid" if split == "train" else "tstid")
    if wrong := sorted({int(i) for i in images if not 1 <= i <= len(classes)}):
        raise DataError(f"{split_file}: image {some(wrong)}; {labels_file.name} has {len(classes)}")
    class_names = [str(i + 1) for i in range(int(classes.max(initial=0)))]
    labels = _zero_based(classes[images - 1].tolist(), len(class_names), labels_file)
    return Listing([f"jpg/image_{i:05d}.jpg" for i in images], labels, class_names)


def _read_food(folder: Path, split: Split) -> Listing:
    class_names = [name for (name,) in _rows(folder / "meta/classes.txt", 1)]
    numbers = {name: i for i, name in enumerate(class_names)}
    path = folder / f"meta/{split}.txt"
    images = [image for (image,) in _rows(path, 1)]
    classes = [image.partition("/")[0] for image in images]
    if unknown := sorted(set(classes) - set(class_names)):
        raise DataError(f"{path}: {some(unknown)} not in classes.txt")
    names = [f"images/{image}.jpg" for image in images]
    return Listing(names, [numbers[name] for name in classes], class_names)


def _read_pets(folder: Path, split: Split) -> Listing:
    files = {"train": folder / "annotations/trainval.txt", "test": folder / "annotations/test.txt"}
    rows = {key: _rows(path, 4) for key, path in files.items()}
    breeds: dict[int, str] = {}
    for key, path in files.items():
        for image, number, *_ in rows[key]:
            breed = image.rpartition("_")[0]
            known = breeds.setdefault(_whole(number, path), breed)
            if known != breed:
                raise DataError(f"{path}: class {number} is both {known} and {breed}")
    if sorted(breeds) != list(range(1, len(breeds) + 1)):
        raise DataError(f"{files['test'].parent}: classes {sorted(breeds)}, not 1, 2, ...")
    names = [f"images/{image}.jpg" for image, *_ in rows[split]]
    labels = [_whole(number, files[split]) - 1 for _, number, *_ in rows[split]]
    return Listing(names, labels, [breeds[i + 1] for i in range(len(breeds))])


@dataclass(frozen=True)
class Layout:
    """How the official archives of a data set unpack.

    Attributes:
        folder: Folder that may stand between DIR and the files, as the archive or torchvision
            makes it.
        files: Files and folders that must be there.
        archives: What to unpack where.
        read: Lists one split.
    """

    folder: str
    files: tuple[str, ...]
    archives: str
    read: Callable[[Path, Split], Listing]


LAYOUTS: dict[str, Layout] = {
    "cub-200": Layout(
        "CUB_200_2011",
        ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "images"),
        "unpack CUB_200_2011.tgz in DIR",
        _read_cub,
    ),
    "flowers-102": Layout(
        "flowers-102",
        ("imagelabels.mat", "setid.mat", "jpg"),
        "unpack 102flowers.tgz in DIR and put imagelabels.mat and setid.mat beside its folder jpg",
        _read_flowers,
    ),
    "food-101": Layout(
        "food-101",
        ("meta/classes.txt", "meta/train.txt", "meta/test.txt", "images"),
        "unpack food-101.tar.gz in DIR",
        _read_food,
    ),
    "oxford-pets": Layout(
        "oxford-iiit-pet",
        ("annotations/trainval.txt", "annotations/test.txt", "images"),
        "unpack images.tar.gz and annotations.tar.gz in DIR",
        _read_pets,
    ),
}


def open_transfer(name: str, root: Path | None, split: Split) -> ListedSource:
    """List the images of one split of a data set of `LAYOUTS`, decoding none.

    The official splits: CUB-200-2011 train_test_split.txt; Flowers-102 trnid (1,020 images) and
    tstid, its third part is not used; Food-101 train and test; Oxford-IIIT Pet trainval and test.
    Class names are those of the lists; Flowers-102 has numbers only.

    Args:
        name: "cub-200", "flowers-102", "food-101" or "oxford-pets".
        root: DIR, or its parent if the folder has the archive's or torchvision's name.
        split: "train" or "test".

    Raises:
        DataError: Listing every missing file, and how to get them; or if the lists do not fit.

    Source: the splits of the authors' downstream scripts; for CUB-200-2011 the official one,
    because theirs is not published.
    """
    layout = LAYOUTS[name]
    if root is None:
        raise DataError(f"{name} needs its folder: pass --data DIR ({layout.archives})")
    folder = _folder_with(root, layout)
    missing = [str(folder / file) for file in layout.files if not (folder / file).exists()]
    if missing:
        advice = layout.archives.replace("DIR", str(root))
        raise DataError(f"{name}: not found: {', '.join(missing)}; {advice}")
    return ListedSource(folder, layout.read(folder, split), f"{name}, split {split}")


def _folder_with(root: Path, layout: Layout) -> Path:
    """DIR or the folder in it, whichever holds more of the files."""
    folders = (root, root / layout.folder)
    return max(folders, key=lambda folder: sum((folder / file).exists() for file in layout.files))
