"""Canonical checkpoints of a run: saving by every process, loading at any layout.

A checkpoint folder holds `state.json`, `index.json` and one safetensors file a process. Each process writes what ZeRO
gave it: float32 master weights and Adam moments of its flat ranges, cut along the boxes of the global tensors, so
that any layout reads any other's. The folder appears by rename when every byte is on disk; then `latest` is moved.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from hmar_mega.checkpoint.layout import Placement, fragments, placement
from hmar_mega.checkpoint.sources import BEST, EMA, LATEST, CheckpointReader, WeightSource, check_shapes
from hmar_mega.engine import Engine
from hmar_mega.files import sync_folder, sync_path, write_atomic
from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.parallel.pipeline import BALLAST

log = logging.getLogger(__name__)


def save_checkpoint(run: Path, engine: Engine, state: dict[str, Any], keep_last: int) -> Path:
    """Write the checkpoint of `engine.step` into `run`/checkpoints; collective over all processes.

    Args:
        state: what `state.json` records besides the step.
        keep_last: older checkpoints beyond this many are removed; the best one stays.

    Returns:
        The new checkpoint's folder.
    """
    folder = run / "checkpoints"
    final, temporary = folder / step_name(engine.step), folder / f".saving-{step_name(engine.step)}"
    dims = engine.dims
    if dims.is_main:
        for cut_short in folder.glob(".saving-*"):
            shutil.rmtree(cut_short)
        temporary.mkdir(parents=True)
    dist.barrier()
    name = f"rank-{dims.rank:05d}.safetensors"
    tensors, entries = _own_tensors(engine, name)
    if tensors:
        save_file(tensors, temporary / name)
    gathered: list[Any] | None = [None] * dims.world_size if dims.is_main else None
    dist.gather_object(entries, gathered)
    if gathered is not None:
        index = {"format": 1, "entries": [entry for part in gathered for entry in part]}
        (temporary / "index.json").write_text(json.dumps(index))
        (temporary / "state.json").write_text(
            json.dumps({"step": engine.step, "skipped_steps": engine.skipped, **state}, indent=1)
        )
        sync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_path(folder)
        point_to(run, LATEST, final)
        _prune(run, keep_last, final)
    dist.barrier()
    return final


def load_weights(
    model: nn.Module, source: WeightSource, dims: ParallelDims, where: str | Path, renames: dict[str, str] | None = None
) -> None:
    """Fill a model's parameters, each process reading only its own part.

    Args:
        renames: parameter name → the name it is read under, for those that differ.

    Raises:
        UserError: when a tensor is missing or of another shape.
    """
    renames = renames or {}
    places = {n: placement(p, dims.tp_rank, dims.tensor_parallel) for n, p in saved_parameters(model)}
    wanted = {renames.get(n, n): place.global_shape for n, place in places.items() if renames.get(n, n)}
    check_shapes(source, wanted, where)
    for name, parameter in saved_parameters(model):
        stored = renames.get(name, name)
        if stored:
            with torch.no_grad():
                parameter.copy_(_read_local(source, stored, places[name], parameter))


def load_optimizer(engine: Engine, reader: CheckpointReader) -> None:
    """Fill float32 masters and Adam moments from a checkpoint, and continue at its step."""
    engine.resume_at(int(reader.state["step"]), int(reader.state.get("skipped_steps", 0)))
    partitions = engine.partitions()
    for name, parameter in saved_parameters(engine.model):
        if name not in partitions:
            continue
        owned, stored = partitions[name], reader.kinds(name)
        place = placement(parameter, engine.dims.tp_rank, engine.dims.tensor_parallel)
        for kind, target in (("weight", owned.weight), *owned.moments.items()):
            if kind == EMA and EMA not in stored:  # an average that starts here starts from the weights
                kind = "weight"
            for box, first, last, at in fragments(place, owned.start, owned.stop):
                values = reader.read(name, box, kind).flatten()[first:last]
                target[at : at + last - first].copy_(values)


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a rank's part of the model that checkpoints hold, by global name."""
    return ((name, p) for name, p in model.named_parameters() if name not in BALLAST)


def point_to(run: Path, pointer: str, checkpoint: Path) -> None:
    """Move `latest` or `best` to a checkpoint."""
    write_atomic(run / "checkpoints" / pointer, checkpoint.name + "\n")


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def _own_tensors(engine: Engine, file: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What this process writes, and its index entries."""
    dims, owned = engine.dims, engine.partitions()
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for name, parameter in saved_parameters(engine.model):
        place = placement(parameter, dims.tp_rank, dims.tensor_parallel)
        if place.replicated and dims.tp_rank > 0:
            continue
        if name in owned:
            part = owned[name]
            kinds = {"weight": part.weight, **part.moments}
            start, stop = part.start, part.stop
        elif not parameter.requires_grad and (frozen := engine.frozen.get(name)) is not None:
            kinds, start = {"weight": frozen[0]}, frozen[1]
            stop = start + frozen[0].numel()
        else:
            continue
        for box, first, last, at in fragments(place, start, stop):
            for kind, values in kinds.items():
                key = f"{kind}/{name}/{'-'.join(map(str, box.offset))}/{first}"
                tensors[key] = values[at : at + last - first].detach().to("cpu", torch.float32).clone()
                entries.append(
                    {"name": name, "kind": kind, "file": file, "key": key, "global_shape": place.global_shape,
                     "offset": box.offset, "shape": box.shape, "start": first, "stop": last}
                )  # fmt: skip
    return tensors, entries


def _read_local(source: WeightSource, name: str, place: Placement, parameter: Tensor) -> Tensor:
    local = torch.zeros(parameter.shape, dtype=torch.float32).flatten()
    position = 0
    for box in place.boxes:
        local[position : position + box.numel] = source.read(name, box).flatten()
        position += box.numel
    return local.view(parameter.shape)


def _prune(run: Path, keep_last: int, current: Path) -> None:
    """Remove what is older than the last few, and what a continuation given up left beyond the present step."""
    folder = run / "checkpoints"
    best = folder / BEST
    kept = {best.read_text().strip()} if best.is_file() else set()
    steps = sorted(path for path in folder.glob("step-*") if path.name <= current.name)
    for path in folder.glob("step-*"):
        if path.name > current.name:
            shutil.rmtree(path)
            log.info("removed checkpoint %s: the run went back before it", path.name)
    for path in steps[:-keep_last]:
        if path.name not in kept:
            shutil.rmtree(path)
            log.info("removed checkpoint %s (keep_last=%d)", path.name, keep_last)
