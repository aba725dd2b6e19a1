"""Which images a process takes at each step, and the batches of them."""

import functools
import signal
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from training.config import Recipe
from training.data import Batch, TrainImages
from training.distributed import Processes


@functools.lru_cache(maxsize=1)  # asked for at every step, made once an epoch
def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(steps, batch_size): a shuffle of the data set, the incomplete last batch dropped."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[: count // batch_size * batch_size].reshape(-1, batch_size)


def step_samples(recipe: Recipe, count: int, step: int, processes: Processes) -> NDArray[np.int64]:
    """(parts, B): the images of a step that this process takes, part by part."""
    epoch, within = divmod(step, count // recipe.batch_size)
    samples = epoch_order(count, recipe.batch_size, recipe.seed, epoch)[within]
    shares = samples.reshape(processes.world_size, recipe.run.accumulation_steps, -1)
    return shares[processes.rank]


class _StepSampler(Sampler[list[int]]):
    """The images of each step, all parts in a row."""

    def __init__(self, recipe: Recipe, count: int, steps: range, processes: Processes) -> None:
        self._arguments = recipe, count, processes
        self._steps = steps

    def __iter__(self) -> Iterator[list[int]]:
        recipe, count, processes = self._arguments
        for step in self._steps:
            yield step_samples(recipe, count, step, processes).ravel().tolist()

    def __len__(self) -> int:
        return len(self._steps)


def _outlive_sigterm(worker: int) -> None:
    """A signal to the whole group is the run's to answer; workers end with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _unchanged(batch: Batch) -> Batch:
    return batch


def step_batches(
    data: TrainImages, recipe: Recipe, steps: range, processes: Processes, workers: int
) -> Iterator[Batch]:
    """This process's batch of each of the steps, read ahead by worker processes if there are any.

    Which images they are depends on the recipe's seed and the step alone, so a run can go on at
    any step.
    """
    loader = DataLoader(
        data,
        batch_sampler=_StepSampler(recipe, len(data), steps, processes),
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_outlive_sigterm,
        pin_memory=processes.device.type == "cuda",
        generator=torch.Generator(),  # the global one belongs to what is trained
    )
    return iter(loader)
