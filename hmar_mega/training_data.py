"""What a run reads, from its configuration: opened and checked folders, the training loader, validation batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hmar_mega.config import Config
from hmar_mega.config_data import DataConfig
from hmar_mega.data.cache import ShardCache
from hmar_mega.data.damage import DamageAccount, DamagePolicy
from hmar_mega.data.index import Kind, TokenFormat
from hmar_mega.data.order import GroupedOrder, MixedOrder, Order, SampleOrder
from hmar_mega.data.reader import ShardReader, check_fingerprint
from hmar_mega.data.samples import Pixels, SampleSet
from hmar_mega.data.stream import Loader, StreamLoader, eval_batches, eval_spans
from hmar_mega.data.streams import TokenStream, TokenStreamLoader, open_stream
from hmar_mega.errors import UserError
from hmar_mega.micro_batches import micro_batch_size
from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.parallel.shared_batches import SharedLoader, reads, share_evaluation
from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.tokenizer.online import OnlineLoader, encode_batches

log = logging.getLogger(__name__)

MAX_EVAL_SAMPLES = 50_000


@dataclass(frozen=True)
class TrainingData:
    """The opened data of a run; `classes` are the names of labels 0, 1, …."""

    train: SampleSet | TokenStream
    validation: SampleSet | None
    classes: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        """Images of an epoch: those of all training sets together."""
        return len(self.train)

    def order(self, config: Config) -> Order:
        """In which order a run sees the training samples."""
        data, seed = config.data, config.run.seed
        orders: list[Order] = []
        assert isinstance(self.train, SampleSet)
        for reader in self.train.readers:
            if data.shuffle == "groups":
                orders.append(GroupedOrder(reader.shard_sizes, seed, data.group_shards))
            else:
                orders.append(SampleOrder(len(reader), seed))
        return MixedOrder(orders, [part.weight for part in data.mix]) if data.mix else orders[0]


def require_training_data(data: DataConfig) -> None:
    """Raise UserError where the settings do not say what to train on."""
    if data.encode == "online" and data.images is None and not data.mix:
        raise UserError("data.images is not set, and data.encode=online trains on it: give a folder of image shards")
    if data.encode == "stored" and data.train is None and not data.mix:
        raise UserError("data.train is not set: give a folder of token shards (hmar-mega data encode)")


def open_data(config: Config, tokenizer: MultiScaleVQVAE) -> TrainingData:
    """Open what `data` names.

    Raises:
        UserError: when it does not go with the tokenizer, the scales, the model or each other, or is damaged.
    """
    data = config.data
    online = data.encode == "online"
    single, held_out = (data.images, data.images_val) if online else (data.train, data.val)
    name = "images" if online else "train"
    places: list[tuple[str, str | None]] = [(f"data.mix[{n}]", part.path) for n, part in enumerate(data.mix)] or [
        (f"data.{name}", single)
    ]
    cache = None if data.cache is None else ShardCache(Path(data.cache), int(data.cache_gb * 1e9))
    if data.reader != "index":
        return _open_stream(config, tokenizer)
    readers = [_open_folder(path, key, config, tokenizer, cache) for key, path in places]
    for (key, path), reader in zip(places[1:], readers[1:], strict=True):
        _check_classes(readers[0], reader, f"{key}={path}", f"{places[0][0]}={places[0][1]}")
    train = SampleSet(readers, _pixels(config, random=True) if online else None)
    validation = None
    if held_out is not None:
        key = "data.images_val" if online else "data.val"
        reader = _open_folder(held_out, key, config, tokenizer, cache)
        _check_classes(readers[0], reader, f"{key}={held_out}", f"{places[0][0]}={places[0][1]}")
        validation = SampleSet([reader], _pixels(config, random=False) if online else None)
    for samples in (train, validation):
        if samples is not None:
            DamageAccount.of(samples)  # refuses a set of which too much is gone, before anything else is done
    return TrainingData(train, validation, readers[0].index.classes)


def open_loader(config: Config, data: TrainingData, dp_rank: int, dp_size: int, start_position: int) -> Loader:
    """The micro-batches of one data-parallel rank, of tokens or, to be encoded online, of pixels.

    Raises:
        UserError: for batches that do not divide, or page-locked memory without a GPU.
    """
    settings = config.data
    pin = settings.pin_memory if settings.pin_memory is not None else torch.cuda.is_available()
    if pin and not torch.cuda.is_available():
        raise UserError("data.pin_memory=true is for copies to a GPU, and there is none here; leave it out")
    if isinstance(data.train, TokenStream):
        return TokenStreamLoader(
            data.train, settings.batch_plan, micro_batch_size(config, dp_size), dp_rank, dp_size, start_position,
            config.run.seed, settings.prefetch,
        )  # fmt: skip
    return StreamLoader(
        data.train, data.order(config), settings.batch_plan, micro_batch_size(config, dp_size), dp_rank, dp_size,
        start_position, settings.workers, settings.worker_kind, settings.prefetch, pin,
    )  # fmt: skip


def run_loader(
    config: Config, data: TrainingData, dims: ParallelDims, start_position: int, tokenizer: MultiScaleVQVAE
) -> Loader:
    """The loader of a training run on this rank; where ranks hold parts of one model, the first reads for all."""
    alone = dims.tensor_parallel * dims.pipeline_parallel == 1
    loader = None
    if alone or reads(dims):
        loader = open_loader(config, data, dims.dp_rank, dims.data_parallel, start_position)
        if config.data.encode == "online":
            loader = OnlineLoader(loader, tokenizer, dims.device)
    if alone and loader is not None:
        return loader
    return SharedLoader(
        loader, config.data.batch_plan, micro_batch_size(config, dims.data_parallel),
        config.schedule.scales.num_tokens, data.num_samples, dims, start_position,
    )  # fmt: skip


class Validation:
    """The batches of a validation on this rank: calling gives them anew.

    Raises:
        UserError: when there are fewer samples than ranks that all need one (ZeRO-3).

    Attributes:
        rounds: batches of the rank that has most of them.
    """

    def __init__(self, config: Config, samples: SampleSet, dims: ParallelDims, tokenizer: MultiScaleVQVAE) -> None:
        self._samples, self._dims, self._tokenizer = samples, dims, tokenizer
        self._limit = min(config.eval.num_samples or MAX_EVAL_SAMPLES, len(samples))
        self._batch_size = config.eval.batch_size
        self._num_tokens = config.schedule.scales.num_tokens
        if config.parallel.zero_stage == 3 and self._limit < dims.data_parallel:
            raise UserError(
                f"{self._limit} validation samples are fewer than the {dims.data_parallel} data-parallel processes, "
                "each of which needs one under zero_stage=3; raise eval.num_samples or use zero_stage=2"
            )
        self.rounds = math.ceil(math.ceil(self._limit / dims.data_parallel) / self._batch_size)

    def __call__(self) -> Iterator[Any]:
        """This rank's batches of tokens, from the first on."""
        dims, part = self._dims, (self._batch_size, self._dims.dp_rank, self._dims.data_parallel)
        alone = dims.tensor_parallel * dims.pipeline_parallel == 1
        batches = None
        if alone or reads(dims):
            batches = eval_batches(self._samples, *part, self._limit)
            if self._samples.pixels is not None:
                batches = encode_batches(batches, self._tokenizer, dims.device)
        if alone and batches is not None:
            return batches
        return share_evaluation(batches, eval_spans(self._limit, *part), self._num_tokens, dims)


