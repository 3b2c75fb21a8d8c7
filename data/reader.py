"""Reading shards in any order, and the batches of a training run as a pure function of its position.

`ShardReader` gives sample i of a folder. `StreamLoader` gives a data-parallel rank its part of one global batch after
the other: which samples those are depends on (seed, position) alone, so a run can stop at any image and go on with any
number of ranks, threads and micro-batches. `eval_batches` gives every sample once.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hmar_mega.batches import BatchPlan
from hmar_mega.data.index import Kind, Offsets, ShardIndex, load_offsets, read_index, require_kind
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.threads import map_ahead
from hmar_mega.data.tokens import TOKEN_FIELD, TokenCodec, choose_crops, npy_bytes
from hmar_mega.errors import UserError
from hmar_mega.micro_batches import check_batch_sizes

__all__ = [
    "TOKEN_FIELD",
    "Batch",
    "Sample",
    "SampleOrder",
    "ShardReader",
    "StreamLoader",
    "check_fingerprint",
    "eval_batches",
    "npy_bytes",
]

#: Names of an image's field in a sample: the format of its bytes.
IMAGE_FIELDS = ("jpg", "png", "webp")


@dataclass(frozen=True)
class ImageSample:
    """One image: the bytes of its file. `where` names shard and key, for messages."""

    key: str
    label: int
    data: bytes
    where: str


@dataclass(frozen=True)
class TokenSample:
    """One image as tokens, (N,) int64, its K maps one after the other. `where` names shard and key, for messages."""

    key: str
    label: int
    tokens: np.ndarray
    where: str


Sample = ImageSample | TokenSample


@dataclass(frozen=True)
class Batch:
    """b token samples: tokens (b, N) int64, labels (b,) int64, stream positions (b,) int64, and their keys."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    keys: tuple[str, ...]


