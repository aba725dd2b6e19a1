"""The transfer data sets on small folders in their official layouts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from clever_zoo.errors import DataError
from clever_zoo.preprocess import crop_pixels
from training.config import DataConfig
from training.data import load_split, load_train_images, open_source
from training.data.transfer import LAYOUTS

SIZE = 16
# Data set -> class names, train images, test images, both as (path, class) in the lists' order.
EXPECTED = {
    "cub-200": (
        ("001.Albatross", "002.Wren"),
        [("images/001.Albatross/a1.jpg", 0), ("images/002.Wren/w2.jpg", 1)],
        [("images/001.Albatross/a2.jpg", 0), ("images/002.Wren/w1.jpg", 1)],
    ),
    "flowers-102": (
        ("1", "2"),
        [("jpg/image_00003.jpg", 1), ("jpg/image_00001.jpg", 0)],
        [("jpg/image_00002.jpg", 0), ("jpg/image_00006.jpg", 1), ("jpg/image_00004.jpg", 1)],
    ),
    "food-101": (
        ("apple_pie", "sushi"),
        [("images/apple_pie/10.jpg", 0), ("images/sushi/20.jpg", 1), ("images/sushi/21.jpg", 1)],
        [("images/sushi/22.jpg", 1), ("images/apple_pie/11.jpg", 0)],
    ),
    "oxford-pets": (
        ("Abyssinian", "american_bulldog"),
        [("images/Abyssinian_100.jpg", 0), ("images/american_bulldog_7.jpg", 1)],
        [("images/american_bulldog_8.jpg", 1), ("images/Abyssinian_2.jpg", 0)],
    ),
}


def write_image(path: Path) -> None:
    """A picture that is a function of its name; one of them is grey, as some of CUB's are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    shape = (20, 30) if path.stem in ("w2", "10") else (24, 20, 3)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path, quality=95)


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_data_set(name: str, folder: Path) -> Path:
    _, train, test = EXPECTED[name]
    for path, _ in train + test:
        write_image(folder / path)
    if name == "cub-200":
        paths = [path.removeprefix("images/") for path, _ in (train[0], test[0], test[1], train[1])]
        write_lines(folder / "classes.txt", "1 001.Albatross", "2 002.Wren")
        write_lines(folder / "images.txt", *(f"{i} {p}" for i, p in enumerate(paths, 1)))
        write_lines(folder / "image_class_labels.txt", "1 1", "2 1", "3 2", "4 2")
        write_lines(folder / "train_test_split.txt", "1 1", "2 0", "3 0", "4 1")
    elif name == "flowers-102":
        write_image(folder / "jpg/image_00005.jpg")
        savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 1, 2, 2, 1, 2]], np.uint8)})
        split = {"trnid": [[3, 1]], "valid": [[5]], "tstid": [[2, 6, 4]]}
        savemat(folder / "setid.mat", {k: np.array(v, np.uint16) for k, v in split.items()})
    elif name == "food-101":
        write_lines(folder / "meta/classes.txt", "apple_pie", "sushi")
        write_lines(folder / "meta/train.txt", "apple_pie/10", "sushi/20", "sushi/21")
        write_lines(folder / "meta/test.txt", "sushi/22", "apple_pie/11")
    else:
        trainval = ("Abyssinian_100 1 1 1", "american_bulldog_7 2 2 1")
        test_lines = ("#Image CLASS-ID SPECIES BREED ID", "american_bulldog_8 2 2 1")
        write_lines(folder / "annotations/trainval.txt", *trainval)
        write_lines(folder / "annotations/test.txt", *test_lines, "Abyssinian_2 1 1 1")
    return folder


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("transfer")
    return {name: write_data_set(name, base / name / LAYOUTS[name].folder) for name in LAYOUTS}


@pytest.fixture
def copy_of(data_sets, tmp_path):
    """A copy of one data set that a test may damage."""
    return lambda name: Path(shutil.copytree(data_sets[name], tmp_path / "copy"))


