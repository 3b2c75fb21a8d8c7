"""Learning rate and weight decay as pure functions of the optimizer step (SPEC §4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hmar_mega.config import Config


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run.

    Attributes:
        total_steps: steps the schedule spans.
        warmup_steps: steps from `warmup_start`·lr to lr.
        peak_lr: base_lr · global batch / 256.
    """

    total_steps: int
    warmup_steps: int
    peak_lr: float
    warmup_start: float
    flat_fraction: float
    final_ratio: float
    weight_decay: float
    weight_decay_end: float | None

    @classmethod
    def of(cls, config: Config, dataset_size: int) -> Schedule:
        """The schedule of `config` on a training set of `dataset_size` images."""
        optim, batch = config.optim, config.data.global_batch_size
        warmup_epochs = optim.warmup_epochs if optim.warmup_epochs is not None else optim.epochs / 50
        total = max(1, math.ceil(optim.epochs * dataset_size / batch))
        return cls(
            total_steps=total,
            warmup_steps=min(total, round(warmup_epochs * dataset_size / batch)),
            peak_lr=optim.base_lr * batch / 256,
            warmup_start=optim.warmup_start,
            flat_fraction=optim.flat_fraction,
            final_ratio=optim.final_ratio,
            weight_decay=optim.weight_decay,
            weight_decay_end=optim.weight_decay_end,
        )

    def lr(self, step: int) -> float:
        """Learning rate of `step` (0-based): linear warm-up, flat, then linear to final_ratio · peak."""
        if step < self.warmup_steps:
            return self.peak_lr * (self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps)
        after = max(1, self.total_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / after)
        if progress < self.flat_fraction:
            return self.peak_lr
        rest = 1.0 if self.flat_fraction >= 1 else (1 - progress) / (1 - self.flat_fraction)
        return self.peak_lr * (self.final_ratio + (1 - self.final_ratio) * rest)

    def decay(self, step: int) -> float:
        """Weight decay of `step`: constant, or along a half cosine to `weight_decay_end`."""
        if self.weight_decay_end is None:
            return self.weight_decay
        progress = min(1.0, step / max(1, self.total_steps - 1))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.weight_decay_end + (self.weight_decay - self.weight_decay_end) * cosine
