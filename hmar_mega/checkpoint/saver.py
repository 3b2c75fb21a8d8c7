"""Saving while training goes on: a copy of this process's part, then a thread that writes it.

A checkpoint folder holds one safetensors file a process, `index.json`, `state.json` and `SHA256SUMS` over all of them.
The threads of all processes agree over a gloo group of their own, which nothing else uses: the folder gets its name
when every byte of every process is on disk, and then `latest` is moved. Where one process cannot write (a full disk),
nobody's part counts, the checkpoint before stays, and training goes on.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hmar_mega.checkpoint.canonical import own_tensors
from hmar_mega.checkpoint.checksums import sha256_of, write_sums
from hmar_mega.checkpoint.folders import abandon, commit, open_folder, point_to, prune, step_name
from hmar_mega.checkpoint.shards import write_shard
from hmar_mega.checkpoint.sources import BEST, CHECKPOINT_FORMAT, JSON_FILES, find_checkpoint
from hmar_mega.config import CheckpointConfig
from hmar_mega.errors import UserError
from hmar_mega.files import sync_path

if TYPE_CHECKING:
    from hmar_mega.engine import Engine

log = logging.getLogger(__name__)

#: How long processes wait for the slowest one to write its part.
TIMEOUT = timedelta(hours=2)

#: Waiting longer than this many seconds for the checkpoint before is worth a line of the log.
WORTH_TELLING = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same in every process.

    Attributes:
        best: whether `best` was to be moved too.
        error: why there is no checkpoint; None when there is.
    """

    step: int
    best: bool
    error: str | None


@dataclass(frozen=True)
class _Snapshot:
    """A copy of what this process saves.

    Attributes:
        values: flat float32 on the CPU.
        pieces: (key, elements) in the order of `values`.
    """

    file: str
    values: Tensor
    pieces: list[tuple[str, int]]
    entries: list[dict[str, Any]]


@dataclass(frozen=True)
class _Part:
    """What a process tells the first one about its part: what it wrote, or why it could not."""

    file: str | None = None
    sha256: str = ""
    size: int = 0
    entries: tuple[dict[str, Any], ...] = ()
    error: str | None = None


