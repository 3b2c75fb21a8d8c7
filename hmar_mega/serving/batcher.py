"""Requests become batches: a queue, and one thread that owns the model. Knows neither torch nor HTTP.

Images of jobs with equal keys go together, the oldest job first, up to `max_batch` of them. A job that arrives at an
idle worker waits up to `max_wait` for company; one that waited longer behind a running batch is taken at once. Jobs
that were cancelled or are past their deadline leave the queue without being computed.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hmar_mega.errors import UserError

log = logging.getLogger(__name__)

#: Share of the newest batch in the running mean of seconds an image.
NEWEST = 0.2

#: Seconds that `close` waits for the batch under way to notice.
CLOSING = 10.0


class Busy(Exception):
    """The queue is full.

    Attributes:
        retry_after: whole seconds after which there should be room, at least 1.
    """

    def __init__(self, waiting: int, limit: int, retry_after: int) -> None:
        super().__init__(f"{waiting} images are waiting and at most {limit} may; try again in {retry_after} s")
        self.retry_after = retry_after


class Closing(Exception):
    """The service is stopping and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("the service is stopping; try again once it has been started anew")


class Abandoned(Exception):
    """Raised out of a batch that nobody waits for any more."""


@dataclass(frozen=True)
class Part:
    """Results of some images of a job.

    Attributes:
        first: number of the first of them within the job.
        scale: 0-based scale that they show.
        last: whether it is the last one, the finished images.
        results: one for each image.
    """

    first: int
    scale: int
    last: bool
    results: Sequence[Any]


@dataclass(frozen=True)
class Failure:
    """A job that ended without its images."""

    error: Exception


@dataclass(eq=False)
class Job:
    """What one request wants.

    Attributes:
        key: jobs with equal keys may share a batch.
        items: what to compute, one for each image.
        deliver: called with what becomes of it, from the worker's thread.
        deadline: of `time.monotonic()`; afterwards nobody waits for the result.
    """

    key: Hashable
    items: Sequence[Any]
    deliver: Callable[[Part | Failure], None]
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    taken: int = 0
    cancelled: bool = False

    @property
    def left(self) -> int:
        """Images that no batch has taken yet."""
        return len(self.items) - self.taken

    def dead(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.cancelled or time.monotonic() >= self.deadline


class Run(Protocol):
    """Computes one batch."""

    def __call__(
        self,
        key: Any,
        items: Sequence[Any],
        emit: Callable[[int, bool, Sequence[Any]], None],
        abandoned: Callable[[], bool],
    ) -> None:
        """Call `emit(scale, last, results)`, the last time with `last` true, or raise.

        Args:
            abandoned: whether all of it has become pointless; then raise `Abandoned`.
        """


@dataclass(frozen=True)
class _Share:
    """The images `first` … `first + count − 1` of a job, as a part of a batch."""

    job: Job
    first: int
    count: int


class Batcher:
    """The queue and its worker.

    Args:
        run: computes a batch, in the worker's thread only.
        max_batch: images computed together.
        max_wait: seconds that a job waits for company while the worker is idle.
        max_queue: images that may wait.
        on_batch: told the images and seconds of every finished batch.
    """

    def __init__(
        self,
        run: Run,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self._run, self._on_batch = run, on_batch
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._busy_since: float | None = None
        self._image_seconds = 0.0
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)

    def start(self) -> None:
        """Start the worker; once."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            Busy: when it has no room for all of the job's images.
            Closing: after `close`.
        """
        with self._changed:
            if self._closed:
                raise Closing
            self._drop_dead()
            waiting = self._waiting()
            if waiting + len(job.items) > self.max_queue:
                raise Busy(waiting, self.max_queue, max(1, math.ceil(waiting * self._image_seconds)))
            self._queue.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for the job any more: it leaves the queue; a batch that holds only such jobs is broken off."""
        with self._changed:
            job.cancelled = True
            self._drop_dead()

    def close(self) -> None:
        """Refuse what still waits, break off the batch under way, and end the worker."""
        with self._changed:
            self._closed = True
            left, self._queue = list(self._queue), deque()
            self._changed.notify_all()
        for job in left:
            job.deliver(Failure(Closing()))
        if self._thread.ident is not None:
            self._thread.join(CLOSING)
        if self._thread.is_alive():
            log.error("the batch under way did not end within %.0f s and is left behind", CLOSING)

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        with self._changed:
            return self._waiting()

    @property
    def busy_seconds(self) -> float:
        """For how long the batch under way has been running; 0 when there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def alive(self) -> bool:
        """Whether the worker runs."""
        return self._thread.is_alive()

    def _waiting(self) -> int:
        return sum(job.left for job in self._queue)

    def _drop_dead(self) -> None:
        if any(job.dead() for job in self._queue):
            self._queue = deque(job for job in self._queue if not job.dead())

    def _work(self) -> None:
        while (shares := self._next()) is not None:
            self._compute(shares)

    def _next(self) -> list[_Share] | None:
        """Wait for the next batch; None once the batcher is closed."""
        with self._changed:
            while not self._closed:
                self._drop_dead()
                if not self._queue:
                    self._changed.wait()
                    continue
                first = self._queue[0]
                together = [job for job in self._queue if job.key == first.key]
                patience = first.arrived + self.max_wait - time.monotonic()
                if patience <= 0 or sum(job.left for job in together) >= self.max_batch:
                    return self._take(together)
                self._changed.wait(patience)
            return None

    def _take(self, jobs: Sequence[Job]) -> list[_Share]:
        shares, room = [], self.max_batch
        for job in jobs:
            count = min(job.left, room)
            if count:
                shares.append(_Share(job, job.taken, count))
                job.taken += count
                room -= count
        self._queue = deque(job for job in self._queue if job.left)
        return shares

    def _compute(self, shares: Sequence[_Share]) -> None:
        items = [item for share in shares for item in share.job.items[share.first : share.first + share.count]]
        started = self._busy_since = time.monotonic()
        try:
            self._run(
                shares[0].job.key,
                items,
                lambda scale, last, results: _hand_out(shares, scale, last, results),
                lambda: self._closed or all(share.job.dead() for share in shares),
            )
        except Abandoned:
            self._fail(shares, Closing() if self._closed else TimeoutError())
            return
        except Exception as err:  # whatever it is, the requests of this batch fail and the next batch runs
            if not isinstance(err, UserError):
                log.exception("a batch of %d images failed", len(items))
            self._fail(shares, err)
            return
        finally:
            self._busy_since = None
        seconds = time.monotonic() - started
        mean = seconds / len(items)
        self._image_seconds = mean if not self._image_seconds else (1 - NEWEST) * self._image_seconds + NEWEST * mean
        self._on_batch(len(items), seconds)

    def _fail(self, shares: Sequence[_Share], error: Exception) -> None:
        for share in shares:
            if not share.job.cancelled:
                share.job.deliver(Failure(error))
            self.cancel(share.job)


def _hand_out(shares: Sequence[_Share], scale: int, last: bool, results: Sequence[Any]) -> None:
    at = 0
    for share in shares:
        if not share.job.cancelled:
            share.job.deliver(Part(share.first, scale, last, results[at : at + share.count]))
        at += share.count
