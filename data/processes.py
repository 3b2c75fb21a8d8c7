"""Doing work in processes, results as they come."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from hmar_mega.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Results of `function` as they come, in any order, from `workers` processes; 1: from this one, in order.

    After an error no further task is taken; those that the processes have already are still finished, then the error
    is raised. Only a few tasks are taken ahead, so `tasks` may be long.

    Args:
        function, tasks: picklable.

    Raises:
        UserError: when a process was killed; and whatever `function` raises.
    """
    source = iter(tasks)
    if workers <= 1:
        yield from map(function, source)
        return
    # Spawned: torch, which this process may have loaded, does not survive a fork well.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        pending: set[Future[Result]] = set()
        try:
            pending = {pool.submit(function, task) for task in islice(source, 2 * workers)}
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                results = [future.result() for future in finished]  # an error ends it here
                pending |= {pool.submit(function, task) for task in islice(source, len(finished))}
                yield from results
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; run the command again, with fewer --workers"
            ) from None
        finally:
            for future in pending:
                future.cancel()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="hmar-parent").start()
