"""A few hundred small real pictures for demos and checks: Fashion-MNIST test images.

Thirty of each class, named CLASS-INDEX.png by their index in the test set; MIT licence, see
LICENSE beside them.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "fashion-mnist"


def sample_paths() -> list[Path]:
    """The 300 bundled pictures, 28x28 grey PNG, sorted by name."""
    return sorted(FOLDER.glob("*.png"))


def sample_class(path: Path) -> str:
    """The class of a bundled picture, such as "ankle-boot"."""
    return path.stem.rpartition("-")[0]
