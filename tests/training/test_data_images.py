"""Cache, streaming, replacement of bad images, and what DataLoader workers see."""

import errno
import itertools
import logging
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from clever_zoo.errors import DataError
from clever_zoo.preprocess import crop_pixels, load_image
from clever_zoo.samples import sample_class, sample_paths
from training.config import DataConfig
from training.data import (
    Batch,
    StreamedImages,
    TrainImages,
    cached,
    load_split,
    load_train_images,
)
from training.data.sources import FakeSource, FolderSource

SIZE = 20


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """train/ and val/ of three classes; colour and grey, JPEG and PNG, wide and high."""
    paths = sample_paths()[::6]
    for i, path in enumerate(paths[:24]):
        image = Image.open(path).resize((40, 30 + i) if i % 2 else (30 + i, 40))
        for split in ("train", "val")[: 2 if i % 3 == 0 else 1]:
            folder = tmp_path / split / sample_class(path)
            folder.mkdir(parents=True, exist_ok=True)
            suffix = ("png", "jpg")[i % 2]
            image.convert("RGB" if i % 4 else "L").save(folder / f"{path.stem}.{suffix}")
    return tmp_path


def config(**changes) -> DataConfig:
    return DataConfig(dataset="image-folder", image_size_px=SIZE, **changes)


def files(root: Path, split: str = "train") -> list[Path]:
    return sorted((root / split).rglob("*.*g"))


def keep_batch(batch):
    return batch


def workers(data: TrainImages, order: list[list[int]], context: str = "fork") -> DataLoader:
    return DataLoader(
        data,
        batch_sampler=order,
        collate_fn=keep_batch,
        num_workers=2,
        multiprocessing_context=context,
    )


def read_all(data: DataConfig, root: Path) -> Batch:
    images = load_train_images(data, root)
    return images.__getitems__(range(len(images)))


@pytest.mark.parametrize("cache", ["memory", "disk", "stream"])
def test_pixels_are_those_of_the_library_transform(photos: Path, cache: str) -> None:
    data = load_train_images(config(cache=cache), photos)
    order = [5, 0, 17, 5, 23]
    batch = data.__getitems__(order)
    assert batch.samples.tolist() == order
    assert batch.replaced.tolist() == []
    for index, image in zip(order, batch.images, strict=True):
        square = crop_pixels(load_image(files(photos)[index]), SIZE, SIZE)
        assert np.array_equal(image.permute(1, 2, 0), square)
    names = [data.class_names[label] for label in data.labels]
    assert names == [path.parent.name for path in files(photos)]


@pytest.mark.parametrize("cache", ["memory", "disk", "stream"])
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_dataloader_workers(photos: Path, cache: str, context: str) -> None:
    """Two worker processes give what this process gives, and count bad images together."""
    files(photos)[2].write_bytes(b"no image")
    data = load_train_images(config(cache=cache), photos)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(6, 4).tolist()
    loader = workers(data, order, context)
    for batch, indices in zip(loader, order, strict=True):
        here = data.__getitems__(indices)
        assert torch.equal(batch.images, here.images)
        assert batch.samples.tolist() == indices
        assert batch.replaced.tolist() == [2] * (2 in indices)


def test_what_travels_to_a_worker_is_small(photos: Path) -> None:
    """A spawned worker gets the path of a mapped file, not its pixels."""
    data = load_train_images(config(cache="disk"), photos)
    assert len(pickle.dumps(data)) < 5000 < 24 * 3 * SIZE * SIZE


def test_the_cache_is_used_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_split(config(cache="disk"), photos, "train")
    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "read", lambda *_: pytest.fail("decoded again"))
        second = load_split(config(cache="disk"), photos, "train")
    assert torch.equal(first.images, second.images)
    assert first.file == second.file
    assert torch.equal(first.images, load_split(config(), photos, "train").images)


def test_processes_wait_for_the_one_that_decodes(tmp_path: Path) -> None:
    reads = []

    class Counted(FakeSource):
        def read(self, index: int) -> np.ndarray:
            reads.append(index)
            return super().read(index)

    source = Counted(40, 16, "train")
    with ThreadPoolExecutor() as pool:
        ranks = list(pool.map(lambda _: cached(source, 16, tmp_path), range(3)))
    assert sorted(reads) == list(range(40))
    assert torch.equal(ranks[0].images, ranks[2].images)


