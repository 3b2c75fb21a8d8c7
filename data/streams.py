"""Streams of token samples without positions: plain webdataset, also through `pipe:`, and megatron-energon.

For data that cannot be read at random, such as an object store. What is given up is said in the log: a resumed run sees
other samples than an unbroken one would have, and samples of one epoch may come twice or not at all. Everything keyed
by stream position (label drop, masks, drop-path) stays as it is.
"""

from __future__ import annotations

import importlib.util
import logging
import queue
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import webdataset

from hmar_mega.batches import BatchPlan
from hmar_mega.data.damage import Damage, DamageAccount, DamagePolicy, Lost
from hmar_mega.data.index import INDEX_NAME, LABEL_FIELD, ShardIndex, TokenFormat, read_index, require_kind
from hmar_mega.data.patience import read_patiently
from hmar_mega.data.stream import Batch
from hmar_mega.data.threads import map_ahead
from hmar_mega.data.tokens import TokenCodec, bits_for
from hmar_mega.errors import UserError
from hmar_mega.micro_batches import check_batch_sizes

log = logging.getLogger(__name__)

#: Samples that a stream holds to draw the next one from.
SHUFFLE_BUFFER = 4096

#: What stands in an account in place of a substitute: a stream goes on with whatever comes next.
NO_SAMPLE = -1

#: Steps read ahead where nothing else is said.
AHEAD = 4

Found = TypeVar("Found")

#: Called with damage and the number of samples it cost.
Note = Callable[[Damage, int], None]


@dataclass(frozen=True)
class TokenStream:
    """Where a stream comes from and what its samples are.

    Attributes:
        reader: which library reads it.
        source: a folder of shards, or for webdataset any URLs it takes: braces, `pipe:`, joined by `::`.
        index: of the folder, which says how many samples each tar must give; None for other sources.
        codecs: how tokens are read, by the field that holds them.
        crops: stored of every image, one of which is drawn.
        num_classes: what labels must be below.
        num_samples: of an epoch.
    """

    reader: Literal["webdataset", "energon"]
    source: str
    index: ShardIndex | None
    codecs: Mapping[str, TokenCodec]
    crops: int
    num_classes: int
    num_samples: int
    policy: DamagePolicy

    def __len__(self) -> int:
        return self.num_samples

    @property
    def lost(self) -> dict[str, tuple[int, str]]:
        """Shards that are known not to be usable: none, before they are read."""
        return {}


def open_stream(
    reader: Literal["webdataset", "energon"], source: str, num_samples: int | None, tokens: TokenFormat,
    num_classes: int, policy: DamagePolicy,
) -> TokenStream:  # fmt: skip
    """A stream, and in the log what it cannot do.

    Args:
        tokens: what the model reads; how they are stored is the index's to say, or the samples' own fields.

    Raises:
        UserError: when the library is missing, the folder is not prepared for it, or the number of samples is unknown.
    """
    folder = Path(source)
    index = read_index(folder) if (folder / INDEX_NAME).is_file() else None
    if index is not None:
        require_kind(folder, index, "tokens")
    if reader == "energon":
        if importlib.util.find_spec("megatron.energon") is None:
            raise UserError(
                "data.reader=energon needs megatron-energon, which is not installed: pip install 'hmar-mega[energon]', "
                "or use data.reader=index"
            )
        if not (folder / ".nv-meta").is_dir():
            raise UserError(f"{source} is not prepared for energon: run `energon prepare {source}` (CrudeWebdataset)")
    if index is None and num_samples is None:
        raise UserError(f"data.train={source} has no {INDEX_NAME}: say how many images it has in data.stream_samples")
    log.info("data.reader=%s: one reading thread; a resumed run neither repeats nor continues the order", reader)
    if index is None:
        log.warning(
            "%s has no %s: neither the tokenizer that made its tokens nor lost ends of damaged tars can be checked",
            source, INDEX_NAME,
        )  # fmt: skip
    count = num_samples if index is None else index.samples
    assert count is not None
    if index is not None and index.tokens is not None:
        formats = [index.tokens]
    else:
        packed = {"storage": "packed", "bits": bits_for(tokens.codebook_size)}
        formats = [tokens, tokens.model_copy(update=packed)]
    codecs = {codec.field: codec for codec in map(TokenCodec, formats)}
    return TokenStream(reader, source, index, codecs, formats[0].crops, num_classes, count, policy)


