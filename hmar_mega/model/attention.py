"""Scale-block attention: one entry, several backends.

Axes: N sequence, B batch, H heads (of this tensor-parallel rank), D head dim; activations are sequence-first, so every
scale is one contiguous (p_k², B, …) block. q and k are L2-normalised per head and q is multiplied by a learned scale,
so no further softmax scale is applied (SPEC §3; VAR's `attn_l2_norm`).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hmar_mega.scales import Pattern, ScaleSchedule

log = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "sdpa", "triton", "triton_fp8", "te", "te_fp8"]


def scale_block_attention(
    qkv_NB3HD: Tensor, q_scale_H: Tensor, schedule: ScaleSchedule, pattern: Pattern, backend: Backend = "auto"
) -> Tensor:
    """Attention within each scale (`block_diagonal`, HMAR) or over it and all earlier ones (`block_causal`, VAR).

    Args:
        qkv_NB3HD: packed projection (N, B, 3, H, D), bias added, not normalised.
        q_scale_H: (H,) linear scale of the normalised queries, exp(min(a, ln 100)).
        schedule: the scales; N must be its number of tokens.
        pattern: which scales a token sees.
        backend: `reference` (dense mask, any device, the truth in tests), `sdpa` (one fused call a scale), `triton`
            (own kernels, GPU), `triton_fp8` (forward products of larger scales in FP8 at heads of a small q_scale),
            `te` (Transformer Engine, one variable-length call), `te_fp8` (its larger scales in FP8) or `auto`, the
            fastest that takes the inputs.

    Returns:
        (N, B, H·D) in the dtype of `qkv`.
    """
    if qkv_NB3HD.shape[0] != schedule.num_tokens:
        raise ValueError(f"qkv has {qkv_NB3HD.shape[0]} positions, the schedule {schedule.num_tokens}")
    return _BACKENDS[chosen_backend(qkv_NB3HD, backend)](qkv_NB3HD, q_scale_H, schedule, pattern)


def chosen_backend(qkv_NB3HD: Tensor, backend: Backend) -> str:
    """What `auto` takes for such inputs, or what was asked for."""
    if backend != "auto":
        return backend
    return _choose(qkv_NB3HD.device.type, qkv_NB3HD.dtype, qkv_NB3HD.shape[-1])


def split_normalised(qkv_NB3HD: Tensor, q_scale_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (unit length × scale), k (unit length) and v, each (B, H, N, D); norms in float32, or float64 when given."""
    q, k, v = qkv_NB3HD.permute(2, 1, 3, 0, 4)
    precise = torch.promote_types(qkv_NB3HD.dtype, torch.float32)
    q = F.normalize(q.to(precise), dim=-1) * q_scale_H.to(precise)[:, None, None]
    k = F.normalize(k.to(precise), dim=-1)
    return q.to(v.dtype), k.to(v.dtype), v


def _reference(qkv: Tensor, q_scale: Tensor, schedule: ScaleSchedule, pattern: Pattern) -> Tensor:
    q, k, v = split_normalised(qkv, q_scale)
    precise = torch.promote_types(qkv.dtype, torch.float32)
    logits = q.to(precise) @ k.to(precise).transpose(-1, -2)
    mask = schedule.attention_mask(pattern, qkv.device)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return _merge_heads((weights @ v.to(weights.dtype)).to(v.dtype))


def _sdpa(qkv: Tensor, q_scale: Tensor, schedule: ScaleSchedule, pattern: Pattern) -> Tensor:
    q, k, v = split_normalised(qkv, q_scale)
    out = []
    for scale in range(schedule.num_scales):
        own = schedule.span(scale)
        seen = own if pattern == "block_diagonal" else slice(0, own.stop)
        out.append(F.scaled_dot_product_attention(q[:, :, own], k[:, :, seen], v[:, :, seen], scale=1.0))
    return _merge_heads(torch.cat(out, dim=2))


def _triton(qkv: Tensor, q_scale: Tensor, schedule: ScaleSchedule, pattern: Pattern) -> Tensor:
    from hmar_mega.kernels import scale_block_attention as kernels  # Triton comes with torch's builds for GPUs alone

    return kernels.scale_block_attention(qkv, q_scale, schedule, pattern)


