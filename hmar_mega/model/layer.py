"""One AdaLN transformer block (SPEC §3) over whatever linears it is given.

Axes: N sequence, B batch, C width. γ1 γ2 s1 s2 b1 b2 are chunks of Linear(SiLU(cond)):
    x += drop_path(γ1 · Attn(LN(x)·(1 + s1) + b1));  x += drop_path(γ2 · FFN(LN(x)·(1 + s2) + b2))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmar_mega.config import ModelConfig
from hmar_mega.model.attention import Attend
from hmar_mega.model.elementwise import (
    bias_gelu,
    gated_residual,
    gated_residual_norm,
    gelu_input,
    modulated_norm,
    recomputed,
    shortened,
)
from hmar_mega.model.initialize import Initializer
from hmar_mega.model.layers_torch import Layers

MAX_LOG_SCALE = math.log(100)


class Attention(nn.Module):
    """QKV without bias plus learned q and v biases, cosine attention with a learned scale per head, projection."""

    def __init__(self, name: str, config: ModelConfig, layers: Layers, init: Initializer) -> None:
        super().__init__()
        width, depth = config.resolved_width, config.depth
        self.name, self.layers = name, layers
        self.recompute = False  #: recompute the attention in the backward pass, where its backend keeps copies
        self.local_heads = config.resolved_heads // layers.tensor_parallel
        self.head_dim = config.head_dim
        self.log_scale = layers.vector(config.resolved_heads, math.log(4))
        self.q_bias = layers.vector(width, 0.0)
        self.v_bias = layers.vector(width, 0.0)
        self.qkv = layers.column(width, 3 * width, init.normal(f"{name}.qkv.weight"), bias=False, stride=3, fp8=True)
        self.proj = layers.row(width, width, init.normal(f"{name}.proj.weight", 1 / math.sqrt(2 * depth)))

    def forward(self, x_NBC: Tensor, attend: Attend, length: int) -> tuple[Tensor, Tensor | None]:
        """(N, B, C) → (N, B, C) and the bias that is still to be added; under sequence parallelism this rank's part.

        Args:
            length: real tokens of the whole sequence; padding behind them attends to nothing and is attended by none.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = shortened(self.qkv(x_NBC, bias), length).unflatten(-1, (3, self.local_heads, self.head_dim))
        if self.recompute and torch.is_grad_enabled() and attend.keeps_copies(qkv):
            out = checkpoint(attend, self.name, qkv, self.q_scale(), use_reentrant=False, preserve_rng_state=False)
        else:
            out = attend(self.name, qkv, self.q_scale())
        return self.proj(self.layers.pad_sequence(out), apart=True)

    def q_scale(self) -> Tensor:
        """Linear scale of the normalised queries, (H/tp,) float32 = exp(min(a, ln 100))."""
        return self.log_scale.float().clamp(max=MAX_LOG_SCALE).exp()


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, name: str, config: ModelConfig, layers: Layers, init: Initializer) -> None:
        super().__init__()
        width, hidden = config.resolved_width, config.ffn_width
        self.recompute = False  #: recompute GELU in the backward pass
        self.fc1 = layers.column(width, hidden, init.normal(f"{name}.fc1.weight"), bias=True, fp8=True)
        self.fc2 = layers.row(hidden, width, init.normal(f"{name}.fc2.weight", 1 / math.sqrt(2 * config.depth)))

    def forward(self, x_NBC: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, B, C) → (N, B, C) and the bias that is still to be added."""
        before, bias = gelu_input(*self.fc1(x_NBC, apart=True))
        hidden = bias_gelu(before, bias)
        with _kept(hidden, self.recompute, bias_gelu, before, bias):
            return self.fc2(hidden, apart=True)


class Block(nn.Module):
    """Attention and feed-forward, modulated by the class condition.

    With `shared_aln` the modulation comes from one linear of the model and the block only adds `ada_gss` (1, 1, 6, C).
    """

    def __init__(self, name: str, config: ModelConfig, layers: Layers, init: Initializer) -> None:
        super().__init__()
        self.layers = layers
        self.recompute = False  #: recompute the norms in the backward pass
        self.attn = Attention(f"{name}.attn", config, layers, init)
        self.ffn = FeedForward(f"{name}.ffn", config, layers, init)
        width = config.resolved_width
        factors = [config.gamma_init] * 2 + [0.5] * 4
        if config.shared_aln:
            # randn/√C, while the initializer draws with its own std
            unit = 1 / (init.std * math.sqrt(width))
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, width))
            init.normal(f"{name}.ada_gss", [unit * f for f in factors])(self.ada_gss.data.view(6, width))
        else:
            fill = init.normal(f"{name}.ada_lin.weight", factors)
            self.ada_lin = layers.column(width, 6 * width, fill, bias=True, gather=True)

    def modulation(self, cond_BC: Tensor, shared_B6C: Tensor | None) -> tuple[Tensor, ...]:
        """γ1 γ2 s1 s2 b1 b2, each (B, C), from SiLU(cond) or from the model's shared linear."""
        if shared_B6C is not None:
            return self.layers.for_sequence_part(shared_B6C + self.ada_gss[0]).unbind(1)
        return self.layers.for_sequence_part(self.ada_lin(F.silu(cond_BC))).chunk(6, dim=-1)

    def forward(
        self,
        x_NBC: Tensor,
        cond_BC: Tensor,
        shared_B6C: Tensor | None,
        attend: Attend,
        length: int,
        drop_path_2B: Tensor | None = None,
    ) -> Tensor:
        """(N, B, C) → (N, B, C); under sequence parallelism this rank's part of both.

        Args:
            cond_BC, shared_B6C: see `modulation`.
            length: real tokens of the whole sequence.
            drop_path_2B: factor of each sample's attention and feed-forward residual, 0 or 1/keep; None: 1.
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation(cond_BC, shared_B6C)
        if drop_path_2B is not None:
            gamma1 = gamma1 * drop_path_2B[0, :, None].to(gamma1.dtype)
            gamma2 = gamma2 * drop_path_2B[1, :, None].to(gamma2.dtype)
        normed = modulated_norm(x_NBC, scale1, shift1)
        with _kept(normed, self.recompute, modulated_norm, x_NBC, scale1, shift1):
            branch, bias = self.attn(normed, attend, length)
        x_NBC, normed = gated_residual_norm(x_NBC, branch, bias, gamma1, scale2, shift2)
        with _kept(normed, self.recompute, modulated_norm, x_NBC, scale2, shift2):
            branch, bias = self.ffn(normed)
        return gated_residual(x_NBC, branch, bias, gamma2)


def _kept(value: Tensor, again: bool, function: Callable[..., Tensor], *given: Tensor | None) -> Any:
    """`recomputed` from `given` where `again`; else nothing."""
    if not (again and torch.is_grad_enabled()):
        return nullcontext()
    fixed = [None if t is None else t.detach() for t in given]
    return recomputed(value, lambda: function(*fixed))
