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
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    ahead: int,
    at_once: Callable[[Item], bool] = lambda item: False,
) -> Iterator[Result]:
    """Like `map`, with up to `ahead` results computed in threads before they are asked for.

    Args:
        function: Called in a worker thread; what it raises is raised in place of its result.
        items: Read lazily, in the caller's thread.
        threads: Number of worker threads; with 0 it is `map`.
        ahead: Results that may wait, at least 1; it bounds the memory.
        at_once: Which items are worked on in the caller's thread, before the next one is read.
    """
    if threads < 1:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    iterator = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:

        def start(item: Item) -> Future[Result]:
            return _done(function, item) if at_once(item) else pool.submit(function, item)

        try:
            pending.extend(map(start, islice(iterator, ahead)))
            while pending:
                result = pending.popleft().result()
                pending.extend(map(start, islice(iterator, 1)))
                yield result
        finally:
            for future in pending:
                future.cancel()


def _done(function: Callable[[Item], Result], item: Item) -> Future[Result]:
    future: Future[Result] = Future()
    try:
        future.set_result(function(item))
    except Exception as error:  # noqa: BLE001, raised when its turn comes
        future.set_exception(error)
    return future


def usable_cores() -> int:
    """Number of processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