class CheckpointSaver:
    """Writes the checkpoints of a run; made, and asked to save, by all processes together.

    Args:
        run: run directory.
        beside: what the first process saves besides the engine's tensors, by name: float32 tensors that are the same
            in every process (`canonical.read_beside`).

    Attributes:
        failed_saves: saves that left no checkpoint, those before a resume too; the same in every process once it has
            waited.
    """

    def __init__(
        self,
        run: Path,
        engine: Engine,
        settings: CheckpointConfig,
        beside: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:
        self.run, self.engine, self.settings, self.beside = run, engine, settings, beside
        self.failed_saves = 0
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._crash: BaseException | None = None
        self._pinned: Tensor | None = None

    def save(self, state: dict[str, Any], best: bool = False) -> None:
        """Take a copy of the engine's state and write it behind the back of training; collective.

        Waits for the save before. With `checkpoint.asynchronous=false` it returns when everything is written.

        Args:
            state: what `state.json` records besides what the engine knows.
            best: move `best` too.
        """
        self.wait()
        engine = self.engine
        state = {
            "step": engine.step, "skipped_steps": engine.skipped, "skipped_in_a_row": engine.skipped_in_a_row,
            "loss_scaler": engine.loss_scaler_state(), "failed_saves": self.failed_saves, **state,
        }  # fmt: skip
        snapshot = self._snapshot(f"rank-{engine.dims.rank:05d}.safetensors")
        if not self.settings.asynchronous:
            self._write(snapshot, state, best)
            return
        # neither kept alive here: the copy goes when the thread is done
        self._thread = threading.Thread(target=self._in_thread, args=(snapshot, state, best), name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> Outcome | None:
        """Wait until the last save has ended; how it ended, None before the first."""
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self._thread = None
            waited = time.perf_counter() - began
            if waited > WORTH_TELLING and self.engine.dims.is_main:
                log.info("waited %.1f s for the checkpoint before to be written", waited)
        if self._crash is not None:
            crash, self._crash = self._crash, None
            raise crash
        return self._outcome

    def mark_best(self) -> None:
        """Move `best` to the checkpoint of the present step, which has been saved or resumed from."""
        outcome = self.wait()
        if self.engine.dims.is_main and (outcome is None or outcome.error is None):
            checkpoint = self.run / "checkpoints" / step_name(self.engine.step)
            try:
                if checkpoint.is_dir():
                    point_to(self.run, BEST, checkpoint)
            except UserError as err:
                log.error("step %d | %s is not marked as the best: %s", self.engine.step, checkpoint.name, err)

    def close(self) -> None:
        """Let a save that is under way end, also when training ends by an error that must not be hidden."""
        try:
            self.wait()
        except Exception:
            log.exception("the last save failed")

    def _snapshot(self, file: str) -> _Snapshot:
        """Copy what this process owns; on a GPU into pinned memory that is kept for the next save."""
        tensors, entries = own_tensors(self.engine, file, self.beside() if self.engine.dims.is_main else {})
        device = self.engine.dims.device
        total = sum(values.numel() for values in tensors.values())
        if device.type != "cuda":
            buffer = torch.empty(total)
        else:
            if self._pinned is None or self._pinned.numel() != total:
                self._pinned = torch.empty(total, pin_memory=True)
            buffer = self._pinned
        at = 0
        for values in tensors.values():
            buffer[at : at + values.numel()].copy_(values.flatten(), non_blocking=True)
            at += values.numel()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return _Snapshot(file, buffer, [(key, values.numel()) for key, values in tensors.items()], entries)

    def _in_thread(self, snapshot: _Snapshot, state: dict[str, Any], best: bool) -> None:
        try:
            self._write(snapshot, state, best)
        except BaseException as err:
            self._crash = err

    def _write(self, snapshot: _Snapshot, state: dict[str, Any], best: bool) -> None:
        """Write this process's part, learn of everybody's, and settle the outcome; collective on the saver's group."""
        dims, began = self.engine.dims, time.perf_counter()
        temporary = self.run / "checkpoints" / f".saving-{step_name(state['step'])}"
        refused = self._begin(state["step"]) if dims.is_main else None
        refused = self._told(refused)
        part = _Part(error=refused) if refused is not None else _write_part(temporary, snapshot)
        if part.error is not None and refused is None and not dims.is_main:
            log.warning("%s", part.error)
        parts: list[Any] | None = [None] * dims.world_size if dims.is_main else None
        dist.gather_object(part, parts, group=self._group)
        error = self._finish(temporary, parts, state, best) if parts is not None else None
        error = self._told(error)
        if error is not None:
            self.failed_saves += 1
        self._outcome = Outcome(state["step"], best, error)
        if dims.is_main:
            self._report(self._outcome, time.perf_counter() - began)

    def _begin(self, step: int) -> str | None:
        """Make the folder; why it cannot be made."""
        try:
            open_folder(self.run, step)
        except OSError as err:
            return _reason(self.run / "checkpoints", err)
        return None

    def _told(self, message: str | None) -> str | None:
        """What the first process says, in all of them."""
        said = [message]
        dist.broadcast_object_list(said, src=0, group=self._group)
        return said[0]

    def _finish(self, temporary: Path, parts: list[_Part], state: dict[str, Any], best: bool) -> str | None:
        """In the first process: complete the folder and give it its name; why that cannot be done."""
        failed = [f"process {rank}: {part.error}" for rank, part in enumerate(parts) if part.error is not None]
        try:
            if not failed:
                failed = [m for m in (_missing(temporary, part) for part in parts) if m is not None]
            if failed:
                abandon(temporary)
                more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
                return failed[0] + more
            index = {"format": CHECKPOINT_FORMAT, "entries": [entry for part in parts for entry in part.entries]}
            for name, text in zip(JSON_FILES, (json.dumps(index), json.dumps(state, indent=1)), strict=True):
                _write_synced(temporary / name, text)
            sums = {part.file: part.sha256 for part in parts if part.file is not None}
            write_sums(temporary, {**sums, **{name: sha256_of(temporary / name) for name in JSON_FILES}})
            sync_path(temporary)
            final = commit(self.run, temporary, best)
        except (OSError, UserError) as err:
            abandon(temporary)
            return _reason(temporary, err)
        try:
            prune(self.run, final, self.settings.keep_last, self.settings.keep_every)
        except OSError as err:
            log.warning("old checkpoints in %s could not be removed: %s", final.parent, err)
        return None

    def _report(self, outcome: Outcome, seconds: float) -> None:
        if outcome.error is None:
            log.info("step %d | saved %s (%.1f s)", outcome.step, step_name(outcome.step), seconds)
            return
        last = None
        with suppress(UserError):
            last = find_checkpoint(self.run)
        log.error(
            "step %d | checkpoint NOT saved: %s. Training goes on; the last good checkpoint is %s. Make room below %s "
            "before the next save (%d failed so far)",
            outcome.step, outcome.error, last.name if last is not None else "none", self.run, self.failed_saves,
        )  # fmt: skip


def _write_part(temporary: Path, snapshot: _Snapshot) -> _Part:
    if not snapshot.pieces:
        return _Part()
    path = temporary / snapshot.file
    try:
        digest = write_shard(path, snapshot.pieces, [snapshot.values])
        return _Part(snapshot.file, digest, path.stat().st_size, tuple(snapshot.entries))
    except OSError as err:
        return _Part(error=_reason(path, err))


def _missing(temporary: Path, part: _Part) -> str | None:
    """Why a part that was written does not stand in the folder of the first process."""
    if part.file is None:
        return None
    path = temporary / part.file
    if path.is_file() and path.stat().st_size == part.size:
        return None
    return f"{path}, which another process wrote, is not there: run.dir must be on a disk that all nodes share"


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _reason(path: Path, err: OSError | UserError) -> str:
    if isinstance(err, OSError):
        return f"{path} cannot be written: {err.strerror or err}"
    return str(err)