def config(name: str, **changes) -> DataConfig:
    return DataConfig(dataset=name, image_size_px=SIZE, **changes)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_images_and_classes_are_those_of_the_lists(data_sets, name: str, split: str) -> None:
    class_names, train, test = EXPECTED[name]
    listed = train if split == "train" else test
    folder = data_sets[name]
    for root in (folder, folder.parent):
        data = load_split(config(name), root, split)
        assert data.class_names == class_names
        assert data.labels.tolist() == [label for _, label in listed]
        for image, (path, _) in zip(data.images, listed, strict=True):
            with Image.open(folder / path) as opened:
                square = crop_pixels(opened.convert("RGB"), SIZE, SIZE)
            assert torch.equal(image, torch.from_numpy(square).permute(2, 0, 1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_cache_gives_the_same(data_sets, name: str, tmp_path) -> None:
    images = [
        load_train_images(config(name, cache=cache), data_sets[name], cache_folder=tmp_path)
        for cache in ("memory", "disk", "stream")
    ]
    batches = [data.__getitems__(range(len(data))).images for data in images]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])
    assert images[1].digest() == images[2].digest()


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_missing_files_are_listed_with_the_archive(name: str, tmp_path) -> None:
    with pytest.raises(DataError) as caught:
        open_source(config(name), tmp_path, "train")
    message = str(caught.value)
    assert all(file in message for file in LAYOUTS[name].files)
    assert f"in {tmp_path}" in message
    with pytest.raises(DataError, match="--data DIR"):
        open_source(config(name), None, "train")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_list_is_named(copy_of, name: str) -> None:
    folder = copy_of(name)
    (folder / LAYOUTS[name].files[0]).unlink()
    with pytest.raises(DataError, match=LAYOUTS[name].files[0]):
        open_source(config(name), folder, "test")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_image_is_named(copy_of, name: str) -> None:
    folder = copy_of(name)
    path, _ = EXPECTED[name][1][0]
    (folder / path).unlink()
    with pytest.raises(DataError, match=path):
        open_source(config(name), folder, "train")
    assert len(open_source(config(name), folder, "test"))


DAMAGES = {
    "class without image": ("cub-200", "classes.txt", "1 001.Albatross\n2 002.Wren\n3 003.Owl\n"),
    "class number": ("cub-200", "image_class_labels.txt", "1 1\n2 1\n3 2\n4 9\n"),
    "no number": ("cub-200", "image_class_labels.txt", "1 1\n2 1\n3 2\n4 x\n"),
    "other images": ("cub-200", "image_class_labels.txt", "1 1\n2 1\n3 2\n"),
    "split value": ("cub-200", "train_test_split.txt", "1 1\n2 0\n3 0\n4 2\n"),
    "words": ("cub-200", "images.txt", "1 a b c\n"),
    "empty": ("food-101", "meta/train.txt", "\n"),
    "unknown class": ("food-101", "meta/train.txt", "pizza/1\n"),
    "two breeds": ("oxford-pets", "annotations/test.txt", "Abyssinian_2 2 1 1\n"),
    "gap": ("oxford-pets", "annotations/test.txt", "beagle_2 4 1 1\n"),
    "only in test": ("oxford-pets", "annotations/test.txt", "beagle_2 3 1 1\n"),
    "no mat file": ("flowers-102", "setid.mat", "hello"),
}
MESSAGES = {
    "class without image": r"1 classes without an image: 003\.Owl",
    "class number": "class 9; there are the classes 1 to 2",
    "no number": "'x' stands where a whole number",
    "other images": "not the same ones",
    "split value": r"use 1 \(train\) or 0",
    "words": "do not have 2 words: 1 a b c",
    "empty": "lists no image",
    "unknown class": "pizza not in classes.txt",
    "two breeds": "class 2 is both american_bulldog and Abyssinian",
    "gap": r"\[1, 2, 4\]",
    "only in test": "1 classes without an image: beagle",
    "no mat file": "is no MATLAB file",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_lists_are_named(copy_of, damage: str) -> None:
    name, file, content = DAMAGES[damage]
    folder = copy_of(name)
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=MESSAGES[damage]):
        open_source(config(name), folder, "train")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("setid.mat", {"tstid": [[1]]}, "holds no 'trnid'; there is tstid"),
        ("setid.mat", {"trnid": [[1, 7]]}, r"image 7; imagelabels\.mat has 6"),
        ("imagelabels.mat", {"labels": [[0, 1, 2, 2, 1, 2]]}, "class 0; there are the classes 1"),
    ],
)
def test_wrong_numbers_of_flowers_are_named(copy_of, file, content, message) -> None:
    folder = copy_of("flowers-102")
    savemat(folder / file, content)
    with pytest.raises(DataError, match=message):
        open_source(config("flowers-102"), folder, "train")


def test_digests_tell_listings_apart(copy_of, data_sets) -> None:
    def digest(folder: Path) -> str:
        return open_source(config("food-101"), folder, "train").digest()

    before = digest(data_sets["food-101"])
    folder = copy_of("food-101")
    assert digest(folder) == before
    write_lines(folder / "meta/train.txt", "apple_pie/10", "sushi/20")
    assert digest(folder) != before
