"""Prepare data sets: `python -m training.data --help`."""

from pathlib import Path
from typing import Annotated

import typer

from clever_zoo.cli import fail
from clever_zoo.errors import CleverZooError
from training.data.imagenet100 import make_imagenet100

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Prepare data sets for training and evaluation."""


@app.command("make-in100")
def make_in100(
    imagenet_dir: Annotated[
        Path, typer.Argument(help="ImageNet: train/WNID/*.JPEG and val/WNID/*.JPEG.")
    ],
    out: Annotated[Path, typer.Argument(help="The new folder; must be empty or not there.")],
    hard: Annotated[
        bool,
        typer.Option(
            "--hard", help="Hard-link every image, instead of a symbolic link to each class folder."
        ),
    ] = False,
) -> None:
    """Make ImageNet-100 out of ImageNet, by links: OUT/train/WNID and OUT/val/WNID.

    Nothing is copied. The 100 classes are the usual list, that of Contrastive Multiview Coding
    (training/data/imagenet100.txt). Everything is checked before the first link is made; the same
    command again finds its work done. Exit code 2: bad input.

    Then train with a recipe that says dataset = "image-folder", and --data OUT.

    Example: python -m training.data make-in100 /data/imagenet /data/imagenet-100
    """
    try:
        report = make_imagenet100(imagenet_dir, out, hard=hard)
    except (CleverZooError, OSError) as error:
        fail(error)
    counts = ", ".join(f"{split} {count:,} images" for split, count in report.images.items())
    typer.echo(f"{out} {'was there already' if report.existed else 'made'}: {counts}")


if __name__ == "__main__":
    app()