def _triton_fp8(qkv: Tensor, q_scale: Tensor, schedule: ScaleSchedule, pattern: Pattern) -> Tensor:
    from hmar_mega.kernels import scale_block_attention as kernels
    from hmar_mega.kernels.scale_block_fp8 import FP8_BELOW

    return kernels.scale_block_attention(qkv, q_scale, schedule, pattern, FP8_BELOW)


def _te(qkv: Tensor, q_scale: Tensor, schedule: ScaleSchedule, pattern: Pattern) -> Tensor:
    from hmar_mega.model.attention_te import te_attention  # needs CUDA to be imported

    return te_attention(qkv, q_scale, schedule, pattern)


def _te_fp8(qkv: Tensor, q_scale: Tensor, schedule: ScaleSchedule, pattern: Pattern) -> Tensor:
    from hmar_mega.model.attention_te import te_fp8_attention

    return te_fp8_attention(qkv, q_scale, schedule, pattern)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, ScaleSchedule, Pattern], Tensor]] = {
    "reference": _reference,
    "sdpa": _sdpa,
    "triton": _triton,
    "triton_fp8": _triton_fp8,
    "te": _te,
    "te_fp8": _te_fp8,
}


@cache
def _choose(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """The fastest backend for such inputs; says once which and why."""
    if device != "cuda":
        chosen, why = "sdpa", f"one fused call a scale; the own kernels need a CUDA GPU, not {device}"
    elif importlib.util.find_spec("triton") is None:
        chosen, why = "sdpa", "one fused call a scale; the own kernels need Triton, which is not installed"
    else:
        from hmar_mega.kernels import HEAD_DIMS
        from hmar_mega.kernels.scale_block_attention import DTYPES

        if dtype in DTYPES and head_dim in HEAD_DIMS:
            chosen, why = "triton", "own kernels, normalisation and scale included"
        else:
            chosen, why = (
                "sdpa",
                f"one fused call a scale; the own kernels do not take {dtype} with head_dim {head_dim}",
            )
    log.info("attention.backend=auto: %s (%s)", chosen, why)
    return chosen


def _merge_heads(out_BHND: Tensor) -> Tensor:
    return out_BHND.permute(2, 0, 1, 3).flatten(2)


class Attend(Protocol):
    """How a block's packed projection becomes its attention output."""

    def __call__(self, layer: str, qkv_NB3HD: Tensor, q_scale_H: Tensor) -> Tensor:
        """(N, B, 3, H, D), (H,) → (N, B, H·D); `layer` names the block, for caches."""

    def keeps_copies(self, qkv_NB3HD: Tensor) -> bool:
        """Whether more than input and output is kept for the backward pass."""


@dataclass(frozen=True)
class SequenceAttention:
    """All scales at once: training and teacher forcing.

    Attributes:
        bf16_layers: layers for which `te_fp8` means `te`.
    """

    schedule: ScaleSchedule
    pattern: Pattern
    backend: Backend = "auto"
    bf16_layers: frozenset[str] = frozenset()

    def __call__(self, layer: str, qkv_NB3HD: Tensor, q_scale_H: Tensor) -> Tensor:
        """See `scale_block_attention`."""
        backend: Backend = "te" if self.backend == "te_fp8" and layer in self.bf16_layers else self.backend
        return scale_block_attention(qkv_NB3HD, q_scale_H, self.schedule, self.pattern, backend)

    def keeps_copies(self, qkv_NB3HD: Tensor) -> bool:
        """Every backend does but the own kernels."""
        return chosen_backend(qkv_NB3HD, self.backend) not in ("triton", "triton_fp8")


@dataclass
class ScaleAttention:
    """One scale at a time: sampling. Block-causal models keep the keys and values of earlier scales."""

    pattern: Pattern
    cache: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, layer: str, qkv_NB3HD: Tensor, q_scale_H: Tensor) -> Tensor:
        """Dense attention over the given scale, and over the cached ones when block-causal."""
        q, k, v = split_normalised(qkv_NB3HD, q_scale_H)
        if self.pattern == "block_causal":
            if layer in self.cache:
                past_k, past_v = self.cache[layer]
                k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
            self.cache[layer] = (k, v)
        return _merge_heads(F.scaled_dot_product_attention(q, k, v, scale=1.0))

    def keeps_copies(self, qkv_NB3HD: Tensor) -> bool:
        """Sampling has no backward pass."""
        return False