def test_a_stale_cache_is_made_again(photos: Path) -> None:
    old = load_split(config(cache="disk"), photos, "train")
    files(photos)[3].unlink()
    Image.new("RGB", (33, 44), "red").save(files(photos)[0])
    new = load_split(config(cache="disk"), photos, "train")
    assert len(new) == 23
    assert not torch.equal(old.images[0], new.images[0])
    assert torch.equal(new.images, load_split(config(), photos, "train").images)
    assert not old.file.exists()
    assert len(old.images[0].unique()) > 1  # a run that maps the old file keeps it


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, file.stat().st_size - 1),
        lambda file: file.with_suffix(".json").unlink(),
        lambda file: file.with_suffix(".json").write_text('{"listing": "'),
        lambda file: file.with_suffix(".json").write_text("{}"),
        lambda file: file.unlink(),
    ],
)
def test_a_damaged_cache_is_made_again(photos: Path, damage) -> None:
    whole = load_split(config(cache="disk"), photos, "train")
    expected = whole.images.clone()
    damage(whole.file)
    again = load_split(config(cache="disk"), photos, "train")
    assert torch.equal(again.images, expected)
    assert again.file.stat().st_size == expected.numel()


KILLED = """
import os, sys
from pathlib import Path
from training.data import cached
from training.data.sources import FakeSource
class Source(FakeSource):
    def read(self, index):
        if index == 1500:
            os.kill(os.getpid(), 9)
        return super().read(index)
cached(Source(2000, 8, "train"), 8, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_kill_while_writing_leaves_nothing_half(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert killed.returncode == -9
    assert not list(tmp_path.glob("8px*.bin"))
    assert list(tmp_path.glob(".8px*.tmp"))
    data = cached(FakeSource(2000, 8, "train"), 8, tmp_path)
    assert torch.equal(data.images, cached(FakeSource(2000, 8, "train"), 8, None).images)
    assert not list(tmp_path.glob(".8px*.tmp"))


def test_too_small_a_memory(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(DataError, match=r"0\.0 GB of memory; use data\.cache ="):
        load_split(config(), photos, "train")


def test_too_small_a_disk(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataError, match="another cache folder"):
        load_split(config(cache="disk"), photos, "train")


def break_three(root: Path) -> None:
    """Number 4 is cut short, the last is no image, and the first will be gone after listing."""
    paths = files(root)
    paths[4].write_bytes(paths[4].read_bytes()[:200])
    paths[23].write_bytes(b"")


@pytest.mark.parametrize("cache", ["memory", "disk", "stream"])
def test_bad_images_are_replaced_by_the_next(photos: Path, cache: str, caplog) -> None:
    good = load_split(config(), photos, "train").images.clone()
    paths = files(photos)
    break_three(photos)
    source = FolderSource(photos, "train")
    paths[0].unlink()  # vanished after listing
    with caplog.at_level(logging.WARNING):
        if cache == "stream":
            data = TrainImages(StreamedImages(source, SIZE, max_bad=3))
        else:
            folder = photos / "cache" if cache == "disk" else None
            data = TrainImages(cached(source, SIZE, folder, max_bad=3))
        for _ in range(2):
            batch = data.__getitems__([23, 4, 7, 0])
            assert torch.equal(batch.images, good[[1, 5, 7, 1]])
            assert sorted(batch.replaced.tolist()) == [0, 4, 23]
    for path, reason in ((paths[0], "no such file"), (paths[4], "truncated"), (paths[23], "image")):
        lines = [r for r in caplog.messages if r.startswith(f"unreadable image {path}")]
        assert len(lines) == 1
        assert reason in lines[0]
    if cache != "stream":
        assert data.labels[23] == data.labels[1] == data.labels[0]
        assert data.labels[22] == source.labels[22]


@pytest.mark.parametrize("cache", ["memory", "disk", "stream"])
def test_the_limit_of_bad_images(photos: Path, cache: str) -> None:
    break_three(photos)
    bad = [files(photos)[4], files(photos)[23]]
    with pytest.raises(DataError, match="2 of the images") as caught:
        read_all(config(cache=cache, max_bad_images=1), photos)
    for path in bad:
        assert f"{path}: cannot be" in str(caught.value)
    assert read_all(config(cache=cache, max_bad_images=2), photos).replaced.tolist() == [4, 23]
    with pytest.raises(DataError, match="at most 0"):  # a disk cache remembers them
        read_all(config(cache=cache, max_bad_images=0), photos)


@pytest.mark.parametrize("cache", ["memory", "stream"])
def test_all_images_bad(photos: Path, cache: str) -> None:
    for path in files(photos):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="24 of the images"):
        load_train_images(config(cache=cache), photos).__getitems__([3])


def test_evaluation_tolerates_no_bad_image(photos: Path) -> None:
    broken = files(photos, "val")[1]
    broken.write_bytes(b"x")
    with pytest.raises(DataError, match=re.escape(str(broken))):
        load_split(config(), photos, "test")


def test_workers_count_bad_images_together(photos: Path) -> None:
    break_three(photos)
    images = StreamedImages(FolderSource(photos, "train"), SIZE, max_bad=2)
    list(workers(TrainImages(images), [[4, 1], [23, 2]]))
    assert images.replaced().tolist() == [4, 23]


@pytest.mark.slow  # torch takes 5 s to end each worker after an error
def test_a_worker_stops_the_run_at_the_limit(photos: Path) -> None:
    break_three(photos)
    data = load_train_images(config(cache="stream", max_bad_images=1), photos)
    loader = workers(data, [[4, 1], [23, 2]])
    with pytest.raises(DataError, match="2 of the images"):
        list(itertools.chain(loader, loader))  # each worker alone may stay within the limit


def test_digests_name_the_data(photos: Path) -> None:
    def digests() -> list[str]:
        return [
            load_train_images(config(cache=cache), photos).digest()
            for cache in ("memory", "disk", "stream")
        ]

    memory, disk, stream = digests()
    assert disk == stream != memory
    assert digests() == [memory, disk, stream]
    files(photos)[3].rename(files(photos)[3].with_name("zz.jpg"))
    assert all(new != old for new, old in zip(digests(), (memory, disk, stream), strict=True))


def test_limit_and_least_number(photos: Path) -> None:
    few = load_train_images(config(), photos, limit=5)
    assert len(few) == len(few.labels) == 5
    with pytest.raises(DataError, match="24 training images, but 25 are needed"):
        load_train_images(config(), photos, at_least=25)


def test_problems_of_a_folder_are_listed_at_once(photos: Path) -> None:
    classes = sorted(p.name for p in (photos / "val").iterdir())
    (photos / "val" / classes[0]).rename(photos / "val" / "surplus")
    for path in (photos / "val" / classes[1]).iterdir():
        path.unlink()
    with pytest.raises(DataError, match="3 problem") as caught:
        load_split(config(), photos, "test")
    for text in (f"without an image: {classes[1]}", f"missing: {classes[0]}", "train: surplus"):
        assert text in str(caught.value)


def test_a_flat_folder_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "a.png")
    with pytest.raises(DataError, match="1 images lie outside class folders"):
        load_split(config(), tmp_path, "train")


def test_fake_images_need_no_files_and_stay_the_same() -> None:
    fake = DataConfig(dataset="fake", image_size_px=32, fake_images=12)
    train, again, test = (load_split(fake, None, s) for s in ("train", "train", "test"))
    assert train.images.shape == (12, 3, 32, 32)
    assert torch.equal(train.images, again.images)
    assert not torch.equal(train.images, test.images)
    assert train.labels.tolist() == [*range(10), 0, 1]
    stream = load_train_images(fake.model_copy(update={"cache": "stream"}), None)
    assert torch.equal(stream.__getitems__(range(12)).images, train.images)
    assert train.images.float().std(dim=(1, 2, 3)).min() > 20  # not flat
    with pytest.raises(DataError, match="--data DIR"):
        load_split(fake.model_copy(update={"cache": "disk"}), None, "train")


def test_data_config_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="shards") as caught:
        DataConfig(dataset="fashion-mnist", cache="stream", shards="a.tar", hf_name="b")
    for text in ("hf_name: for 'huggingface'", "shards: for 'webdataset'", "cache is 'stream'"):
        assert text in str(caught.value)
    for dataset in ("huggingface", "webdataset"):
        with pytest.raises(ValueError, match="is missing"):
            DataConfig(dataset=dataset)
