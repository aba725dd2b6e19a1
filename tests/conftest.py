"""What all tests share. Sockets other than loopback are blocked by pytest-socket (pyproject)."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clever_zoo.samples import sample_class, sample_paths
from tests.onnx_models import write_models


@pytest.fixture(scope="session")
def sample_images() -> list[Image.Image]:
    """Bundled pictures, two of each class, RGB."""
    return [Image.open(path).convert("RGB") for path in sample_paths()[::15]]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def fashion_mnist_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled pictures in the layout of Debian's package: 300 train, the same 300 test."""
    folder = tmp_path_factory.mktemp("fashion-mnist")
    paths = sample_paths()
    paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]
    names = sorted({sample_class(path) for path in paths})
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    labels = np.array([names.index(sample_class(path)) for path in paths], dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            content = gzip.compress(header + array.tobytes())
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def onnx_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that tests/onnx_models.py writes; made by hand where torch is not installed."""
    if prepared := os.environ.get("CLEVER_ZOO_ONNX_MODELS"):
        return Path(prepared)
    folder = tmp_path_factory.mktemp("onnx-models")
    write_models(folder)
    return folder
