"""Dynamic batching: single requests in, batches to the network, answers out."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clever_zoo.errors import RequestError
from clever_zoo.serve.metrics import Metrics
from clever_zoo.serve.model import Outputs


@dataclass(eq=False, frozen=True)
class _Job:
    """At most one batch of one request's images."""

    pixels: NDArray[np.uint8]
    result: asyncio.Future[Outputs]
    queued_at_s: float


class Batcher:
    """Runs images of many requests together, in the order in which they came.

    A batch starts when it is full or its oldest image has waited `max_delay_s`; while one runs,
    the next fills. A request is kept whole if it fits a batch. Belongs to one event loop.

    Args:
        run: Called with (B, size, size, 3) uint8, B <= max_batch, in a thread of its own.
        max_batch: Images per batch.
        max_delay_s: How long the first image of a batch may wait for more.
        max_queue: Images that may wait; more are refused.
        metrics: What to count in.
    """

    def __init__(
        self,
        run: Callable[[NDArray[np.uint8]], Outputs],
        *,
        max_batch: int,
        max_delay_s: float,
        max_queue: int,
        metrics: Metrics,
    ) -> None:
        self._run, self._metrics = run, metrics
        self._max_batch, self._max_delay_s, self._max_queue = max_batch, max_delay_s, max_queue
        self._jobs: deque[_Job] = deque()
        self._queued = 0  # images
        self._arrived = asyncio.Event()
        self._last_batch_s = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Batches are run inside this context."""
        with ThreadPoolExecutor(1, thread_name_prefix="inference") as worker:
            task = asyncio.create_task(self._run_batches(worker))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.wait([task])

    def check_room(self, images: int = 1) -> None:
        """Refuse images for which the queue has no room.

        Raises:
            RequestError: Status 503, with Retry-After.
        """
        if self._queued + images <= self._max_queue:
            return
        wait_s = max(1, math.ceil(self._queued / self._max_batch * self._last_batch_s))
        raise RequestError(
            f"{self._queued} images are waiting, {self._max_queue} may; try again in {wait_s} s",
            503,
            {"Retry-After": str(wait_s)},
        )

    async def submit(self, pixels: NDArray[np.uint8]) -> Outputs:
        """Run images and wait for their outputs; if cancelled, what waits is dropped.

        Raises:
            RequestError: See `check_room`.
        """
        self.check_room(len(pixels))
        loop, now_s = asyncio.get_running_loop(), time.perf_counter()
        jobs = [
            _Job(pixels[start : start + self._max_batch], loop.create_future(), now_s)
            for start in range(0, len(pixels), self._max_batch)
        ]
        self._jobs.extend(jobs)
        self._count(len(pixels))
        self._arrived.set()
        try:
            parts = await asyncio.gather(*(job.result for job in jobs))
        finally:
            for job in jobs:
                if job in self._jobs:
                    self._jobs.remove(job)
                    self._count(-len(job.pixels))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _count(self, images: int) -> None:
        self._queued += images
        self._metrics.queued_images.set(self._queued)

    async def _run_batches(self, worker: ThreadPoolExecutor) -> None:
        while True:
            await self._wait_for_batch()
            batch = self._take_batch()
            start_s = time.perf_counter()
            for job in batch:
                self._metrics.queue_s.observe(start_s - job.queued_at_s)
            work = asyncio.get_running_loop().run_in_executor(worker, self._run_jobs, batch)
            await asyncio.wait([work])
            self._last_batch_s = time.perf_counter() - start_s
            self._metrics.inference_s.observe(self._last_batch_s)
            _answer(batch, work)

    async def _wait_for_batch(self) -> None:
        while self._queued < self._max_batch:
            left_s = None
            if self._jobs:
                left_s = self._jobs[0].queued_at_s + self._max_delay_s - time.perf_counter()
                if left_s <= 0:
                    return
            self._arrived.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left_s)

    def _take_batch(self) -> list[_Job]:
        batch: list[_Job] = []
        room = self._max_batch
        while self._jobs and len(self._jobs[0].pixels) <= room:
            job = self._jobs.popleft()
            room -= len(job.pixels)
            batch.append(job)
        images = self._max_batch - room
        self._count(-images)
        self._metrics.batch_images.observe(images)
        self._metrics.images.inc(images)
        return batch

    def _run_jobs(self, batch: list[_Job]) -> Outputs:
        return self._run(np.concatenate([job.pixels for job in batch]))


def _answer(batch: list[_Job], work: asyncio.Future[Outputs]) -> None:
    """Give each job its rows, or the error that ended them all."""
    start = 0
    for job in batch:
        stop = start + len(job.pixels)
        if job.result.done():
            pass  # its client hung up
        elif error := work.exception():
            job.result.set_exception(error)
        else:
            job.result.set_result({name: rows[start:stop] for name, rows in work.result().items()})
        start = stop
