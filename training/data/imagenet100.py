"""ImageNet-100 from an ImageNet folder, by links."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from clever_zoo.errors import DataError
from clever_zoo.preprocess import IMAGE_SUFFIXES
from training.data.sources import CACHE, data_error, some

SPLITS = ("train", "val")
CLASS_LIST = Path(__file__).with_name("imagenet100.txt")


class Report(NamedTuple):
    """What `make_imagenet100` made, or found made.

    Attributes:
        images: Number of images of each split.
        existed: True if the folder was there already, as it should be.
    """

    images: dict[str, int]
    existed: bool


def imagenet100_classes() -> list[str]:
    """The 100 WordNet ids, in the order of the list.

    Source: the file named at the top of imagenet100.txt.
    """
    lines = CLASS_LIST.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def make_imagenet100(imagenet: Path, out: Path, *, hard: bool = False) -> Report:
    """Build OUT/{train,val}/WNID out of the same folders of ImageNet.

    Args:
        imagenet: Folder with train/WNID/*.JPEG and val/WNID/*.JPEG.
        out: The new folder; it appears in one step when all links are made.
        hard: Hard-link every image instead of pointing to each class folder with a symbolic
            link; survives the removal of `imagenet`, needs the same file system.

    Raises:
        DataError: If ImageNet is not complete (lists all problems), or `out` is there and holds
            anything else.
    """
    files, problems = _list_classes(imagenet)
    if problems:
        raise data_error(imagenet, problems)
    links = _wanted_links(imagenet, files, hard)
    report = Report(
        {split: sum(len(f) for c, f in files.items() if c.parts[0] == split) for split in SPLITS},
        existed=out.is_dir() and any(out.iterdir()),
    )
    if report.existed:
        if problems := _differences(out, links, hard):
            raise data_error(f"{out} is there and differs; name an empty folder", problems)
        return report
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for name, target in links.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            if hard:
                (temporary / name).hardlink_to(target)
            else:
                (temporary / name).symlink_to(target)
        temporary.replace(out)
    except OSError as error:
        raise DataError(
            f"{out} could not be made: {error}; hard links need the same file system and a "
            "folder that is yours, symbolic links (without --hard) do not"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _list_classes(imagenet: Path) -> tuple[dict[Path, list[str]], list[str]]:
    """Image names of each SPLIT/WNID, and everything that is wrong."""
    files: dict[Path, list[str]] = {}
    problems = []
    for split in SPLITS:
        folder = imagenet / split
        if not folder.is_dir():
            problems.append(f"the folder {folder} is missing")
            continue
        for wnid in imagenet100_classes():
            if (folder / wnid).is_dir():
                files[Path(split, wnid)] = _image_names(folder / wnid)
        missing = [w for w in imagenet100_classes() if Path(split, w) not in files]
        empty = [c.name for c, names in files.items() if c.parts[0] == split and not names]
        if loose := _image_names(folder):
            problems.append(
                f"{folder} holds {len(loose)} images outside class folders, such as {loose[0]}; "
                f"move each into {split}/WNID first (for val, ImageNet's development kit says "
                "which: ILSVRC2012_validation_ground_truth.txt and meta.mat)"
            )
        if missing:
            problems.append(f"{folder} lacks {len(missing)} class folders: {some(missing)}")
        if empty:
            problems.append(f"{folder} has {len(empty)} class folders with no image: {some(empty)}")
    return files, problems


def _image_names(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(IMAGE_SUFFIXES))


def _wanted_links(imagenet: Path, files: dict[Path, list[str]], hard: bool) -> dict[Path, Path]:
    """Path inside OUT -> what it links to."""
    base = imagenet.resolve()
    if not hard:
        return {folder: base / folder for folder in files}
    return {
        folder / name: (base / folder / name).resolve()
        for folder, names in files.items()
        for name in names
    }


def _differences(out: Path, links: dict[Path, Path], hard: bool) -> list[str]:
    found = {
        Path(folder, name).relative_to(out)
        for folder, folders, names in os.walk(out)
        for name in (*names, *(n for n in folders if Path(folder, n).is_symlink()))
    }
    found = {name for name in found if name.parts[0] != CACHE}  # decoded images of a training
    problems = []
    if missing := sorted(links.keys() - found):
        problems.append(f"{len(missing)} links are missing: {some(missing)}")
    if extra := sorted(found - links.keys()):
        problems.append(f"{len(extra)} entries do not belong there: {some(extra)}")
    other = [
        name
        for name in sorted(found & links.keys())
        if (out / name).is_symlink() == hard or not (out / name).samefile(links[name])
    ]
    if other:
        kind = "a hard" if hard else "a symbolic"
        problems.append(
            f"{len(other)} entries are not {kind} link to {links[other[0]].parent}: {some(other)}"
        )
    return problems
