"""Where images come from: each source lists its images once and reads any of them by index."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clever_zoo.errors import BackendMissingError, DataError
from clever_zoo.preprocess import IMAGE_SUFFIXES, decode_image, load_image

Split = Literal["train", "test"]

CACHE = "cache"  # folder of decoded images in that of a data set
LISTED = 10  # names shown in a message before "and N more"
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class ImageSource(Protocol):
    """N images that are read by index, from any process."""

    @property
    def labels(self) -> Tensor:
        """Classes (N,) int64."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> NDArray[np.uint8]:
        """One upright image, (H, W, 3) RGB.

        Raises:
            ImageError: If it is gone or cannot be decoded.
        """
        ...

    def digest(self) -> str:
        """SHA-256 of the listing (names, sizes, classes), hexadecimal; reads no image."""
        ...


def data_error(where: object, problems: Sequence[str]) -> DataError:
    """One error for all problems of a data set; long lists are cut."""
    lines = "".join(f"\n  - {problem}" for problem in problems[: 2 * LISTED])
    rest = f"\n  and {len(problems) - 2 * LISTED} more" if len(problems) > 2 * LISTED else ""
    return DataError(f"{where}: {len(problems)} problem(s){lines}{rest}")


def some(names: Sequence[object]) -> str:
    """The first names of a list and how many more there are."""
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(str, names[:LISTED])) + rest


