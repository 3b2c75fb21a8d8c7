"""What a batch of token maps costs: the training loss of either stage, and the losses reported in evaluation.

Axes: B batch, N sequence, K scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hmar_mega import sequence
from hmar_mega.config import Config
from hmar_mega.model.layers_torch import Layers
from hmar_mega.scales import token_weights

#: A model's forward: HMAR itself or DeepSpeed's engine around it.
Forward = Callable[..., Tensor]


class TokenBatch(Protocol):
    """A micro-batch as the reader gives it."""

    tokens: Tensor  #: (B, N) int64
    labels: Tensor  #: (B,) int64
    positions: Tensor  #: (B,) int64 stream positions
    keys: Sequence[str]  #: names of the samples


@dataclass(frozen=True)
class Scores:
    """Losses of a batch.

    Attributes:
        loss: (B,) loss of each sample as the stage defines it.
        cross_entropy: (B, N) of every position.
        counted: (B, N) bool, positions that the stage predicts.
    """

    loss: Tensor
    cross_entropy: Tensor
    counted: Tensor


class Objective:
    """Stage 1 (next-scale) or stage 2 (masked prediction) of one configuration.

    Args:
        codes: the tokenizer's quantizer, on `device`.
        layers: the model's layers, for their cross-entropy.
    """

    def __init__(self, config: Config, codes: sequence.Codes, layers: Layers, device: torch.device) -> None:
        self.config, self.codes, self.layers, self.device = config, codes, layers, device
        self.schedule = config.schedule.scales
        self.weights = token_weights(self.schedule, config.stage.loss_weights).to(device)

    def training(self, forward: Forward, batch: TokenBatch) -> Scores:
        """Scores with label drop, masks and drop-path drawn from (seed, stream position)."""
        config, positions = self.config, batch.positions.to(self.device)
        seed, model = config.run.seed, config.model
        labels = sequence.drop_labels(
            batch.labels.to(self.device), positions, seed, config.stage.label_drop, model.num_classes
        )
        drop_path = None
        if model.resolved_drop_path > 0:
            drop_path = sequence.drop_path_factors(positions, seed, model.depth, model.resolved_drop_path)
        return self._scores(forward, labels, batch, drop_path)

    @torch.no_grad()
    def evaluation(self, forward: Forward, batch: TokenBatch) -> Scores:
        """Scores with every label kept and no drop-path; masks are functions of (seed, the sample's number)."""
        return self._scores(forward, batch.labels.to(self.device), batch, None)

    def _scores(self, forward: Forward, labels: Tensor, batch: TokenBatch, drop_path: Tensor | None) -> Scores:
        tokens, schedule = batch.tokens.to(self.device), self.schedule
        with torch.no_grad():
            given = sequence.teacher_input(tokens, self.codes, schedule)
        if self.config.stage.name == "next_scale":
            logits = forward(labels, given, drop_path=drop_path)
            ce = self._cross_entropy(logits, tokens)
            return Scores(sequence.next_scale_loss(ce, self.weights), ce.detach(), torch.ones_like(tokens).bool())
        with torch.no_grad():
            mask = sequence.draw_masks(batch.positions.to(self.device), self.config.run.seed, schedule)
            features = sequence.token_features(tokens, mask, self.codes, schedule, self.config.stage.mask_input)
        logits = forward(labels, given, features, mask, branch="masked", drop_path=drop_path)
        ce = self._cross_entropy(logits, tokens)
        counted = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)
        return Scores(sequence.masked_loss(ce, mask), ce.detach(), counted)

    def _cross_entropy(self, logits_NBV: Tensor, tokens_BN: Tensor) -> Tensor:
        return self.layers.cross_entropy(logits_NBV, tokens_BN.t().contiguous()).t()


def per_scale_sums(scores: Scores, objective: Objective) -> Tensor:
    """Σ cross-entropy and count of the predicted positions of each scale, (2, K) float64."""
    counted = scores.counted.double()
    values = scores.cross_entropy.double() * counted
    spans = [objective.schedule.span(k) for k in range(objective.schedule.num_scales)]
    return torch.stack(
        [
            torch.stack([values[:, s].sum() for s in spans]),
            torch.stack([counted[:, s].sum() for s in spans]),
        ]
    )