def damage_policy(data: DataConfig) -> DamagePolicy:
    """What the settings say about damage."""
    return DamagePolicy(data.on_damage, data.max_damaged, data.read_timeout, data.read_retries)


def _open_stream(config: Config, tokenizer: MultiScaleVQVAE) -> TrainingData:
    """`data.train` as a stream of tokens; validation is read from a folder with an index as ever."""
    data, classes = config.data, config.model.num_classes
    if data.worker_kind == "processes" or data.pin_memory:
        raise UserError(f"data.reader={data.reader} has one reading thread: leave out worker_kind and pin_memory")
    tokens = TokenFormat(
        patch_nums=config.schedule.scales.patch_nums, codebook_size=tokenizer.config.codebook_size,
        fingerprint=tokenizer.fingerprint, resolution=config.schedule.resolution,
    )  # fmt: skip
    stream = open_stream(data.reader, str(data.train), data.stream_samples, tokens, classes, damage_policy(data))
    names = tuple(str(number) for number in range(classes))
    if stream.index is not None:
        check_fingerprint(stream.index, tokenizer.fingerprint, config.schedule.scales.patch_nums)
        names = stream.index.classes
    validation = None
    if data.val is not None:
        reader = _open_folder(data.val, "data.val", config, tokenizer, None)
        if stream.index is not None and reader.index.classes != stream.index.classes:
            raise UserError(f"data.val={data.val} has other classes than data.train={data.train}; shard both alike")
        validation = SampleSet([reader])
    return TrainingData(stream, validation, names)


def _pixels(config: Config, random: bool) -> Pixels:
    return Pixels(config.schedule.resolution, config.data.augment, random)


def _open_folder(
    path: str | None, key: str, config: Config, tokenizer: MultiScaleVQVAE, cache: ShardCache | None
) -> ShardReader:
    """The shards of setting `key`; UserError when they do not go with the tokenizer, the scales or the model."""
    kind: Kind = "images" if config.data.encode == "online" else "tokens"
    reader = ShardReader(Path(str(path)), kind, damage_policy(config.data), cache)
    if kind == "tokens":
        check_fingerprint(reader.index, tokenizer.fingerprint, config.schedule.scales.patch_nums)
    if len(reader.index.classes) > config.model.num_classes:
        raise UserError(
            f"{key}={path} has {len(reader.index.classes)} classes, model.num_classes={config.model.num_classes}; "
            f"set model.num_classes={len(reader.index.classes)}"
        )
    return reader


def _check_classes(first: ShardReader, other: ShardReader, given: str, beside: str) -> None:
    """Refuse shards whose labels would mean other classes than those of the first training set."""
    ours, theirs = first.index.classes, other.index.classes
    if ours != theirs:
        different = ", ".join(sorted(set(ours) ^ set(theirs))[:10]) or "only their order"
        raise UserError(
            f"{given} has other classes than {beside} (different: {different}), so labels would mean different things; "
            "shard both from folders with the same class names"
        )
