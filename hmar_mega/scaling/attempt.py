"""One attempt of one cell, which every way to submit starts: train as `hmar-mega train` would, record how that ended.

Cells resume from their checkpoints, so that an attempt may be stopped and another started at any time. Nothing heavy is
imported: this process only waits for the one that trains.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import yaml

from hmar_mega.interrupts import REQUEUE_STATUS
from hmar_mega.launchers.outcome import checkpoint_state, find_reason, tail
from hmar_mega.launchers.prepare import CELL_RUN
from hmar_mega.scaling import record
from hmar_mega.scaling.contents import CONTENTS, contents_of

log = logging.getLogger(__name__)

#: Exit status of a wrong configuration, which no machine can mend.
REFUSED_STATUS = 2

#: How torchrun, which ends with 1 itself, tells of it.
_TORCHRUN_REFUSED = re.compile(rf"^\s*exitcode\s*: {REFUSED_STATUS} ", re.M)


def run_cell(folder: Path, name: str, processes: int) -> int:
    """One attempt of one cell, in the foreground; signals are passed on to it.

    Returns:
        0 when the cell is finished, also before, or was stopped by SIGTERM or SIGINT; 75 when SIGUSR1 stopped it and it
        wants to be started again; 2 when its configuration is refused; 1 when the attempt failed.

    Raises:
        UserError: for a cell that the sweep does not have, or that is being trained.
    """
    path = record.cell_folder(folder, name)
    identity = record.read_identity(folder, name)
    if record.read_result(folder, name) is not None:
        return 0
    with record.attempt_lock(path):
        if _write_result(folder, name):  # trained by hand, or killed before it could say so
            return 0
        number = record.count_attempts(path) + 1
        record.record(path, "start", number=number, job=os.environ.get("SLURM_JOB_ID"))
        if (changed := _changed_contents(path, identity)) is not None:
            return _end(path, number, "refused", REFUSED_STATUS, changed)
        output = path / f"attempt-{number}.log"
        status, asked = _train(path, processes, output)
        if _write_result(folder, name):
            return 0
        if asked and status in (0, REQUEUE_STATUS, 1, -signal.SIGTERM):  # torchrun reports any status but 0 as 1
            record.record(path, "end", outcome="stopped", status=status)
            return REQUEUE_STATUS if signal.SIGUSR1 in asked else 0
        text = tail(output)
        refused = status == REFUSED_STATUS or (processes > 1 and _TORCHRUN_REFUSED.search(text) is not None)
        if status == 0 and checkpoint_state(record.run_folder(folder, name)).get("finished") is True:
            return _end(path, number, "failed", status, "trained to its last step, which has no validation with errors")
        return _end(path, number, "refused" if refused else "failed", status, failure_reason(status, output))


def _end(path: Path, number: int, outcome: str, status: int, reason: str) -> int:
    """Record an attempt that did not come to its end, and say so; the exit status."""
    record.record(path, "end", outcome=outcome, status=status, reason=reason)
    log.warning("cell %s, attempt %d %s: %s (%s)", path.name, number, outcome, reason, path / f"attempt-{number}.log")
    return REFUSED_STATUS if outcome == "refused" else 1


def _write_result(folder: Path, name: str) -> bool:
    """Write the result of a cell that is trained to its last step, by its checkpoint, and validated; whether it is."""
    found = checkpoint_state(record.run_folder(folder, name))
    if found.get("finished") is not True or not record.write_result(folder, name, found["step"]):
        return False
    record.record(record.cell_folder(folder, name), "end", outcome="finished", status=0)
    return True


def _changed_contents(path: Path, identity: dict[str, object]) -> str | None:
    """What to say where data or tokenizer are no longer those that the cell was entered with."""
    contents = contents_of(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
    changed = [name for name in CONTENTS.values() if contents[name] not in (None, identity[name])]
    if not changed:
        return None
    words = ", ".join(f"{name} {identity[name]} → {contents[name]}" for name in changed)
    return f"{words} since the sweep was submitted; `hmar-mega sweep submit` again makes cells for what is there now"


def failure_reason(status: int, output: Path) -> str:
    """Why an attempt failed, from its exit status and what it printed."""
    reason: str = find_reason([output])
    if reason:
        return reason
    if status < 0:
        return f"killed by signal {-status}" + (" (often the system, for want of memory)" if status == -9 else "")
    last = [line.strip() for line in tail(output).splitlines() if line.strip()]
    return f"exit status {status}: {last[-1] if last else 'it printed nothing'}"[:200]


def _train(path: Path, processes: int, output: Path) -> tuple[int, list[int]]:
    """(exit status, signals that asked it to stop) of the training process, whose output goes to a file."""
    command = [sys.executable, "-m", "hmar_mega"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, "-m", "hmar_mega"]
    command += ["train", str(path / "config.yaml"), f"run.dir={path / CELL_RUN}"]
    asked: list[int] = []
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

        def pass_on(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            # torchrun dies of USR1, and hands TERM on to its workers
            process.send_signal(signal.SIGTERM if processes > 1 else number)

        with handling((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), pass_on):
            status = process.wait()
    return status, asked


@contextlib.contextmanager
def handling(signals: Sequence[signal.Signals], handler: object) -> Iterator[None]:
    """Have signals handled by a function, as `signal.signal` takes it, and as before afterwards."""
    before = {number: signal.signal(number, handler) for number in signals}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
