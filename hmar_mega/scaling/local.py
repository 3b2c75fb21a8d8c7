"""Cells as processes of this machine, side by side, each `hmar-mega sweep run DIR CELL`."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hmar_mega.errors import UserError
from hmar_mega.interrupts import REQUEUE_STATUS
from hmar_mega.scaling import state
from hmar_mega.scaling.attempt import handling

log = logging.getLogger(__name__)

#: Seconds between looks at what local processes do.
POLL_SECONDS = 0.2


@dataclass
class _Slot:
    """A place for one cell at a time; `devices` are the GPUs it may see, None for all."""

    devices: str | None
    process: subprocess.Popen[bytes] | None = None
    name: str = ""


@dataclass
class Outcome:
    """What became of the cells of one submission, by name."""

    finished: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    gave_up: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def run_local(
    folder: Path, names: Sequence[str], processes: int, concurrency: int, max_attempts: int,
    minutes: float | None = None,
) -> Outcome:  # fmt: skip
    """Train cells as processes of this machine, `concurrency` at a time, retrying those that fail.

    Args:
        minutes: after which running cells save and stop, to go on in a later call; None: never.
    """
    waiting, outcome = list(names), Outcome()
    slots = [_Slot(devices) for devices in _devices(concurrency, processes)]
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    asked: list[int] = []
    entries = {entry["cell"]: entry for entry in state.read_sweep(folder)}
    with handling((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), lambda number, _: asked.append(number)):
        told = False
        while waiting or any(slot.process for slot in slots):
            stopping = bool(asked) or (ends is not None and time.monotonic() >= ends)
            if stopping and not told:
                log.info("stopping: running cells save themselves; the same command goes on later")
                for slot in slots:
                    if slot.process is not None:
                        slot.process.send_signal(signal.SIGTERM)
                outcome.stopped += waiting
                waiting, told = [], True
            for slot in slots:
                if slot.process is not None and slot.process.poll() is not None:
                    _settle(folder, slot, entries, max_attempts, waiting, outcome, told)
                if slot.process is None and waiting:
                    _start(folder, slot, waiting.pop(0), processes)
            time.sleep(POLL_SECONDS)
    return outcome


def _start(folder: Path, slot: _Slot, name: str, processes: int) -> None:
    environment = dict(os.environ) if slot.devices is None else {**os.environ, "CUDA_VISIBLE_DEVICES": slot.devices}
    command = [sys.executable, "-m", "hmar_mega", "sweep", "run", str(folder), name, "--processes", str(processes)]
    slot.name = name
    slot.process = subprocess.Popen(command, env=environment, start_new_session=True)
    log.info("cell %s: training%s", name, "" if slot.devices is None else f" on GPU {slot.devices}")


def _settle(
    folder: Path, slot: _Slot, entries: dict[str, dict[str, object]], max_attempts: int, waiting: list[str],
    outcome: Outcome, stopping: bool,
) -> None:  # fmt: skip
    """Note how a cell ended; a failed one waits again while it has attempts left."""
    status, slot.process = slot.process.returncode if slot.process is not None else 0, None
    found = state.state_of(folder, entries[slot.name], max_attempts)
    if found.state == "finished":
        loss = "" if found.loss is None else f", validation loss {found.loss:.4f}"
        log.info("cell %s: finished%s", slot.name, loss)
        outcome.finished.append(slot.name)
    elif found.state == "failed" and not stopping:
        log.info("cell %s: retried after failure %d of %d: %s", slot.name, found.attempts, max_attempts, found.reason)
        waiting.append(slot.name)
    elif found.state == "gave up":
        log.warning("cell %s: given up after %d failures, last: %s", slot.name, found.attempts, found.reason)
        outcome.gave_up.append(slot.name)
    elif found.state == "refused":
        log.warning("cell %s: refused, and not tried again as it is: %s", slot.name, found.reason)
        outcome.refused.append(slot.name)
    elif status in (0, REQUEUE_STATUS) or stopping:
        outcome.stopped.append(slot.name)
    else:  # it could not even begin, and said why
        log.warning("cell %s: not begun, exit status %d", slot.name, status)
        outcome.gave_up.append(slot.name)


def _devices(concurrency: int, processes: int) -> list[str | None]:
    """GPUs of every slot; None where this machine has none."""
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return [None] * concurrency
    if count < processes:
        raise UserError(f"processes={processes} a cell, but this machine has {count} GPUs; use at most that many")
    if concurrency * processes > count:
        log.warning("%d cells at a time of %d GPUs each share the %d there are", concurrency, processes, count)
    places = count // processes
    return [",".join(str((slot % places) * processes + i) for i in range(processes)) for slot in range(concurrency)]
