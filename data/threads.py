"""Doing work ahead of its use in threads, results in the order of the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int | None = None
) -> Generator[Result, None, None]:
    """`map(function, items)` with `workers` threads that run at most `ahead` items in front of the caller.

    Unlike `Executor.map`, the number of results held in memory is bounded and `items` may be endless. `workers=0` runs
    in the calling thread. An error of `function` is raised where its result would have come, and ends the iteration.

    Args:
        ahead: default twice the workers.
    """
    if workers == 0:
        yield from map(function, items)
        return
    source = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="hmar-data") as pool:
        pending: deque[Future[Result]] = deque()
        try:
            pending.extend(pool.submit(function, item) for item in islice(source, ahead or 2 * workers))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(source, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()
