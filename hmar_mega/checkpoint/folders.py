"""The folder `checkpoints/` of a run: how a written checkpoint gets its name, and how old ones go.

Everything becomes visible by rename. Names that begin with a dot are on their way in or out, and the next save sweeps
up what a kill left of them:

    .saving-step-…     being written
    .replaced-step-…   stepped aside for another one of the same step; readers still find it until that one is in place
    .removing-step-…   being deleted
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from hmar_mega.checkpoint.sources import BEST, LATEST, REPLACED
from hmar_mega.files import sync_path, write_atomic

log = logging.getLogger(__name__)

SAVING, REMOVING = ".saving-", ".removing-"

_NAME = re.compile(r"step-\d{8,}")


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's folder name."""
    return int(checkpoint.name.removeprefix("step-"))


def point_to(run: Path, pointer: str, checkpoint: Path) -> None:
    """Move `latest` or `best` to a checkpoint."""
    write_atomic(run / "checkpoints" / pointer, checkpoint.name + "\n")


def open_folder(run: Path, step: int) -> Path:
    """Sweep up what a kill or a failed save left, and make the folder that a checkpoint is written in.

    Raises:
        OSError: when the system takes no more.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob(f"{SAVING}*"), *folder.glob(f"{REMOVING}*")]:
        shutil.rmtree(left)
    for aside in folder.glob(f"{REPLACED}*"):
        own = folder / aside.name.removeprefix(REPLACED)
        if own.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(own)
    temporary = folder / f"{SAVING}{step_name(step)}"
    temporary.mkdir()
    return temporary


def commit(run: Path, temporary: Path, best: bool) -> Path:
    """Give a checkpoint whose every byte is on disk its name, and move `latest` (and `best`) to it.

    At no moment does a pointer name nothing that can be found.
    """
    folder = run / "checkpoints"
    final = folder / temporary.name.removeprefix(SAVING)
    aside = folder / f"{REPLACED}{final.name}"
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    sync_path(folder)
    for pointer in (LATEST, BEST) if best else (LATEST,):
        point_to(run, pointer, final)
    if aside.exists():
        _remove(aside)
    return final


def abandon(temporary: Path) -> None:
    """Remove what was written of a checkpoint that failed, as far as the system lets."""
    shutil.rmtree(temporary, ignore_errors=True)


def prune(run: Path, current: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove what is older than the last few, and what a continuation given up left beyond the present step.

    The best one, and those at multiples of `keep_every` steps, stay.
    """
    folder = run / "checkpoints"
    best = folder / BEST
    best_name = best.read_text().strip() if best.is_file() else None
    own = sorted(
        path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)
    )  # and nobody's copies beside them
    for path in own:
        if path.name > current.name:
            if path.name == best_name:
                best.unlink()
            _remove(path)
            log.info("removed checkpoint %s: the run went back before it", path.name)
    for path in [path for path in own if path.name <= current.name][:-keep_last]:
        if path.name != best_name and not (keep_every and step_of(path) % keep_every == 0):
            _remove(path)
            log.info("removed checkpoint %s (keep_last=%d)", path.name, keep_last)


def _remove(path: Path) -> None:
    """Delete a folder so that half of it never passes for a checkpoint."""
    going = path.with_name(f"{REMOVING}{path.name.lstrip('.')}")
    path.rename(going)
    shutil.rmtree(going)
