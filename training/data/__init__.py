"""The data of a run: where images come from, how they are kept, what training reads.

`load_train_images` is for training, `load_split` for evaluation.
"""

from pathlib import Path

import torch

from clever_zoo.errors import DataError
from training.config import DataConfig
from training.data.fashion_mnist import DEBIAN_FASHION_MNIST, load_fashion_mnist
from training.data.images import Batch, ImageSet, StreamedImages, TrainImages, cached
from training.data.shards import ShardSource, find_shards
from training.data.sources import (
    CACHE,
    FakeSource,
    First,
    FolderSource,
    HuggingFaceSource,
    ImageSource,
    Split,
    data_error,
    some,
)
from training.data.transfer import LAYOUTS, open_transfer

__all__ = [
    "DEBIAN_FASHION_MNIST",
    "Batch",
    "ImageSet",
    "ImageSource",
    "Split",
    "StreamedImages",
    "TrainImages",
    "cached",
    "check_classes",
    "list_images",
    "load_fashion_mnist",
    "load_split",
    "load_train_images",
    "open_source",
]


def load_split(
    config: DataConfig, root: Path | None, split: Split, *, cache_folder: Path | None = None
) -> ImageSet:
    """Load one split of a recipe's data whole, as evaluation needs it.

    Args:
        config: The recipe's data section. With cache = "disk" the images are mapped from a file,
            otherwise they are held in memory.
        root: Folder of the data; relative names in `config` start there. For Fashion-MNIST None
            means Debian's package dataset-fashion-mnist; torchvision's layout is understood too.
        split: "train" or "test" (an image folder's test split may be called test or val).
        cache_folder: Where decoded images and fetched shards are kept; None is ROOT/cache.

    Raises:
        DataError: If the data are missing or malformed, if a test image cannot be read, or more
            than `config.max_bad_images` of the training images cannot.
        BackendMissingError: If the package that reads this data set is not installed.
    """
    if config.dataset == "fashion-mnist":
        return load_fashion_mnist(root, split)
    source = open_source(config, root, split, cache_folder=cache_folder)
    folder = _decoded_folder(config, root, cache_folder)
    return cached(
        source,
        config.image_size_px,
        folder and folder / split,
        max_bad=config.max_bad_images if split == "train" else 0,
        description=f"decode {split}",
    )


def load_train_images(
    config: DataConfig,
    root: Path | None,
    *,
    at_least: int = 1,
    limit: int | None = None,
    cache_folder: Path | None = None,
) -> TrainImages:
    """Open the training split of a recipe's data, as its `cache` says.

    Args:
        config, root, cache_folder: See `load_split`.
        at_least: Images that are needed, such as the batch size.
        limit: Take the first so many images only, for a trial.

    Raises:
        DataError: If the data are missing or malformed, if there are too few images, or if more
            than `config.max_bad_images` cannot be read.
        BackendMissingError: If the package that reads this data set is not installed.
    """
    if config.dataset == "fashion-mnist":
        data = load_fashion_mnist(root, "train")
        images = ImageSet(data.images[:limit], data.labels[:limit], data.class_names)
        _check_count(len(images), at_least)
        return TrainImages(images)
    source, name = open_source(config, root, "train", cache_folder=cache_folder), "train"
    if limit is not None:
        source, name = First(source, limit), f"train-first-{limit}"
    _check_count(len(source), at_least)
    if config.cache == "stream":
        return TrainImages(
            StreamedImages(source, config.image_size_px, max_bad=config.max_bad_images)
        )
    folder = _decoded_folder(config, root, cache_folder)
    return TrainImages(
        cached(
            source,
            config.image_size_px,
            folder and folder / name,
            max_bad=config.max_bad_images,
            description="decode train",
        )
    )


def list_images(
    config: DataConfig, root: Path | None, split: Split, cache_folder: Path | None = None
) -> ImageSet | ImageSource:
    """The images of a split, not decoded where that can be avoided; see `load_split`."""
    if config.dataset == "fashion-mnist":
        return load_split(config, root, split)
    return open_source(config, root, split, cache_folder=cache_folder)


def check_classes(train: ImageSet | ImageSource, test: ImageSet | ImageSource) -> None:
    """Refuse data on which an accuracy would mean nothing.

    Raises:
        DataError: For a class that has no image in one of the splits, other classes in test
            than in train, fewer than two classes or two training images; lists all.
    """
    names = train.class_names
    problems = []
    if only := [name for name in names if name not in test.class_names]:
        problems.append(f"{len(only)} classes of train are not in test: {some(only)}")
    if only := [name for name in test.class_names if name not in names]:
        problems.append(f"{len(only)} classes of test are not in train: {some(only)}")
    if not problems and names != test.class_names:
        problems.append("train and test number their classes differently")
    if len(names) < 2:
        problems.append(f"{len(names)} class ({some(names)}); a classifier needs at least 2")
    if len(train) < 2:
        problems.append(f"{len(train)} training image; at least 2 are needed")
    for split, images in (("train", train), ("test", test)):
        counts = torch.bincount(images.labels, minlength=len(images.class_names)).tolist()
        empty = [n for n, c in zip(images.class_names, counts, strict=True) if not c]
        if empty:
            problems.append(f"{len(empty)} classes without an image in {split}: {some(empty)}")
    if problems:
        raise data_error("the data set cannot be used", problems)


def open_source(
    config: DataConfig, root: Path | None, split: Split, *, cache_folder: Path | None = None
) -> ImageSource:
    """List the images of one split, decoding none; for all data sets but Fashion-MNIST.

    Args:
        config, root, split, cache_folder: See `load_split`.

    Raises:
        DataError: If the data are missing or malformed.
        BackendMissingError: If the package that reads this data set is not installed.
    """
    match config.dataset:
        case "image-folder":
            if root is None:
                raise DataError("an image-folder data set needs its folder: pass --data DIR")
            return FolderSource(root, split)
        case "huggingface":
            name = config.hf_name or ""
            if root is not None and name.startswith("."):
                name = str((root / name).resolve())
            return HuggingFaceSource(
                name,
                config.hf_config,
                config.hf_train_split if split == "train" else config.hf_test_split,
                config.image_column,
                config.label_column,
            )
        case "webdataset":
            pattern = config.shards if split == "train" else config.test_shards
            if pattern is None:
                raise DataError("there is no test split: set data.test_shards in the recipe")
            return ShardSource(find_shards(pattern, root, _cache_folder(root, cache_folder)))
        case name if name in LAYOUTS:
            return open_transfer(name, root, split)
        case "fake":
            return FakeSource(config.fake_images, config.image_size_px, split)
        case _:
            raise DataError(f"{config.dataset!r} has no source; use load_split")


def _cache_folder(root: Path | None, cache_folder: Path | None) -> Path | None:
    return cache_folder or (root and root / CACHE)


def _decoded_folder(
    config: DataConfig, root: Path | None, cache_folder: Path | None
) -> Path | None:
    """Where decoded images are kept: a folder, or None for memory."""
    if config.cache != "disk":
        return None
    folder = _cache_folder(root, cache_folder)
    if folder is None:
        raise DataError('data.cache = "disk" writes decoded images to DIR/cache: pass --data DIR')
    return folder / config.dataset


def _check_count(count: int, at_least: int) -> None:
    if count < at_least:
        raise DataError(
            f"{count} training images, but {at_least} are needed to fill a batch; add images or "
            "lower batch_size"
        )
