"""Other people's readers for `data.py`: each a function that gives batches from a folder of our shards, as users would.

`start` is a number of samples after which to go on, as a run that is resumed. Where a library has no such state, its
stream is replayed up to there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmar_mega.data.images import crop_pixels, decode_sample
from hmar_mega.data.index import TokenFormat, read_index
from hmar_mega.data.reader import ImageSample
from hmar_mega.data.samples import Pixels
from hmar_mega.data.tokens import TokenCodec

BATCH, RESOLUTION = 64, 256

#: Samples from which streams draw, as their documentation advises.
BUFFER = 1000


@dataclass(frozen=True)
class Sizes:
    """Samples of the two sets."""

    images: int
    tokens: int


def images_of() -> Pixels:
    """What images become."""
    return Pixels(RESOLUTION, "crop", random=True)


class Decode:
    """A sample's fields as an array, the same work as ours does; can be sent to workers."""

    def __init__(self, kind: str, tokens: TokenFormat) -> None:
        self.kind, self.codec = kind, TokenCodec(tokens)

    def __call__(self, sample: dict[str, Any]) -> np.ndarray:
        """From bytes."""
        if self.kind == "tokens":
            return self.codec.decode(_bytes(sample, "tok"), "sample")
        image = decode_sample(ImageSample("", 0, _bytes(sample, "jpg"), "sample"))
        return crop_pixels(image, RESOLUTION, "crop", [(random.random(), random.random())])[0]


def _bytes(sample: dict[str, Any], field: str) -> bytes:
    found = sample[field] if field in sample else sample["." + field]
    return found if isinstance(found, bytes) else found.read()


def stack(samples: list[np.ndarray]) -> torch.Tensor:
    """A batch."""
    return torch.from_numpy(np.stack(samples))


def _tars(folder: Path) -> list[str]:
    return [str(folder / shard.name) for shard in read_index(folder).shards]


def _webdataset(folder: Path, kind: str, tokens: TokenFormat) -> Any:
    import webdataset

    return (
        webdataset.WebDataset(_tars(folder), resampled=True, shardshuffle=False)
        .shuffle(BUFFER)
        .map(Decode(kind, tokens))
        .batched(BATCH, collation_fn=stack, partial=False)
    )


def open_webdataset(folder: Path, kind: str, workers: int, tokens: TokenFormat, start: int) -> Iterator[torch.Tensor]:
    """Plain webdataset: resampled shards, a shuffle buffer, torch's DataLoader."""
    loader = torch.utils.data.DataLoader(_webdataset(folder, kind, tokens), batch_size=None, num_workers=workers)
    yield from itertools.islice(loader, start // BATCH, None)


def open_wids(folder: Path, kind: str, workers: int, tokens: TokenFormat, start: int) -> Iterator[torch.Tensor]:
    """wids: indexed tars, random access in a global random order, torch's DataLoader."""
    import wids

    shards = [{"url": str(folder / s.name), "nsamples": s.samples} for s in read_index(folder).shards]
    dataset = wids.ShardListDataset(shards, transformations=[])
    dataset.add_transform(Decode(kind, tokens))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, sampler=order[start:] + order, num_workers=workers, collate_fn=stack
    )
    while True:
        yield from loader


def open_torchdata(folder: Path, kind: str, workers: int, tokens: TokenFormat, start: int) -> Iterator[torch.Tensor]:
    """torchdata's StatefulDataLoader around the same webdataset pipeline; its state replays the stream."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(_webdataset(folder, kind, tokens), batch_size=None, num_workers=workers)
    yield from itertools.islice(loader, start // BATCH, None)


def open_energon(folder: Path, kind: str, workers: int, tokens: TokenFormat, start: int) -> Iterator[torch.Tensor]:
    """megatron-energon: a crude webdataset, prepared once, its loader with a shuffle buffer."""
    from megatron import energon
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    if not (folder / ".nv-meta" / "dataset.yaml").exists():
        names = [Path(tar).name for tar in _tars(folder)]
        BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=2)
        (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    decode = Decode(kind, tokens)

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = None
        cookers = (energon.Cooker(energon.stateless(lambda sample: sample)),)

        @energon.stateless
        def encode_sample(self, sample: Any) -> Any:
            return decode(sample)

        @energon.stateless
        def batch(self, samples: list[Any]) -> Any:
            return stack(samples)

        def encode_batch(self, batch: Any) -> Any:
            return batch

    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = energon.get_train_dataset(
        folder, worker_config=config, batch_size=BATCH, batch_drop_last=True, shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=None, task_encoder=Encoder(),
    )  # fmt: skip
    yield from itertools.islice(energon.get_loader(dataset), start // BATCH, None)


RIVALS: dict[str, Callable[[Path, str, int, TokenFormat, int], Iterator[torch.Tensor]]] = {
    "webdataset": open_webdataset,
    "wids": open_wids,
    "torchdata": open_torchdata,
    "energon": open_energon,
}
