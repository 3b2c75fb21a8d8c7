"""The rival of `training.py`: the next-scale model and its step in plain torch, as one would write them without us.

Written apart from hmar_mega's model on purpose: what speeds that one up must not speed this one up. Parameters have the
same names, so that one loads the other's weights. Choices: (B, N, C) activations; float32 weights, gradients and Adam
moments under bf16 autocast, with the residual stream in bf16; one SDPA call with a dense mask a layer; torch.compile of
each block (compiled once, shared by all of them) and of head and loss together; fused AdamW; foreach gradient clipping.
Axes: B batch, N sequence, C width, H heads, D head dim, Z latent channels, V codebook.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmar_mega.config import Config, ModelConfig
from hmar_mega.errors import UserError
from hmar_mega.objective import Objective, TokenBatch

#: Parameters without weight decay beside 1-d ones.
TABLES = ("pos_start", "pos_embed", "level_embed")


class PlainAttention(nn.Module):
    """Cosine attention with a learned scale per head under a dense mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4)))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BNC: Tensor, mask_NN: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BNC, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        q = F.normalize(q.float(), dim=-1) * scale[:, None, None]
        k = F.normalize(k.float(), dim=-1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask_NN, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class PlainFeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        return self.fc2(F.gelu(self.fc1(x_BNC), approximate="tanh"))


class PlainBlock(nn.Module):
    """x += γ1·Attn(LN(x)·(1 + s1) + b1); x += γ2·FFN(LN(x)·(1 + s2) + b2), all six from Linear(SiLU(cond))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.resolved_width
        self.attn = PlainAttention(width, config.resolved_heads)
        self.ffn = PlainFeedForward(width, config.ffn_width)
        self.ada_lin = nn.Linear(width, 6 * width)

    def forward(self, x_BNC: Tensor, cond_BC: Tensor, mask_NN: Tensor, drop_path_2B: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C); `drop_path_2B` multiplies the two residuals of each sample."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.ada_lin(F.silu(cond_BC))[:, None].chunk(6, dim=-1)
        drop1, drop2 = drop_path_2B.to(x_BNC.dtype)[..., None, None]
        x_BNC = x_BNC + drop1 * gamma1 * self.attn(modulated(x_BNC, scale1, shift1), mask_NN)
        return x_BNC + drop2 * gamma2 * self.ffn(modulated(x_BNC, scale2, shift2))


def modulated(x_BNC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """LN(x)·(1 + scale) + shift, LN without affine, eps 1e-6."""
    return F.layer_norm(x_BNC, x_BNC.shape[-1:], eps=1e-6) * (1 + scale_B1C) + shift_B1C


class PlainHead(nn.Module):
    """LN·(1 + s) + b, then a linear to the codebook, and the weighted cross-entropy of a batch."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.ada_lin = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, vocabulary)

    def forward(self, x_BNC: Tensor, cond_BC: Tensor, targets_BN: Tensor, weights_N: Tensor) -> Tensor:
        """Mean over samples of Σ_n w_n · cross-entropy, scalar float32."""
        scale, shift = self.ada_lin(F.silu(cond_BC))[:, None].chunk(2, dim=-1)
        logits = self.linear(modulated(x_BNC, scale, shift)).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets_BN.flatten(), reduction="none")
        return (losses.view_as(targets_BN) * weights_N).sum(1).mean()


class PlainModel(nn.Module):
    """The next-scale model of a configuration; forward gives the loss of a batch.

    Raises:
        UserError: for configurations that it does not cover (stage 2, shared AdaLN).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, schedule = config.model, config.schedule.scales
        if config.stage.name != "next_scale" or model.shared_aln:
            raise UserError(
                f"stage.name={config.stage.name}, shared_aln={model.shared_aln}: the rival is the next-scale model "
                "with an AdaLN linear in each block; measure this configuration without --rival"
            )
        width = model.resolved_width
        self.class_embed = nn.Embedding(model.num_classes + 1, width)
        self.word_embed = nn.Linear(config.tokenizer.latent_channels, width)
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, schedule.num_tokens, width))
        self.level_embed = nn.Parameter(torch.empty(schedule.num_scales, width))
        self.blocks = nn.ModuleDict({str(i): PlainBlock(model) for i in range(model.depth)})
        self.head = PlainHead(width, config.tokenizer.codebook_size)
        self.register_buffer("level_ids", schedule.level_ids(), persistent=False)
        seen = schedule.attention_mask(model.attention.pattern)
        self.register_buffer("mask", torch.zeros(seen.shape).masked_fill(~seen, float("-inf")), persistent=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Normal weights of std sqrt(1/(3C)), a small head, biases 0: close enough to training's for timing."""
        std = math.sqrt(1 / (3 * self.pos_start.shape[-1]))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif not name.endswith("log_scale"):
                parameter.normal_(0.0, 0.02 * std if name == "head.linear.weight" else std)

    def compile_parts(self) -> None:
        """torch.compile of every block and of the head with the loss."""
        for block in self.blocks.values():
            block.compile(dynamic=False)
        self.head.compile(dynamic=False)

    def forward(
        self, labels_B: Tensor, teacher_input_BNZ: Tensor, targets_BN: Tensor, drop_path: Tensor, weights_N: Tensor
    ) -> Tensor:
        """Arguments as those of `HMAR.forward`, and the weight of each position; scalar float32."""
        cond = self.class_embed(labels_B)
        rest = self.word_embed(teacher_input_BNZ)
        x = torch.cat([(cond + self.pos_start[0])[:, None].to(rest.dtype), rest], dim=1)
        x = (x + self.level_embed[self.level_ids] + self.pos_embed).to(rest.dtype)
        mask = self.mask.to(rest.dtype)
        for number, block in self.blocks.items():
            x = block(x, cond, mask, drop_path[int(number)])
        return self.head(x, cond, targets_BN, weights_N)


class PlainTrainer:
    """Its optimizer step: `accumulation` micro-batches, clip, AdamW."""

    def __init__(self, model: PlainModel, config: Config, lr: float) -> None:
        self.model, self.config = model, config
        named = list(model.named_parameters())
        plain = [p for n, p in named if p.ndim < 2 or n in TABLES]
        matrices = [p for n, p in named if p.ndim >= 2 and n not in TABLES]
        groups = [
            {"params": matrices, "weight_decay": config.optim.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        fused = model.pos_start.is_cuda
        self.optimizer = torch.optim.AdamW(
            groups, lr=lr, betas=config.optim.betas, eps=config.optim.eps, fused=fused or None
        )

    def train_step(self, micro_batches: Sequence[TokenBatch], objective: Objective) -> tuple[Tensor, Tensor]:
        """Gradient norm before clipping and mean loss, on the device; inputs are built as training builds them."""
        total = torch.zeros((), device=objective.device)
        for batch in micro_batches:
            inputs = self.inputs(objective, batch)
            with torch.autocast(objective.device.type, torch.bfloat16):
                loss = self.model(**inputs) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, total

    def inputs(self, objective: Objective, batch: TokenBatch) -> dict[str, Any]:
        """What the model's forward takes, with training's draws."""
        given = objective.inputs(batch, training=True)
        depth, samples = self.config.model.depth, len(batch.labels)
        drop_path = given.get("drop_path", torch.ones(depth, 2, samples, device=objective.device))
        return {
            "labels_B": given["labels_B"],
            "teacher_input_BNZ": given["teacher_input_BNZ"],
            "targets_BN": given["targets_BN"],
            "drop_path": drop_path,
            "weights_N": objective.weights,
        }
