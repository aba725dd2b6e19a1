"""Clocks, made-up photographs, and works that take turns."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

CANARY_SIZE = 512
Figure = TypeVar("Figure")


def photograph(seed: int, size: int) -> Image.Image:
    """Smooth colour gradients, edges and grain, which is what photographs are made of."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(float)
    y, x = np.mgrid[:size, :size] / size
    pixels[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06] *= 0.5
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of a call, the device's work included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def canary_gflops(device: str) -> float:
    """Speed of a float32 matrix product, the best of three."""
    a = torch.ones(CANARY_SIZE, CANARY_SIZE, device=device)
    return 2 * CANARY_SIZE**3 / min(seconds(lambda: a @ a, device) for _ in range(3)) / 1e9


def take_turns(
    works: Mapping[str, Callable[[], Figure]], rounds: int
) -> tuple[dict[str, list[Figure]], list[float]]:
    """Measure each work once per round, one after the other, after a round that does not count.

    Args:
        works: Name -> call that returns a figure, such as its own seconds, or several.
        rounds: Counted rounds.

    Returns:
        Figures of each work by round, and the canary's GFLOP/s of each round.
    """
    figures: dict[str, list[Figure]] = {name: [] for name in works}
    canaries = []
    for number in range(rounds + 1):
        canary = canary_gflops("cpu")
        measured = {name: work() for name, work in works.items()}
        if number:
            canaries.append(canary)
            for name, figure in measured.items():
                figures[name].append(figure)
    return figures, canaries
