"""From image shards to token shards: every image through the tokenizer once, so that training needs no pixels.

A token sample has one .npy field, (N,) uint16: the K maps of integers, each row-major, one after the other in the order
of the scales. `patch_nums` in the folder's index says where to split; `split_scales` does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hmar_mega.data.images import Augment, decode_sample, image_to_tensor
from hmar_mega.data.index import ShardIndex, TokenFormat
from hmar_mega.data.reader import TOKEN_FIELD, ImageSample, ShardReader, npy_bytes
from hmar_mega.data.threads import map_ahead
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.progress import track
from hmar_mega.scales import ScaleSchedule


class ImageTokenizer(Protocol):
    """What encoding needs of a tokenizer; `MultiScaleVQVAE` is one."""

    schedule: ScaleSchedule
    config: Any  #: has `codebook_size` and `downsample`

    @property
    def fingerprint(self) -> str:
        """Identifies the weights and settings that decide the tokens."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) float32 in [−1, 1] → tokens (B, N) int64."""
        ...


def encode_shards(
    shards: Path,
    tokenizer: ImageTokenizer,
    out: Path,
    batch_size: int = 64,
    augment: Augment = "none",
    device: torch.device | str = "cpu",
    progress: bool = True,
    samples_per_shard: int = 16384,
    workers: int = 2,
) -> ShardIndex:
    """Write the tokens of the image shards in `shards` into token shards in the new folder `out`.

    Samples keep their order, keys and labels, whatever the batch size; the output is byte for byte reproducible
    wherever the tokenizer's arithmetic is.

    Args:
        tokenizer: on `device` already and in evaluation mode.
        augment: "crop" takes the centre of the image at 1.125 × resolution, "none" the largest centred square.
        workers: threads that decode images ahead.

    Raises:
        UserError: when `shards` does not hold images, an image is damaged, or `out` is taken or cannot be written.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: use at least 1")
    reader = ShardReader(Path(shards), "images")
    tokens = TokenFormat(
        patch_nums=tokenizer.schedule.patch_nums,
        codebook_size=tokenizer.config.codebook_size,
        fingerprint=tokenizer.fingerprint,
        resolution=tokenizer.schedule.grid * tokenizer.config.downsample,
    )

    def load(number: int) -> tuple[ImageSample, Tensor]:
        sample = reader.read_image(number)
        return sample, image_to_tensor(decode_sample(sample), tokens.resolution, augment)

    loaded = map_ahead(load, range(len(reader)), workers, ahead=batch_size)
    with track("encode", len(reader), progress) as tally:
        with open_shards(Path(out), "tokens", reader.index.classes, samples_per_shard, tokens) as writer:
            for batch in _batches(loaded, batch_size):
                samples, images = zip(*batch, strict=True)
                ids = _encode(tokenizer, torch.stack(images).to(device))
                for sample, row in zip(samples, ids, strict=True):
                    writer.write(sample.key, sample.label, {TOKEN_FIELD: npy_bytes(row)})
                tally.advance(len(samples))
        index = writer.index
        tally.summary = (
            f"{index.samples} images as {tokenizer.schedule.num_tokens} tokens each "
            f"in {len(index.shards)} shards at {out}"
        )
    return index


def split_scales(tokens: Tensor, schedule: ScaleSchedule) -> tuple[Tensor, ...]:
    """Tokens (…, N) → K tensors, that of scale k (…, p_k²)."""
    return torch.split(tokens, list(schedule.scale_lengths), dim=-1)


def _encode(tokenizer: ImageTokenizer, images: Tensor) -> np.ndarray:
    """Tokens (B, N) uint16; RuntimeError when the tokenizer breaks its own promise."""
    with torch.no_grad():
        ids = tokenizer.encode(images)
    shape, codes = (len(images), tokenizer.schedule.num_tokens), tokenizer.config.codebook_size
    if tuple(ids.shape) != shape or ids.min() < 0 or ids.max() >= codes:
        raise RuntimeError(f"the tokenizer gave tokens {tuple(ids.shape)}, {shape} below {codes} were expected")
    return ids.cpu().numpy().astype("<u2")


def _batches(items: Iterable[tuple[ImageSample, Tensor]], size: int) -> Iterator[list[tuple[ImageSample, Tensor]]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
