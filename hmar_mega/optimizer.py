"""AdamW as the configuration asks for it: torch's fused one, Transformer Engine's or NVIDIA apex's."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import nn

from hmar_mega.config import OptimConfig
from hmar_mega.errors import UserError
from hmar_mega.model.hmar import decays

log = logging.getLogger(__name__)

#: Where each implementation's `FusedAdam` is.
FUSED_ADAM = {"te": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}


def build_adamw(
    model: nn.Module, optim: OptimConfig, device: torch.device, zero_stage: int = 1
) -> torch.optim.Optimizer:
    """AdamW over the trained parameters of `model`, in two groups: with and without weight decay.

    `optim.impl`: `auto` and `torch` are torch's, fused on a GPU; `te` and `apex` are `FusedAdam` of Transformer Engine
    and NVIDIA apex, with the same mathematics (decoupled weight decay, bias correction).

    Raises:
        UserError: when the implementation asked for is not installed, is another package of that name, needs a GPU, or
            cannot be stepped part by part, as ZeRO-3 does.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if decays(n, p)], "decays": True},
        {"params": [p for n, p in trained if not decays(n, p)], "decays": False},
    ]
    groups = [g for g in groups if g["params"]]
    if optim.impl in FUSED_ADAM:
        if zero_stage == 3:
            raise UserError(
                f"optim.impl={optim.impl} counts its updates by call, of which zero_stage=3 makes several in a step;"
                " use optim.impl=torch"
            )
        found = fused_adam(optim.impl, device)(groups, lr=1.0, betas=optim.betas, eps=optim.eps, adam_w_mode=True)
        log.info("optimizer: FusedAdam of %s, %d trained tensors", FUSED_ADAM[optim.impl], len(trained))
        return found
    fused = device.type == "cuda"
    log.info("optimizer: torch AdamW%s, %d trained tensors", " (fused)" if fused else "", len(trained))
    return torch.optim.AdamW(groups, lr=1.0, betas=optim.betas, eps=optim.eps, fused=fused or None)


def fused_adam(impl: str, device: torch.device) -> Any:
    """The class `FusedAdam` of `te` or `apex`; raises UserError as `build_adamw`."""
    if device.type != "cuda":
        raise UserError(f"optim.impl={impl} needs a CUDA GPU, not {device.type}; use optim.impl=torch")
    try:
        return importlib.import_module(FUSED_ADAM[impl]).FusedAdam
    except (ImportError, AttributeError) as problem:
        if impl == "apex":
            hint = "NVIDIA apex is built from its repository; the package `apex` on PyPI is an unrelated project"
        else:
            hint = "install the extra: pip install 'hmar-mega[te]'"
        raise UserError(f"optim.impl={impl}: no FusedAdam in {FUSED_ADAM[impl]} ({problem}). {hint}") from problem


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Count so many updates as made, for implementations that count them by group and not by parameter."""
    if not isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["step"] = steps
