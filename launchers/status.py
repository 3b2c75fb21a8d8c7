"""Where runs stand: a state machine over the notes of their jobs, SLURM's queue, figures and checkpoints.

queued → starting → running → completed
   ↑                   ├→ preempted ─┐
   └──── requeued ←────┴→ (lost) ────┤
                       ├→ cancelled  │
                       └→ failed  ←──┘ (restarts used, or nothing in the queue)
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hmar_mega.launchers.events import LOCAL_JOB, Event, read_events
from hmar_mega.launchers.outcome import checkpoint_state, find_reason, logs_of, tail
from hmar_mega.launchers.prepare import LAUNCH_FOLDER

#: What SLURM calls a job that waits, and one that works or is about to go.
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "RESV_DEL_HOLD"}
WORKING = {"RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING"}

#: Seconds in which a job that was submitted or requeued may be in no list of SLURM.
GRACE = 30

_STEP_LINE = re.compile(r"^(?P<time>\d\d:\d\d:\d\d) step +(?P<step>\d+)/(?P<total>\d+) ", re.M)


@dataclass(frozen=True)
class RunStatus:
    """One row of the table.

    Attributes:
        step, total: optimizer steps done and wanted; None while unknown.
        seconds_left: at the pace of the last logged steps.
        reason: why it waits or failed; or a note.
    """

    run: str
    state: str
    step: int | None = None
    total: int | None = None
    seconds_left: float | None = None
    job: str = ""
    nodes: str = ""
    restarts: int = 0
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class QueuedJob:
    """A job as `squeue` shows it."""

    state: str
    reason: str


def ask_queue() -> dict[str, QueuedJob] | None:
    """The jobs of SLURM's queue by number; None where there is no SLURM that answers."""
    try:
        done = subprocess.run(
            ["squeue", "-h", "-o", "%A|%T|%r"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    rows = (line.strip().split("|", 2) for line in done.stdout.splitlines())
    return {number: QueuedJob(state, reason) for number, state, reason in rows}


def read_status(run: Path, queue: Mapping[str, QueuedJob] | None, now: float | None = None) -> RunStatus:
    """Where a run stands.

    Args:
        queue: SLURM's jobs; None where it cannot be asked: then the notes alone count.
        now: seconds since 1970; default the clock.
    """
    now = time.time() if now is None else now
    events = read_events(run)
    state = checkpoint_state(run)
    if not events:
        return _without_jobs(run, state)
    last = events[-1]
    job, attempt = last.about.get("next", last.job), last.attempt
    logs = logs_of(run, job, attempt)
    step, total, pace = progress(run, logs, state)
    name, reason = _decide(last, queue.get(job) if queue is not None else None, queue is not None, now)
    if name == "running" and not _has_step(run, logs):
        name = "starting"
    if state.get("finished") is True and name != "running" and last.time <= _saved(run):
        name, reason = "completed", ""  # a checkpoint before the last note may be the last of an earlier, shorter run
    if name == "failed":
        reason = "; ".join(dict.fromkeys(part for part in (find_reason(logs), reason) if part))
    started = [event for event in events if event.kind == "started" and event.job == job]
    left = (total - step) * pace if name == "running" and None not in (step, total, pace) else None  # type: ignore[operator]
    return RunStatus(
        run=str(run), state=name, step=step, total=total, seconds_left=left, job=job,
        nodes=started[-1].about.get("nodes", "") if started and name in ("starting", "running") else "",
        restarts=_restarts(run, attempt), reason=reason,
    )  # fmt: skip


def _decide(last: Event, queued: QueuedJob | None, asked: bool, now: float) -> tuple[str, str]:
    """State and reason out of the last note and what SLURM says of the job."""
    said = last.about.get("reason", "")
    if last.kind in ("completed", "cancelled", "failed"):
        return last.kind, said
    if last.job == LOCAL_JOB:
        return ("running", "") if _alive(last) else ("failed", "its process is gone")
    waiting = queued is not None and queued.state in WAITING
    why = f"waits: {queued.reason}" if queued is not None and waiting and queued.reason != "None" else ""
    if last.kind in ("preempted", "requeued", "bad_node", "chained"):
        name = "preempted" if last.kind == "preempted" else "requeued"
        if waiting:
            return "requeued", "; ".join(part for part in (said, why) if part)
        if queued is None and asked and now - last.time > GRACE:
            return "failed", f"{said}; then its job left the queue".removeprefix("; ")
        return name, said
    if last.kind == "submitted":
        if queued is None and asked and now - last.time > GRACE:
            return "failed", "its job left the queue before it started"
        return ("starting", "") if queued is not None and queued.state in WORKING else ("queued", why)
    # started, preempting
    if waiting:
        return "requeued", "; ".join(part for part in ("SLURM requeued it", why) if part)
    if queued is None and asked:
        return "failed", "its job left the queue without a word: killed, over its time limit, or its node died"
    return ("running", "was asked to save and start again") if last.kind == "preempting" else ("running", "")


def _alive(started: Event) -> bool:
    """Whether the process of a run on this machine is there; one on another machine is taken to be."""
    if started.about.get("nodes") != socket.gethostname():
        return True
    try:
        os.kill(int(started.about.get("process", "0")), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _without_jobs(run: Path, state: Mapping[str, Any]) -> RunStatus:
    """A run that was started by hand: its lock says whether somebody works in it."""
    step, total, _ = progress(run, [], state)
    name, reason = "stopped", "started without hmar-mega launch"
    held = _held(run / ".lock")
    if state.get("finished") is True:
        name = "completed"
    elif held is not False:
        name = "running" if step is not None else "starting"
        if held is None:
            reason += "; its file system has no locks: it may be gone"
    elif (run / ".lock").exists():
        reason += "; it was killed"
    return RunStatus(str(run), name, step, total, None, reason=reason)


def _held(lock: Path) -> bool | None:
    """Whether a process holds the lock of a run, which the dead do not; None where the system cannot say."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as err:
        # another user's file, or a file system without locks
        if err.errno in (errno.EACCES, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            return None
        raise
    return False


def _saved(run: Path) -> float:
    """When the latest checkpoint was written, in seconds since 1970; 0 where there is none."""
    folder = run / "checkpoints"
    try:
        return (folder / (folder / "latest").read_text().strip() / "state.json").stat().st_mtime
    except OSError:
        return 0.0


def busy(run: Path, queue: Mapping[str, QueuedJob] | None) -> str:
    """What works on a run or waits to: `job 5 (RUNNING)`, or the process here; empty when nothing does.

    Args:
        queue: SLURM's jobs; None where it cannot be asked.
    """
    events = read_events(run)
    if not events or events[-1].kind in ("completed", "cancelled", "failed"):
        return ""
    last = events[-1]
    if last.job == LOCAL_JOB:
        return f"process {last.about.get('process')} on {last.about.get('nodes')}" if _alive(last) else ""
    job = last.about.get("next", last.job)
    queued = queue.get(job) if queue is not None else None
    return "" if queued is None or queued.state not in WAITING | WORKING else f"job {job} ({queued.state})"


def progress(run: Path, logs: Iterable[Path], state: Mapping[str, Any]) -> tuple[int | None, int | None, float | None]:
    """Steps done, steps wanted and seconds a step, as far as figures, logs and checkpoint say."""
    rows = [row for row in _last_rows(run / "metrics.jsonl") if row.get("kind") == "train"]
    step, total = state.get("step"), state.get("last_step")
    pace = None
    if rows:
        step = max(step or 0, int(rows[-1]["step"]))
        if len(rows) > 1:
            one, other = rows[-2], rows[-1]
            images, steps = other["images"] - one["images"], other["step"] - one["step"]
            if images > 0 and steps > 0 and other["images_per_second"] > 0:
                pace = images / steps / other["images_per_second"]
    for path in logs:
        if lines := list(_STEP_LINE.finditer(tail(path))):
            total = int(lines[-1]["total"])
            step = max(step or 0, int(lines[-1]["step"]))
            break
    return step, total, pace


def _has_step(run: Path, logs: Iterable[Path]) -> bool:
    """Whether this attempt has logged a step."""
    return any(_STEP_LINE.search(tail(path)) for path in logs)


def _last_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in tail(path, 20_000).splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the first is cut by where the tail begins, the last by a kill
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _restarts(run: Path, attempt: int) -> int:
    try:
        return int((run / LAUNCH_FOLDER / "restarts").read_text())
    except (OSError, ValueError):
        return attempt
