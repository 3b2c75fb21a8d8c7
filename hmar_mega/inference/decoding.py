"""f̂ to pixels: in float32, or in a 16-bit format with channels last; a few images at a time, which bounds memory."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hmar_mega.precision import exact_float32
from hmar_mega.tokenizer.model import MultiScaleVQVAE

log = logging.getLogger(__name__)

#: Bytes that one map of the decoder's widest level may take at full resolution; it holds a handful of such maps.
MAP_BYTES = 2**28


class ImageDecoder:
    """The tokenizer's decoder in one number format.

    Args:
        tokenizer: its weights are shared in float32, and copied in a 16-bit format.
        dtype: float32, bfloat16 or float16; pixels are float32 in any case.
        compiled: run it through torch.compile, which fuses GroupNorm, SiLU and layouts; the first call of a size then
            takes a minute.
    """

    def __init__(self, tokenizer: MultiScaleVQVAE, dtype: torch.dtype = torch.float32, compiled: bool = False) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        config = tokenizer.config
        widest = config.base_channels * config.channel_mult[0] * tokenizer.resolution**2 * dtype.itemsize
        self.chunk = max(1, MAP_BYTES // widest)
        parts = nn.Sequential(tokenizer.post_quant_conv, tokenizer.decoder)
        if dtype != torch.float32:
            parts = copy.deepcopy(parts).to(dtype=dtype, memory_format=torch.channels_last)
            parts = parts.eval().requires_grad_(False)
        self._run: Any = parts
        if compiled:
            self._run = torch.compile(self._run, dynamic=False)
        how = "compiled" if compiled else "not compiled"
        log.info("decoder: %s, %s, %d images at a time", str(dtype).removeprefix("torch."), how, self.chunk)

    @torch.inference_mode()
    def __call__(self, f_hat: Tensor, out: Tensor | None = None) -> Tensor:
        """Decode f̂ (B, Z, h, w) float32 to images (B, 3, R, R) float32 in [0, 1], into `out` where it is given."""
        if out is None:
            out = f_hat.new_empty(len(f_hat), 3, self.tokenizer.resolution, self.tokenizer.resolution)
        size = math.ceil(len(f_hat) / math.ceil(len(f_hat) / self.chunk))  # chunks alike: few sizes to compile
        for start in range(0, len(f_hat), size):
            part = f_hat[start : start + size].to(self.dtype)
            if self.dtype != torch.float32:
                part = part.contiguous(memory_format=torch.channels_last)
            with exact_float32():  # around what was compiled, which would not keep it
                pixels = self._run(part).float()
            out[start : start + size] = pixels.clamp(-1, 1).add(1).mul(0.5).clamp(0, 1)
        return out


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] → (B, H, W, 3) uint8, rounded, where they are."""
    return images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_bytes(images: Tensor) -> np.ndarray:
    """`to_uint8` in main memory."""
    return to_uint8(images).cpu().numpy()
