"""Our parameter groups and schedule for other people's AdamW: torch's, DeepSpeed's or mcore's."""

from __future__ import annotations

from typing import Any

import torch
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


def prepare_to_load(optimizer: Any) -> None:
    """Lay out the state of mcore's `optimizer` before its first step: call this before `sharded_state_dict(…,
    is_loading=True)`.

    Without Transformer Engine or apex mcore 0.16.1 runs torch's AdamW, whose state it cannot name before a step.
    """
    for part in _parts(optimizer):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        state = part.optimizer.state
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"] if p not in state):
            moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
            state[parameter] = {"step": torch.tensor(0.0), **moments}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(state)` for mcore's distributed optimizer, also where it runs torch's AdamW.

    There mcore 0.16.1 does not get past AdamW's `step` when it reads the `fully_reshardable` form, and would have all
    parameters share one `step`, which every one of them then advances.

    Args:
        state: of `dist_checkpointing.load`.
    """
    part, *others = _parts(optimizer)
    if others or not isinstance(part.optimizer, torch.optim.AdamW) or _form(state) != "fully_reshardable":
        optimizer.load_state_dict(state)
        return
    part.load_state_dict({key: value for key, value in state.items() if key != "param_state"})
    states = part.optimizer.state.values()
    steps = [own.pop("step") for own in states]
    part.load_parameter_state_from_fully_reshardable(state["param_state"])
    for own, step in zip(states, steps, strict=True):
        own["step"] = step.clone()


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _form(state: dict[str, Any]) -> Any:
    return state.get("param_state_sharding_type")