class TokenStreamLoader:
    """This rank's micro-batches from a stream; see `StreamLoader` for the batches and arguments.

    Every rank draws its own shards, at random with replacement (energon: its own part of the shards).
    """

    def __init__(
        self, stream: TokenStream, batches: BatchPlan, micro_batch_size: int, dp_rank: int, dp_size: int,
        start_position: int, seed: int, prefetch: int | None = None,
    ) -> None:  # fmt: skip
        for size in batches.sizes:
            check_batch_sizes(size, micro_batch_size, dp_size)
        self.wait_seconds = 0.0  #: how long the last `next` kept the caller waiting
        self.account = DamageAccount(stream.policy, stream.num_samples, stream.lost)
        self._stream, self._plan, self._micro_batch_size = stream, batches, micro_batch_size
        self._dp_rank, self._dp_size, self._position = dp_rank, dp_size, start_position
        self._damage: queue.SimpleQueue[tuple[Damage, int]] = queue.SimpleQueue()
        self._ended: Damage | None = None
        self._closed = threading.Event()
        draw = random.Random(f"{seed} {start_position} {dp_rank}")
        if stream.reader == "energon":
            from hmar_mega.data.energon_stream import energon_samples  # an optional dependency

            raw = energon_samples(stream.source, draw, dp_rank, dp_size, min(SHUFFLE_BUFFER, len(stream)), self._note)
            self._samples = _decoded(raw, stream, draw, self._note)
        else:
            self._samples = _webdataset_samples(stream, draw, self._note)
        self._steps = map_ahead(self._load_step, batches.positions(start_position), 1, prefetch or AHEAD)

    def __next__(self) -> list[Batch]:
        begin = time.perf_counter()
        try:
            batches = next(self._steps)
        except StopIteration:
            raise RuntimeError("the loader is closed, or stopped at an error before; make a new one") from None
        while not self._damage.empty():
            damage, count = self._damage.get()
            for number in range(count):  # a tar that is read again is damaged again: the same samples
                sample = -zlib.crc32(f"{damage} {number}".encode()) - 1
                self.account.record(Lost(self._position, sample, NO_SAMPLE, damage.kind, str(damage)))
        self._position += self._plan.size_at(self._position)
        self.wait_seconds = time.perf_counter() - begin
        return batches

    def state(self) -> dict[str, int]:
        """`position`, the images given out so far, and the epoch they amount to."""
        return {"epoch": self._position // self._stream.num_samples, "position": self._position}

    def close(self) -> None:
        """Stop reading ahead, and leave a read that hangs behind."""
        self._closed.set()
        self._steps.close()

    def _note(self, damage: Damage, count: int) -> None:
        """Count samples that are lost, or end the stream, as the policy says."""
        if self._stream.policy.on_damage == "stop":
            raise damage
        self._damage.put((damage, count))

    def _take(self, _: int) -> tuple[np.ndarray, int, str]:
        if self._ended is not None:
            raise self._ended.again()
        try:
            return next(self._samples)
        except Damage as damage:
            self._ended = damage
            raise

    def _load_step(self, position: int) -> list[Batch]:
        count = self._plan.size_at(position) // self._dp_size
        start = position + self._dp_rank * count
        policy, source = self._stream.policy, self._stream.source
        once = replace(policy, timeout=policy.timeout * (policy.retries + 1), retries=0)

        def silent(_: int) -> Damage:
            message = f"{source} gives no sample within {once.timeout:g} s, and a stream has no other way"
            self._ended = Damage(message, "slow")  # what hangs in it holds it: nothing more can be taken
            return self._ended

        rows: list[tuple[np.ndarray, int, str]] = []
        for row in read_patiently(self._take, range(count), once, silent, closed=self._closed):
            if isinstance(row, Damage):
                raise row
            rows.append(row)
        size = self._micro_batch_size
        return [_batch(rows[at : at + size], start + at) for at in range(0, count, size)]


def _batch(rows: list[tuple[np.ndarray, int, str]], start: int) -> Batch:
    tokens, labels, keys = zip(*rows, strict=True)
    positions = torch.arange(start, start + len(rows))
    return Batch(torch.from_numpy(np.stack(tokens)), torch.tensor(labels), positions, keys)


def _decode(
    sample: dict[str, Any], stream: TokenStream, where: str, draw: random.Random
) -> tuple[np.ndarray, int, str]:
    """(tokens (N,) int64, label, key) of a sample's fields; Damage when they are not those of the model."""
    try:
        field, codec = next((f, c) for f, c in stream.codecs.items() if f in sample)
        label = int(sample[LABEL_FIELD])
        tokens = codec.decode(sample[field], f"{where}: sample {sample['__key__']}", draw.randrange(stream.crops))
    except (KeyError, StopIteration, ValueError) as err:
        raise Damage(f"{where}: sample {sample.get('__key__')} cannot be decoded: {err!r}", "content") from None
    if not 0 <= label < stream.num_classes:
        raise Damage(f"{where}: sample {sample['__key__']} has label {label} of {stream.num_classes}", "content")
    return tokens, label, str(sample["__key__"])


def _shuffled(samples: Iterator[Found], draw: random.Random) -> Iterator[Found]:
    """Samples drawn from a buffer that the stream refills."""
    held: list[Found] = []
    for sample in samples:
        held.append(sample)
        if len(held) >= SHUFFLE_BUFFER:
            place = draw.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()


def _decoded(
    raw: Iterator[tuple[str, dict[str, Any]]], stream: TokenStream, draw: random.Random, note: Note
) -> Iterator[tuple[np.ndarray, int, str]]:
    """The rows of (where, fields); what cannot be decoded is noted."""
    for where, sample in raw:
        try:
            row = _decode(sample, stream, where, draw)
        except Damage as damage:
            note(damage, 1)
            continue
        yield row


def _webdataset_samples(stream: TokenStream, draw: random.Random, note: Note) -> Iterator[tuple[np.ndarray, int, str]]:
    """Samples of shards drawn at random, without end; what a tar should have held and did not is noted."""
    expected: dict[str, int] = {}
    if stream.index is not None:
        expected = {str(Path(stream.source) / shard.name): shard.samples for shard in stream.index.shards}
    urls = list(expected) or webdataset.shardlists.expand_urls(stream.source)

    def read() -> Iterator[tuple[np.ndarray, int, str]]:
        barren = 0
        while True:
            url = draw.choice(urls)
            errors: list[Exception] = []
            seen = given = 0
            tar = webdataset.DataPipeline(
                webdataset.SimpleShardList([url]),
                webdataset.tarfile_to_samples(handler=lambda err, errors=errors: errors.append(err) or True),
            )
            for sample in tar:
                seen += 1
                for row in _decoded(iter([(url, sample)]), stream, draw, note):
                    given += 1
                    yield row
            missing = max(0, expected.get(url, seen) - seen)
            if errors or missing:
                why = "; ".join(str(err) for err in errors) or "its end cannot be found behind a damaged header"
                note(Damage(f"{url}: {missing or 'some'} samples are lost: {why}", "cut off"), max(1, missing))
            barren = 0 if given else barren + 1
            if barren > 10 * len(urls):
                raise Damage(f"nothing can be read from {stream.source}; the last tar was {url}", "missing")

    # A small set would fill the buffer with many copies of itself before the first sample is given.
    return _shuffled(read(), draw) if stream.num_samples > SHUFFLE_BUFFER else read()
