"""What the demo's report reads: a tokenizer's folder and the run directories of the two training stages."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmar_mega.checkpoint.sources import CheckpointReader, find_checkpoint
from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.errors import UserError
from hmar_mega.metrics import read_metrics

#: What writes the folders, for those who lack one.
TRAIN_TOKENIZER, TRAIN = "hmar-mega tokenizer train CONFIG --out FOLDER", "hmar-mega train CONFIG run.dir=FOLDER"


@dataclass(frozen=True)
class Stage:
    """One run directory.

    Attributes:
        rows: of metrics.jsonl.
        versions: of versions.json: device, world_size, revision.
        parameters: weights of the last checkpoint, counted from its index.
        trained_parameters: those of them with Adam moments.
    """

    folder: Path
    config: Config
    rows: list[dict[str, Any]]
    versions: dict[str, Any]
    parameters: int
    trained_parameters: int

    @property
    def patch_nums(self) -> tuple[int, ...]:
        """Side of each scale's token map."""
        return self.config.schedule.scales.patch_nums

    @property
    def processes(self) -> int:
        """How many trained together."""
        return int(self.versions["world_size"])

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The rows of `train` or of `val`."""
        return [row for row in self.rows if row["kind"] == kind]


def read_stage(folder: Path) -> Stage:
    """Read a run directory; of its checkpoint only the index.

    Raises:
        UserError: when a part of it is missing or unreadable.
    """
    config_path = folder / "config.yaml"
    if not config_path.is_file():
        raise UserError(f"{folder} is not a run directory (no config.yaml); train it first: {TRAIN}")
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"run {folder} has no checkpoint to count the weights of; train it first: {TRAIN}")
    weights = CheckpointReader(checkpoint)
    sizes = {name: math.prod(shape) for name, shape in weights.shapes.items()}
    return Stage(
        folder=folder,
        config=load_config(config_path),
        rows=_rows(folder, TRAIN),
        versions=_read_json(folder / "versions.json", TRAIN),
        parameters=sum(sizes.values()),
        trained_parameters=sum(size for name, size in sizes.items() if "exp_avg" in weights.kinds(name)),
    )


def read_tokenizer(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A tokenizer's metrics.json, and the rows of its metrics.jsonl that tell of training.

    Raises:
        UserError: when one of them is missing or unreadable.
    """
    rows = [row for row in _rows(folder, TRAIN_TOKENIZER) if row.get("kind", "train") == "train"]
    return _read_json(folder / "metrics.json", TRAIN_TOKENIZER), rows


def _rows(folder: Path, remedy: str) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    try:
        rows = read_metrics(folder)
    except OSError as err:
        raise UserError(f"cannot read {path}: {err.strerror}; write it first: {remedy}") from None
    if not rows:
        raise UserError(f"{path} has no rows to draw; write it anew: {remedy}")
    return rows


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise UserError(f"cannot read {path}: {err.strerror}; write it first: {remedy}") from None
    except ValueError as err:
        raise UserError(f"{path} is damaged ({err}); write it anew: {remedy}") from None
    return tree
