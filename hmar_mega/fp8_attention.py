"""Which layers attend in FP8: those of small learned scales, looked at when training starts and at every evaluation.

A cosine of e4m3 vectors has an rms error of 0.0047, a logit one of 0.0047 times the learned scale. The output's was
measured as 5 % at a scale of 4 and 8 % at 20, and is about 16 % at 100; in bf16 it is 0.3 to 1 %. Scales start at 4 and
may grow to 100.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from hmar_mega.config_precision import FP8_MAX_Q_SCALE
from hmar_mega.engine import Engine
from hmar_mega.model.hmar import HMAR
from hmar_mega.model.layer import Attention

log = logging.getLogger(__name__)


def choose_fp8_attention(engine: Engine) -> None:
    """Let layers with a scale above `FP8_MAX_Q_SCALE` attend in bf16, the others in FP8, and log each change.

    Does nothing without FP8 attention. Waits for the device; collective over all ranks.
    """
    models = [m for m in engine.model.modules() if isinstance(m, HMAR) and m.training_backend == "te_fp8"]
    if not models:
        return
    scales: dict[str, float] = {}
    for part in _everywhere(largest_scales(engine), engine.dims.world_size):
        for layer, scale in part.items():
            scales[layer] = max(scale, scales.get(layer, 0.0))
    above = {layer: scale for layer, scale in scales.items() if scale > FP8_MAX_Q_SCALE}
    changed = models[0].bf16_attention != above.keys()
    for model in models:
        model.bf16_attention = frozenset(above)
    if changed and engine.dims.is_main:
        rest = len(scales) - len(above)
        log.warning(
            "step %d | learned scales above %g, too large for FP8 attention: %s; these layers attend in bf16 and the "
            "other %d in FP8%s", engine.step, FP8_MAX_Q_SCALE,
            ", ".join(f"{layer} ({scale:.1f})" for layer, scale in above.items()) or "none any more", rest,
            "" if rest else ": precision.fp8=linears is the same training",
        )  # fmt: skip


def largest_scales(engine: Engine) -> dict[str, float]:
    """The largest learned scale of each attention layer of this rank, exp(min(a, ln 100)); collective under ZeRO-3."""
    layers = [module for module in engine.model.modules() if isinstance(module, Attention)]
    with engine.whole([layer.log_scale for layer in layers]), torch.no_grad():
        largest = torch.stack([layer.q_scale().max() for layer in layers]).tolist()
    return {layer.name: scale for layer, scale in zip(layers, largest, strict=True)}


def _everywhere(own: dict[str, float], ranks: int) -> list[dict[str, float]]:
    """What every rank has: other layers on a pipeline, other heads under tensor parallelism."""
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, own)
    return parts
