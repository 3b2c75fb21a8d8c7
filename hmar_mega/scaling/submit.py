"""Running cells: one attempt of one cell, local processes side by side, and SLURM arrays.

Every way comes down to `hmar-mega sweep run DIR CELL`, which trains one cell as `hmar-mega train` would and records how
it ended. Cells resume from their checkpoints, so that all of this may be stopped and started again at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import FrameType

from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic
from hmar_mega.interrupts import REQUEUE_STATUS
from hmar_mega.scaling import state

log = logging.getLogger(__name__)

#: Seconds between looks at what local processes do.
POLL_SECONDS = 0.2

#: Characters of a log that are searched for the reason of a failure.
LOG_TAIL = 20_000


def run_cell(folder: Path, name: str, processes: int) -> int:
    """One attempt of one cell, in the foreground; signals are passed on to it.

    Returns:
        0 when the cell is finished, also before, or was stopped by SIGTERM or SIGINT; 75 when SIGUSR1 stopped it and it
        wants to be started again; 1 when the attempt failed.

    Raises:
        UserError: for a cell that the sweep does not have, or that is being trained.
    """
    path = state.cell_folder(folder, name)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{folder} has no cell {name}; `hmar-mega sweep status` lists them")
    with state.attempt_lock(path):
        if state.is_finished(path):
            if not state.is_recorded_finished(path):  # trained by hand, or killed before it could say so
                state.record(path, "end", outcome="finished", status=0)
            return 0
        number = state.count_attempts(path) + 1
        state.record(path, "start", number=number, job=os.environ.get("SLURM_JOB_ID"))
        output = path / f"attempt-{number}.log"
        status, asked = _train(path, processes, output)
        if state.is_finished(path):
            state.record(path, "end", outcome="finished", status=status)
            return 0
        if asked and status in (0, REQUEUE_STATUS, 1, -signal.SIGTERM):  # torchrun reports any status but 0 as 1
            state.record(path, "end", outcome="stopped", status=status)
            return REQUEUE_STATUS if signal.SIGUSR1 in asked else 0
        reason = state.failure_reason(status, output.read_text(errors="replace")[-LOG_TAIL:])
        state.record(path, "end", outcome="failed", status=status, reason=reason)
        log.warning("cell %s, attempt %d failed: %s (%s)", name, number, reason, output)
        return 1


def _train(path: Path, processes: int, output: Path) -> tuple[int, list[int]]:
    """(exit status, signals that asked it to stop) of the training process, whose output goes to a file."""
    command = [sys.executable, "-m", "hmar_mega"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, "-m", "hmar_mega"]
    command += ["train", str(path / "config.yaml"), f"run.dir={path / 'run'}"]
    asked: list[int] = []
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

        def pass_on(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            # torchrun dies of USR1, and hands TERM on to its workers
            process.send_signal(signal.SIGTERM if processes > 1 else number)

        with _handling((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), pass_on):
            status = process.wait()
    return status, asked


@contextlib.contextmanager
def _handling(signals: Sequence[signal.Signals], handler: object) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


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
    with _handling((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), lambda number, _: asked.append(number)):
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
