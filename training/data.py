"""Data sets held in memory as bytes: Fashion-MNIST and any folder of class folders."""

import gzip
import hashlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from clever_zoo.errors import DataError
from clever_zoo.preprocess import IMAGE_SUFFIXES, crop_pixels, load_image
from training.config import DataConfig

Split = Literal["train", "test"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W) uint8 with C = 1 or 3, and their classes (N,) int64."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """SHA-256 of the images, hexadecimal: the same data gives the same."""
        return hashlib.sha256(self.images.contiguous().numpy().data).hexdigest()


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


def load_split(config: DataConfig, root: Path | None, split: Split) -> ImageSet:
    """Load one split of a recipe's data.

    Args:
        config: The recipe's data section.
        root: Folder of the data. For Fashion-MNIST None means Debian's package
            dataset-fashion-mnist; torchvision's layout is understood too.
        split: "train" or "test" (an image folder's test split may be called test or val).

    Raises:
        DataError: If the folder or a file is missing or malformed.
        ImageError: For a file in an image folder that is no image.
    """
    if config.dataset == "fashion-mnist":
        return load_fashion_mnist(root, split)
    if root is None:
        raise DataError("an image-folder data set needs its folder: pass --data DIR")
    names = ("train",) if split == "train" else ("test", "val")
    for name in names:
        if (root / name).is_dir():
            return load_image_folder(root / name, config.image_size_px)
    raise DataError(f"{root} has no folder {' or '.join(names)}; lay it out as SPLIT/CLASS/IMAGE")


def load_fashion_mnist(root: Path | None, split: Split) -> ImageSet:
    """Read Fashion-MNIST's idx files, gzipped or not; see `load_split`."""
    base = root or DEBIAN_FASHION_MNIST
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx(_find_idx(base, f"{prefix}-images-idx3-ubyte"), rank=3)
    labels = _read_idx(_find_idx(base, f"{prefix}-labels-idx1-ubyte"), rank=1)
    if len(images) != len(labels):
        raise DataError(f"{base}: {len(images)} {split} images but {len(labels)} labels")
    if labels.size and labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(f"{base}: label {labels.max()} found, but there are ten classes, 0..9")
    return ImageSet(
        torch.from_numpy(images).unsqueeze(1),
        torch.from_numpy(labels).long(),
        FASHION_MNIST_CLASSES,
    )


def _find_idx(base: Path, name: str) -> Path:
    folders = [base, base / "FashionMNIST" / "raw", base / "raw"]
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(
        f"Fashion-MNIST file {name}[.gz] not found in {', '.join(map(str, folders))}; "
        "install Debian's package dataset-fashion-mnist or pass --data DIR"
    )


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


def load_image_folder(folder: Path, size_px: int) -> ImageSet:
    """Decode CLASS/IMAGE files once, short side to `size_px` and centre-cropped.

    Raises:
        DataError: If there is no class folder or no image.
        ImageError: For a file that is no image, with its path.
    """
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DataError(f"{folder} holds no CLASS/IMAGE files ({', '.join(IMAGE_SUFFIXES)})")
    images = torch.empty(len(files), 3, size_px, size_px, dtype=torch.uint8)
    for i, (path, _) in enumerate(track(files, description=f"decode {folder}")):
        pixels = crop_pixels(load_image(path, i), size_px, size_px)
        images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
    return ImageSet(images, torch.tensor([label for _, label in files]), tuple(classes))
