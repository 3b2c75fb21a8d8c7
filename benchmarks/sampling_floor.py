"""The least time that sampling a batch can take: weights read, or FLOPs done, at the machine's measured limits.

A pass of the transformer reads the weights of its blocks (without AdaLN) and its head once, and multiplies them with
every token of every row. AdaLN is computed once an image. The decoder's FLOPs are counted operator by operator.
Activations, draws and launches count nothing.
"""

from __future__ import annotations

import torch
from common import Limits
from torch.utils.flop_counter import FlopCounterMode

from hmar_mega.config import TokenizerConfig
from hmar_mega.inference.sampler import SampleSettings
from hmar_mega.model.hmar import HMAR
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.model import MultiScaleVQVAE


def floor(
    model: HMAR, tokenizer: TokenizerConfig, settings: SampleSettings, batch: int, limits: Limits
) -> dict[str, float]:
    """Lower bounds in ms of `transformer` and `decoder`, and their `total`."""
    config, schedule = model.config, model.schedule
    width, size = config.resolved_width, model.pos_start.element_size()
    block = 4 * width * width + 2 * width * config.ffn_width
    weights = config.depth * block + width * model.codebook_size
    strengths, masked = settings.strengths(schedule.num_scales), settings.mask_strengths(schedule.num_scales)
    time = 0.0
    for scale, counts in enumerate(settings.mask_schedule):
        tokens = sum(counts)
        for strength in (strengths[scale], *[masked[scale]] * (len(counts) - 1)):
            rows = batch * (2 if strength > 0 else 1)
            flops = rows * tokens * (2.0 * weights + 4.0 * config.depth * tokens * width)
            time += limits.floor(flops, size * weights)[0]
    layers = config.depth + (config.resolved_mask_layers if model.has_mask_branch else 0)
    modulation = 6 * width * width * (1 if config.shared_aln else layers)
    time += limits.floor(2.0 * (batch + 1) * modulation, size * modulation)[0]
    flops, parameters = decoder_work(tokenizer, schedule)
    decoder = limits.floor(batch * flops, size * parameters)[0]
    return {"transformer": time, "decoder": decoder, "total": time + decoder}


def decoder_work(config: TokenizerConfig, schedule: ScaleSchedule) -> tuple[float, int]:
    """FLOPs of decoding one image, and the decoder's parameters."""
    with torch.device("meta"):
        tokenizer = MultiScaleVQVAE(config, schedule)
        latent = torch.empty(1, config.latent_channels, schedule.grid, schedule.grid)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokenizer.decoder(tokenizer.post_quant_conv(latent))
    return float(counter.get_total_flops()), sum(p.numel() for p in tokenizer.decoder.parameters())
