"""One run at a time in a run directory: a lock that the kernel takes back when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from hmar_mega.errors import UserError
from hmar_mega.files import NO_LOCKS, cannot_write
from hmar_mega.parallel.dims import ParallelDims

log = logging.getLogger(__name__)

#: Of a run directory, while a run works in it.
LOCK_FILE = ".lock"


@contextlib.contextmanager
def run_lock(folder: Path, dims: ParallelDims) -> Iterator[None]:
    """Hold the lock of a run directory, made when missing; rank 0 holds it for all. Collective.

    Raises:
        UserError: on every rank, when another run holds it.
    """
    refusal: str | None = None
    holding = contextlib.ExitStack()
    with holding:
        if dims.is_main:
            try:
                holding.enter_context(_lock(folder))
            except UserError as err:
                refusal = str(err)
        verdict = [refusal]
        dist.broadcast_object_list(verdict, src=0)
        if verdict[0] is not None:
            raise UserError(verdict[0])
        yield


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(folder)
    except OSError as err:
        raise cannot_write(folder / LOCK_FILE, err) from None
    try:
        yield
    finally:
        # removed while it is held, and `_take` makes sure of its name: nobody can hold a file that is gone
        (folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only where nothing came of the run


def _take(folder: Path) -> int:
    """The open, locked file; UserError when another process has it."""
    path, trials = folder / LOCK_FILE, 0
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(handle, 4096, 0)
            os.close(handle)
            trials += 1
            if trials < 5:  # `status` holds it for a moment to see whether it is free
                time.sleep(0.1)
                continue
            raise UserError(_refusal(folder, text)) from None
        except OSError as err:
            if err.errno not in NO_LOCKS:
                os.close(handle)
                raise
            log.warning("%s is on a file system without locks: a second run there would not be noticed", folder)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)  # its holder removed it a moment ago
    about = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    about["since"] = datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(about).encode(), 0)
    return handle


def _refusal(folder: Path, text: bytes) -> str:
    who = "another process"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        about = json.loads(text)
        job = f" (SLURM job {about['job']})" if about["job"] else ""
        who = f"process {about['pid']}{job} on {about['host']} since {about['since']}"
    return (
        f"run.dir={folder} is in use by {who}; wait until that run has ended, stop it (it saves itself when it gets "
        "SIGTERM), or choose another run.dir"
    )
