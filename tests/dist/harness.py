"""Several gloo processes inside a test: `run_ranks(4, function, argument)` gives what each rank's call returned.

The processes fork from a server that has torch, Megatron-core, DeepSpeed and our training modules imported already, so
that starting them costs next to nothing after the first time. They compute on the CPU with one thread each, find each
other through a store that the test process keeps (no port to race for), and never outlive the call: when a rank fails
or the time is up, the others are killed and the error shows every rank's traceback, or the stack it hung in.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: More would only wait for each other on the two cores that these tests are meant for.
MAX_RANKS = 8

#: Imported once by the server; the children are forked with them. hmar_mega.train, which brings Megatron-core, comes
#: before deepspeed because it silences what the two say while they are imported; pytest, because the children import
#: the test modules.
PRELOADED = [
    "torch", "pytest", "hmar_mega.train", "deepspeed", "torch._dynamo",
    # what every run would import after it has started, in each of its processes
    "hmar_mega.parallel.mpu", "megatron.core.models.backends", "deepspeed.comm.mori", "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.superoffload.superoffload_stage3", "PIL.PngImagePlugin",
]  # fmt: skip

#: What the server, and so every rank, sees of the machine. DS_ACCELERATOR is read while deepspeed is imported.
SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

#: Seconds that ranks usually get to end by themselves after another one failed.
GRACE = 5.0

#: Lines shown of what a failed rank printed.
SHOWN_LINES = 30

SHARED_MEMORY = Path("/dev/shm")


class RanksFailed(AssertionError):
    """Not every rank returned; the message holds what is known of each.

    Attributes:
        exit_codes: of the processes by rank; −9 for one that was killed.
    """

    def __init__(self, message: str, exit_codes: list[int | None]) -> None:
        super().__init__(message)
        self.exit_codes = exit_codes


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0, grace: float = GRACE) -> list[Any]:
    """Call `function(*args)` in `world` processes that RANK, WORLD_SIZE, MASTER_ADDR … make one process group.

    Args:
        world: 1 to 8 processes.
        function: a function at the top of a module; its arguments and result must pickle.
        timeout: seconds until what still runs is killed.
        grace: seconds that ranks get to end by themselves after another one failed.

    Returns:
        What each rank's call returned, in the order of ranks.

    Raises:
        RanksFailed: when a rank raised, died or hung.
    """
    if not 1 <= world <= MAX_RANKS:
        raise ValueError(f"world={world}: use 1 to {MAX_RANKS} processes")
    context = _fork_context()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [_Rank(context, Path(folder), rank, world, store.port, function, args) for rank in range(world)]
        try:
            _wait(ranks, time.monotonic() + timeout, grace)
        finally:
            for rank in ranks:
                rank.stop()
            _remove_shared_memory(store.port, world)
        if not all(rank.returned for rank in ranks):
            report = "\n".join(rank.report() for rank in ranks)
            raise RanksFailed(f"{function.__name__} on {world} ranks:\n{report}", [r.process.exitcode for r in ranks])
        return [rank.result for rank in ranks]


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def shared_memory_names(port: int, world: int) -> list[str]:
    """Files in /dev/shm that carry this run's port and rank, as DeepSpeed names its buffers."""
    ends = tuple(f"_{port}_{rank}" for rank in range(world))
    return sorted(p.name for p in SHARED_MEMORY.glob("*") if p.name.endswith(ends))


class _Rank:
    """One process, seen from the test."""

    def __init__(
        self, context: Any, folder: Path, rank: int, world: int, port: int, function: Callable[..., Any], args: Any
    ) -> None:
        self.rank = rank
        self.returned = False
        self.result: Any = None
        self.failure = ""
        self._output, self._stack = folder / f"output-{rank}", folder / f"stack-{rank}"
        self.pipe, theirs = context.Pipe(duplex=False)
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is the test's: ranks connect, none serves
        }  # fmt: skip
        self.process = context.Process(
            target=_child,
            args=(theirs, {k: str(v) for k, v in environment.items()}, self._output, self._stack, function, args),
            daemon=True,
        )
        self.process.start()
        theirs.close()

    @property
    def running(self) -> bool:
        """Whether an outcome is still to come."""
        return not self.pipe.closed

    def receive(self) -> None:
        """Take the outcome, or note that the process died without one."""
        try:
            self.returned, outcome = self.pipe.recv()
        except EOFError:
            self.process.join()
            self.failure = f"died with exit status {self.process.exitcode}"
        else:
            if self.returned:
                self.result = outcome
            else:
                self.failure = outcome
        self.pipe.close()

    def hang(self, why: str) -> None:
        """Ask the process where it is, for the report."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        stack = self._stack.read_text() if self._stack.exists() else ""
        self.failure = f"killed: {why}; it was in\n{stack}"
        self.pipe.close()

    def stop(self) -> None:
        """Make sure that the process is gone."""
        self.process.join(GRACE if self.returned else 0.5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()

    def report(self) -> str:
        """What became of this rank, with the end of what it printed."""
        printed = self._output.read_text(errors="replace").splitlines() if self._output.exists() else []
        tail = "".join(f"    | {line}\n" for line in printed[-SHOWN_LINES:])
        return f"rank {self.rank}: {'returned' if self.returned else self.failure}\n{tail}"


def _wait(ranks: list[_Rank], deadline: float, grace: float) -> None:
    """Receive every rank's outcome until the deadline, which the first failure draws near."""
    why = "the time was up"
    while waiting := [rank for rank in ranks if rank.running]:
        ready = connection.wait([rank.pipe for rank in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in waiting:
                rank.hang(why)
            return
        for rank in waiting:
            if rank.pipe in ready:
                rank.receive()
                if not rank.returned and time.monotonic() + grace < deadline:
                    deadline, why = time.monotonic() + grace, f"rank {rank.rank} had failed"


def _child(
    pipe: Any, environment: dict[str, str], output: Path, stack: Path, function: Callable[..., Any], args: Any
) -> None:
    """The life of a rank."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.register(signal.SIGUSR1, file=stack.open("w"))
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported is nobody's garbage, and looking at it would copy its memory
    try:
        outcome = pickle.dumps((True, function(*args)))
    except BaseException:
        outcome = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    pipe.send_bytes(outcome)


def _fork_context() -> Any:
    """The forkserver, started with one thread and no GPU when it does not run yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _environment(SERVER_ENVIRONMENT):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _remove_shared_memory(port: int, world: int) -> None:
    for name in shared_memory_names(port, world):
        (SHARED_MEMORY / name).unlink(missing_ok=True)
