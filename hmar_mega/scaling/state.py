"""Where every cell of a sweep stands, as its folder says: what was tried, how it ended and why.

DIR/sweep.json                    the cells in their order, their settings and what they need
DIR/cells/<cell>/config.yaml      what the cell trains
DIR/cells/<cell>/run/             its run directory
DIR/cells/<cell>/attempts.jsonl   a line when an attempt starts and one when it ends
DIR/cells/<cell>/attempt-1.log    what it printed
DIR/arrays/                       SLURM arrays: script, cells by task, job number
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from hmar_mega.checkpoint.sources import find_checkpoint
from hmar_mega.config_io import config_to_yaml, load_config
from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic
from hmar_mega.metrics import read_metrics
from hmar_mega.scaling.cells import Cell, identity
from hmar_mega.scaling.plan import PlannedCell, plan_json
from hmar_mega.scaling.spec import SweepSpec

log = logging.getLogger(__name__)

SWEEP_FILE, ATTEMPTS_FILE, LOCK_FILE = "sweep.json", "attempts.jsonl", ".attempt.lock"

StateName = Literal["new", "queued", "running", "stopped", "failed", "gave up", "finished"]

#: What the log of a failed run says, and what that means; the first that matches counts.
REASONS = (
    (re.compile(r"out of memory|OutOfMemoryError|Cannot allocate memory|DefaultCPUAllocator", re.I), "out of memory"),
    (re.compile(r"loss or gradient that is not finite"), "loss or gradients not finite"),
    (re.compile(r"No space left|Disk quota exceeded|cannot write"), "disk full or not writable"),
    (re.compile(r"NCCL.*(timeout|timed out)|Watchdog caught collective", re.I), "NCCL timeout"),
    (re.compile(r"lost rank"), "a process was lost"),
)


@dataclass(frozen=True)
class CellState:
    """Where a cell stands.

    Attributes:
        attempts: failed ones.
        reason: of the last failure, or why it is where it is; empty where nothing need be said.
        step, steps: last step logged, of all.
        loss: last validation loss over all scales, None before the first.
    """

    name: str
    state: StateName
    attempts: int
    reason: str
    step: int
    steps: int
    loss: float | None


def cell_folder(folder: Path, name: str) -> Path:
    """Of one cell."""
    return folder / "cells" / name


def write_sweep(folder: Path, spec: SweepSpec, planned: Sequence[PlannedCell]) -> list[str]:
    """Enter cells into a sweep folder: new ones are added, known ones are kept as they are.

    Returns:
        Names of the cells that are new.

    Raises:
        UserError: when a finished or running cell comes back with other settings; nothing is written then.
    """
    refuse_changed(folder, [item.cell for item in planned])
    known = {entry["cell"]: entry for entry in read_sweep(folder)} if (folder / SWEEP_FILE).exists() else {}
    entries = {entry["cell"]: entry for entry in plan_json(planned)}
    for item in planned:
        path = cell_folder(folder, item.cell.name) / "config.yaml"
        if not path.exists():
            write_atomic(path, config_to_yaml(item.config))
    kept = {n: entry for n, entry in known.items() if n not in entries and _attempts(cell_folder(folder, n))}
    keys = {item.cell.key: item.cell.name for item in planned}
    for replaced in [n for n in kept if n.rsplit("-", 1)[0] in keys]:  # neither finished nor running
        log.info("cell %s was not finished and has other settings now: %s", replaced, keys[replaced.rsplit("-", 1)[0]])
        del kept[replaced]
    tree = {"name": spec.name, "max_attempts": spec.max_attempts, "cells": [*kept.values(), *entries.values()]}
    write_atomic(folder / SWEEP_FILE, json.dumps(tree, indent=1))
    return [n for n in entries if n not in known]


def read_sweep(folder: Path) -> list[dict[str, Any]]:
    """The cells of a sweep folder as `plan_json` described them.

    Raises:
        UserError: when it is no sweep folder.
    """
    cells: list[dict[str, Any]] = _sweep_file(folder)["cells"]
    return cells


def recorded_max_attempts(folder: Path) -> int:
    """The sweep's `max_attempts` when it was last submitted.

    Raises:
        UserError: when it is no sweep folder.
    """
    return int(_sweep_file(folder)["max_attempts"])


def _sweep_file(folder: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UserError(
            f"{folder} holds no sweep ({SWEEP_FILE}: {err}); start one with `hmar-mega sweep submit SWEEP.yaml`"
        ) from None
    return tree


def refuse_changed(folder: Path, cells: Sequence[Cell]) -> None:
    """Raise UserError when a cell is finished, or being trained, with other settings than it has now."""
    begun: dict[str, Path] = {}
    for path in sorted((folder / "cells").glob("*")):
        if is_recorded_finished(path) or is_running(path):
            begun[path.name.rsplit("-", 1)[0]] = path
    changed = []
    for cell in cells:
        other = begun.get(cell.key)
        if other is None or other.name == cell.name:
            continue
        before, now = identity(load_config(other / "config.yaml")), identity(cell.config)
        keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        words = ", ".join(f"{key} {before.get(key)} → {now.get(key)}" for key in keys[:4])
        changed.append(f"{other.name} ({words}{' …' if len(keys) > 4 else ''})")
    if changed:
        raise UserError(
            f"{folder} has cells trained with other settings: {'; '.join(changed[:3])}"
            f"{f' and {len(changed) - 3} more' if len(changed) > 3 else ''}. One fit must not mix them: undo "
            "the change, or give the sweep another dir"
        )


def state_of(folder: Path, entry: dict[str, Any], max_attempts: int, queued: frozenset[str] = frozenset()) -> CellState:
    """Where one cell stands.

    Args:
        entry: of `read_sweep`.
        queued: cells that wait in a SLURM queue.
    """
    path, name = cell_folder(folder, entry["cell"]), entry["cell"]
    attempts = _attempts(path)
    ends = [row for row in attempts if row["event"] == "end"]
    failures = [row for row in ends if row["outcome"] == "failed"]
    lost = len([row for row in attempts if row["event"] == "start"]) - len(ends)
    reason = failures[-1]["reason"] if failures else ""
    running = is_running(path)
    failed = len(failures) + max(0, lost - running)
    state: StateName
    if ends and ends[-1]["outcome"] == "finished":
        state, reason = "finished", ""
    elif running:
        state = "running"
    elif name in queued:
        state = "queued"
    elif not attempts:
        state = "new"
    elif attempts[-1]["event"] == "end" and attempts[-1]["outcome"] == "stopped":
        state, reason = "stopped", "asked to stop; goes on from its checkpoint"
    else:
        if attempts[-1]["event"] == "start":
            reason = "ended without a word: killed, or its machine went down"
        state = "failed" if failed < max_attempts else "gave up"
    step, loss = _progress(path / "run")
    return CellState(name, state, failed, reason, step, entry["steps"], loss)


def is_finished(folder: Path) -> bool:
    """Whether the run of a cell's folder has trained to its last step, by its checkpoint."""
    checkpoint = find_checkpoint(folder / "run")
    return checkpoint is not None and bool(json.loads((checkpoint / "state.json").read_text())["finished"])


