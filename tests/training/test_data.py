import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clever_zoo.errors import DataError
from clever_zoo.samples import sample_paths
from training.config import DataConfig
from training.data import DEBIAN_FASHION_MNIST, load_fashion_mnist, load_split

FASHION = DataConfig(dataset="fashion-mnist")
FOLDER = DataConfig(dataset="image-folder", image_size_px=16)


def test_debians_layout(fashion_mnist_folder: Path) -> None:
    data = load_split(FASHION, fashion_mnist_folder, "train")
    assert data.images.shape == (300, 1, 28, 28)
    assert np.bincount(data.labels).tolist() == [30] * 10
    assert len(data.class_names) == 10


@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "raw"])
def test_torchvisions_layout(fashion_mnist_folder: Path, tmp_path: Path, folder: str) -> None:
    """Uncompressed files in torchvision's folders, read by torchvision and by us."""
    from torchvision.datasets import FashionMNIST

    (tmp_path / folder).mkdir(parents=True)
    for path in fashion_mnist_folder.glob("*.gz"):
        (tmp_path / folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    ours = load_fashion_mnist(tmp_path, "test")
    if folder.startswith("FashionMNIST"):
        theirs = FashionMNIST(tmp_path, train=False)
        assert np.array_equal(ours.images[:, 0], theirs.data)
        assert np.array_equal(ours.labels, theirs.targets)
        assert list(ours.class_names) == theirs.classes
    assert len(ours) == 300


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (lambda raw: raw[:-5], "header says"),
        (lambda raw: b"\x00\x00\x08\x01" + raw[4:], "no idx file"),
        (lambda raw: raw[:6], "no idx file"),
    ],
)
def test_damaged_files_are_data_errors(fashion_mnist_folder, tmp_path, damage, hint) -> None:
    for path in fashion_mnist_folder.iterdir():
        shutil.copy(path, tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(DataError, match=hint):
        load_fashion_mnist(tmp_path, "train")


def test_a_flipped_byte_in_a_gzip_file_is_a_data_error(fashion_mnist_folder, tmp_path) -> None:
    for path in fashion_mnist_folder.iterdir():
        shutil.copy(path, tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for position in (40, 5000, 20_000):
        content = bytearray((fashion_mnist_folder / path.name).read_bytes())
        content[position] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            load_fashion_mnist(tmp_path, "train")


def test_a_torn_gzip_file_is_a_data_error(fashion_mnist_folder: Path, tmp_path: Path) -> None:
    for path in fashion_mnist_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read"):
        load_fashion_mnist(tmp_path, "train")


def test_missing_data_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        load_split(FASHION, tmp_path, "train")
    with pytest.raises(DataError, match="--data DIR"):
        load_split(FOLDER, None, "train")
    with pytest.raises(DataError, match="SPLIT/CLASS/IMAGE"):
        load_split(FOLDER, tmp_path, "train")


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t10k-images\S+ and t10k-labels"):
        load_fashion_mnist(tmp_path, "test")


def test_image_folders(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("bag", "coat"):
            (tmp_path / split / name).mkdir(parents=True)
            for path in sample_paths()[:count]:
                shutil.copy(path, tmp_path / split / name)
    train, test = (load_split(FOLDER, tmp_path, split) for split in ("train", "test"))
    assert train.images.shape == (6, 3, 16, 16)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.images.shape == (4, 3, 16, 16)
    assert train.class_names == ("bag", "coat")
    (tmp_path / "val/bag/broken.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"broken\.png: cannot be read"):
        load_split(FOLDER, tmp_path, "test")
    for path in (tmp_path / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="no CLASS/IMAGE files"):
        load_split(FOLDER, tmp_path, "test")


@pytest.mark.data
def test_the_bundled_pictures_are_the_test_images_of_their_names() -> None:
    data = load_fashion_mnist(DEBIAN_FASHION_MNIST, "test")
    for path in sample_paths():
        name, _, index = path.stem.rpartition("-")
        assert np.array_equal(np.asarray(Image.open(path)), data.images[int(index), 0])
        slug = data.class_names[data.labels[int(index)]].lower()
        assert slug.replace("/", "-").replace(" ", "-") == name


@pytest.mark.data
def test_the_whole_data_set() -> None:
    for split, count in (("train", 60_000), ("test", 10_000)):
        data = load_fashion_mnist(None, split)
        assert data.images.shape == (count, 1, 28, 28)
        assert np.bincount(data.labels).tolist() == [count // 10] * 10
