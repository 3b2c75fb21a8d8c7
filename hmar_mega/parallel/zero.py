"""What each process owns of every parameter under DeepSpeed ZeRO 1, 2 and 3: the one place that reads its insides.

ZeRO keeps float32 master weights and Adam moments flat and cut over data-parallel ranks. Here they become, for each
parameter, a range of its flattened local elements and views of the values in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hmar_mega.parallel.partition import MOMENTS, Partition

__all__ = ["MOMENTS", "Partition", "flat_masters", "frozen_span", "lay_moments", "partitions"]


def partitions(
    zero: Any, model: nn.Module, beside: Mapping[str, Sequence[Tensor]] | None = None
) -> dict[str, Partition]:
    """What this process owns of every trained parameter, by global name.

    Args:
        zero: DeepSpeed's ZeRO (or bf16) optimizer.
        beside: kind → tensors laid out as `flat_masters`, of which the partitions hold views too.
    """
    flats = flat_masters(zero)
    owned = {}
    for name, parameter in model.named_parameters():
        place = _place(zero, parameter)
        if place is None:
            continue
        group, at, start, stop = place
        flat, span = flats[group], slice(at, at + stop - start)
        state = zero.optimizer.state.get(flat, {})
        moments = {key: state[key].view(-1)[span] for key in MOMENTS if key in state}
        moments |= {kind: tensors[group].view(-1)[span] for kind, tensors in (beside or {}).items()}
        owned[name] = Partition(start, stop, flat.data.view(-1)[span], moments)
    return owned


def frozen_span(parameter: Tensor) -> slice | None:
    """The range of a parameter that is not trained which this process saves; None when it saves nothing of it.

    ZeRO-3 cuts frozen weights too; elsewhere the first data-parallel rank speaks for all.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    pieces = getattr(parameter, "ds_tensor", None)
    if pieces is None:
        return slice(0, parameter.numel()) if rank == 0 else None
    start = rank * pieces.numel()
    stop = min(start + pieces.numel(), parameter.ds_numel)  # type: ignore[attr-defined]
    return slice(start, stop) if start < stop else None


def lay_moments(zero: Any, optimizer_steps: int) -> None:
    """Adam's state as after so many updates, zeros, for a checkpoint to be read into."""
    for flat in flat_masters(zero):
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(optimizer_steps), device=flat.device if flat.is_cuda else None),
            "exp_avg": torch.zeros_like(flat.data),
            "exp_avg_sq": torch.zeros_like(flat.data),
        }


def flat_masters(zero: Any) -> list[Tensor]:
    """The flat float32 master weights this process owns, one tensor a parameter group (ZeRO-3: a sub-group)."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        flats: list[Tensor] | None = getattr(zero, name, None)
        if flats is not None:
            return flats
    raise TypeError(f"{type(zero).__name__} is no ZeRO optimizer that is known here")


def _place(zero: Any, parameter: Tensor) -> tuple[int, int, int, int] | None:
    """(flat tensor, first element there, first and past-last element of the local parameter), or None."""
    if hasattr(parameter, "ds_tensor"):
        if not parameter.requires_grad:
            return None
        group, at, length = zero.grad_position[zero.get_param_id(parameter)]
        start = dist.get_rank(zero.dp_process_group) * length
        stop = min(start + length, parameter.ds_numel)  # type: ignore[attr-defined]
        return (group, at, start, stop) if start < stop else None
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    high, low = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
    return mapping.param_group_index, high.start, low.start, low.start + low.numel
