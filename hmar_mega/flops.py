"""How much work a training step is, and what this GPU could do at best."""

from __future__ import annotations

import torch

from hmar_mega.config import Config

#: Dense bf16 peak in FLOP/s by the vendor's datasheet, by a part of the device name.
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12, "4090": 165e12}


def train_flops_per_image(config: Config) -> float:
    """FLOPs of forward and backward for one image.

    6 · (block weights without AdaLN + head) · tokens + 12 · depth · H·D · attended pairs, the usual count in which
    recomputation adds nothing. In stage 2 the frozen base has no weight gradients: 4 instead of 6 for its weights.
    """
    model, schedule = config.model, config.schedule.scales
    width = model.resolved_width
    block = 4 * width * width + 2 * width * model.ffn_width
    frozen = model.depth - model.resolved_mask_layers if config.stage.name == "masked" else 0
    weights = model.depth * block + width * config.tokenizer.codebook_size - frozen * block / 3
    attention = 12 * model.depth * width * schedule.attended_pairs(model.attention.pattern)
    return 6.0 * weights * schedule.num_tokens + attention


def device_peak(device: torch.device) -> float | None:
    """bf16 peak of a CUDA device in FLOP/s; None for CPUs and unknown GPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAK.items() if part in name), None)
