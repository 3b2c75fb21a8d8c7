"""What the folder of a sweep says of its cells: what each is, what was tried, how that ended, what was measured.

DIR/cells/<cell>/config.yaml      what the cell trains
DIR/cells/<cell>/cell.json        its identity: settings, and fingerprints of data and tokenizer
DIR/cells/<cell>/run/             its run directory
DIR/cells/<cell>/attempts.jsonl   a line when an attempt starts and one when it ends
DIR/cells/<cell>/attempt-1.log    what it printed
DIR/results/<cell>.json           of a finished cell: its identity and what it measured, a few kB

A cell is finished when its result is there: with `sweep.json` and `results/` another machine goes on, and fits, without
any weights. Nothing heavy is imported, as `sweep run` waits for training in a process of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from hmar_mega.errors import UserError
from hmar_mega.files import NO_LOCKS, write_atomic
from hmar_mega.launchers.prepare import CELL_RUN
from hmar_mega.metrics import read_metrics

log = logging.getLogger(__name__)

CELL_FILE, ATTEMPTS_FILE, LOCK_FILE = "cell.json", "attempts.jsonl", ".attempt.lock"


def cell_folder(folder: Path, name: str) -> Path:
    """Of one cell."""
    return folder / "cells" / name


def run_folder(folder: Path, name: str) -> Path:
    """The run directory of one cell."""
    run: Path = cell_folder(folder, name) / CELL_RUN
    return run


def result_path(folder: Path, name: str) -> Path:
    """The file of a finished cell's result."""
    return folder / "results" / f"{name}.json"


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """`cell`, `identity`, `finished` (time) and `values` of a finished cell; None while it is not finished.

    Raises:
        UserError: for a file that is no result.
    """
    path = result_path(folder, name)
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result["cell"] != name:
            raise ValueError(f"it is of cell {result['cell']}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"{path} is not the result of a cell ({err}); copy it again, or remove it") from None
    return result


def write_result(folder: Path, name: str, steps: int) -> bool:
    """Write what a run measured at its last step; whether it was validated there, which a signal may have put off."""
    run = run_folder(folder, name)
    found = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    rows = [row for row in found if row["kind"] == "val" and row["step"] == steps]
    if not rows or "scale_error" not in rows[-1]:
        return False
    result = {
        "cell": name,
        "finished": now(),
        "steps": steps,
        "values": row_values(rows[-1]),
        "identity": read_identity(folder, name),
    }
    write_atomic(result_path(folder, name), json.dumps(result, indent=1) + "\n")
    return True


def row_values(row: Mapping[str, Any]) -> dict[str, float]:
    """The quantities of a validation row of metrics.jsonl: `loss/all`, `loss/last`, `loss/1` …, and `error/…` alike."""
    values = {}
    for name, kind in (("loss", ""), ("error", "_error")):
        values[f"{name}/all"], values[f"{name}/last"] = row[f"all_scales{kind}"], row[f"last_scale{kind}"]
        for number, value in enumerate(row[f"scale_{name}"], 1):
            if value is not None:
                values[f"{name}/{number}"] = value
    return values


def read_identity(folder: Path, name: str) -> dict[str, Any]:
    """The settings and contents that make a cell what it is, as they were when it was entered.

    Raises:
        UserError: for a cell that the sweep does not have.
    """
    try:
        tree: dict[str, Any] = json.loads((cell_folder(folder, name) / CELL_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} has no cell {name}; `hmar-mega sweep status` lists them") from None
    return tree


def now() -> str:
    """The time, for people and programs."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def attempts_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a cell's attempts; one that a kill cut short is left out."""
    file = path / ATTEMPTS_FILE
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def count_attempts(path: Path) -> int:
    """Attempts that were started."""
    return len([row for row in attempts_of(path) if row["event"] == "start"])


def record(path: Path, event: str, **values: Any) -> None:
    """Add a line to a cell's attempts."""
    with (path / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "time": now(), **values}) + "\n")
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
                if err.errno in NO_LOCKS:
                    log.warning("%s is on a file system without locks: a second attempt would not be noticed", path)
                    break
                if err.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if trial == 9:
                    raise UserError(f"cell {path.name} is being trained by another process; wait for it") from None
                time.sleep(0.1)
        yield


def is_running(path: Path) -> bool:
    """Whether an attempt of a cell holds its lock; never where the file system has no locks."""
    if not (path / LOCK_FILE).exists():
        return False
    with (path / LOCK_FILE).open("a+") as file:  # NFS gives a shared lock only on what can be read
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as err:
            if err.errno in (errno.EAGAIN, errno.EACCES):
                return True
            if err.errno not in NO_LOCKS:
                raise
    return False
