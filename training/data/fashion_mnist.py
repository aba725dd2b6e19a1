"""Fashion-MNIST from its idx files."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clever_zoo.errors import DataError
from training.data.images import ImageSet
from training.data.sources import Split

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_fashion_mnist(root: Path | None, split: Split) -> ImageSet:
    """Read Fashion-MNIST's idx files, gzipped or not.

    Args:
        root: Folder of the files, or one in torchvision's layout; None means Debian's package
            dataset-fashion-mnist.
        split: "train" or "test".

    Returns:
        Images (N, 1, 28, 28).

    Raises:
        DataError: If a file is missing or malformed; lists all that are missing.
    """
    base = root or DEBIAN_FASHION_MNIST
    prefix = "train" if split == "train" else "t10k"
    names = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    paths = [path for name in names if (path := _find_idx(base, name))]
    if missing := [f"{name}[.gz]" for name in names if not _find_idx(base, name)]:
        raise DataError(
            f"Fashion-MNIST file {' and '.join(missing)} not found in "
            f"{', '.join(map(str, _folders(base)))}; install Debian's package "
            "dataset-fashion-mnist or pass --data DIR"
        )
    images, labels = (_read_idx(path, rank) for path, rank in zip(paths, (3, 1), strict=True))
    if len(images) != len(labels):
        raise DataError(f"{base}: {len(images)} {split} images but {len(labels)} labels")
    if labels.size and labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(f"{base}: label {labels.max()} found, but there are ten classes, 0..9")
    return ImageSet(
        torch.from_numpy(images).unsqueeze(1),
        torch.from_numpy(labels).long(),
        FASHION_MNIST_CLASSES,
    )


def _folders(base: Path) -> list[Path]:
    return [base, base / "FashionMNIST" / "raw", base / "raw"]


def _find_idx(base: Path, name: str) -> Path | None:
    for folder in _folders(base):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def _read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    header = 4 + 4 * rank
    if raw[:4] != bytes([0, 0, 8, rank]) or len(raw) < header:
        raise DataError(f"{path} is no idx file of {rank}-dimensional bytes (starts {raw[:4]!r})")
    shape = struct.unpack(f">{rank}I", raw[4:header])
    expected = int(np.prod(shape))
    if len(raw) - header != expected:
        raise DataError(f"{path} holds {len(raw) - header} bytes, its header says {expected}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape).copy()
