"""What all tests share. Sockets other than loopback are blocked by pytest-socket (pyproject)."""

import numpy as np
import pytest
from PIL import Image

from clever_zoo.samples import sample_paths


@pytest.fixture(scope="session")
def sample_images() -> list[Image.Image]:
    """Bundled pictures, two of each class, RGB."""
    return [Image.open(path).convert("RGB") for path in sample_paths()[::15]]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
