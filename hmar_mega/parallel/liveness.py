"""Naming a rank that is gone, instead of waiting for it: heartbeats in a store of their own, watched around a ring.

A thread of every rank counts up its heartbeat in a store on rank 0 and watches the count of the next rank. A count that
stands still for `timeout` seconds means that this rank is lost; everybody reads so in the store. Rank 0 itself is lost
when its store no longer answers. Then each process says who was lost and ends, as it could only wait for ever. So it
does when a rank reports that training hangs, after showing where it stands itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.parallel.hang import dump_stacks

log = logging.getLogger(__name__)

#: Exit status of a process that lost another one: starting the same command again goes on.
LOST_RANK_STATUS = 76

#: Exit status of a process that another one's error stopped.
STOPPED_STATUS = 1

#: What errors of a collective say when it is another process that failed.
PEER_SIGNS = ("/gloo/transport/", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")

#: Intervals without a heartbeat that are enough once a collective has failed somewhere.
ALARMED_INTERVALS = 5


@dataclass(frozen=True)
class Loss:
    """A rank that the others need not wait for.

    Attributes:
        who: its host and process.
        why: how it was noticed; or its own error.
        stopped: whether it ended by an error of its own.
        hung: whether nobody is lost, but no step ends.
    """

    rank: int
    who: str
    why: str
    stopped: bool = False
    hung: bool = False


@contextlib.contextmanager
def watch_peers(
    dims: ParallelDims, timeout: float, last_checkpoint: Callable[[], str]
) -> Iterator[Callable[[str], None]]:
    """While the block runs, end this process with a message when another one is lost; collective on entry.

    An error of the block itself is raised as it is, and told to the others; one that says only that another process
    failed is answered with who that was. Alone, or with timeout 0, nothing is watched.

    Yields:
        What to call, from any thread, with the reason why training hangs: all processes that can be told show the
        stacks of their threads and end, this one too.

    Args:
        timeout: seconds without a sign of life; the heartbeat comes every second, or three times in this time.
        last_checkpoint: its name, for the message.
    """
    if dims.world_size == 1 or timeout == 0:
        yield lambda why: _end_hung(dims.rank, why)
        return
    watch = _Watch(dims, timeout, last_checkpoint)
    try:
        yield watch.hung
    except BaseException as err:
        watch.failed(err)
        raise
    watch.finished()


def _end_hung(rank: int, why: str) -> None:
    """End a process that has nobody to tell."""
    dump_stacks(rank)
    log.error("rank %d: %s; start the same command again to go on from the last checkpoint", rank, why)
    os._exit(LOST_RANK_STATUS)


def _blames_a_peer(err: BaseException) -> bool:
    """Whether an error says that a collective failed, which is seldom the fault of the process that sees it."""
    plain = type(err) is RuntimeError and any(sign in str(err) for sign in PEER_SIGNS)
    return plain or isinstance(err, dist.DistError)


class _Watch:
    """This rank's heartbeat and what it knows of the others. The heartbeat thread alone waits for the store."""

    def __init__(self, dims: ParallelDims, timeout: float, last_checkpoint: Callable[[], str]) -> None:
        self.rank, self.world, self.timeout = dims.rank, dims.world_size, timeout
        self.interval = min(1.0, timeout / 3)
        self.next = (dims.rank + 1) % dims.world_size
        self.last_checkpoint = last_checkpoint
        self.loss: Loss | None = None
        self.known = threading.Event()  #: `loss` is set
        self.leaving = threading.Event()  #: the main thread ends by itself
        self._outbox: queue.SimpleQueue[tuple[str, str, threading.Event]] = queue.SimpleQueue()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        # under SLURM by the name that the job can be told to avoid
        me = f"host {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}, process {os.getpid()}"
        place: list[Any] = [None]
        if self.rank == 0:
            self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            place = [(os.environ.get("MASTER_ADDR", "localhost"), self.store.port, me)]
        dist.broadcast_object_list(place, src=0)
        host, port, self.main = place[0]
        if self.rank > 0:
            wait = timedelta(seconds=max(30.0, timeout))
            self.store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
        self.store.set(f"who/{self.rank}", me)
        self._answered = time.monotonic()  #: when the store did last
        self._heart = threading.Thread(target=self._live, name="hmar-heartbeat", daemon=True)
        self._heart.start()
        if self.rank > 0:
            threading.Thread(target=self._watch_store, name="hmar-watch", daemon=True).start()

    def finished(self) -> None:
        """The block ended well: this rank may go, and is not missed."""
        self.leaving.set()
        self._tell(f"done/{self.rank}", "")
        if self.rank == 0:
            self._serve("finished", self.world, self.timeout)
        self._close()

    def failed(self, err: BaseException) -> None:
        """The block raised: end the process here if another one is to blame, else tell the others why this one goes."""
        self.leaving.set()
        if _blames_a_peer(err):
            self._tell("alarm", "")
            if self.known.wait(self.timeout + 2 * self.interval):
                self._end()
        reason = str(err).strip() if isinstance(err, Exception) else ""
        own = Loss(self.rank, "", reason or type(err).__name__, stopped=True)
        self._tell("lost", json.dumps(asdict(own)))
        if self.rank == 0:
            self._serve("seen", self.world, 3 * self.interval)
        self._close()

    def hung(self, why: str) -> None:
        """Tell all ranks, this one too, to show their stacks and end. The first reason counts."""
        self._tell("lost", json.dumps(asdict(Loss(self.rank, "", why, hung=True))))
        if not self.known.wait(self.timeout):  # the heartbeat thread waits for a store that does not answer
            _end_hung(self.rank, why)

    def _close(self) -> None:
        self._stop.set()
        self._wake.set()
        self._heart.join(self.interval)

    def _live(self) -> None:
        """The heartbeat thread."""
        count, silent, before = -1, 0.0, time.monotonic()
        try:
            while not self._stop.is_set():
                self.store.add(f"beat/{self.rank}", 1)
                now = time.monotonic()
                self._answered = now
                # a process that was itself suspended for a while must not take the others for silent
                silent, before = silent + min(now - before, 2 * self.interval), now
                moved = self.store.add(f"beat/{self.next}", 0)
                if moved != count:
                    count, silent = moved, 0.0
                elif silent >= self._patience() and not self.store.check([f"done/{self.next}"]):
                    self._accuse(silent)
                self._write()
                if self.loss is None and self.store.check(["lost"]):
                    self._learn(Loss(**json.loads(self.store.get("lost"))))
                    self.store.add("seen", 1)
                self._wake.wait(self.interval)
                self._wake.clear()
        except RuntimeError as err:
            if not self._stop.is_set():
                log.debug("heartbeat store: %s", err)
                self._learn(Loss(0, self.main, "the connection to it is closed"))

    def _watch_store(self) -> None:
        """The second thread: the first one may hang in the store of a rank 0 that is silent."""
        silent, before = 0.0, time.monotonic()
        while not self.known.wait(self.interval) and not self._stop.is_set():
            now = time.monotonic()
            silent = 0.0 if now - self._answered < 2 * self.interval else silent + min(now - before, 2 * self.interval)
            before = now
            if silent >= self.timeout:
                self._learn(Loss(0, self.main, f"no sign of life for {now - self._answered:.0f} s"))

    def _patience(self) -> float:
        alarmed = self.store.check(["alarm"])
        return min(self.timeout, ALARMED_INTERVALS * self.interval) if alarmed else self.timeout

    def _accuse(self, silent: float) -> None:
        key = f"who/{self.next}"
        who = self.store.get(key).decode() if self.store.check([key]) else "it never came"
        loss = Loss(self.next, who, f"no sign of life for {silent:.0f} s")
        self.store.compare_set("lost", "", json.dumps(asdict(loss)))  # the first accusation counts

    def _tell(self, key: str, value: str) -> None:
        """Let the heartbeat thread write something, and wait a moment until it has."""
        written = threading.Event()
        self._outbox.put((key, value, written))
        self._wake.set()
        until = time.monotonic() + 2 * self.interval
        while not written.wait(0.02) and not self.known.is_set() and time.monotonic() < until:
            pass

    def _write(self) -> None:
        while not self._outbox.empty():
            key, value, written = self._outbox.get()
            if key == "lost":
                self.store.compare_set(key, "", value)
            else:
                self.store.set(key, value)
            if key.startswith("done/"):
                self.store.add("finished", 1)
            written.set()

    def _learn(self, loss: Loss) -> None:
        """Remember who was lost; if the main thread does not end by itself soon, it waits for that rank: end it."""
        if self.loss is not None:
            return
        self.loss = loss
        self.known.set()
        # after an error on one rank the others often raise the same in a moment, and should say it themselves
        grace = ALARMED_INTERVALS * self.interval if loss.stopped else 0.5 * self.interval
        threading.Thread(target=self._end_unless_leaving, args=(grace,), daemon=True).start()

    def _end_unless_leaving(self, grace: float) -> None:
        if not self.leaving.wait(grace):
            self._end()

    def _end(self) -> None:
        """Say who was lost, and end the process."""
        with self._ending:
            assert self.loss is not None
            try:
                if self.loss.hung:
                    dump_stacks(self.rank)
                log.error("%s", self._obituary(self.loss))
                if self.rank == 0:
                    self._serve("seen", self.world - 1, 3 * self.interval)
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError, ValueError):
                        stream.flush()
            finally:  # whatever cannot be said, leave
                os._exit(STOPPED_STATUS if self.loss.stopped else LOST_RANK_STATUS)

    def _obituary(self, loss: Loss) -> str:
        if loss.stopped:
            return f"rank {loss.rank} stopped: {loss.why}"
        onward = f"last checkpoint: {self._last_checkpoint()}; start the same command again to go on from it"
        if loss.hung:
            return f"rank {loss.rank} reports: {loss.why}; {onward}"
        if loss.rank == self.rank:
            return f"the others have given up this rank, {loss.rank} ({loss.who}): {loss.why}; {onward}"
        return f"lost rank {loss.rank} ({loss.who}): {loss.why}; {onward}"

    def _last_checkpoint(self) -> str:
        """Its name, unless the disk does not say it within two intervals: then the process leaves without it."""
        found = ["unknown"]

        def ask() -> None:
            with contextlib.suppress(Exception):
                found[0] = self.last_checkpoint()

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * self.interval)
        return found[0]

    def _serve(self, counter: str, wanted: int, most: float) -> None:
        """Rank 0 keeps the store until so many ranks have counted themselves in, at most `most` seconds."""
        until = time.monotonic() + most
        while self.store.add(counter, 0) < wanted and time.monotonic() < until:
            time.sleep(0.02)
