"""Data sets of the `datasets` library, opened offline from folders."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clever_zoo.errors import DataError
from clever_zoo.preprocess import crop_pixels, load_image
from clever_zoo.samples import sample_paths
from training.config import DataConfig
from training.data import load_split, load_train_images

PATHS = sample_paths()[::30]
SIZE = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """saved/ by save_to_disk (train, test), alone/ without splits, parquet/ with a train split."""
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("hf")
    import datasets

    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    labels = datasets.ClassLabel(names=[f"class {i}" for i in range(5)])
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in PATHS],
        "label": [0, 1, 2, 3, 4] * 2,
        "number": [7] * 10,
        "score": [0.5] * 10,
        "unlabelled": [-1] * 10,
    }
    train = datasets.Dataset.from_dict(columns)
    train = train.cast_column("image", datasets.Image()).cast_column("label", labels)
    test = train.select(range(5))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(root / "saved")
    train.save_to_disk(root / "alone")
    (root / "parquet").mkdir()
    train.to_parquet(root / "parquet" / "train-00000-of-00001.parquet")
    yield root
    patch.undo()


def config(name: str, **changes) -> DataConfig:
    return DataConfig(dataset="huggingface", hf_name=name, image_size_px=SIZE, **changes)


def expected_squares() -> torch.Tensor:
    squares = [crop_pixels(load_image(path), SIZE, SIZE) for path in PATHS]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["./saved", "./alone", "./parquet"])
@pytest.mark.parametrize("cache", ["memory", "disk", "stream"])
def test_folders_are_read_offline(folders: Path, name: str, cache: str) -> None:
    data = load_train_images(config(name, cache=cache), folders)
    data = pickle.loads(pickle.dumps(data))  # noqa: S301, as for a spawned worker
    assert torch.equal(data.__getitems__(range(10)).images, expected_squares())
    assert data.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert data.class_names == tuple(f"class {i}" for i in range(5))


def test_integer_labels_and_other_splits(folders: Path) -> None:
    absolute = config(str(folders / "saved"), label_column="number")
    assert load_split(absolute, None, "train").class_names == tuple(map(str, range(8)))
    assert len(load_split(absolute, None, "test")) == 5
    with pytest.raises(DataError, match="no split 'validation'; there are train, test"):
        load_split(config("./saved", hf_test_split="validation"), folders, "test")
    with pytest.raises(DataError, match="saved without splits"):
        load_split(config("./alone"), folders, "test")


def test_the_digest_follows_the_content(folders: Path) -> None:
    by_name = {
        name: load_train_images(config(name, cache="stream"), folders).digest()
        for name in ("./saved", "./alone", "./parquet")
    }
    assert len(set(by_name.values())) == 1  # the same images in three containers
    other = config("./saved", cache="stream", hf_train_split="test")
    assert load_train_images(other, folders).digest() not in by_name.values()


def test_wrong_columns_are_all_named(folders: Path) -> None:
    with pytest.raises(DataError, match="2 problem") as caught:
        load_split(config("./saved", image_column="img", label_column="y"), folders, "train")
    for text in ("image_column is 'img'", "label_column is 'y'", "score (Value('float64'))"):
        assert text in str(caught.value)
    with pytest.raises(DataError, match="2 problem") as caught:
        load_split(config("./saved", image_column="number", label_column="score"), folders, "train")
    assert "cast it to datasets.Image()" in str(caught.value)
    assert "use ClassLabel or integers" in str(caught.value)
    with pytest.raises(DataError, match="10 of 10 images have no class"):
        load_split(config("./saved", label_column="unlabelled"), folders, "train")


def test_names_that_cannot_be_opened(
    folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"write \./org/name"):
        load_split(config("org/name"), None, "train")
    with pytest.raises(DataError, match=r"write org/name, or \./a b"):
        load_split(config("a b"), None, "train")
    with pytest.raises(DataError, match="cannot be opened"):
        load_split(config("org/absent"), None, "train")
    with pytest.raises(DataError, match="cannot be opened"):
        load_split(config("./absent"), tmp_path, "train")


def test_a_corrupt_row_is_replaced(folders: Path, tmp_path: Path) -> None:
    import datasets

    buffer = io.BytesIO()
    Image.open(PATHS[0]).save(buffer, "jpeg")
    rows = [{"bytes": content} for content in (buffer.getvalue()[:150], PATHS[1].read_bytes())]
    images = [rows[0], None, rows[1]]
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2]})
    data.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "bad")
    batch = load_train_images(config("./bad"), tmp_path).__getitems__([0, 1, 2])
    assert batch.replaced.tolist() == [0, 1]
    assert torch.equal(batch.images, expected_squares()[[1, 1, 1]])
