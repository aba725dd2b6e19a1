"""Work done ahead of its use: threads, a bounded window, results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[Result]:
    """Like `map`, with up to `ahead` results computed in threads before they are asked for.

    Args:
        function: Called in a worker thread; what it raises is raised in place of its result.
        items: Read lazily, in the caller's thread.
        threads: Number of worker threads; with 0 it is `map`.
        ahead: Results that may wait, at least 1; it bounds the memory.
    """
    if threads < 1:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    iterator = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        try:
            pending.extend(pool.submit(function, item) for item in islice(iterator, ahead))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(iterator, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()


def usable_cores() -> int:
    """Number of processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