class ShardReader:
    """Random access to the samples of a folder of shards, numbered in stored order.

    Samples are read with `pread`, which shares no file position, so threads and forked processes may read at once.

    Args:
        kind: what the folder must hold.

    Raises:
        UserError: when the folder is not what `kind` says, or a shard no longer agrees with the index.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder = Path(folder)
        self.index: ShardIndex = read_index(self.folder)
        require_kind(self.folder, self.index, kind)
        self._codec = None if self.index.tokens is None else TokenCodec(self.index.tokens)
        self._shards = [load_offsets(self.folder, shard) for shard in self.index.shards]
        self._starts = [0, *itertools.accumulate(len(offsets) for offsets in self._shards)]
        self._columns = [self._find_columns(shard) for shard in range(len(self._shards))]
        self._descriptors: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)

    def __len__(self) -> int:
        return self.index.samples

    def read(self, index: int) -> Sample:
        """Sample `index`, an image or tokens as the folder holds.

        Raises:
            IndexError: when `index` is not in [0, len).
            UserError: when its bytes cannot be read or are not tokens; names the shard and the key.
        """
        return self.read_image(index) if self.index.kind == "images" else self.read_tokens(index)

    def read_image(self, index: int) -> ImageSample:
        """Sample `index` of image shards; see `read`."""
        return ImageSample(*self._read(index))

    def read_tokens(self, index: int, crop: int = 0) -> TokenSample:
        """Sample `index` of token shards, of its stored crops the one with number `crop`; see `read`."""
        key, label, data, where = self._read(index)
        assert self._codec is not None
        return TokenSample(key, label, self._codec.decode(data, where, crop), where)

    def close(self) -> None:
        """Close the files, which also happens when the reader is forgotten; reading opens them again."""
        _close_all(self._descriptors)

    def _read(self, index: int) -> tuple[str, int, bytes, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[shard]
        offsets, column = self._shards[shard], self._columns[shard][row]
        key = offsets.keys[row].decode()
        where = f"{self.folder / self.index.shards[shard].name}: sample {key}"
        data = self._pread(shard, int(offsets.sizes[row, column]), int(offsets.starts[row, column]), where)
        return key, int(offsets.labels[row]), data, where

    def _find_columns(self, shard: int) -> np.ndarray:
        """For each sample of a shard the column of `Offsets` that holds its content, (n,) int64."""
        offsets: Offsets = self._shards[shard]
        wanted = IMAGE_FIELDS if self._codec is None else (self._codec.field,)
        present = (offsets.sizes >= 0) & np.isin(offsets.fields, wanted)[None, :]
        where = self.folder / self.index.shards[shard].name
        if not (present.sum(axis=1) == 1).all():
            row = int(np.argmax(present.sum(axis=1) != 1))
            raise UserError(
                f"shard {where}: sample {offsets.keys[row].decode()} must have exactly one field of "
                f"{', '.join(wanted)}; make the shards anew"
            )
        classes = len(self.index.classes)
        if len(offsets) and not (offsets.labels.min() >= 0 and offsets.labels.max() < classes):
            raise UserError(f"shard {where} has labels outside 0 … {classes - 1}; make the shards anew")
        columns: np.ndarray = present.argmax(axis=1)
        return columns

    def _pread(self, shard: int, size: int, start: int, where: str) -> bytes:
        try:
            data = os.pread(self._descriptor(shard), size, start)
            while data and len(data) < size:
                more = os.pread(self._descriptor(shard), size - len(data), start + len(data))
                data = data + more if more else b""
        except OSError as err:
            hint = "; raise the limit with `ulimit -n`" if err.errno == errno.EMFILE else ""
            raise UserError(f"{where} cannot be read: {err.strerror}{hint}") from None
        if len(data) != size:
            raise UserError(f"{where} is cut off: the shard has been truncated; restore it or make it anew")
        return data

    def _descriptor(self, shard: int) -> int:
        found = self._descriptors.get(shard)
        if found is not None:
            return found
        opened = os.open(self.folder / self.index.shards[shard].name, os.O_RDONLY)
        # No lock, which a fork could leave locked: setdefault is atomic, and a loser closes its own.
        kept = self._descriptors.setdefault(shard, opened)
        if kept != opened:
            os.close(opened)
        return kept


def _close_all(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def check_fingerprint(index: ShardIndex, tokenizer_fingerprint: str, patch_nums: Sequence[int] | None = None) -> None:
    """Make sure that token shards go with a tokenizer, and with a model's scales where `patch_nums` is given.

    Raises:
        UserError: when the shards were made by another tokenizer or for other scales.
    """
    if index.tokens is None:
        raise UserError("the shards hold images, not tokens; turn them into token shards with `hmar-mega data encode`")
    if index.tokens.fingerprint != tokenizer_fingerprint:
        raise UserError(
            f"the token shards were made by tokenizer {index.tokens.fingerprint}, but the one given is "
            f"{tokenizer_fingerprint}; give that tokenizer, or encode the images anew with `hmar-mega data encode`"
        )
    if patch_nums is not None and tuple(patch_nums) != index.tokens.patch_nums:
        raise UserError(
            f"the token shards have patch_nums {list(index.tokens.patch_nums)}, but {list(patch_nums)} are asked for; "
            "set schedule.patch_nums to those of the shards, or encode the images anew with `hmar-mega data encode`"
        )


class StreamLoader:
    """This rank's micro-batches of one global batch after the other; an endless iterator.

    The global batch of G images at position s holds positions s … s+G−1. Rank r of R takes the contiguous part that
    starts at s + r·G/R, cut into contiguous micro-batches.

    Args:
        reader: token shards.
        order: which sample stands at which position.
        batches: the global batch size of every step, or one for all.
        start_position: images seen before; where a resumed run goes on.
        workers: threads that read steps ahead; 0 reads in the calling thread.

    Raises:
        UserError: when the ranks and micro-batches do not divide the global batch.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: SampleOrder,
        batches: BatchPlan | int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        start_position: int = 0,
        workers: int = 2,
    ) -> None:
        require_kind(reader.folder, reader.index, "tokens")
        self._plan = BatchPlan.constant(batches) if isinstance(batches, int) else batches
        for size in self._plan.sizes:
            check_batch_sizes(size, micro_batch_size, dp_size)
        if not 0 <= dp_rank < dp_size or start_position < 0 or order.num_samples != len(reader):
            raise ValueError(
                f"dp_rank={dp_rank} must be below dp_size={dp_size}, start_position={start_position} not negative, and "
                f"the order's {order.num_samples} samples those of the reader, {len(reader)}"
            )
        self.wait_seconds = 0.0  #: how long the last `next` kept the caller waiting
        self._reader = reader
        self._order = order
        self._micro_batch_size = micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._position = start_position
        self._steps = map_ahead(self._load_step, self._plan.positions(start_position), workers)

    def __iter__(self) -> StreamLoader:
        return self

    def __next__(self) -> list[Batch]:
        begin = time.perf_counter()
        try:
            batches = next(self._steps)
        except StopIteration:  # the stream is endless: only close() or an error ends it
            raise RuntimeError("the loader is closed, or stopped at an error before; make a new one") from None
        self._position += self._plan.size_at(self._position)
        self.wait_seconds = time.perf_counter() - begin
        return batches

    def state(self) -> dict[str, int]:
        """`position`, the images of the batches given out so far and of the run before; and the epoch it is in."""
        return {"epoch": self._order.epoch(self._position), "position": self._position}

    def close(self) -> None:
        """Stop reading ahead."""
        self._steps.close()

    def _load_step(self, position: int) -> list[Batch]:
        share = self._plan.size_at(position) // self._dp_size
        start = position + self._dp_rank * share
        indices = self._order.sample_indices(start, share)
        assert self._reader.index.tokens is not None
        stored = self._reader.index.tokens.crops
        crops = choose_crops(stored, self._order.seed, len(self._reader), start, indices).tolist()
        samples = indices.tolist()
        return [
            _read_batch(
                self._reader,
                samples[at : at + self._micro_batch_size],
                start + at,
                crops[at : at + self._micro_batch_size],
            )
            for at in range(0, share, self._micro_batch_size)
        ]


def eval_batches(
    reader: ShardReader, batch_size: int, dp_rank: int = 0, dp_size: int = 1, limit: int | None = None
) -> Iterator[Batch]:
    """This rank's part of the first `limit` samples (default all) in stored order; each sample on exactly one rank.

    Ranks take contiguous parts that differ by at most one sample; the last batch of a rank may be short, and a rank
    may have a batch less than another. A batch's positions are the numbers of its samples.
    """
    require_kind(reader.folder, reader.index, "tokens")
    count = len(reader) if limit is None else min(limit, len(reader))
    start, end = count * dp_rank // dp_size, count * (dp_rank + 1) // dp_size
    for at in range(start, end, batch_size):
        numbers = range(at, min(at + batch_size, end))
        yield _read_batch(reader, numbers, at, [0] * len(numbers))


def _read_batch(reader: ShardReader, samples: Sequence[int], position: int, crops: Sequence[int]) -> Batch:
    read = [reader.read_tokens(sample, crop) for sample, crop in zip(samples, crops, strict=True)]
    return Batch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in read])),
        labels=torch.tensor([sample.label for sample in read]),
        positions=torch.arange(position, position + len(read)),
        keys=tuple(sample.key for sample in read),
    )
