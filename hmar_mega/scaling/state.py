"""A sweep's folder: entering cells into it, refusing changed ones, and where every cell stands.

DIR/sweep.json   the cells in their order with what they need, and the configuration they start from
DIR/arrays/001/  of a SLURM array: script, cells by task, job numbers

and what `record.py` says of cells and results.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hmar_mega.config import Config
from hmar_mega.config_io import config_to_yaml
from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic
from hmar_mega.launchers.events import read_events
from hmar_mega.metrics import read_metrics
from hmar_mega.scaling import record
from hmar_mega.scaling.array import queued_cells
from hmar_mega.scaling.contents import CONTENTS
from hmar_mega.scaling.plan import PlannedCell, plan_json
from hmar_mega.scaling.spec import SweepSpec

log = logging.getLogger(__name__)

SWEEP_FILE = "sweep.json"

StateName = Literal["new", "queued", "running", "stopped", "failed", "gave up", "refused", "finished"]


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


def write_sweep(
    folder: Path, spec: SweepSpec, base: Config, planned: Sequence[PlannedCell], accept_changed_data: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Enter cells into a sweep folder: new ones are added, known ones are kept as they are.

    Args:
        base: what cells start from, with the architecture of its tokenizer.
        accept_changed_data: as for `entries_of`.

    Returns:
        The entries of `planned`, and the names of those that are new.

    Raises:
        UserError: when a finished, running or queued cell comes back changed; nothing is written then.
    """
    entries = entries_of(folder, planned, accept_changed_data)
    known = {entry["cell"]: entry for entry in read_sweep(folder)} if (folder / SWEEP_FILE).exists() else {}
    for item, entry in zip(planned, entries, strict=True):
        path = record.cell_folder(folder, item.cell.name)
        if entry["cell"] == item.cell.name and not (path / "config.yaml").exists():
            write_atomic(path / record.CELL_FILE, json.dumps(item.cell.identity, indent=1, sort_keys=True))
            write_atomic(path / "config.yaml", config_to_yaml(item.config))
    names = {entry["cell"] for entry in entries}
    kept = {n: entry for n, entry in known.items() if n not in names and _was_begun(folder, n)}
    keys = {item.cell.key: entry["cell"] for item, entry in zip(planned, entries, strict=True)}
    for replaced in [n for n in kept if _key(n) in keys]:  # neither finished nor running nor queued
        log.info("cell %s was not finished and has changed since: %s begins anew", replaced, keys[_key(replaced)])
        del kept[replaced]
    tree = {
        "name": spec.name,
        "max_attempts": spec.max_attempts,
        "base": base.model_dump(mode="json"),
        "cells": [*kept.values(), *entries],
    }
    write_atomic(folder / SWEEP_FILE, json.dumps(tree, indent=1))
    return entries, [n for n in dict.fromkeys(entry["cell"] for entry in entries) if n not in known]


def _was_begun(folder: Path, name: str) -> bool:
    return bool(record.attempts_of(record.cell_folder(folder, name))) or record.result_path(folder, name).exists()


def _key(name: str) -> str:
    """Where a cell stands in the grid, of its name."""
    return name.rsplit("-", 1)[0]


def read_sweep(folder: Path) -> list[dict[str, Any]]:
    """The cells of a sweep folder as `plan_json` described them.

    Raises:
        UserError: when it is no sweep folder.
    """
    cells: list[dict[str, Any]] = sweep_file(folder)["cells"]
    return cells


def sweep_file(folder: Path) -> dict[str, Any]:
    """`name`, `max_attempts`, `base` and `cells` of a sweep folder.

    Raises:
        UserError: when it is no sweep folder.
    """
    try:
        tree: dict[str, Any] = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UserError(
            f"{folder} holds no sweep ({SWEEP_FILE}: {err}); start one with `hmar-mega sweep submit SWEEP.yaml`"
        ) from None
    return tree


