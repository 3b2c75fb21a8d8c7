"""Micro-batches for other people's loops: the same samples in the same order as in `hmar-mega train`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron.core import parallel_state

from hmar_mega.config import Config
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader
from hmar_mega.data.stream import Batch, StreamLoader, eval_batches
from hmar_mega.engine import micro_batch_size
from hmar_mega.errors import UserError
from hmar_mega.plugin.model import load_tokenizer, run_config
from hmar_mega.train import open_shards


class TokenStream:
    """This data-parallel rank's micro-batches one by one, without end.

    Attributes:
        num_samples: images in the shards.
        micro_batch_size: images of every micro-batch.
    """

    def __init__(self, batches: Iterator[Batch], num_samples: int, micro_batch_size: int) -> None:
        self.num_samples, self.micro_batch_size = num_samples, micro_batch_size
        self._batches = batches

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)


class Streams(NamedTuple):
    """What a dataset provider gives; there is no test set."""

    train: TokenStream
    valid: TokenStream | None
    test: None


def dataset_provider(
    config: Config | str | Path,
    train_val_test_num_samples: Sequence[int] | None = None,
    vp_stage: int | None = None,
    *,
    start_position: int = 0,
) -> Streams:
    """The streams of `data.train` and `data.val` for this data-parallel rank.

    Bound to a configuration (`functools.partial`) it is Megatron-LM's `train_valid_test_datasets_provider`, for its
    `--dataloader-type external`; give the partial the attribute `is_distributed = True`, since every rank of a pipeline
    or a tensor-parallel group reads for itself.

    Args:
        train_val_test_num_samples, vp_stage: taken for Megatron's sake; streams have no end and are the same for all.
        start_position: images seen before; where a resumed run goes on.

    Raises:
        UserError: for shards that do not go with tokenizer or model, or batches that do not divide.
    """
    train = batch_iterator(config, start_position=start_position)
    return Streams(train, _validation_stream(run_config(config), train.micro_batch_size), None)


dataset_provider.is_distributed = True  # type: ignore[attr-defined]


def batch_iterator(config: Config | str | Path, start_position: int = 0) -> TokenStream:
    """The training stream alone: `num_micro_batches` of them make a step."""
    config = run_config(config)
    reader = _open(config, "train")
    rank, size = _data_parallel()
    micro = micro_batch_size(config, size)
    order = SampleOrder(len(reader), config.run.seed)
    steps = StreamLoader(reader, order, config.data.batch_plan, micro, rank, size, start_position, config.data.workers)
    return TokenStream(itertools.chain.from_iterable(steps), len(reader), micro)


def num_micro_batches(config: Config | str | Path, step: int = 0) -> int:
    """Micro-batches that each data-parallel rank runs in `step` (0-based)."""
    config = run_config(config)
    size = _data_parallel()[1]
    return config.data.batch_plan.size(step) // (size * micro_batch_size(config, size))


def _validation_stream(config: Config, micro: int) -> TokenStream | None:
    """Whole micro-batches over and over, equally many on every rank; what is left over at the end is never shown."""
    if config.data.val is None:
        return None
    reader = _open(config, "val")
    rank, size = _data_parallel()
    limit = len(reader) // (micro * size) * micro * size
    if limit == 0:
        raise UserError(
            f"data.val has {len(reader)} samples, fewer than a micro-batch of {micro} on each of {size} data-parallel "
            "ranks; lower data.micro_batch_size or leave data.val out"
        )

    def forever() -> Iterator[Batch]:
        while True:
            yield from eval_batches(reader, micro, rank, size, limit)

    return TokenStream(forever(), len(reader), micro)


def _open(config: Config, split: str) -> ShardReader:
    path = getattr(config.data, split)
    if path is None or config.tokenizer.path is None:
        raise UserError(
            f"data.{split} and tokenizer.path must be set: a folder of token shards, and of their tokenizer"
        )
    return open_shards(path, f"data.{split}", config, load_tokenizer(config.tokenizer.path))


def _data_parallel() -> tuple[int, int]:
    return int(parallel_state.get_data_parallel_rank()), int(parallel_state.get_data_parallel_world_size())
