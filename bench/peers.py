"""What ours is compared with: timm as people use it, timm as fast as it goes, and plain loops."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from torch import nn
from torch.fx.experimental.optimization import fuse

import clever_zoo.timm  # noqa: F401, VMamba by timm's name
from clever_zoo.onnx_graph import OnnxGraph
from clever_zoo.preprocess import batched
from clever_zoo.spec import IMAGENET_MEAN, IMAGENET_STD

# glibc gives large blocks back at each forward; keeping them is worth a factor to torch.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}

timm_transform = create_transform((3, 224, 224), crop_pct=0.875, interpolation="bicubic")


def eager(architecture: str) -> nn.Module:
    """timm's model as it comes; VMamba is ours, in timm's registry."""
    torch.manual_seed(0)
    return timm.create_model(architecture, num_classes=0).eval()


def forward_s(model: nn.Module, pixels: torch.Tensor) -> float:
    """Seconds of a forward pass."""
    started = time.perf_counter()
    with torch.inference_mode():
        model(pixels)
    return time.perf_counter() - started


@contextmanager
def tuned(architecture: str, batch: int, threads: int) -> Iterator[Callable[[], float]]:
    """Seconds of timm's model with folded batch-norm, channels last, and memory kept.

    In a process of its own, because glibc reads its settings when a process starts.
    """
    before = {name: os.environ.get(name) for name in _KEEP_MEMORY}
    os.environ.update(_KEEP_MEMORY)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_tuned, args=(theirs, architecture, batch, threads))
    process.start()
    theirs.close()  # so that a process that dies ends the waiting for its answer
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})

    def measure() -> float:
        ours.send(True)
        return ours.recv()

    try:
        yield measure
    finally:
        ours.send(False)
        process.join()


def _serve_tuned(connection: Connection, architecture: str, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = eager(architecture)
    if architecture.startswith("resnet"):
        model = fuse(model)
    model = model.to(memory_format=torch.channels_last)
    pixels = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    while connection.recv():
        connection.send(forward_s(model, pixels))


def timm_folder(model: nn.Module, paths: list[Path], batch: int) -> NDArray[np.float32]:
    """The loop of a timm tutorial: open, transform, stack, forward."""
    rows = []
    with torch.inference_mode():
        for chunk in batched(paths, batch):
            pixels = torch.stack([timm_transform(Image.open(p).convert("RGB")) for p in chunk])
            rows.append(model(pixels).numpy())
    return np.concatenate(rows)


def fastembed_style_folder(graph: OnnxGraph, paths: list[Path], batch: int) -> NDArray[np.float32]:
    """As embedding libraries on ONNX Runtime do: NumPy normalisation, one batch after the other.

    Args:
        graph: With float32 input.
    """
    mean, std = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
    rows = []
    for chunk in batched(paths, batch):
        squares = []
        for path in chunk:
            image = Image.open(path).convert("RGB")
            scale = 256 / min(image.size)
            sides = [round(side * scale) for side in image.size]
            image = image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
            left, top = ((side - 224) // 2 for side in sides)
            square = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
            squares.append(((square / np.float32(255) - mean) / std).transpose(2, 0, 1))
        rows.append(np.hstack(graph.session.run(None, {"pixels": np.stack(squares)})))
    return np.concatenate(rows)
