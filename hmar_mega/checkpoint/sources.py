"""Reading weights by global name and box, whatever wrote them: a canonical checkpoint or an exported model.

Imports torch and safetensors alone, so that inference and export need neither mcore nor DeepSpeed.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hmar_mega.checkpoint.checksums import SUMS_FILE, describe, find_damage, read_sums
from hmar_mega.checkpoint.layout import Box, paste, whole
from hmar_mega.checkpoint.shards import ShardFile
from hmar_mega.errors import UserError

LATEST = "latest"
BEST = "best"
CHECKPOINT_FORMAT = 2
READABLE_FORMATS = (1, 2)
JSON_FILES = ("index.json", "state.json")

#: Elements of a stored block held at a time while reading.
STRIPE = 2 << 20

#: Before the name of a checkpoint that is being replaced by one of the same step, until that one is in place.
REPLACED = ".replaced-"

log = logging.getLogger(__name__)

#: Kind under which a checkpoint holds the moving average of a weight.
EMA = "ema"

#: Kind of the scales and histories of FP8 linears, which are tensors of their own: `blocks.0.attn.qkv.fp8_scale_fwd`.
FP8 = "fp8"

#: Kind of what is no parameter and the same in every process: a discriminator with its optimizer, usage of a codebook.
BESIDE = "beside"


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
    """A canonical checkpoint: `state.json`, `index.json`, shard files, and `SHA256SUMS` from format 2 on.

    Attributes:
        state: step, images seen, configuration, versions.
        shapes: global shape of every weight.
        sums: SHA-256 by file name; None in format 1, which had none.

    Raises:
        UserError: when the folder is no complete checkpoint, or its two JSON files are not as they were written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sums = read_sums(folder)
        if self.sums is not None and (damage := find_damage(folder, self.sums, JSON_FILES)):
            raise UserError(f"{describe(folder, damage)}; pick another one of its run")
        try:
            self.state: dict[str, Any] = json.loads((folder / "state.json").read_text())
            index = json.loads((folder / "index.json").read_text())
        except (OSError, ValueError) as err:
            raise UserError(f"{folder} is not a complete checkpoint ({err}); pick another one of its run") from None
        self.format = index["format"]
        if self.format not in READABLE_FORMATS:
            raise UserError(
                f"{folder}/index.json has format {self.format}; this version reads "
                f"{' and '.join(map(str, READABLE_FORMATS))}"
            )
        if self.sums is None and self.format > 1:
            raise UserError(f"{folder} is not a complete checkpoint (no {SUMS_FILE}); pick another one of its run")
        self._entries: dict[tuple[str, str], dict[Box, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        self._global: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, ShardFile] = {}
        for entry in index["entries"]:
            box = Box(tuple(entry["offset"]), tuple(entry["shape"]))
            self._entries[entry["name"], entry["kind"]][box].append(entry)
            self._global[entry["name"]] = tuple(entry["global_shape"])
        if self.sums is not None and (unlisted := set(self.files) - set(self.sums)):
            raise UserError(
                f"{folder}/{SUMS_FILE} does not list {min(unlisted)}: it is damaged; pick another checkpoint"
            )
        self.shapes = {name: self._global[name] for name, kind in self._entries if kind == "weight"}
        self.tokenizer_fingerprint = str(self.state.get("tokenizer_fingerprint"))

    @property
    def files(self) -> list[str]:
        """Names of the shard files."""
        return sorted({e["file"] for boxes in self._entries.values() for pieces in boxes.values() for e in pieces})

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, kind, global shape) of everything stored, in the order of the index."""
        return [(name, kind, self._global[name]) for name, kind in self._entries]

    def kinds(self, name: str) -> set[str]:
        """What is stored of `name`: `weight`, and `exp_avg`, `exp_avg_sq` where it was trained."""
        return {kind for stored, kind in self._entries if stored == name}

    def averaged(self) -> set[str]:
        """Names of the weights that have a moving average; what was not trained has none.

        Raises:
            UserError: when none has.
        """
        found = {name for name in self.shapes if EMA in self.kinds(name)}
        if not found:
            raise UserError(
                f"checkpoint {self.folder} holds no moving average: the run was trained without optim.ema_decay; leave "
                "--ema out to take its weights"
            )
        return found

    def read(self, name: str, box: Box | None = None, kind: str = "weight") -> Tensor:
        """The float32 values of `box` of one tensor, assembled from whatever pieces were written."""
        box = box if box is not None else whole(self._global[name])
        return self.read_range(name, box, 0, box.numel, kind).view(box.shape)

    def read_range(self, name: str, box: Box, first: int, last: int, kind: str = "weight") -> Tensor:
        """The elements `first` … `last` − 1 of the flattened `box`, flat.

        Besides the result, rows of the stored blocks are held a few megabytes at a time.
        """
        target, begin = box.rows(first, last)
        result = torch.empty(target.shape, dtype=torch.float32)
        found = 0
        for stored, pieces in self._entries.get((name, kind), {}).items():
            common = stored.intersect(target)
            if common is None:
                continue
            for part, start in stored.stripes(*stored.span_of(common), STRIPE):
                found += paste(result, target, self._assemble(part, start, pieces), part)
        if found != target.numel:
            raise UserError(
                f"checkpoint {self.folder} holds {found} of the {target.numel} values of {kind} {name}; "
                "it is damaged, pick another one of its run"
            )
        return result.view(-1)[first - begin : last - begin]

    def verify(self) -> None:
        """Hash every file; UserError when one is not as it was written. Format 1 has nothing to compare with."""
        if self.sums is None:
            log.warning("checkpoint %s has no checksums (format 1): it is read as it is", self.folder)
        elif damage := find_damage(self.folder, self.sums):
            raise UserError(f"{describe(self.folder, damage)}; pick another one of its run")

    def check_files(self) -> None:
        """Open every shard file and look at its length, which shows truncation at once; UserError when one is bad."""
        for name in self.files:
            self._file(name)

    def _assemble(self, part: Box, start: int, pieces: Iterable[dict[str, Any]]) -> Tensor:
        """The rows `part` of a stored block, whose first element is the block's element `start`."""
        flat = torch.empty(part.numel, dtype=torch.float32)
        covered = 0
        for piece in pieces:
            first, last = max(piece["start"], start), min(piece["stop"], start + part.numel)
            if first >= last:
                continue
            file, at = self._file(piece["file"]), piece["start"]
            try:
                file.read_into(piece["key"], first - at, last - at, flat[first - start : last - start])
            except (OSError, ValueError) as err:
                raise self._unreadable(piece["file"], err) from None
            covered += last - first
        if covered != part.numel:
            raise UserError(f"checkpoint {self.folder} is damaged: {covered} of {part.numel} values of a block")
        return flat.view(part.shape)

    def _file(self, name: str) -> ShardFile:
        if name not in self._files:
            try:
                self._files[name] = ShardFile(self.folder / name)
            except (OSError, ValueError) as err:
                raise self._unreadable(name, err) from None
        return self._files[name]

    def _unreadable(self, name: str, err: Exception) -> UserError:
        return UserError(f"checkpoint file {self.folder / name} cannot be read: {err}; pick another one of its run")


