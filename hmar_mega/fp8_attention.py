"""What attends in FP8: that of small learned scales, looked at when training starts and at every evaluation.

Transformer Engine takes a layer as a whole; the own kernels choose by head, on the device, and are only reported here.

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

    With the own kernels, log how many heads they compute in FP8. Does nothing without FP8 attention. Waits for the
    device; collective over all ranks.
    """
    if any(isinstance(m, HMAR) and m.training_backend == "triton_fp8" for m in engine.model.modules()):
        _report_heads(engine)
        return
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


def _report_heads(engine: Engine) -> None:
    from hmar_mega.kernels.scale_block_fp8 import FP8_BELOW  # Triton comes with torch's builds for GPUs alone

    own = {f"{layer} {engine.dims.tp_rank}": scales for layer, scales in _scales(engine).items()}
    heads: dict[str, list[float]] = {}
    for part in _everywhere(own, engine.dims.world_size):
        heads.update(part)
    scales = [scale for part in heads.values() for scale in part]
    below = sum(scale < FP8_BELOW for scale in scales)
    if engine.dims.is_main:
        log.info(
            "step %d | FP8 attention: %d of %d heads, those with a learned scale below %g; the largest is %.1f",
            engine.step, below, len(scales), FP8_BELOW, max(scales),
        )  # fmt: skip


def largest_scales(engine: Engine) -> dict[str, float]:
    """The largest learned scale of each attention layer of this rank, exp(min(a, ln 100)); collective under ZeRO-3."""
    return {layer: max(scales) for layer, scales in _scales(engine).items()}


def _scales(engine: Engine) -> dict[str, list[float]]:
    """The learned scales of this rank's heads by layer."""
    layers = [module for module in engine.model.modules() if isinstance(module, Attention)]
    with engine.whole([layer.log_scale for layer in layers]), torch.no_grad():
        scales = torch.stack([layer.q_scale() for layer in layers]).tolist()
    return {layer.name: own for layer, own in zip(layers, scales, strict=True)}


def _everywhere(own: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """What every rank has: other layers on a pipeline, other heads under tensor parallelism."""
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, own)
    return parts
