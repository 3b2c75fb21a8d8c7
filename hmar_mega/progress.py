"""A progress bar on a terminal, a line a minute and a closing line everywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

#: Between two lines of progress where there is no terminal.
SECONDS_A_LINE = 60.0

log = logging.getLogger(__name__)


class Tally:
    """What a long job reports: `advance(n)` while it works, `show` for figures beside the bar, `summary` at the end."""

    def __init__(self) -> None:
        self.done = 0
        self.summary = ""
        self._bar: Progress | None = None
        self._lines: _Lines | None = None

    def advance(self, count: int = 1) -> None:
        """Count `count` more items as done."""
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        if self._lines is not None:
            self._lines.tell(self.done)

    def already(self, count: int) -> None:
        """Count `count` items that were done before, by an earlier process: they do not enter the rate."""
        self.done += count
        if self._bar is not None:
            self._bar.reset(self._bar.task_ids[0], completed=self.done)
        if self._lines is not None:
            self._lines.start += count

    def show(self, figures: str) -> None:
        """Put a few figures beside the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], figures=figures)


@contextmanager
def track(description: str, total: int, enabled: bool = True, start: int = 0) -> Iterator[Tally]:
    """Show a bar with rate and time left on a terminal; at the end print `summary`, if set, and the time taken, once.

    Nothing is printed when `enabled` is false or the block raises. Without a terminal rate and time left are logged
    once a minute, so that the log of a job tells where it stands.

    Args:
        start: items done before, when a job is resumed.
    """
    tally = Tally()
    tally.done = start
    begin = time.perf_counter()
    console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    if enabled and console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            bar.add_task(description, total=total, completed=start, figures="")
            tally._bar = bar
            yield tally
    else:
        tally._lines = _Lines(description, total, start) if enabled else None
        yield tally
    if enabled and tally.summary:
        closing = Console(soft_wrap=True, highlight=False, emoji=False)
        closing.print(f"{tally.summary} ({time.perf_counter() - begin:.1f} s)", markup=False)


class _Lines:
    """Progress as lines of the log."""

    def __init__(self, description: str, total: int, start: int) -> None:
        self._description, self._total, self.start = description, total, start
        self._begin = self._last = time.monotonic()

    def tell(self, done: int) -> None:
        """Log where things stand, unless that was done less than a minute ago."""
        now = time.monotonic()
        if now - self._last < SECONDS_A_LINE:
            return
        self._last = now
        rate = (done - self.start) / (now - self._begin)
        left = f"{(self._total - done) / rate / 60:,.0f} min left" if rate > 0 else "standing still"
        log.info("%s: %s of %s, %s/s, %s", self._description, f"{done:,}", f"{self._total:,}", f"{rate:,.0f}", left)


class LogHandler(logging.StreamHandler[TextIO]):
    """Logs to whatever `sys.stderr` is at the moment, so that lines appear above a running bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The current standard error."""
        return sys.stderr


class _RateColumn(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        """The rate over the last moments, empty before there is one."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")
