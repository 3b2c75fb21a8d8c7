"""AdamW as the configuration asks for it: the own one in one pass, or torch's, Transformer Engine's or apex's."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import nn

from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.kernels import triton_runs_on
from hmar_mega.model.hmar import decays

log = logging.getLogger(__name__)

#: Where each implementation's `FusedAdam` is.
FUSED_ADAM = {"te": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}


class SinglePassAdamW(torch.optim.Optimizer):
    """Groups and state of an AdamW whose updates `parallel.bf16_optimizer` makes, within DeepSpeed's bf16 optimizer."""

    def step(self, closure: Any = None) -> None:
        """Nothing steps it from outside.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("this AdamW is stepped by DeepSpeed's bf16 optimizer, made single_pass")


def choose_adamw(config: Config, device: torch.device) -> tuple[str, str]:
    """Which implementation of `optim.impl` trains, and why.

    Raises:
        UserError: when the one asked for cannot.
    """
    impl, stage = config.optim.impl, config.parallel.zero_stage  # which go together, as the configuration checked
    if impl in FUSED_ADAM:
        return impl, "as asked"
    if config.precision.compute != "bf16":
        why_not = f"it is for precision.compute=bf16, not {config.precision.compute}"
    elif stage != 1:
        why_not = f"it is for parallel.zero_stage=1, not {stage}"
    elif not triton_runs_on(device):
        why_not = f"Triton kernels do not run on {device.type} here"
    elif impl == "auto" and device.type != "cuda":
        why_not = "it is interpreted here"
    else:
        why_not = ""
    if impl == "triton" and why_not:
        raise UserError(f"optim.impl=triton: {why_not}; use optim.impl=torch")
    if impl == "torch" or why_not:
        return "torch", f"not in one pass: {why_not}" if impl == "auto" else "as asked"
    return "triton", "one pass over gradients, masters and moments"


def build_adamw(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the trained parameters of `model`, in two groups: with and without weight decay.

    `optim.impl`: `triton` is the own one in one pass over bf16 training's float32 state, under ZeRO 1; `torch` is
    torch's, fused on a GPU; `te` and `apex` are `FusedAdam` of Transformer Engine and NVIDIA apex; all with the same
    mathematics (decoupled weight decay, bias correction). `auto`: `triton` where it can be, else `torch`.

    Raises:
        UserError: when the implementation asked for is not installed, is another package of that name, needs a GPU, or
            does not go with the precision or ZeRO stage.
    """
    optim = config.optim
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if decays(n, p)], "decays": True},
        {"params": [p for n, p in trained if not decays(n, p)], "decays": False},
    ]
    groups = [g for g in groups if g["params"]]
    impl, reason = choose_adamw(config, device)
    if impl in FUSED_ADAM:
        found = fused_adam(impl, device)(groups, lr=1.0, betas=optim.betas, eps=optim.eps, adam_w_mode=True)
        log.info("optimizer: FusedAdam of %s, %d trained tensors", FUSED_ADAM[impl], len(trained))
        return found
    if impl == "triton":
        defaults = {"lr": 1.0, "betas": optim.betas, "eps": optim.eps, "weight_decay": 0.0, "step": 0}
        return SinglePassAdamW(groups, defaults)
    fused = device.type == "cuda"
    log.info("optimizer: torch AdamW%s, %d trained tensors; %s", " (fused)" if fused else "", len(trained), reason)
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
