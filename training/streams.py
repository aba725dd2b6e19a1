"""Counter-based random numbers: every view of every image has a stream of its own.

A draw depends on ``(seed, epoch, sample, view)`` alone, so the batch size, the order of the
batches and the number of processes change nothing, and resuming needs no generator state.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(
    seed: int, epoch: int, samples: NDArray[np.integer], view: int, count: int, *, first: int = 0
) -> NDArray[np.float64]:
    """Independent uniform numbers in [0, 1) for each sample.

    Args:
        seed: Run seed.
        epoch: Epoch, 0-based.
        samples: Index of each image in the data set, shape (B,).
        view: Index of the view.
        count: Numbers wanted per sample.
        first: Position in the stream at which to begin.

    Returns:
        Shape (B, count).
    """
    key = np.zeros(len(samples), dtype=np.uint64)
    for word in (np.uint64(seed), np.uint64(epoch), samples.astype(np.uint64), np.uint64(view)):
        key = _mix((key ^ word) + _GOLDEN)
    counter = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    words = _mix(key[:, None] + counter * _GOLDEN)
    return (words >> np.uint64(11)) * 2.0**-53
