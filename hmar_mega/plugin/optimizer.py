"""Our parameter groups and schedule for other people's AdamW: torch's, DeepSpeed's or mcore's."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import nn

from hmar_mega.model.hmar import decays
from hmar_mega.schedules import Schedule


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Groups for torch's optimizers: trained parameters with weight decay (`wd_mult` 1) and without (0)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trained if decays(n, p)], "wd_mult": 1.0},
        {"params": [p for n, p in trained if not decays(n, p)], "wd_mult": 0.0},
    ]


def no_decay_overrides() -> dict[ParamKey, ParamGroupOverride]:
    """`config_overrides` for mcore's `get_megatron_optimizer`: the same two groups."""
    predicate = ParamWithNamePredicate(name="hmar_no_decay", fn=lambda parameter, name: not decays(name, parameter))
    return {ParamKey(with_name_predicate=predicate): ParamGroupOverride(wd_mult=0.0)}


def apply_schedule(optimizer: Any, schedule: Schedule, step: float) -> None:
    """Set learning rate and weight decay of `step` (0-based, in full batches) in every group of the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr(step)
        group["weight_decay"] = schedule.decay(step) * group["wd_mult"]
