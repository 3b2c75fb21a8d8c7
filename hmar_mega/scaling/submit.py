"""Running cells: local processes side by side, and SLURM arrays; both start `hmar-mega sweep run DIR CELL`."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic
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


@dataclass(frozen=True)
class Script:
    """An sbatch script and where it is, or would be."""

    path: Path
    text: str


def render_array(
    folder: Path, name: str, names: Sequence[str], processes: int, concurrency: int, options: Sequence[str] = (),
    dependency: str | None = None, write: bool = True,
) -> Script:  # fmt: skip
    """The sbatch script of an array with one task a cell, written beside the list of its cells.

    Args:
        options: further `#SBATCH` lines, such as `--partition=gpu`.
        dependency: as sbatch takes it, such as `afterok:123`.
        write: False only says what would be written.
    """
    arrays = folder / "arrays"
    number = len(list(arrays.glob("*.cells"))) + 1
    listed = arrays / f"{number:03d}.cells"
    lines = [*options, *([f"--dependency={dependency}"] if dependency else [])]
    values = {
        "NAME": name, "LAST": str(len(names) - 1), "LIMIT": str(concurrency), "GPUS": str(processes),
        "OUTPUT": str((arrays / f"{number:03d}-%a.out").resolve()), "CELLS": str(listed.resolve()),
        "FOLDER": str(folder.resolve()), "PYTHON": sys.executable,
        "OPTIONS": "\n".join(f"#SBATCH {line}" for line in lines),
    }  # fmt: skip
    template = resources.files("hmar_mega.launchers").joinpath("sweep_array.sbatch").read_text(encoding="utf-8")
    script = Script(arrays / f"{number:03d}.sbatch", re.sub(r"@([A-Z]+)@", lambda match: values[match[1]], template))
    if write:
        write_atomic(listed, "".join(f"{cell}\n" for cell in names))
        write_atomic(script.path, script.text)
    return script


def submit_array(script: Path) -> str:
    """Give an array to SLURM; returns and records its job number.

    Raises:
        UserError: when there is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not on this machine; the script is {script}: submit it where SLURM is, or --local")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    write_atomic(script.with_suffix(".job"), job + "\n")
    return job


def queued_cells(folder: Path) -> frozenset[str]:
    """Cells whose tasks SLURM still has, by squeue; none where there are no arrays."""
    jobs = {path.read_text().strip(): path.with_suffix(".cells") for path in sorted((folder / "arrays").glob("*.job"))}
    if not jobs:
        return frozenset()
    if shutil.which("squeue") is None:
        log.warning("squeue is not on this machine: queued cells of arrays %s look new", ", ".join(jobs))
        return frozenset()
    command = ["squeue", "--noheader", "--array", "--format=%F %K", "--me"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"squeue failed, so cells might be submitted twice: {done.stderr.strip()}")
    found = set()
    for line in done.stdout.splitlines():
        job, _, task = line.strip().partition(" ")
        if job in jobs and task.isdecimal():
            found.add(jobs[job].read_text().split()[int(task)])
    return frozenset(found)
