"""Batches of training images from image shards, as a pure function of the position in the stream.

Like `reader.StreamLoader`, for pixels: this rank's micro-batches of one global batch after the other, whatever the
number of ranks, threads and micro-batches. Axes: B micro-batch, R resolution.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from hmar_mega.batches import BatchPlan
from hmar_mega.data.images import Augment, decode_sample, image_to_tensor
from hmar_mega.data.index import require_kind
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ImageSample, ShardReader
from hmar_mega.data.threads import map_ahead
from hmar_mega.errors import UserError
from hmar_mega.micro_batches import check_batch_sizes
from hmar_mega.rng import Purpose, uniform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageBatch:
    """b images: pixels (b, 3, R, R) uint8, stream positions (b,) int64, and their keys."""

    pixels: Tensor
    positions: Tensor
    keys: tuple[str, ...]


class ImageLoader:
    """This rank's micro-batches of one global batch after the other; an endless iterator.

    Args:
        reader: image shards.
        order: which sample stands at which position.
        augment: "crop" crops at a place that is a pure function of (seed, position); "none" at the centre.
        batch_size: images of a step, over all ranks.
        start_position: images seen before; where a resumed run goes on.
        workers: threads that read steps ahead; 0 reads in the calling thread.
        cache_bytes: decoded images are kept where all of them fit into so much, and `augment` is "none".
        allow_upscaling: take images smaller than the resolution, enlarged.

    Raises:
        UserError: when the ranks and micro-batches do not divide the global batch; from `next` for a damaged image, and
            for one that is smaller than the resolution.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: SampleOrder,
        resolution: int,
        augment: Augment,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_position: int = 0,
        workers: int = 2,
        cache_bytes: int = 0,
        allow_upscaling: bool = False,
    ) -> None:
        require_kind(reader.folder, reader.index, "images")
        check_batch_sizes(batch_size, micro_batch_size, dp_size)
        self.wait_seconds = 0.0  #: how long the last `next` kept the caller waiting
        self._reader, self._order = reader, order
        self._resolution, self._augment, self._seed = resolution, augment, seed
        self._allow_upscaling = allow_upscaling
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._cache: Tensor | None = None
        if augment == "none" and len(reader) * 3 * resolution**2 <= cache_bytes:
            self._cache = torch.empty(len(reader), 3, resolution, resolution, dtype=torch.uint8)
            self._cached_keys: list[str | None] = [None] * len(reader)
        positions = BatchPlan.constant(batch_size).positions(start_position)
        self._steps = map_ahead(self._load_step, positions, workers)
        self._position = start_position

    def __iter__(self) -> ImageLoader:
        return self

    def __next__(self) -> list[ImageBatch]:
        begin = time.perf_counter()
        try:
            batches = next(self._steps)
        except StopIteration:  # the stream is endless: only close() or an error ends it
            raise RuntimeError("the loader is closed, or stopped at an error before; make a new one") from None
        self._position += self._batch_size
        self.wait_seconds = time.perf_counter() - begin
        return batches

    def state(self) -> dict[str, int]:
        """`position`, the images of the batches given out so far and of the run before; and the epoch it is in."""
        return {"epoch": self._order.epoch(self._position), "position": self._position}

    def close(self) -> None:
        """Stop reading ahead."""
        self._steps.close()

    def read(self, position: int, count: int) -> ImageBatch:
        """The images at `count` positions of the stream, whatever rank would get them."""
        samples = self._order.sample_indices(position, count).tolist()
        positions = torch.arange(position, position + count)
        places = [(0.5, 0.5)] * count
        if self._augment == "crop":
            places = [(u, v) for u, v in uniform(torch.tensor(self._seed), positions, Purpose.CROP, 2).tolist()]
        read = [self._pixels(sample, place) for sample, place in zip(samples, places, strict=True)]
        return ImageBatch(torch.stack([p for p, _ in read]), positions, tuple(key for _, key in read))

    def _load_step(self, position: int) -> list[ImageBatch]:
        share = self._batch_size // self._dp_size
        start = position + self._dp_rank * share
        return [self.read(start + at, self._micro_batch_size) for at in range(0, share, self._micro_batch_size)]

    def _pixels(self, sample: int, place: tuple[float, float]) -> tuple[Tensor, str]:
        if self._cache is not None and (key := self._cached_keys[sample]) is not None:
            return self._cache[sample], key
        read = self._reader.read_image(sample)
        image = decode_sample(read, lambda stored: self._look_at(stored, read))
        values = image_to_tensor(image, self._resolution, self._augment, place)
        pixels = ((values + 1) * 127.5).round().to(torch.uint8)
        if self._cache is not None:
            self._cache[sample] = pixels
            self._cached_keys[sample] = read.key  # after its pixels: other threads go by it
        return pixels, read.key

    def _look_at(self, image: Image.Image, sample: ImageSample) -> None:
        """Refuse what is too small, and tell once of what is turned into RGB."""
        if min(image.size) < self._resolution and not self._allow_upscaling:
            raise UserError(
                f"{sample.where} is {image.width}×{image.height} px, smaller than schedule.resolution="
                f"{self._resolution}: enlarged images would teach the tokenizer blur. Leave small images out of the "
                "shards, lower schedule.resolution, or set tokenizer.train.allow_upscaling=true"
            )
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            self._tell_once(
                "transparent", f"{sample.where} has transparency, which becomes white, as in all such images"
            )
        if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;"):
            self._tell_once(
                "grey", f"{sample.where} is grey, and becomes RGB of three equal channels, as all such images"
            )

    def _tell_once(self, kind: str, message: str) -> None:
        with self._lock:
            if kind not in self._told:
                self._told.add(kind)
                log.info("%s", message)
