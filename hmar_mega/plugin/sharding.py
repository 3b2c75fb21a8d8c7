"""Where a parameter lies in its global tensor, told in the words of mcore's `dist_checkpointing`.

Keys are the global names of our own checkpoints, whole layers of no stage, so any layout loads what any other saved.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

#: What mcore calls a place on the grid of shards: (axis, number of the shard, shards along the axis).
Offsets = tuple[tuple[int, int, int], ...]


def sharded_parameters(
    module: nn.Module, prefix: str = "", sharded_offsets: Offsets = (), key_prefix: str | None = None
) -> dict[str, Any]:
    """Every parameter of `module` as `ShardedTensor`, or as a factory of several.

    Stacked matrices that are split alike (q, k and v of the packed projection) are a factory of one shard each. Tables
    padded to a multiple of the tensor-parallel size are loaded at another size with `allow_shape_mismatch`.

    Args:
        prefix: of the entries' names, which are those of `module.state_dict(prefix=prefix)`.
        sharded_offsets: axes that a module around this one put in front of the tensor's own.
        key_prefix: of the names in the checkpoint; default `prefix`.
    """
    keys = prefix if key_prefix is None else key_prefix
    return {
        prefix + name: sharded_parameter(parameter, keys + name, sharded_offsets)
        for name, parameter in module.named_parameters()
    }


def sharded_parameter(
    parameter: Tensor, key: str, sharded_offsets: Offsets = ()
) -> ShardedTensor | ShardedTensorFactory:
    """One parameter under its name in the checkpoint; see `sharded_parameters`."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    dp_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    prepended = len(sharded_offsets)
    shared = {"prepend_axis_num": prepended, "allow_shape_mismatch": hasattr(parameter, "unpadded_rows")}
    if not getattr(parameter, "tensor_model_parallel", False):
        replica = (0, tp_rank, dp_rank)
        return ShardedTensor.from_rank_offsets(key, parameter, *sharded_offsets, replica_id=replica, **shared)
    axis, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    replica = (0, 0, dp_rank)
    if stride == 1:
        place = (axis + prepended, tp_rank, tp_size)
        return ShardedTensor.from_rank_offsets(key, parameter, *sharded_offsets, place, replica_id=replica, **shared)

    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        assert flattened_range is None
        return [
            ShardedTensor.from_rank_offsets(
                key, part.contiguous(), *sharded_offsets, (axis + prepended, s * tp_size + tp_rank, stride * tp_size),
                replica_id=replica_id, **shared,
            )
            for s, part in enumerate(tensor.chunk(stride, dim=axis))
        ]  # fmt: skip

    def merge(parts: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat(parts, dim=axis)

    return ShardedTensorFactory(key, parameter, build, merge, replica)
