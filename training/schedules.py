"""Values that change over a run, as functions of the step."""

import math


def cosine(step: int, total_steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 towards `end` at `total_steps` (not reached)."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak: float, end: float) -> float:
    """Linear from 0 at step 0 to `peak` at the last warm-up step, then `cosine` to `end`."""
    if step < warmup_steps:
        return peak * step / max(warmup_steps - 1, 1)
    return cosine(step - warmup_steps, total_steps - warmup_steps, peak, end)


def linear_then_constant(epoch: int, warmup_epochs: int, start: float, end: float) -> float:
    """Linear from `start` to `end` over `warmup_epochs` epochs, then `end`."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(warmup_epochs - 1, 1)
