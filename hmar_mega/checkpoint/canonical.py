"""Canonical checkpoints of a run: what each process saves of it, and loading at any layout.

Each process saves what ZeRO gave it: float32 master weights and Adam moments of its flat ranges, cut along the boxes
of the global tensors, so that any layout reads any other's. `saver.py` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hmar_mega.checkpoint.layout import Placement, fragments, placement
from hmar_mega.checkpoint.sources import BESIDE, EMA, FP8, CheckpointReader, WeightSource, check_shapes
from hmar_mega.errors import UserError
from hmar_mega.model.stage import BALLAST
from hmar_mega.parallel.dims import ParallelDims

if TYPE_CHECKING:
    from hmar_mega.engine import Engine


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
    state = reader.state
    engine.resume_at(int(state["step"]), int(state.get("skipped_steps", 0)))
    engine.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))
    engine.restore_loss_scaler(state.get("loss_scaler"))
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
                target[at : at + last - first].copy_(reader.read_range(name, box, first, last, kind))
    if engine.fp8 is not None:
        engine.fp8.restore(_names(engine), reader)


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a rank's part of the model that checkpoints hold, by global name."""
    return ((name, p) for name, p in model.named_parameters() if name not in BALLAST)


def own_tensors(
    engine: Engine, file: str, beside: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What this process saves: views of its flat values by key, on their device, and the index entries of `file`.

    Args:
        beside: other float32 tensors by name, which this process saves whole.
    """
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
                tensors[key] = values[at : at + last - first].detach()
                entries.append(
                    {"name": name, "kind": kind, "file": file, "key": key, "global_shape": place.global_shape,
                     "offset": box.offset, "shape": box.shape, "start": first, "stop": last}
                )  # fmt: skip
    others = [(FP8, *pair) for pair in _fp8_scales(engine)] + [(BESIDE, *pair) for pair in (beside or {}).items()]
    for kind, name, values in others:
        key, shape = f"{kind}/{name}", tuple(values.shape)
        tensors[key] = values.detach().flatten()
        entries.append(
            {"name": name, "kind": kind, "file": file, "key": key, "global_shape": shape, "offset": (0,) * len(shape),
             "shape": shape, "start": 0, "stop": values.numel()}
        )  # fmt: skip
    return tensors, entries


def read_beside(reader: CheckpointReader, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Fill tensors that were saved with `beside`, in place.

    Raises:
        UserError: when one is missing or of another shape.
    """
    stored = {name: shape for name, kind, shape in reader.tensors() if kind == BESIDE}
    for name, tensor in tensors.items():
        if stored.get(name) != tuple(tensor.shape):
            found = f"has it with shape {stored[name]}" if name in stored else "lacks it"
            raise UserError(
                f"{where}: a run of this configuration keeps {name} with shape {tuple(tensor.shape)}, its checkpoint "
                f"{found}; go on with the configuration it was started with, or choose another folder"
            )
        tensor.copy_(reader.read(name, kind=BESIDE))


def _fp8_scales(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Scales of this stage's FP8 linears, equal on its tensor- and data-parallel ranks: the first one saves them."""
    if engine.fp8 is not None and engine.dims.tp_rank == engine.dims.dp_rank == 0:
        yield from engine.fp8.state(_names(engine))


def _names(engine: Engine) -> dict[int, str]:
    return {id(parameter): name for name, parameter in saved_parameters(engine.model)}


def _read_local(source: WeightSource, name: str, place: Placement, parameter: Tensor) -> Tensor:
    local = torch.zeros(parameter.shape, dtype=torch.float32).flatten()
    position = 0
    for box in place.boxes:
        local[position : position + box.numel] = source.read(name, box).flatten()
        position += box.numel
    return local.view(parameter.shape)
