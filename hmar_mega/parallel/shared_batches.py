"""One reader for all ranks that hold parts of one model: the first reads, the others are sent what it read.

Were each to read for itself, a read that fails or is given up on one of them alone, or an image that is encoded with
another rounding, would have them compute on different samples without anyone noticing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from hmar_mega.batches import BatchPlan
from hmar_mega.data.damage import DamageAccount, DamagePolicy
from hmar_mega.data.stream import Batch, Loader
from hmar_mega.parallel.dims import ParallelDims


def reads(dims: ParallelDims) -> bool:
    """Whether this rank reads for its tensor and pipeline ranks."""
    return dims.tp_rank == 0 and dims.pp_rank == 0


class SharedLoader:
    """A loader for every rank of a model-parallel group; `next` is collective over the group.

    Args:
        loader: of the rank that reads; None elsewhere.
        num_tokens: N.
        num_samples: of the set, for the epoch of `state`.
    """

    def __init__(
        self, loader: Loader | None, plan: BatchPlan, micro_batch_size: int, num_tokens: int, num_samples: int,
        dims: ParallelDims, start_position: int,
    ) -> None:  # fmt: skip
        self.wait_seconds = 0.0  #: how long the last `next` kept the caller waiting
        self.account = loader.account if loader is not None else DamageAccount(DamagePolicy(), num_samples, {})
        self._loader, self._plan, self._micro_batch_size = loader, plan, micro_batch_size
        self._num_tokens, self._num_samples, self._dims = num_tokens, num_samples, dims
        self._position = start_position

    def __next__(self) -> list[Batch]:
        begin = time.perf_counter()
        size, dims = self._micro_batch_size, self._dims
        share = self._plan.size_at(self._position) // dims.data_parallel
        read: list[Batch | None] = [None] * (share // size)
        if self._loader is not None:
            read = list(next(self._loader))
        start = self._position + dims.dp_rank * share
        batches = [
            _share(batch, range(start + number * size, start + (number + 1) * size), self._num_tokens, dims)
            for number, batch in enumerate(read)
        ]
        self._position += share * dims.data_parallel
        self.wait_seconds = time.perf_counter() - begin
        return batches

    def state(self) -> dict[str, int]:
        """Where the stream stands, the same on all ranks."""
        return {"epoch": self._position // self._num_samples, "position": self._position}

    def close(self) -> None:
        """Stop reading ahead."""
        if self._loader is not None:
            self._loader.close()


def share_evaluation(
    batches: Iterator[Batch] | None, spans: Iterator[range], num_tokens: int, dims: ParallelDims
) -> Iterator[Batch]:
    """Evaluation batches for every rank of a model-parallel group; each `next` is collective over it.

    Args:
        batches: of the rank that reads; None elsewhere.
        spans: the positions of every batch.
    """
    for span in spans:
        yield _share(None if batches is None else next(batches), span, num_tokens, dims)


def _share(batch: Batch | None, span: range, num_tokens: int, dims: ParallelDims) -> Batch:
    """The reading rank's batch at these positions, on every rank; keys are known to that rank alone."""
    from megatron.core import parallel_state

    if batch is not None:
        packed: Tensor = torch.cat([batch.tokens.to(dims.device), batch.labels.to(dims.device)[:, None]], dim=1)
    else:
        packed = torch.empty(len(span), num_tokens + 1, dtype=torch.int64, device=dims.device)
    dist.broadcast(packed, dims.dp_rank * dims.tensor_parallel, parallel_state.get_model_parallel_group())
    keys = batch.keys if batch is not None else ("",) * len(span)
    return Batch(packed[:, :-1].contiguous(), packed[:, -1].contiguous(), torch.arange(span.start, span.stop), keys)
