"""Noticing that training hangs: processes that live and send heartbeats, while no step ends."""

from __future__ import annotations

import faulthandler
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

#: Steps whose times are remembered, and how many must be known before one is called too long.
REMEMBERED, ENOUGH = 100, 5


class StepWatch:
    """Calls `report` when a step takes longer than `factor` × the median of the last ones; a context.

    Only what lies between `begin` and `end` is watched: not evaluation and saving, whose length has another measure.
    Until five steps are known nothing is, as the first ones compile: there the process group's own time limit holds.

    Args:
        factor: how many medians; 0 watches nothing.
        floor: seconds that a step may always take.
        report: gets the reason in words, from a thread of its own; called once.
    """

    def __init__(self, factor: float, floor: float, report: Callable[[str], None]) -> None:
        self._factor, self._floor, self._report = factor, floor, report
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._started: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hmar-hang", daemon=True)

    def __enter__(self) -> StepWatch:
        if self._factor:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()

    def begin(self) -> None:
        """A step begins."""
        self._started = time.monotonic()

    def end(self) -> None:
        """It has ended."""
        assert self._started is not None
        self._steps.append(time.monotonic() - self._started)
        self._started = None

    @property
    def limit(self) -> float:
        """Seconds that a step may take; infinite while too few are known."""
        if len(self._steps) < ENOUGH:
            return float("inf")
        return max(self._floor, self._factor * statistics.median(self._steps))

    def _watch(self) -> None:
        interval = min(1.0, self._floor / 4)
        watched, waited, before = None, 0.0, time.monotonic()
        while not self._stop.wait(interval):
            now, started = time.monotonic(), self._started
            # counted in intervals: a process that was itself suspended for a while does not hang
            waited = min(now - before, 2 * interval) + (waited if started == watched else 0.0)
            watched, before = started, now
            if started is not None and waited > self.limit:
                median = statistics.median(self._steps)
                self._report(f"no step for {waited:.0f} s, where the median is {median:.2g} s: training hangs")
                return


def dump_stacks(rank: int) -> None:
    """Print what every thread of this process is doing, in one piece: other ranks print to the same log."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        os.write(2, f"stacks of rank {rank}, process {os.getpid()}:\n".encode() + file.read())
