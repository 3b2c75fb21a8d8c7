"""Bytes that collectives send, counted where torch hands them to a backend, by group of ranks; no NCCL needed.

Counted are the operations of c10d as they pass torch's dispatcher, so that it does not matter who asks: Megatron-core,
DeepSpeed or autograd. A rank of a ring of n sends (n − 1)/n of the bytes in an all-gather or a reduce-scatter, and
twice that in an all-reduce; that is how `hmar-mega plan` counts, and how NCCL's and gloo's rings send.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Rounds of a ring by operation; the bytes are those of the larger side.
RING_ROUNDS = {
    "allreduce_": 2, "allreduce_coalesced_": 2,
    "allgather_": 1, "_allgather_base_": 1, "allgather_coalesced_": 1, "allgather_into_tensor_coalesced_": 1,
    "reduce_scatter_": 1, "_reduce_scatter_base_": 1, "reduce_scatter_tensor_coalesced_": 1,
    "broadcast_": 1, "reduce_": 1, "alltoall_": 1, "alltoall_base_": 1,
}  # fmt: skip

#: Operations that send nothing worth counting, or receive what another rank counts.
SILENT = {"barrier", "recv_", "recv_any_source_", "monitored_barrier_"}


class SentBytes(TorchDispatchMode):
    """Within it, what this rank sends is added up.

    Attributes:
        by_group: bytes by the global ranks of the group, in their order.
        calls: operations by name.

    Raises:
        NotImplementedError: for an operation of c10d that it does not know, so that nothing stays uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_group: Counter[tuple[int, ...]] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name in SILENT:
            return
        if name != "send" and name not in RING_ROUNDS:
            raise NotImplementedError(f"c10d::{name} is sent by someone and not counted: add it to RING_ROUNDS")
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject) and _is_group(a)))
        ranks = tuple(dist.get_process_group_ranks(group))
        self.calls[name] += 1
        size = max((_size(argument) for argument in args), default=0)
        if name == "send":
            self.by_group[ranks] += size
        else:
            self.by_group[ranks] += RING_ROUNDS[name] * size * (len(ranks) - 1) // len(ranks)

    def of(self, ranks: Sequence[int]) -> int:
        """Bytes sent within exactly this group."""
        return self.by_group[tuple(ranks)]


def _is_group(given: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(given._type())


def _size(given: Any) -> int:
    """Bytes of all tensors in an argument, however deep in lists."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(given))


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for item in given:
            yield from _tensors(item)
