"""The batches of a run as a pure function of its position.

`StreamLoader` gives a data-parallel rank its part of one global batch after the other: which samples those are depends
on (seed, position) alone, so a run can stop at any image and go on with any number of ranks, workers and micro-batches.
`eval_batches` gives every sample once. Damaged samples are replaced and counted, or end the run, as the policy says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hmar_mega.batches import BatchPlan
from hmar_mega.data.damage import DamageAccount
from hmar_mega.data.order import Order
from hmar_mega.data.patience import Closed
from hmar_mega.data.reader import ShardReader
from hmar_mega.data.samples import Request, SampleSet, Share
from hmar_mega.data.threads import map_ahead
from hmar_mega.data.workers import WorkerProcesses
from hmar_mega.micro_batches import check_batch_sizes

WorkerKind = Literal["threads", "processes"]


@dataclass(frozen=True)
class Batch:
    """b token samples: tokens (b, N) int64, labels (b,) int64, stream positions (b,) int64, and their keys."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    keys: tuple[str, ...]


@dataclass(frozen=True)
class PixelBatch:
    """b images: pixels (b, 3, R, R) uint8, labels (b,) int64, stream positions (b,) int64, and their keys."""

    pixels: Tensor
    labels: Tensor
    positions: Tensor
    keys: tuple[str, ...]


class Loader(Protocol):
    """What the training loop reads from: an endless iterator over this rank's micro-batches of each step."""

    wait_seconds: float  #: how long the last `next` kept the caller waiting
    account: DamageAccount

    def __next__(self) -> list[Any]:
        """The micro-batches of the next step."""
        ...

    def state(self) -> dict[str, int]:
        """Where the stream stands: `position` and `epoch`."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


class StreamLoader:
    """This rank's micro-batches of one global batch after the other; an endless iterator.

    The global batch of G images at position s holds positions s … s+G−1. Rank r of R takes the contiguous part that
    starts at s + r·G/R, cut into contiguous micro-batches.

    Args:
        samples: what is read; a reader alone stands for the set of its folder's tokens.
        order: which sample stands at which position.
        batches: the global batch size of every step, or one for all.
        start_position: images seen before; where a resumed run goes on.
        workers: threads or processes that read steps ahead; 0 reads in the calling thread.
        prefetch: steps read ahead; default twice the workers.
        pin: give batches in page-locked memory, from which a GPU copies while it computes.

    Raises:
        UserError: when the ranks and micro-batches do not divide the global batch, or more of the samples are lost
            from the start than the policy allows.
    """

    def __init__(
        self,
        samples: SampleSet | ShardReader,
        order: Order,
        batches: BatchPlan | int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        start_position: int = 0,
        workers: int = 2,
        worker_kind: WorkerKind = "threads",
        prefetch: int | None = None,
        pin: bool = False,
    ) -> None:
        self._samples = as_set(samples)
        self._plan = BatchPlan.constant(batches) if isinstance(batches, int) else batches
        for size in self._plan.sizes:
            check_batch_sizes(size, micro_batch_size, dp_size)
        if not 0 <= dp_rank < dp_size or start_position < 0 or order.num_samples != len(self._samples):
            raise ValueError(
                f"dp_rank={dp_rank} must be below dp_size={dp_size}, start_position={start_position} not negative, and "
                f"the order's {order.num_samples} samples those of the reader, {len(self._samples)}"
            )
        self.wait_seconds = 0.0  #: how long the last `next` kept the caller waiting
        self.account = DamageAccount.of(self._samples)
        self._order = order
        self._micro_batch_size = micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._position = start_position
        self._pin = pin
        self._closed = threading.Event()
        self._processes = WorkerProcesses(workers, self._samples) if worker_kind == "processes" and workers else None
        self._steps = map_ahead(self._load_step, self._plan.positions(start_position), workers, prefetch)

    def __iter__(self) -> StreamLoader:
        return self

    def __next__(self) -> list[Any]:
        begin = time.perf_counter()
        try:
            share, batches = next(self._steps)
        except (StopIteration, Closed):  # the stream is endless: only close() or an error ends it
            raise RuntimeError("the loader is closed, or stopped at an error before; make a new one") from None
        for lost in share.lost:
            self.account.record(lost)
        self._position += self._plan.size_at(self._position)
        self.wait_seconds = time.perf_counter() - begin
        return batches

    def state(self) -> dict[str, int]:
        """`position`, the images of the batches given out so far and of the run before; and the epoch it is in."""
        return {"epoch": self._order.epoch(self._position), "position": self._position}

    def close(self) -> None:
        """Stop reading ahead."""
        self._closed.set()
        if self._processes is not None:
            self._processes.close()
        self._steps.close()

    def _load_step(self, position: int) -> tuple[Share, list[Any]]:
        count = self._plan.size_at(position) // self._dp_size
        start = position + self._dp_rank * count
        samples, epochs = self._order.sample_indices(start, count), self._order.epochs(start, count)
        request = Request(start, tuple(samples.tolist()), self._order.seed, tuple(epochs.tolist()))
        if self._processes is not None:
            share = self._processes.load_share(request)
        else:
            share = self._samples.load_share(request, self._closed)
        size = self._micro_batch_size
        return share, [_batch(share, start, at, at + size, self._pin) for at in range(0, count, size)]


def as_set(samples: SampleSet | ShardReader) -> SampleSet:
    """The set itself, or that of a single folder of tokens."""
    return samples if isinstance(samples, SampleSet) else SampleSet([samples])


def eval_spans(count: int, batch_size: int, dp_rank: int, dp_size: int) -> Iterator[range]:
    """The samples of every batch of this rank; ranks take contiguous parts that differ by at most one sample."""
    start, end = count * dp_rank // dp_size, count * (dp_rank + 1) // dp_size
    for at in range(start, end, batch_size):
        yield range(at, min(at + batch_size, end))


def eval_batches(
    samples: SampleSet | ShardReader, batch_size: int, dp_rank: int = 0, dp_size: int = 1, limit: int | None = None
) -> Iterator[Any]:
    """This rank's part of the first `limit` samples (default all) in stored order; each sample on exactly one rank.

    The last batch of a rank may be short, and a rank may have a batch less than another. A batch's positions are the
    numbers of its samples. What replaces a damaged sample depends on its number alone.
    """
    samples = as_set(samples)
    account = DamageAccount.of(samples)
    count = len(samples) if limit is None else min(limit, len(samples))
    for span in eval_spans(count, batch_size, dp_rank, dp_size):
        share = samples.load_share(Request(span.start, tuple(span), seed=0))
        for lost in share.lost:
            account.record(lost)
        yield _batch(share, span.start, 0, len(span), pin=False)


def _batch(share: Share, start: int, begin: int, end: int, pin: bool) -> Batch | PixelBatch:
    """Rows `begin` … `end − 1` of a share whose first position is `start`."""
    tensors: Sequence[Tensor] = (
        torch.from_numpy(share.values[begin:end]),
        torch.from_numpy(share.labels[begin:end]),
        torch.arange(start + begin, start + end),
    )
    if pin:
        tensors = [tensor.pin_memory() for tensor in tensors]
    kind = Batch if share.values.ndim == 2 else PixelBatch
    return kind(*tensors, share.keys[begin:end])
