"""What a batch of token maps costs: the training loss of either stage, and the losses reported in evaluation.

Axes: B batch, N sequence, K scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hmar_mega import sequence
from hmar_mega.config import Config
from hmar_mega.model.stage import Stage
from hmar_mega.scales import token_weights

#: A model's forward: HMAR itself or DeepSpeed's engine around it.
Forward = Callable[..., Tensor]

#: Keyword arguments of `HMAR.forward`.
ModelInputs = dict[str, Any]


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
        errors: (B, N) top-1 errors of every position, in evaluation alone.
    """

    loss: Tensor
    cross_entropy: Tensor
    counted: Tensor
    errors: Tensor | None = None

    def guarded_mean(self) -> Tensor:
        """The loss to go back from: NaN where it is not finite, which must not pass for finite gradients."""
        loss = self.loss.mean()
        return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


class Objective:
    """Stage 1 (next-scale) or stage 2 (masked prediction) of one configuration.

    Args:
        codes: the tokenizer's quantizer, on `device`.
    """

    def __init__(self, config: Config, codes: sequence.Codes, device: torch.device) -> None:
        self.config, self.codes, self.device = config, codes, device
        self.schedule = config.schedule.scales
        self.weights = token_weights(self.schedule, config.stage.loss_weights).to(device)

    def training(self, forward: Forward, batch: TokenBatch) -> Scores:
        """Scores with label drop, masks and drop-path drawn from (seed, stream position)."""
        return self.scores(forward(**self.inputs(batch, training=True)), batch)

    @torch.no_grad()
    def evaluation(self, forward: Forward, batch: TokenBatch) -> Scores:
        """Scores with every label kept and no drop-path; masks are functions of (seed, the sample's number)."""
        return self.evaluated(forward(**self.inputs(batch, training=False), errors=True), batch)

    @torch.no_grad()
    def inputs(self, batch: TokenBatch, *, training: bool, stage: Stage | None = None) -> ModelInputs:
        """What `HMAR.forward` takes for the cross-entropy of a batch; on a pipeline, what `stage` needs of it."""
        config, schedule, model = self.config, self.schedule, self.config.model
        positions, seed = batch.positions.to(self.device), config.run.seed
        masked = config.stage.name == "masked"
        given: ModelInputs = {"branch": "masked" if masked else "next_scale"}
        if training and model.resolved_drop_path > 0:
            given["drop_path"] = sequence.drop_path_factors(positions, seed, model.depth, model.resolved_drop_path)
        if stage is not None and not (stage.first or stage.last):
            return given
        tokens = batch.tokens.to(self.device, non_blocking=True)
        if stage is None or stage.last:
            given["targets_BN"] = tokens
        if stage is None or stage.first:
            labels = batch.labels.to(self.device, non_blocking=True)
            if training:
                labels = sequence.drop_labels(labels, positions, seed, config.stage.label_drop, model.num_classes)
            given["labels_B"] = labels
            given["teacher_input_BNZ"] = sequence.teacher_input(tokens, self.codes, schedule)
            if masked:
                mask = given["mask_BN"] = self._masks(batch)
                given["token_features_BNZ"] = sequence.token_features(
                    tokens, mask, self.codes, schedule, config.stage.mask_input
                )
        return given

    def evaluated(self, given_2BN: Tensor, batch: TokenBatch) -> Scores:
        """`scores` of a forward that gave cross-entropy and top-1 errors."""
        cross_entropy, errors = given_2BN
        return replace(self.scores(cross_entropy, batch), errors=errors)

    def scores(self, cross_entropy_BN: Tensor, batch: TokenBatch) -> Scores:
        """What the cross-entropy of a batch means in this stage of training."""
        if self.config.stage.name == "next_scale":
            loss = sequence.next_scale_loss(cross_entropy_BN, self.weights)
            return Scores(loss, cross_entropy_BN.detach(), torch.ones_like(cross_entropy_BN, dtype=torch.bool))
        mask = self._masks(batch)
        counted = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)
        return Scores(sequence.masked_loss(cross_entropy_BN, mask), cross_entropy_BN.detach(), counted)

    def _masks(self, batch: TokenBatch) -> Tensor:
        return sequence.draw_masks(batch.positions.to(self.device), self.config.run.seed, self.schedule)


def per_scale_sums(scores: Scores, objective: Objective) -> Tensor:
    """Σ cross-entropy and count of predicted positions by scale, (2, K); in evaluation Σ errors too: (3, K)."""
    counted = scores.counted.double()
    given = [scores.cross_entropy.double() * counted, counted]
    if scores.errors is not None:
        given.append(scores.errors.double() * counted)
    spans = [objective.schedule.span(k) for k in range(objective.schedule.num_scales)]
    return torch.stack([torch.stack([values[:, s].sum() for s in spans]) for values in given])
