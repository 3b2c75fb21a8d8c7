"""The HMAR transformer: embeddings, the shared base, the next-scale branch and the mask branch (SPEC §3–5).

The next-scale model is `blocks` 0 … d−1 and `head`. With the mask branch, blocks 0 … d−m−1 are shared and
`mask_blocks` d−m … d−1 with `mask_head` predict masked tokens. Names are global (layers keyed by their number), so
checkpoints know no topology. Axes: N sequence, B batch, C width, Z latent channels, V codebook.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmar_mega.config import ModelConfig
from hmar_mega.model.attention import Attend, SequenceAttention
from hmar_mega.model.initialize import Initializer
from hmar_mega.model.layer import Attention, Block, modulated_norm
from hmar_mega.model.layers_torch import Layers, TorchLayers
from hmar_mega.scales import ScaleSchedule

Branch = Literal["next_scale", "masked"]
Recompute = Literal["none", "selective", "full"]

#: Parameters without weight decay beside 1-d ones: position, level and shared-AdaLN tables.
NO_DECAY = ("pos_start", "pos_embed", "level_embed", "ada_gss")


class Head(nn.Module):
    """LN·(1 + s) + b with (s, b) from Linear(SiLU(cond)), then Linear to the codebook; logits in float32."""

    def __init__(self, name: str, width: int, vocabulary: int, layers: Layers, init: Initializer) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.layers = layers
        padded = pad_to_multiple(vocabulary, layers.tensor_parallel)
        self.ada_lin = layers.column(
            width, 2 * width, init.normal(f"{name}.ada_lin.weight", 0.5), bias=True, gather=True
        )
        self.linear = layers.column(
            width, padded, init.normal(f"{name}.linear.weight", 0.02, rows=vocabulary), bias=True
        )
        mark_padding(self.linear.weight, vocabulary)
        mark_padding(self.linear.bias, vocabulary)

    def forward(self, x_NBC: Tensor, cond_BC: Tensor) -> Tensor:
        """(N, B, C), (B, C) → (N, B, V/tp) float32; columns beyond V, padding of the last ranks, are −inf.

        Under sequence parallelism x is this rank's part, and the logits are of the whole padded sequence.
        """
        scale, shift = self.layers.for_sequence_part(self.ada_lin(F.silu(cond_BC))).chunk(2, dim=-1)
        logits = self.linear(modulated_norm(x_NBC, scale, shift)).float()
        real = self.vocabulary - self.layers.vocabulary_start(logits.shape[-1])
        if real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= real
            logits = logits.masked_fill(padding, float("-inf"))
        return logits


class HMAR(nn.Module):
    """The transformer over token maps of growing size.

    Args:
        config: sizes and attention.
        schedule: the scales.
        codebook_size: V.
        latent_channels: Z of the tokenizer.
        mask_branch: build the mask branch too (stage 2 and composite models).
        layers: plain or tensor-parallel layers.
        seed: of the initial weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        schedule: ScaleSchedule,
        codebook_size: int,
        latent_channels: int,
        *,
        mask_branch: bool = False,
        layers: Layers | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.schedule, self.codebook_size = config, schedule, codebook_size
        self.layers = layers if layers is not None else TorchLayers()
        width, depth = config.resolved_width, config.depth
        init = Initializer(seed, math.sqrt(1 / (3 * width)))

        def table(name: str, *shape: int) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(shape))
            init.normal(name)(parameter.data)
            return parameter

        classes = config.num_classes + 1  # the last one is the unconditional class
        # rows beyond the classes only pad the table to a multiple of tensor_parallel
        self.class_embed = self.layers.embedding(
            pad_to_multiple(classes, self.layers.tensor_parallel),
            width,
            init.normal("class_embed.weight", rows=classes),
        )
        mark_padding(self.class_embed.weight, classes)
        self.word_embed = TorchLayers().row(latent_channels, width, init.normal("word_embed.weight"))
        self.pos_start = table("pos_start", 1, 1, width)
        self.pos_embed = table("pos_embed", 1, schedule.num_tokens, width)
        self.level_embed = table("level_embed", schedule.num_scales, width)
        if config.shared_aln:
            fill = init.normal("shared_ada_lin.weight")
            self.shared_ada_lin = self.layers.column(width, 6 * width, fill, bias=True, gather=True)
        self.blocks = nn.ModuleDict({str(i): Block(f"blocks.{i}", config, self.layers, init) for i in range(depth)})
        self.head = Head("head", width, codebook_size, self.layers, init)
        self.has_mask_branch = mask_branch
        if mask_branch:
            self.mask_embed = table("mask_embed", 1, width)
            self.mask_blocks = nn.ModuleDict(
                {str(i): Block(f"mask_blocks.{i}", config, self.layers, init) for i in self.mask_layer_numbers}
            )
            self.mask_head = Head("mask_head", width, codebook_size, self.layers, init)
        self.register_buffer("level_ids", schedule.level_ids(), persistent=False)
        self.set_recompute("none")

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what the backward pass recomputes instead of keeping: nothing, attention, or whole blocks."""
        self.recompute = recompute
        for module in self.modules():
            if isinstance(module, Attention):
                module.recompute = recompute == "selective"

    @property
    def mask_layer_numbers(self) -> range:
        """Global numbers of the mask branch's layers, d−m … d−1."""
        return range(self.config.depth - self.config.resolved_mask_layers, self.config.depth)

    def forward(
        self,
        labels_B: Tensor,
        teacher_input_BNZ: Tensor,
        token_features_BNZ: Tensor | None = None,
        mask_BN: Tensor | None = None,
        *,
        branch: Branch = "next_scale",
        drop_path: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced logits of every position.

        Args:
            labels_B: (B,) int64 classes; `num_classes` is the unconditional one.
            teacher_input_BNZ: (B, N−1, Z), f̂ of the scales before, area-downsampled.
            token_features_BNZ: (B, N−1, Z), φ_k(e_k)↓ of the tokens themselves; mask branch only.
            mask_BN: (B, N−1) bool, True where the token is to be predicted; mask branch only.
            drop_path: (depth, 2, B) residual factors, or None for none.

        Returns:
            (N, B, V/tp) float32.
        """
        cond = self.condition(labels_B)
        x = torch.cat(
            [
                self.embed(slice(0, 1), cond),
                self.embed(slice(1, None), cond, teacher_input_BNZ, token_features_BNZ, mask_BN),
            ]
        )
        attention = self.config.attention
        attend = SequenceAttention(self.schedule, attention.pattern, attention.backend)
        return self.run(x, cond, branch, attend, drop_path)

    def condition(self, labels_B: Tensor) -> Tensor:
        """Class embedding, (B,) → (B, C)."""
        return self.class_embed(labels_B)

    def embed(
        self,
        positions: slice,
        cond_BC: Tensor,
        input_BNZ: Tensor | None = None,
        token_features_BNZ: Tensor | None = None,
        mask_BN: Tensor | None = None,
    ) -> Tensor:
        """Input activations of a run of positions, (n, B, C): position 0 alone, or some after it.

        x_0 = cond + pos_start; x_i = W·f̂_i (+ W·φ_k(e_k)↓ where unmasked, the mask embedding where masked) + b;
        all += level + pos.
        """
        place = self.level_embed[self.level_ids[positions]] + self.pos_embed[0, positions]
        if input_BNZ is None:
            return (cond_BC + self.pos_start[0])[None] + place[:, None]
        features = input_BNZ
        if mask_BN is not None and token_features_BNZ is not None:
            features = features + token_features_BNZ.masked_fill(mask_BN[..., None], 0.0)
        x = self.word_embed(features.to(self.word_embed.weight.dtype))
        if mask_BN is not None:
            x = torch.where(mask_BN[..., None], x + self.mask_embed, x)
        return x.transpose(0, 1) + place[:, None]

    def run(
        self, x_NBC: Tensor, cond_BC: Tensor, branch: Branch, attend: Attend, drop_path: Tensor | None = None
    ) -> Tensor:
        """Blocks and head of `branch`: (n, B, C) → (n, B, V/tp) float32."""
        shared = None
        if self.config.shared_aln:
            shared = self.shared_ada_lin(F.silu(cond_BC)).unflatten(-1, (6, -1))
        length = x_NBC.shape[0]
        x_NBC = self.layers.scatter_sequence(x_NBC)
        for number in range(self.config.depth):
            block = self.block(number, branch)
            factors = None if drop_path is None else drop_path[number]
            given = (x_NBC, cond_BC, shared, attend, length, factors)
            if self.recompute == "full" and torch.is_grad_enabled():
                x_NBC = checkpoint(block, *given, use_reentrant=False)
            else:
                x_NBC = block(*given)
        head = self.mask_head if branch == "masked" else self.head
        return head(x_NBC, cond_BC)[:length]

    def block(self, number: int, branch: Branch) -> Block:
        """Layer `number` as `branch` runs it."""
        own = branch == "masked" and number in self.mask_layer_numbers
        found = (self.mask_blocks if own else self.blocks)[str(number)]
        assert isinstance(found, Block)
        return found

    def mask_branch_names(self) -> dict[str, str]:
        """Name of each parameter of the mask branch that starts from the next-scale branch → that one's name."""
        names = {}
        for name, _ in self.named_parameters():
            if name.startswith("mask_blocks.") or name.startswith("mask_head."):
                names[name] = name.removeprefix("mask_")
        return names


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to 1-d parameters, biases, position, level and shared-AdaLN tables."""
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in NO_DECAY


def mark_padding(parameter: object, rows: int) -> None:
    """Note how many rows of the global tensor are real, so that checkpoints and exports leave padding out."""
    assert isinstance(parameter, nn.Parameter)
    parameter.unpadded_rows = rows  # type: ignore[attr-defined]


def pad_to_multiple(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple
