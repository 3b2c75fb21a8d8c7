"""Which cross-entropy a head computes: the fused kernel where it can, else that of its layers."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@cache
def takes_fused(device: str, dtype: torch.dtype, tensor_parallel: int) -> bool:
    """Whether logits of such a head go to the fused kernel in their own format; says once what is taken and why."""
    others = "torch's, on float32 logits" if tensor_parallel == 1 else "Megatron-core's vocabulary-parallel one"
    if tensor_parallel > 1:
        fused, why = False, f"the codebook is split over {tensor_parallel} ranks"
    elif device != "cuda":
        fused, why = False, f"the own kernel needs a CUDA GPU, not {device}"
    elif importlib.util.find_spec("triton") is None:
        fused, why = False, "the own kernel needs Triton, which is not installed"
    else:
        from hmar_mega.kernels.cross_entropy import DTYPES

        fused = dtype in DTYPES
        why = "one read of the logits, gradient in their place" if fused else f"the own kernel does not take {dtype}"
    log.info("cross-entropy: %s (%s)", "own kernel" if fused else others, why)
    return fused


def fused_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p(target), (…, V) logits and (…) int64 → (…) float32; the backward pass overwrites the logits."""
    from hmar_mega.kernels import cross_entropy  # Triton comes with torch's builds for GPUs alone

    return cross_entropy.cross_entropy(logits, targets)