class ExportReader:
    """An exported model: `model.safetensors` and `config.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "model.safetensors"
        try:
            with safe_open(self._path, "pt") as file:
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            self.settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
        except (OSError, SafetensorError, json.JSONDecodeError) as err:
            raise UserError(f"{folder} is not an exported model ({err})") from None
        self.tokenizer_fingerprint = str(self.settings.get("tokenizer_fingerprint"))

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """The values of `box` of one tensor."""
        box = box if box is not None else whole(self.shapes[name])
        with safe_open(self._path, "pt") as file:
            if not box.shape:
                return file.get_tensor(name)
            return file.get_slice(name)[box.slices_in(whole(self.shapes[name]))]


def open_weights(path: str | Path, verify: bool = True) -> WeightSource:
    """Weights of a run directory (its latest checkpoint), a checkpoint folder or an exported model.

    Args:
        verify: hash the files of a checkpoint first.

    Raises:
        UserError: when it is none of the three, or a checkpoint that is damaged.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file():
        reader = ExportReader(path)
        refuse_quantized(path, reader.settings)
        return reader
    found: Path | None = path
    if not all((path / name).is_file() for name in JSON_FILES):
        found = find_checkpoint(path)
    if found is not None:
        checkpoint = CheckpointReader(found)
        if verify:
            checkpoint.verify()
        return checkpoint
    raise UserError(
        f"{path} holds no weights: expected a run directory with checkpoints/, a checkpoint folder or an exported model"
    )


def refuse_quantized(folder: Path, settings: dict[str, Any]) -> None:
    """Raise UserError for an export of 8-bit weights where float ones are wanted."""
    if "quantization" in settings:
        raise UserError(
            f"{folder} holds weights quantized to {settings['quantization']['to']}, which can be sampled and nothing "
            "else; name the model or run that it was made of"
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
        pointer = folder / pointer.read_text(errors="replace").strip()
    for candidate in (pointer, pointer.with_name(REPLACED + pointer.name)):
        if (candidate / "state.json").is_file():
            return candidate
    complete = complete_checkpoints(run)
    if which == LATEST and complete and not (folder / LATEST).exists():
        # what a kill leaves between a run's first checkpoint and the pointer to it
        log.warning("%s is missing; taking the newest complete checkpoint, %s", folder / LATEST, complete[-1].name)
        return complete[-1]
    if which == LATEST and complete:
        raise UserError(
            f"{folder / LATEST} names no complete checkpoint, but there are {', '.join(p.name for p in complete)}; "
            f"choose one: run.resume_from={complete[-1].name} to train on, --checkpoint {complete[-1].name} to export"
        )
    return None


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, by step."""
    return sorted(p.parent for p in (run / "checkpoints").glob("step-*/state.json"))


def earlier_whole(checkpoint: Path) -> Path | None:
    """The newest checkpoint of the same run from before `checkpoint` whose files are all there, of the right length."""
    for candidate in reversed(complete_checkpoints(checkpoint.parent.parent)):
        if candidate.name < checkpoint.name:
            try:
                CheckpointReader(candidate).check_files()
            except UserError:
                continue
            return candidate
    return None


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
