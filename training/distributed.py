"""One process or many: started by torchrun, every function here is a no-op without it.

A run's result does not depend on the number of processes: each one takes its share of every
batch, and whatever is averaged over the batch is averaged over the processes too.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clever_zoo.encoder import usable_device


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` in 0..`world_size` - 1, computing on `device`."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """Join the group that torchrun describes in the environment, if it started this process.

    Args:
        device: "cpu" or "cuda"; with torchrun, process i of a machine takes its GPU number i.

    Raises:
        BackendMissingError: If the device cannot be used.
    """
    if "RANK" not in os.environ:
        yield Processes(usable_device(device))
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    place = usable_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    store, rank, world_size = next(dist.rendezvous("env://"))
    # After a restart the store may still hold the addresses of dead processes.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield Processes(place, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def spread(objective: nn.Module, processes: Processes) -> nn.Module:
    """What to call instead of the objective, so that all processes compute its gradient together.

    Batch-norm is synchronised on GPUs; PyTorch has no such layer for CPUs, where each process
    normalises its own share.
    """
    if processes.world_size > 1 and processes.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    if processes.world_size == 1:
        return objective
    return DistributedDataParallel(objective, broadcast_buffers=False)


def gradients_averaged(objective: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Backward passes inside average their gradients over the processes, if it is the `last`."""
    if isinstance(objective, DistributedDataParallel) and not last:
        return objective.no_sync()
    return nullcontext()


def rows_of_processes(row: Tensor) -> Tensor:
    """(n,) -> (world_size, n): every process's row, without gradient; all must call it."""
    if not dist.is_initialized():
        return row.detach()[None]
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row.detach().contiguous())
    return torch.stack(rows)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, on each of them."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def decided_by_any(decision: bool, device: torch.device) -> bool:
    """Whether any process decided so, on every process, so that all of them stop at one step."""
    if not dist.is_initialized():
        return decision
    flag = torch.tensor(int(decision), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        ctx.rows = rows.shape[1]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        # Every process computes the same loss of the whole batch, and gradients are averaged
        # over the processes afterwards: each one's share must count world-size times.
        start = dist.get_rank() * ctx.rows
        return gradient[:, start : start + ctx.rows] * dist.get_world_size()


def gather_batch(rows: Tensor) -> Tensor:
    """The whole batch from every process's share: (V, B, D) -> (V, world_size * B, D).

    The gradient is right for a loss that every process computes alike on the whole batch, under
    the averaging of DistributedDataParallel.
    """
    return _Gather.apply(rows) if dist.is_initialized() else rows