def sha256(*parts: bytes | NDArray[Any]) -> str:
    """SHA-256 of a sequence of byte strings and arrays, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else part.tobytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


class FolderSource:
    """ROOT/SPLIT/CLASS/IMAGE files; below a class folder, folders may go deeper."""

    def __init__(self, root: Path, split: Split) -> None:
        """List the images.

        Raises:
            DataError: If the split's folder, a class folder or a class's images are missing.
        """
        self.folder = _split_folder(root, split)
        self.class_names = _class_folders(self.folder)
        files = [
            sorted(_image_files(str(self.folder / name)), key=_by_parts)
            for name in self.class_names
        ]
        if problems := self._problems(root, [len(found) for found in files]):
            raise data_error(self.folder, problems)
        prefix = len(str(self.folder)) + 1
        # Arrays of bytes, because workers that touch a million Python strings would copy them all.
        self._names = np.array([os.fsencode(path[prefix:]) for found in files for path, _ in found])
        self._sizes = np.array([size for found in files for _, size in found])
        counts = torch.tensor([len(found) for found in files])
        self.labels = torch.arange(len(files)).repeat_interleave(counts)

    def _problems(self, root: Path, counts: list[int]) -> list[str]:
        if not any(counts):
            loose = sum(1 for _ in _image_files(str(self.folder)))
            hint = f"; {loose} images lie outside class folders" if loose else ""
            return [f"holds no CLASS/IMAGE files ({', '.join(IMAGE_SUFFIXES)}){hint}"]
        problems = []
        empty = [n for n, count in zip(self.class_names, counts, strict=True) if not count]
        if empty:
            problems.append(f"{len(empty)} class folders without an image: {some(empty)}")
        if self.folder.name != "train" and (root / "train").is_dir():
            train = set(_class_folders(root / "train"))
            if missing := sorted(train - set(self.class_names)):
                problems.append(f"{len(missing)} classes of train are missing: {some(missing)}")
            if extra := sorted(set(self.class_names) - train):
                problems.append(f"{len(extra)} classes are not in train: {some(extra)}")
        return problems

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> NDArray[np.uint8]:
        """See `ImageSource`."""
        return _pixels(load_image(self.folder / os.fsdecode(self._names[index]), index))

    def digest(self) -> str:
        """See `ImageSource`."""
        return sha256("\0".join(self.class_names).encode(), self._names, self._sizes)


def _by_parts(file: tuple[str, int]) -> str:
    return file[0].replace(os.sep, "\0")


def _split_folder(root: Path, split: Split) -> Path:
    names = ("train",) if split == "train" else ("test", "val")
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root} has no folder {' or '.join(names)}; lay it out as SPLIT/CLASS/IMAGE")


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))


def _image_files(folder: str) -> Iterator[tuple[str, int]]:
    """Path and size in bytes of the images below a folder; size -1 for a dead link."""
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _image_files(entry.path)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            try:
                size = entry.stat().st_size
            except FileNotFoundError:
                size = -1  # read() will say so, and it counts as an unreadable image
            yield entry.path, size


class HuggingFaceSource:
    """One split of a data set of the `datasets` library, from the Hub or a folder."""

    def __init__(
        self, name: str, config: str | None, split: str, image_column: str, label_column: str
    ) -> None:
        """Open the split and check its columns.

        Args:
            name: org/name on the Hub, or the path of a folder (with a leading /, ./ or ../) that
                `save_to_disk` wrote or that holds Parquet files.
            config: The data set's configuration, None for its only one.
            split: Name of the split, such as train or validation.
            image_column, label_column: An Image column, and one of ClassLabel or integers.

        Raises:
            DataError: If it cannot be opened or a column does not fit; lists all problems.
            BackendMissingError: If `datasets` is not installed.
        """
        try:
            import datasets
        except ImportError as error:
            raise BackendMissingError(
                'this data set needs the package datasets: pip install "clever-zoo[train]"'
            ) from error
        dataset = _open_dataset(name, config, split)
        where = f"{name}, split {split}"
        features, problems = dataset.features, []
        there = ", ".join(f"{column} ({kind})" for column, kind in features.items())
        for key, column in (("image_column", image_column), ("label_column", label_column)):
            if column not in features:
                problems.append(f"{key} is {column!r}, which is not there; columns: {there}")
        image, label = features.get(image_column), features.get(label_column)
        if image is not None and not isinstance(image, datasets.Image):
            problems.append(f"column {image_column!r} is {image}; cast it to datasets.Image()")
        is_class = isinstance(label, datasets.ClassLabel)
        if label is not None and not is_class and "int" not in str(getattr(label, "dtype", "")):
            problems.append(f"column {label_column!r} is {label}; use ClassLabel or integers")
        if not len(dataset):
            problems.append("holds no images")
        if problems:
            raise data_error(where, problems)
        self._where, self._column = where, image_column
        self._images = dataset.select_columns([image_column]).cast_column(
            image_column, datasets.Image(decode=False)
        )
        self.labels = _labels(dataset.data.column(label_column).to_pylist(), where)
        names = label.names if is_class else range(int(self.labels.max()) + 1)
        self.class_names = tuple(map(str, names))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> NDArray[np.uint8]:
        """See `ImageSource`."""
        image = self._images[index][self._column] or {"bytes": b"", "path": None}
        if image["bytes"] is None:
            return _pixels(load_image(image["path"], index))
        name = f"{self._where}, row {index}"
        return _pixels(decode_image(image["bytes"], name, index))

    def digest(self) -> str:
        """See `ImageSource`."""
        import pyarrow.compute as pc

        images = self._images.with_format("arrow")[:][self._column]
        sizes = pc.binary_length(pc.struct_field(images, "bytes")).fill_null(-1).to_numpy()
        paths = pc.struct_field(images, "path").to_pylist()
        names = "\0".join(Path(path).name if path else "" for path in paths)
        classes = "\0".join(self.class_names)
        return sha256(classes.encode(), names.encode(), sizes, self.labels.numpy())


def _open_dataset(name: str, config: str | None, split: str) -> Any:
    import datasets

    is_folder = name.startswith((".", "/", "~"))
    if not is_folder and not _HUB_ID.fullmatch(name):
        raise DataError(f"data.hf_name is {name!r}; write org/name, or ./{name} for a folder")
    if not is_folder and Path(name).exists():
        raise DataError(
            f"data.hf_name is {name!r}, which could be a data set of the Hub or the folder of that "
            f"name; for the folder write ./{name}, for the Hub run from another folder"
        )
    folder = Path(name).expanduser()
    try:
        if is_folder and (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(folder)
            if split in splits:
                return splits[split]
            raise DataError(f"{name} has no split {split!r}; there are {', '.join(splits)}")
        if is_folder and (folder / "state.json").is_file():
            if split == "train":
                return datasets.load_from_disk(folder)
            raise DataError(
                f"{name} was saved without splits, so it counts as train; for {split!r} save a "
                "datasets.DatasetDict"
            )
        return datasets.load_dataset(str(folder), config, split=split)
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}, split {split}, cannot be opened: {error}") from error


def _labels(values: list[int | None], where: str) -> Tensor:
    unlabelled = [i for i, value in enumerate(values) if value is None or value < 0]
    if unlabelled:
        raise DataError(
            f"{where}: {len(unlabelled)} of {len(values)} images have no class (rows "
            f"{some(unlabelled)}); choose a labelled split (data.hf_train_split, hf_test_split)"
        )
    return torch.tensor(values, dtype=torch.int64)


FAKE_CLASSES = 10


@dataclass(frozen=True)
class FakeSource:
    """Random pictures for smoke runs: smooth coloured blobs with grain, ten classes of hue.

    Every picture is a function of (split, index) and `size_px` alone; its short side is
    `size_px`, its long side up to half longer.
    """

    count: int
    size_px: int
    split: Split

    class_names = tuple(f"hue-{i}" for i in range(FAKE_CLASSES))

    @property
    def labels(self) -> Tensor:
        """Classes (N,) int64, taking turns."""
        return torch.arange(self.count) % FAKE_CLASSES

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> NDArray[np.uint8]:
        """See `ImageSource`."""
        rng = np.random.default_rng([self.split == "test", index])
        blobs = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        blobs[..., 0] = 255 * (index % FAKE_CLASSES) // FAKE_CLASSES
        size = (int(self.size_px * rng.uniform(1, 1.5)), self.size_px)
        hsv = Image.fromarray(blobs).resize(
            size if index % 2 else size[::-1], Image.Resampling.BICUBIC
        )
        pixels = np.asarray(Image.merge("HSV", hsv.split()).convert("RGB")).astype(np.int16)
        grain = rng.integers(-8, 9, pixels.shape, dtype=np.int16)
        return (pixels + grain).clip(0, 255).astype(np.uint8)

    def digest(self) -> str:
        """See `ImageSource`."""
        return sha256(f"fake {self.count} {self.size_px} {self.split}".encode())


@dataclass(frozen=True)
class First:
    """The first `count` images of a source."""

    source: ImageSource
    count: int

    @property
    def labels(self) -> Tensor:
        """Classes (count,) int64."""
        return self.source.labels[: self.count]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the whole source."""
        return self.source.class_names

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def read(self, index: int) -> NDArray[np.uint8]:
        """See `ImageSource`."""
        return self.source.read(index)

    def digest(self) -> str:
        """See `ImageSource`."""
        return sha256(self.source.digest().encode(), str(len(self)).encode())
