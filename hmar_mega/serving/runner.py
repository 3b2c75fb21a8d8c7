"""What one batch computes: finished images, images after every scale, or edits; runs in the batcher's thread only."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmar_mega.inference.decoding import to_bytes
from hmar_mega.inference.editing import edit
from hmar_mega.inference.pipeline import ImageModel
from hmar_mega.inference.sampler import SampleSettings, generate_tokens
from hmar_mega.serving.batcher import Abandoned

log = logging.getLogger(__name__)

#: Settings other than the model's own get CUDA graphs when so many of the last batches had them: a capture costs
#: seconds, in which nobody else is served.
GRAPH_AFTER, RECENT = 4, 64


@dataclass(frozen=True)
class Item:
    """One image to make.

    Attributes:
        image, mask: of an edit: (3, R, R) float32 in [0, 1], and (1, R, R) bool, True where to generate.
    """

    label: int
    seed: int
    image: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Drawn:
    """A picture, (R, R, 3) uint8, and of an edit the PSNR in dB of its kept pixels as they were decoded."""

    pixels: np.ndarray
    kept_psnr: float | None = None


@dataclass(frozen=True)
class Draw:
    """Finished images."""

    settings: SampleSettings


@dataclass(frozen=True)
class Watch:
    """Images after every scale."""

    settings: SampleSettings


@dataclass(frozen=True)
class Repaint:
    """Edits; `paste` and `feather` as in `editing.edit`."""

    settings: SampleSettings
    paste: bool
    feather: int


Emit = Callable[[int, bool, Sequence[Any]], None]


class Runner:
    """Runs batches on a model.

    Args:
        model: nothing else may sample from it meanwhile.
        max_batch: images that a batch has at most.
    """

    def __init__(self, model: ImageModel, max_batch: int) -> None:
        self.model, self.max_batch = model, max_batch
        self._own = model.sample_settings()
        self._recent: deque[SampleSettings] = deque(maxlen=RECENT)

    def warm_up(self) -> None:
        """Make images of every size that a CUDA graph is captured for, else one, so that no request pays for it."""
        sizes = self._sizes() if self.model.sampler.why_not(self.max_batch, self._own) is None else [1]
        for size in sizes:
            self._finished([Item(0, 0)] * size, self._own, lambda: False)
        log.info("warmed up: batches of %s", ", ".join(map(str, sizes)))

    def __call__(
        self, key: Draw | Watch | Repaint, items: Sequence[Item], emit: Emit, abandoned: Callable[[], bool]
    ) -> None:
        """See `batcher.Run`."""
        last = self.model.schedule.num_scales - 1
        if isinstance(key, Draw):
            emit(last, True, [Drawn(pixels) for pixels in self._finished(items, key.settings, abandoned)])
        elif isinstance(key, Watch):
            self._watch(items, key.settings, emit, abandoned)
        else:
            emit(last, True, self._edited(items, key, abandoned))

    def _finished(self, items: Sequence[Item], settings: SampleSettings, abandoned: Callable[[], bool]) -> np.ndarray:
        """(n, R, R, 3) uint8."""
        sampler = self.model.sampler
        size = next(size for size in self._sizes() if size >= len(items))
        reason = sampler.why_not(size, settings)
        if reason is None and self._worth_a_graph(settings):
            labels, seeds = self._tensors([*items, *[items[-1]] * (size - len(items))])
            return to_bytes(sampler(labels, seeds, settings)[1][: len(items)])
        sampler.say_plain(reason or "settings that few requests have are not worth a capture")
        labels, seeds = self._tensors(items)
        _, f_hat = generate_tokens(
            self.model.model, self.model.tokenizer.quantizer, labels, seeds, settings, after_scale=_check(abandoned)
        )
        return to_bytes(self.model.to_images(f_hat))

    def _watch(
        self, items: Sequence[Item], settings: SampleSettings, emit: Emit, abandoned: Callable[[], bool]
    ) -> None:
        self.model.sampler.say_plain("the images after each scale were asked for, and a graph gives the last alone")
        scale, last = 0, self.model.schedule.num_scales - 1

        def show(f_hat: Tensor) -> None:
            nonlocal scale
            emit(scale, scale == last, [Drawn(pixels) for pixels in to_bytes(self.model.to_images(f_hat))])
            scale += 1

        labels, seeds = self._tensors(items)
        generate_tokens(
            self.model.model, self.model.tokenizer.quantizer, labels, seeds, settings,
            after_scale=_check(abandoned), on_features=show,
        )  # fmt: skip

    def _edited(self, items: Sequence[Item], kind: Repaint, abandoned: Callable[[], bool]) -> list[Drawn]:
        images = torch.stack([item.image for item in items if item.image is not None])
        masks = torch.stack([item.mask for item in items if item.mask is not None])
        labels, seeds = [item.label for item in items], [item.seed for item in items]
        done = edit(
            self.model, images, masks, labels, seeds, kind.settings, kind.paste, kind.feather, _check(abandoned)
        )
        return [
            Drawn(pixels, psnr if np.isfinite(psnr) else None)
            for pixels, psnr in zip(to_bytes(done.images), done.kept_psnr.tolist(), strict=True)
        ]

    def _tensors(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Labels and seeds, (n,) int64 each, on the model's device."""
        columns = [[item.label for item in items], [item.seed for item in items]]
        labels, seeds = torch.tensor(columns, dtype=torch.int64, device=self.model.device)
        return labels, seeds

    def _sizes(self) -> list[int]:
        """Sizes that batches are filled up to where graphs are captured: powers of two, and the largest batch."""
        return [*(2**n for n in range(self.max_batch.bit_length()) if 2**n < self.max_batch), self.max_batch]

    def _worth_a_graph(self, settings: SampleSettings) -> bool:
        self._recent.append(settings)
        return settings == self._own or self._recent.count(settings) >= GRAPH_AFTER


def _check(abandoned: Callable[[], bool]) -> Callable[[], None]:
    """What sampling calls after each scale."""

    def check() -> None:
        if abandoned():
            raise Abandoned

    return check
