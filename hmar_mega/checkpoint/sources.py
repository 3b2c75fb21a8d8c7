"""Reading weights by global name and box, whatever wrote them: a canonical checkpoint or an exported model.

Imports torch and safetensors alone, so that inference and export need neither mcore nor DeepSpeed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hmar_mega.checkpoint.layout import Box, paste, whole
from hmar_mega.errors import UserError

LATEST = "latest"
BEST = "best"
CHECKPOINT_FORMAT = 1

#: Kind under which a checkpoint holds the moving average of a weight.
EMA = "ema"


class WeightSource(Protocol):
    """Weights by global name.

    Attributes:
        shapes: global shape of each.
        tokenizer_fingerprint: of the tokenizer whose tokens it was trained on.
    """

    shapes: dict[str, tuple[int, ...]]
    tokenizer_fingerprint: str

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """The values of `box` (default: all) of the tensor `name`, on the CPU."""


class CheckpointReader:
    """A canonical checkpoint: `state.json`, `index.json` and one safetensors file a process.

    Attributes:
        state: step, images seen, configuration, versions.
        shapes: global shape of every weight.

    Raises:
        UserError: when the folder is no complete checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.state: dict[str, Any] = json.loads((folder / "state.json").read_text())
            index = json.loads((folder / "index.json").read_text())
            if index["format"] != CHECKPOINT_FORMAT:
                raise UserError(
                    f"{folder}/index.json has format {index['format']}; this version reads {CHECKPOINT_FORMAT}"
                )
        except (OSError, json.JSONDecodeError) as err:
            raise UserError(f"{folder} is not a complete checkpoint ({err}); pick another one of its run") from None
        self._entries: dict[tuple[str, str], dict[Box, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        self._global: dict[str, tuple[int, ...]] = {}
        for entry in index["entries"]:
            box = Box(tuple(entry["offset"]), tuple(entry["shape"]))
            self._entries[entry["name"], entry["kind"]][box].append(entry)
            self._global[entry["name"]] = tuple(entry["global_shape"])
        self.shapes = {name: self._global[name] for name, kind in self._entries if kind == "weight"}
        self.tokenizer_fingerprint = str(self.state.get("tokenizer_fingerprint"))

    def kinds(self, name: str) -> set[str]:
        """What is stored of `name`: `weight`, and `exp_avg`, `exp_avg_sq` where it was trained."""
        return {kind for stored, kind in self._entries if stored == name}

    def read(self, name: str, box: Box | None = None, kind: str = "weight") -> Tensor:
        """The float32 values of `box` of one tensor, assembled from whatever pieces were written."""
        box = box if box is not None else whole(self._global[name])
        result = torch.empty(box.shape, dtype=torch.float32)
        found = 0
        for stored, pieces in self._entries.get((name, kind), {}).items():
            if stored.intersect(box) is not None:
                found += paste(result, box, self._assemble(stored, pieces), stored)
        if found != box.numel:
            raise UserError(
                f"checkpoint {self.folder} holds {found} of the {box.numel} values of {kind} {name}; "
                "it is damaged, pick another one of its run"
            )
        return result

    def _assemble(self, box: Box, pieces: Iterable[dict[str, Any]]) -> Tensor:
        flat = torch.empty(box.numel, dtype=torch.float32)
        covered = 0
        for piece in pieces:
            try:
                with safe_open(self.folder / piece["file"], "pt") as file:
                    flat[piece["start"] : piece["stop"]] = file.get_tensor(piece["key"])
            except (OSError, SafetensorError, RuntimeError) as err:
                raise UserError(f"checkpoint file {self.folder / piece['file']} cannot be read: {err}") from None
            covered += piece["stop"] - piece["start"]
        if covered != box.numel:
            raise UserError(f"checkpoint {self.folder} is damaged: {covered} of {box.numel} values of a block")
        return flat.view(box.shape)


class ExportReader:
    """An exported model: `model.safetensors` and `config.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "model.safetensors"
        try:
            with safe_open(self._path, "pt") as file:
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            settings = json.loads((folder / "config.json").read_text())
        except (OSError, SafetensorError, json.JSONDecodeError) as err:
            raise UserError(f"{folder} is not an exported model ({err})") from None
        self.tokenizer_fingerprint = str(settings.get("tokenizer_fingerprint"))

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """The values of `box` of one tensor."""
        box = box if box is not None else whole(self.shapes[name])
        with safe_open(self._path, "pt") as file:
            if not box.shape:
                return file.get_tensor(name)
            return file.get_slice(name)[box.slices_in(whole(self.shapes[name]))]


def open_weights(path: str | Path) -> WeightSource:
    """Weights of a run directory (its latest checkpoint), a checkpoint folder or an exported model.

    Raises:
        UserError: when it is none of the three.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file():
        return ExportReader(path)
    if (path / "index.json").is_file() and (path / "state.json").is_file():
        return CheckpointReader(path)
    found = find_checkpoint(path)
    if found is not None:
        return CheckpointReader(found)
    raise UserError(
        f"{path} holds no weights: expected a run directory with checkpoints/, a checkpoint folder or an exported model"
    )


def find_checkpoint(run: Path, which: str = LATEST) -> Path | None:
    """The checkpoint `which` of a run: a pointer (`latest`, `best`) or a folder's name; None if there is none.

    Raises:
        UserError: when the run has checkpoints, but `latest` names none of them: going on from nothing would throw
            them away.
    """
    folder = run / "checkpoints"
    pointer = folder / which
    if pointer.is_file():
        pointer = folder / pointer.read_text().strip()
    if (pointer / "state.json").is_file():
        return pointer
    complete = complete_checkpoints(run)
    if which == LATEST and complete:
        raise UserError(
            f"{folder / LATEST} names no complete checkpoint, but there are {', '.join(p.name for p in complete)}; "
            f"choose one: run.resume_from={complete[-1].name} to train on, --checkpoint {complete[-1].name} to export"
        )
    return None


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, by step."""
    return sorted(p.parent for p in (run / "checkpoints").glob("step-*/state.json"))


def check_shapes(source: WeightSource, wanted: dict[str, tuple[int, ...]], where: str | Path) -> None:
    """Raise UserError unless `source` holds every wanted tensor at the wanted shape."""
    missing = [n for n in wanted if n not in source.shapes]
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} of the model's {len(wanted)} tensors, the first {missing[0]}: it was made "
            "with another depth or stage; use the configuration it was trained with"
        )
    for name, shape in wanted.items():
        if source.shapes[name] != shape:
            raise UserError(
                f"{where} holds {name} with shape {source.shapes[name]}, the model wants {shape}: another model size, "
                "number of classes, codebook or schedule; use the configuration it was trained with"
            )