def entries_of(folder: Path, planned: Sequence[PlannedCell], accept_changed_data: bool = False) -> list[dict[str, Any]]:
    """What `plan_json` says of the cells, unless one is finished, being trained or queued, and has changed since.

    Args:
        accept_changed_data: a cell whose data or tokenizer alone have changed stands as it is, under its name.

    Raises:
        UserError: naming the cells, what has changed, and what to do.
    """
    begun = _begun(folder)
    entries, changed, settings_changed = [], [], False
    for item, entry in zip(planned, plan_json(planned), strict=True):
        cell = item.cell
        others = begun.get(cell.key, {})
        if others and cell.name not in others:
            name, before = next(iter(others.items()))
            now = cell.identity
            keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            data_alone = set(keys) <= set(CONTENTS.values())
            unknown = data_alone and all(now[key] is None for key in keys)  # planned where the data are not at hand
            if unknown or (data_alone and accept_changed_data):
                entry["cell"] = name
            else:
                settings_changed |= not data_alone
                words = ", ".join(f"{key} {before.get(key)} → {now.get(key)}" for key in keys[:4])
                changed.append(f"{name} ({words}{' …' if len(keys) > 4 else ''})")
        entries.append(entry)
    if changed:
        ways = "undo the change, or give the sweep another dir"
        if not settings_changed:
            ways += (
                "; where the data are the same but for rounding, `sweep submit --accept-changed-data` lets them stand"
            )
        other = "settings" if settings_changed else "data"
        raise UserError(
            f"{folder} has cells trained, or waiting in the queue, with other {other}: "
            f"{'; '.join(changed[:3])}{f' and {len(changed) - 3} more' if len(changed) > 3 else ''}. One fit must not "
            f"mix them: {ways}"
        )
    return entries


def _begun(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Identities of cells that are finished, being trained or waiting in SLURM's queue, by key and name."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted((folder / "results").glob("*.json")):
        result = record.read_result(folder, path.stem)
        if result is not None:
            found.setdefault(_key(path.stem), {})[path.stem] = result["identity"]
    queued = queued_cells(folder)
    for path in sorted((folder / "cells").glob("*")):
        if path.name in queued or record.is_running(path):
            found.setdefault(_key(path.name), {})[path.name] = record.read_identity(folder, path.name)
    return found


def state_of(
    folder: Path, entry: Mapping[str, Any], max_attempts: int, queued: frozenset[str] = frozenset()
) -> CellState:
    """Where one cell stands.

    Args:
        entry: of `read_sweep`.
        queued: cells that wait in a SLURM queue.
    """
    path, name = record.cell_folder(folder, entry["cell"]), entry["cell"]
    if (result := record.read_result(folder, name)) is not None:
        return CellState(name, "finished", 0, "", entry["steps"], entry["steps"], result["values"]["loss/all"])
    attempts = record.attempts_of(path)
    ends = [row for row in attempts if row["event"] == "end"]
    failures = [row for row in ends if row["outcome"] == "failed"]
    lost = len([row for row in attempts if row["event"] == "start"]) - len(ends)
    reason = failures[-1]["reason"] if failures else ""
    running = record.is_running(path)
    failed = len(failures) + max(0, lost - running)
    last = attempts[-1].get("outcome") if attempts else None
    state: StateName
    if running:
        state = "running"
    elif name in queued:
        state = "queued"
    elif not attempts:
        state, reason = "new", _unfit_job(record.run_folder(folder, name))
    elif last == "refused":
        state, reason = "refused", attempts[-1]["reason"]
    elif last in ("stopped", "finished"):  # finished, and its result was taken away: it only has to be written again
        state, reason = (
            "stopped",
            "asked to stop; goes on from its checkpoint" if last == "stopped" else "has no result",
        )
    else:
        if attempts[-1]["event"] == "start":
            reason = "ended without a word: killed, or its machine went down"
        state = "failed" if failed < max_attempts else "gave up"
    step, loss = _progress(record.run_folder(folder, name))
    return CellState(name, state, failed, reason, step, entry["steps"], loss)


def _unfit_job(run: Path) -> str:
    """Why a job of a cell ended before it could try, as where no node was fit; empty where none did."""
    events = read_events(run)
    if not events or events[-1].kind != "failed":
        return ""
    return f"its job {events[-1].job} ended: {events[-1].about.get('reason', '')}"


def _progress(run: Path) -> tuple[int, float | None]:
    """(last step, last validation loss) of a run's figures."""
    if not (run / "metrics.jsonl").exists():
        return 0, None
    rows = read_metrics(run)
    losses = [row["all_scales"] for row in rows if row["kind"] == "val"]
    return max((row["step"] for row in rows), default=0), losses[-1] if losses else None
