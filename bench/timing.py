"""Clocks, made-up photographs, and works that take turns."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import numpy as np
import torch
from PIL import Image

CANARY_SIZE = 512


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


def summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of each column."""
    columns = {name: [r[name] for r in rounds] for name in rounds[0]}
    return {k: {"median": median(v), "min": min(v), "max": max(v)} for k, v in columns.items()}


def take_turns(
    works: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Measure each work once per round, one after the other, after a round that does not count.

    Args:
        works: Name -> call that returns a figure, such as its own seconds.
        rounds: Counted rounds.

    Returns:
        Figures of each work by round, and the canary's GFLOP/s of each round.
    """
    figures: dict[str, list[float]] = {name: [] for name in works}
    canaries = []
    for number in range(rounds + 1):
        canary = canary_gflops("cpu")
        measured = {name: work() for name, work in works.items()}
        if number:
            canaries.append(canary)
            for name, figure in measured.items():
                figures[name].append(figure)
    return figures, canaries
