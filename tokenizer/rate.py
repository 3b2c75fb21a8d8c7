"""The learning rate of tokenizer training by step: a pure function of its settings."""

from __future__ import annotations

import math

from hmar_mega.config_tokenizer import TokenizerTrainConfig

#: The learning rate at the end, as a share of the highest.
FINAL_LR = 0.01


def learning_rate(step: int, train: TokenizerTrainConfig) -> float:
    """The rate of 0-based `step`: linear warm-up to `lr`, then half a cosine down to 1 % of it at the last step."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - 1 - train.warmup_steps)
    return train.lr * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class RateSchedule:
    """`learning_rate` and weight decay in the form that engines take."""

    def __init__(self, train: TokenizerTrainConfig) -> None:
        self.train = train

    def lr(self, step: float) -> float:
        """The rate of 0-based `step`."""
        return learning_rate(int(step), self.train)

    def decay(self, step: float) -> float:
        """The weight decay, which is constant."""
        return self.train.weight_decay