def is_recorded_finished(path: Path) -> bool:
    """Whether the last word on a cell's folder is that it finished."""
    attempts = _attempts(path)
    return bool(attempts) and attempts[-1].get("outcome") == "finished"


def failure_reason(status: int, log: str) -> str:
    """Why an attempt failed, from its exit status and its last lines."""
    for pattern, words in REASONS:
        if pattern.search(log):
            return words
    said = re.findall(r"^hmar-mega: (.+)$", log, flags=re.M)
    if said:
        return str(said[-1])
    if status < 0:
        return f"killed by signal {-status}" + (" (often the system, for want of memory)" if status == -9 else "")
    last = [line.strip() for line in log.splitlines() if line.strip()]
    return f"exit status {status}: {last[-1] if last else 'it printed nothing'}"[:200]


def record(path: Path, event: str, **values: Any) -> None:
    """Add a line to a cell's attempts."""
    row = {"event": event, "time": datetime.now().astimezone().isoformat(timespec="seconds"), **values}
    with (path / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def attempt_lock(path: Path) -> Iterator[None]:
    """Hold a cell, so that no two attempts run at once; the system takes it back when the holder dies.

    Raises:
        UserError: when another attempt has it.
    """
    with (path / LOCK_FILE).open("w") as file:
        for trial in range(10):  # `status` holds it for a moment to see whether it is free
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as err:
                if err.errno not in (errno.EAGAIN, errno.EACCES) or trial == 9:
                    raise UserError(f"cell {path.name} is being trained by another process; wait for it") from None
                time.sleep(0.1)
        yield


def is_running(path: Path) -> bool:
    """Whether an attempt of a cell holds its lock."""
    if not (path / LOCK_FILE).exists():
        return False
    with (path / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def count_attempts(path: Path) -> int:
    """Attempts that were started."""
    return len([row for row in _attempts(path) if row["event"] == "start"])


def _attempts(path: Path) -> list[dict[str, Any]]:
    file = path / ATTEMPTS_FILE
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def _progress(run: Path) -> tuple[int, float | None]:
    """(last step, last validation loss) of a run's figures."""
    if not (run / "metrics.jsonl").exists():
        return 0, None
    rows = read_metrics(run)
    losses = [row["all_scales"] for row in rows if row["kind"] == "val"]
    return max((row["step"] for row in rows), default=0), losses[-1] if losses else None
