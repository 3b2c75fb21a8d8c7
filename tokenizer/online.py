"""Images to tokens while training runs: what `data.encode=online` puts between the image loader and the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from hmar_mega.data.damage import DamageAccount
from hmar_mega.data.images import scale_pixels
from hmar_mega.data.stream import Batch, Loader, PixelBatch
from hmar_mega.tokenizer.model import MultiScaleVQVAE


class OnlineLoader:
    """A loader of images as a loader of tokens: every micro-batch is encoded when its step is given out.

    With centre crops the tokens are those that `hmar-mega data encode` stores, up to rounding, which can differ between
    batch sizes and devices and so decide between two codes that are almost equally near.

    Args:
        loader: of PixelBatch.
        tokenizer: on `device` and in evaluation mode.
    """

    def __init__(self, loader: Loader, tokenizer: MultiScaleVQVAE, device: torch.device) -> None:
        self._loader, self._tokenizer, self._device = loader, tokenizer, device

    @property
    def wait_seconds(self) -> float:
        """How long the last `next` waited for images; encoding is not counted."""
        return self._loader.wait_seconds

    @property
    def account(self) -> DamageAccount:
        """What was damaged among the images."""
        return self._loader.account

    def __next__(self) -> list[Batch]:
        return [encode_batch(batch, self._tokenizer, self._device) for batch in next(self._loader)]

    def state(self) -> dict[str, int]:
        """Where the stream of images stands."""
        return self._loader.state()

    def close(self) -> None:
        """Stop reading ahead."""
        self._loader.close()


def encode_batch(batch: PixelBatch, tokenizer: MultiScaleVQVAE, device: torch.device) -> Batch:
    """The tokens (b, N) int64 of b images, on `device`; labels, positions and keys stay."""
    tokens = tokenizer.encode(scale_pixels(batch.pixels.to(device, non_blocking=True)))
    return Batch(tokens, batch.labels, batch.positions, batch.keys)


def encode_batches(batches: Iterable[PixelBatch], tokenizer: MultiScaleVQVAE, device: torch.device) -> Iterator[Batch]:
    """`encode_batch` of one after the other."""
    for batch in batches:
        yield encode_batch(batch, tokenizer, device)
