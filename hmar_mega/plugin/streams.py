"""Micro-batches for other people's loops: the same samples in the same order as in `hmar-mega train`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hmar_mega.config import Config
from hmar_mega.data.stream import Batch, Loader, eval_batches
from hmar_mega.errors import UserError
from hmar_mega.micro_batches import micro_batch_size
from hmar_mega.plugin.model import load_tokenizer, parallel_dims, run_config
from hmar_mega.training_data import TrainingData, open_data, open_loader, require_training_data

log = logging.getLogger(__name__)


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
    config = run_config(config)
    data = _open(config)
    return Streams(_training_stream(config, data, start_position), _validation_stream(config, data), None)


dataset_provider.is_distributed = True  # type: ignore[attr-defined]


def batch_iterator(config: Config | str | Path, start_position: int = 0) -> TokenStream:
    """The training stream alone: `num_micro_batches` of them make a step."""
    config = run_config(config)
    return _training_stream(config, _open(config), start_position)


def num_micro_batches(config: Config | str | Path, step: int = 0) -> int:
    """Micro-batches that each data-parallel rank runs in `step` (0-based)."""
    config = run_config(config)
    size = parallel_dims().data_parallel
    return config.data.batch_plan.size(step) // (size * micro_batch_size(config, size))


def _training_stream(config: Config, data: TrainingData, start_position: int) -> TokenStream:
    dims = parallel_dims()
    steps = open_loader(config, data, dims.dp_rank, dims.data_parallel, start_position)
    micro = micro_batch_size(config, dims.data_parallel)
    return TokenStream(itertools.chain.from_iterable(_steps(steps)), data.num_samples, micro)


def _validation_stream(config: Config, data: TrainingData) -> TokenStream | None:
    """Whole micro-batches over and over, equally many on every rank; what is left over at the end is never shown."""
    held_out, dims = data.validation, parallel_dims()
    if held_out is None:
        return None
    rank, size = dims.dp_rank, dims.data_parallel
    micro = micro_batch_size(config, size)
    limit = len(held_out) // (micro * size) * micro * size
    if limit == 0:
        raise UserError(
            f"data.val has {len(held_out)} samples, fewer than a micro-batch of {micro} on each of {size} "
            "data-parallel ranks; lower data.micro_batch_size or leave data.val out"
        )

    def forever() -> Iterator[Batch]:
        while True:
            yield from eval_batches(held_out, micro, rank, size, limit)

    return TokenStream(forever(), len(held_out), micro)


def _open(config: Config) -> TrainingData:
    """The data of a run. Ranks that hold parts of one model each read for themselves here.

    What fails on one of them alone must not give them different samples, so damage then ends the run.
    """
    require_training_data(config.data)
    if config.tokenizer.path is None:
        raise UserError("tokenizer.path must be set: the folder of the tokenizer that made the tokens")
    if config.data.encode == "online" or config.data.reader != "index":
        raise UserError(
            f"data.encode={config.data.encode} with data.reader={config.data.reader} is for `hmar-mega train`; a loop "
            "of your own reads token shards with an index (`hmar-mega data encode`)"
        )
    dims = parallel_dims()
    if config.data.on_damage == "skip" and dims.tensor_parallel * dims.pipeline_parallel > 1:
        log.info("damaged samples end the run (data.on_damage=stop): tensor and pipeline ranks read for themselves")
        config = config.model_copy(update={"data": config.data.model_copy(update={"on_damage": "stop"})})
    return open_data(config, load_tokenizer(config.tokenizer.path))


def _steps(loader: Loader) -> Iterator[list[Batch]]:
    while True:
        yield next(loader)
