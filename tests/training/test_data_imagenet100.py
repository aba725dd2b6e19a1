"""ImageNet-100 by links, on a miniature of ImageNet."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clever_zoo.errors import DataError
from clever_zoo.samples import sample_paths
from training.config import DataConfig
from training.data import load_split
from training.data.__main__ import app
from training.data.imagenet100 import imagenet100_classes, make_imagenet100


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """All 100 classes and two others; two train images and one val image each."""
    root = tmp_path / "imagenet"
    for split, count in (("train", 2), ("val", 1)):
        for wnid in [*imagenet100_classes(), "n00000001", "n99999999"]:
            (root / split / wnid).mkdir(parents=True)
            for i in range(count):
                shutil.copy(sample_paths()[i], root / split / wnid / f"{wnid}_{i}.JPEG")
    return root


def test_the_class_list() -> None:
    wnids = imagenet100_classes()
    assert len(set(wnids)) == 100
    assert all(wnid[0] == "n" and wnid[1:].isdigit() and len(wnid) == 9 for wnid in wnids)
    assert wnids[:2] == ["n02869837", "n01749939"]
    assert wnids[-1] == "n02090622"


@pytest.mark.parametrize("hard", [False, True])
def test_links_that_the_loader_reads(imagenet: Path, tmp_path: Path, hard: bool) -> None:
    out = tmp_path / "new" / "in100"
    arguments = ["make-in100", str(imagenet), str(out), *["--hard"] * hard]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "made: train 200 images, val 100 images" in result.output
    image = out / "train" / "n01749939" / "n01749939_1.JPEG"
    assert image.samefile(imagenet / image.relative_to(out))
    assert image.parent.is_symlink() != hard
    assert not image.is_symlink()
    config = DataConfig(dataset="image-folder", image_size_px=8)
    for split, count in (("train", 200), ("test", 100)):
        data = load_split(config, out, split)
        assert len(data) == count
        assert list(data.class_names) == sorted(imagenet100_classes())
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0
    assert "was there already: train 200" in again.output
    assert [p.name for p in out.parent.iterdir()] == ["in100"]


def test_all_problems_are_found_before_anything_is_linked(imagenet: Path, tmp_path: Path) -> None:
    first, second, third, *rest = imagenet100_classes()
    shutil.rmtree(imagenet / "train" / first)
    (imagenet / "train" / second / f"{second}_0.JPEG").unlink()
    (imagenet / "train" / second / f"{second}_1.JPEG").unlink()
    for wnid in (third, *rest):
        (imagenet / "val" / wnid / f"{wnid}_0.JPEG").rename(imagenet / "val" / f"{wnid}.JPEG")
        (imagenet / "val" / wnid).rmdir()
    result = CliRunner().invoke(app, ["make-in100", str(imagenet), str(tmp_path / "out")])
    assert result.exit_code == 2
    with pytest.raises(DataError, match="4 problem") as caught:
        make_imagenet100(imagenet, tmp_path / "out")
    for text in (
        f"lacks 1 class folders: {first}",
        f"with no image: {second}",
        "98 images outside class folders",
        "ILSVRC2012_validation_ground_truth",
        "lacks 98 class folders: n02488291",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(imagenet / "val")
    with pytest.raises(DataError, match="val is missing"):
        make_imagenet100(imagenet, tmp_path / "out")


@pytest.mark.parametrize("hard", [False, True])
def test_a_folder_that_differs_is_refused(imagenet: Path, tmp_path: Path, hard: bool) -> None:
    out = tmp_path / "in100"
    out.mkdir()
    make_imagenet100(imagenet, out, hard=hard)
    with pytest.raises(DataError, match="belong"):
        make_imagenet100(imagenet, out, hard=not hard)
    (out / "cache" / "image-folder").mkdir(parents=True)
    (out / "cache" / "image-folder" / "256px.lock").touch()
    assert make_imagenet100(imagenet, out, hard=hard).existed
    (out / "notes.txt").write_text("mine")
    wnid = imagenet100_classes()[0]
    if hard:
        shutil.rmtree(out / "val" / wnid)
        image = out / "train" / wnid / f"{wnid}_0.JPEG"
        image.unlink()
        shutil.copy(sample_paths()[0], image)
    else:
        (out / "val" / wnid).unlink()
        (out / "train" / wnid).unlink()
        (out / "train" / wnid).symlink_to(imagenet / "val" / wnid)
    with pytest.raises(DataError, match="3 problem") as caught:
        make_imagenet100(imagenet, out, hard=hard)
    for text in ("1 links are missing: val/", "notes.txt", "1 entries are not a"):
        assert text in str(caught.value)
    assert (out / "notes.txt").exists()


def test_help_teaches() -> None:
    result = CliRunner().invoke(app, ["make-in100", "--help"])
    assert "Example:" in result.output
    assert "--hard" in result.output
