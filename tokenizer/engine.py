"""The optimizer step of tokenizer training: torch alone in one process, DeepSpeed ZeRO over several.

`PlainEngine` has what `hmar_mega.engine.Engine` has for a model without tensor and pipeline parallelism, so that the
loop and checkpoints take either. Which one is chosen is logged.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hmar_mega.checkpoint.sources import EMA
from hmar_mega.config import Config, ParallelConfig
from hmar_mega.data.image_loader import ImageBatch
from hmar_mega.errors import UserError
from hmar_mega.micro_batches import check_batch_sizes, micro_batch_size
from hmar_mega.parallel.dims import TIMEOUT, ParallelDims
from hmar_mega.parallel.partition import MOMENTS, Partition
from hmar_mega.tokenizer.objective import TokenizerObjective, TokenizerScores
from hmar_mega.tokenizer.rate import RateSchedule

if TYPE_CHECKING:
    from hmar_mega.engine import Engine

log = logging.getLogger(__name__)


def engine_config(config: Config) -> Config:
    """What the engine reads, filled in from `tokenizer.train`: batches, optimizer, float32 weights, ZeRO.

    Raises:
        UserError: for a ZeRO stage that tokenizers are not trained with.
    """
    train, parallel = config.tokenizer.train, config.parallel
    if parallel.zero_stage == 3:
        raise UserError(
            "parallel.zero_stage=3 is for models that fit no single GPU; tokenizers are trained with "
            "parallel.zero_stage=1 or 2"
        )
    return config.model_copy(
        update={
            "data": config.data.model_copy(
                update={
                    "global_batch_size": train.batch_size,
                    "micro_batch_size": train.micro_batch_size,
                    "batch_ramp": None,
                }
            ),
            "optim": config.optim.model_copy(
                update={"impl": "auto", "betas": train.betas, "clip": train.clip, "ema_decay": train.ema_decay}
            ),
            "precision": config.precision.model_copy(update={"compute": "fp32", "fp8": "none"}),
            "parallel": ParallelConfig(zero_stage=parallel.zero_stage),
        }
    )


@contextmanager
def tokenizer_world(config: Config) -> Iterator[ParallelDims]:
    """Join the processes that torchrun started; alone, neither Megatron-core nor DeepSpeed is imported.

    Args:
        config: of `engine_config`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from hmar_mega.parallel.dims import parallel_world

        with parallel_world(config) as dims:
            yield dims
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        yield ParallelDims(1, 1, 0, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()


def build_engine(model: nn.Module, config: Config, dims: ParallelDims) -> Engine | PlainEngine:
    """The engine for so many processes; `config` is that of `engine_config`."""
    rate = RateSchedule(config.tokenizer.train)
    if dims.world_size == 1:
        log.info("engine: torch's AdamW in one process, without DeepSpeed")
        return PlainEngine(model, config, dims, rate)
    from hmar_mega.engine import Engine

    if dims.is_main:
        stage = config.parallel.zero_stage
        log.info("engine: DeepSpeed ZeRO-%d over %d data-parallel processes", stage, dims.world_size)
    return Engine(model, config, dims, rate)


class PlainEngine:
    """Model and AdamW in one process: accumulate, clip, skip what is not finite, average.

    Args:
        model: float32.
        config: of `engine_config`.
        schedule: learning rate and weight decay by step.
    """

    fp8 = None

    def __init__(self, model: nn.Module, config: Config, dims: ParallelDims, schedule: RateSchedule) -> None:
        self.model, self.dims, self.schedule = model, dims, schedule
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.batches, self.clip = config.data.batch_plan, config.optim.clip
        check_batch_sizes(self.batches.full, micro_batch_size(config, 1), 1)
        self.frozen: dict[str, tuple[Tensor, int]] = {}
        self._trained = dict(model.named_parameters())
        decayed = [p for p in self._trained.values() if p.ndim > 1]
        plain = [p for p in self._trained.values() if p.ndim <= 1]
        groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False}]
        fused = dims.device.type == "cuda" or None
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.optim.betas, eps=config.optim.eps, fused=fused)
        self.ema_decay = config.optim.ema_decay
        self._ema = {n: p.detach().clone() for n, p in self._trained.items()} if self.ema_decay else {}
        self.resume_at(0, 0)

    def train_step(
        self, micro_batches: Sequence[ImageBatch], objective: TokenizerObjective
    ) -> tuple[float, list[TokenizerScores]]:
        """Forward, backward and one update, or none where the gradients are not finite; as `Engine.train_step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
            group["weight_decay"] = self.schedule.decay(self.step) if group["decays"] else 0.0
        scored = []
        for batch in micro_batches:
            scores = objective.training(self.model, batch)
            (scores.guarded_mean() / len(micro_batches)).backward()
            scored.append(scores)
        norm = float(nn.utils.clip_grad_norm_(self._trained.values(), self.clip))
        if math.isfinite(norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if math.isfinite(norm):
            self._average_weights()
        return norm, scored

    @property
    def images_seen(self) -> int:
        """Before the step that is next: its first image's position in the stream."""
        return self.batches.position(self.step)

    @property
    def learning_rate(self) -> float:
        """Of the step that is next."""
        return self.schedule.lr(self.step)

    def partitions(self) -> dict[str, Partition]:
        """The whole of every parameter, as views."""
        owned = {}
        for name, parameter in self._trained.items():
            moments = {key: self.optimizer.state[parameter][key].view(-1) for key in MOMENTS}
            if self._ema:
                moments[EMA] = self._ema[name].view(-1)
            owned[name] = Partition(0, parameter.numel(), parameter.data.view(-1), moments)
        return owned

    def resume_at(self, step: int, skipped: int) -> None:
        """Stand where `step` steps were made, `skipped` of them without an update; moments are zeros."""
        self.step, self.skipped = step, skipped
        for parameter in self._trained.values():
            count = torch.tensor(float(step - skipped), device=parameter.device if parameter.is_cuda else None)
            zeros: dict[str, Any] = {key: torch.zeros_like(parameter) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": count, **zeros}

    def loss_scaler_state(self) -> None:
        """There is no loss scaling."""

    def restore_loss_scaler(self, state: object) -> None:
        """There is no loss scaling."""

    @torch.no_grad()
    def _average_weights(self) -> None:
        """ema ← d·ema + (1 − d)·weights; d grows to `ema_decay` over the first updates, as in `Engine`."""
        if not self._ema or self.ema_decay is None:
            return
        updates = self.step - self.skipped
        decay = min(self.ema_decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self._ema.values()), [p.data for p in self._trained.values()], 1 - decay)
