"""Where a run's figures go: a readable line, metrics.jsonl, TensorBoard and, by choice, Weights & Biases."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hmar_mega.config_io import config_to_yaml
from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic

if TYPE_CHECKING:
    from hmar_mega.config import Config

log = logging.getLogger(__name__)


class MetricsLog:
    """The figures of one run; only the main process makes one.

    Args:
        run: run directory.
        resumed_step: records after this step, of steps that are run again, are dropped.
    """

    def __init__(self, run: Path, config: Config, resumed_step: int) -> None:
        self._path = run / "metrics.jsonl"
        drop_rows_after(self._path, resumed_step)
        self._file = self._path.open("a")
        self._tensorboard: Any = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)
            if not resumed_step:
                self._tensorboard.add_text("config", f"```yaml\n{config_to_yaml(config)}```", 0)
        self._wandb = _start_wandb(run, config) if config.logging.wandb != "off" else None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Record one row of `kind` (`train`, `val`); numbers and lists of numbers are plotted.

        A full disk does not end training: rows wait in memory, as many as fit, until there is room again.
        """
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        except OSError as err:
            log.warning("step %d | %s cannot be written: %s; training goes on", step, self._path, err.strerror)
        flat = dict(_flatten(kind, values))
        if self._tensorboard is not None:
            try:
                for name, value in flat.items():
                    self._tensorboard.add_scalar(name, value, step)
            except OSError as err:
                log.warning("step %d | TensorBoard's file cannot be written: %s; it ends here", step, err.strerror)
                self._tensorboard = None
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def picture(self, name: str, step: int, path: Path) -> None:
        """Show an image file where figures are plotted; without TensorBoard and wandb, the file itself is all."""
        if self._tensorboard is not None:
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                self._tensorboard.add_image(name, pixels, step, dataformats="HWC")
            except OSError as err:
                log.warning("step %d | %s is not shown in TensorBoard: %s", step, path, err)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Flush and finish everything."""
        try:
            self._file.close()
        except OSError as err:
            log.warning("the last rows of %s are lost: %s", self._path, err.strerror)
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    return _read_rows(run / "metrics.jsonl")


def drop_rows_after(path: Path, step: int) -> None:
    """Take the rows of later steps out of a file of JSON lines, if it exists: those steps are run again."""
    if path.exists():
        kept = [row for row in _read_rows(path) if row["step"] <= step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s of %s has a line cut short; it is left out", path.name, path.parent)
    return rows


def _flatten(kind: str, values: Mapping[str, Any]) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, bool | str):
            continue
        if isinstance(value, int | float):
            flat.append((f"{kind}/{key}", float(value)))
        elif isinstance(value, list):
            flat += [(f"{kind}/{key}/{i + 1}", float(v)) for i, v in enumerate(value) if v is not None]
    return flat


def require_wandb(mode: str) -> Any:
    """The wandb module; UserError when it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"logging.wandb={mode} needs the wandb package: pip install 'hmar-mega[wandb]', or set logging.wandb=off"
        ) from None
    return wandb


def _start_wandb(run: Path, config: Config) -> Any:
    wandb = require_wandb(config.logging.wandb)
    name = run / "wandb_id"
    if not name.exists():
        write_atomic(name, uuid.uuid4().hex[:8] + "\n")
    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(
        project=config.logging.wandb_project,
        id=name.read_text().strip(),
        resume="allow",
        name=run.name,
        dir=str(run),
        mode=config.logging.wandb,
        config=config.model_dump(mode="json"),
    )
