"""Processes that read and decode samples, for work that threads of one Python process cannot share out.

They come from a server that is forked before anything of the run's state exists, so that no lock, thread or GPU context
of training is inherited; they ignore the signals by which a run is asked to stop, and end with the process they serve.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import queue
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from hmar_mega.data.samples import Request, SampleSet, Share
from hmar_mega.errors import UserError


class WorkerProcesses:
    """`count` processes that each have the set open; any thread may call."""

    def __init__(self, count: int, samples: SampleSet) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._idle: queue.SimpleQueue[tuple[BaseProcess, Connection]] = queue.SimpleQueue()
        self._processes: list[BaseProcess] = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, samples), name=f"hmar-data-{number}", daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.put((process, ours))
        # At its end Python asks its children to end and waits for them; these do not listen to SIGTERM.
        multiprocessing.util.Finalize(self, _kill, args=(self._processes,), exitpriority=10)

    def load_share(self, request: Request) -> Share:
        """What `SampleSet.load_share` gives, from a process that has nothing else to do.

        Raises:
            UserError: when that process died; or whatever it raised.
        """
        process, connection = self._idle.get()
        try:
            connection.send(request)
            answer = connection.recv()
        except (EOFError, OSError):
            process.join(1.0)
            raise UserError(
                f"reader process {process.pid} died (exit status {process.exitcode}); a status of -9 usually means "
                "that the machine ran out of memory: lower data.workers or data.prefetch"
            ) from None
        finally:
            self._idle.put((process, connection))
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Share)
        return answer

    def close(self) -> None:
        """End the processes, whatever they are doing; calls under way fail."""
        _kill(self._processes)


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _serve(connection: Connection, samples: SampleSet) -> None:
    import torch

    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = connection.recv()
            try:
                connection.send(samples.load_share(request))
            except Exception as err:
                connection.send(err)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
