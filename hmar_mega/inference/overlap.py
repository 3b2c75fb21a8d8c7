"""Batches one after another without a pause of the device: transformer, decoder, copies and writing side by side.

On a GPU the transformer of a batch runs on one stream while the decoder of the batch before runs on another; finished
pixels go to page-locked memory without anyone waiting; the host takes a batch while the next one is queued. Everywhere
a thread writes chunks while further ones are computed. What is computed is the same as one batch at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmar_mega.inference.decoding import to_bytes, to_uint8
from hmar_mega.inference.pipeline import ImageModel
from hmar_mega.inference.sampler import SampleSettings
from hmar_mega.inference.storage import Chunk, Store

#: Chunks that wait for the writer, beside the one it writes; each is a chunk of images in memory.
AHEAD = 1

Batch = tuple[np.ndarray, np.ndarray]


def sample_batches(model: ImageModel, settings: SampleSettings, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """The images of each batch, (n, H, W, 3) uint8, in order; on a GPU the next batch is asked for before one is given.

    Args:
        batches: labels and seeds, (n,) int64 each.
    """
    if model.device.type == "cuda":
        yield from _Streams(model, settings).run(batches)
        return
    for labels, seeds in batches:
        yield to_bytes(model.sampler(torch.from_numpy(labels), torch.from_numpy(seeds), settings)[1])


class _Streams:
    """Two streams of a GPU, one for the transformer, one for the decoder and the copies out."""

    def __init__(self, model: ImageModel, settings: SampleSettings) -> None:
        self.model, self.settings = model, settings
        self.transformer, self.decoder = (torch.cuda.Stream(model.device) for _ in range(2))

    def run(self, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """See `sample_batches`."""
        current = torch.cuda.current_stream(self.model.device)
        for stream in (self.transformer, self.decoder):
            stream.wait_stream(current)  # weights may still be on their way
        queued: deque[tuple[Any, Tensor]] = deque()
        try:
            for labels, seeds in batches:
                queued.append(self.queue(labels, seeds))
                if len(queued) > 1:
                    yield _taken(*queued.popleft())
            while queued:
                yield _taken(*queued.popleft())
        finally:
            for stream in (self.transformer, self.decoder):
                current.wait_stream(stream)  # graphs share a pool with what runs next

    @torch.inference_mode()
    def queue(self, labels: np.ndarray, seeds: np.ndarray) -> tuple[Any, Tensor]:
        """Queue a batch; the event of its end, and its pixels in page-locked memory, (n, H, W, 3) uint8."""
        with torch.cuda.stream(self.transformer):
            given = [torch.from_numpy(x).pin_memory().to(self.model.device, non_blocking=True) for x in (labels, seeds)]
            f_hat = self.model.sampler.features(*given, self.settings)[1]
        self.decoder.wait_stream(self.transformer)
        with torch.cuda.stream(self.decoder):
            f_hat.record_stream(self.decoder)  # its memory must not be reused while it is decoded
            pixels = to_uint8(self.model.to_images(f_hat))
            host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            host.copy_(pixels, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return done, host


def _taken(done: Any, host: Tensor) -> np.ndarray:
    done.synchronize()
    return host.numpy()


class ChunkWriter:
    """Writes chunks in order in a thread of its own, while others are computed; a context.

    What goes wrong in the thread is raised by the next `put`, or at the end of the block. A block that raises itself
    still has the chunks written that it had put.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="chunk-writer")
        self._pending: deque[Future[None]] = deque()

    def put(self, chunk: Chunk, images: np.ndarray) -> None:
        """Have a chunk written, images (n, H, W, 3) uint8; waits while `AHEAD` others do.

        Raises:
            UserError: what the store raised for an earlier chunk.
        """
        while self._pending and (self._pending[0].done() or len(self._pending) > AHEAD):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._store.write, chunk, images))

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown()
        if err is None:
            for future in self._pending:
                future.result()
