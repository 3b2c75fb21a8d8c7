"""The HMAR transformer: embeddings, the shared base, the next-scale branch and the mask branch (SPEC §3–5).

The next-scale model is `blocks` 0 … d−1 and `head`. With the mask branch, blocks 0 … d−m−1 are shared and
`mask_blocks` d−m … d−1 with `mask_head` predict masked tokens. Names are global (layers keyed by their number), so
checkpoints know no topology. Axes: N sequence, B batch, C width, Z latent channels, V codebook.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmar_mega.config import ModelConfig
from hmar_mega.model.attention import Attend, Backend, SequenceAttention
from hmar_mega.model.cross_entropy import fused_cross_entropy, takes_fused
from hmar_mega.model.elementwise import modulated_norm, shortened
from hmar_mega.model.graphs import BlockGraphs
from hmar_mega.model.initialize import Initializer
from hmar_mega.model.layer import Attention, Block, FeedForward
from hmar_mega.model.layers_torch import Layers, TorchLayers
from hmar_mega.model.stage import Stage
from hmar_mega.scales import ScaleSchedule

Branch = Literal["next_scale", "masked"]
Recompute = Literal["none", "selective", "full"]

#: Logits that are held at a time while cross-entropy is computed, in the format that it takes them in.
LOGITS_CHUNK_BYTES = 2**27

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

    def forward(self, x_NBC: Tensor, cond_BC: Tensor, targets_NB: Tensor | None = None, errors: bool = False) -> Tensor:
        """Logits of every position, or their cross-entropy.

        Under sequence parallelism x is this rank's part, and the result is of the whole padded sequence.

        Args:
            targets_NB: (N, B) int64 tokens, or None.
            errors: give top-1 errors beside the cross-entropy; they have no gradient.

        Returns:
            (N, B, V/tp) float32 logits, of which columns beyond V, padding of the last ranks, are −inf; with targets
            (N, B) float32, −log p(target), through at most `LOGITS_CHUNK_BYTES` of logits at a time; with errors
            (N, B, 2).
        """
        scale, shift = self.layers.for_sequence_part(self.ada_lin(F.silu(cond_BC))).chunk(2, dim=-1)
        x_NBC = modulated_norm(x_NBC, scale, shift)
        return self._logits(x_NBC) if targets_NB is None else self._cross_entropy(x_NBC, targets_NB, errors)

    def _logits(self, x_NBC: Tensor) -> Tensor:
        logits = self.linear(x_NBC).float()
        real = self.vocabulary - self.layers.vocabulary_start(logits.shape[-1])
        if real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= real
            logits = logits.masked_fill(padding, float("-inf"))
        return logits

    def _cross_entropy(self, x_nBC: Tensor, targets_NB: Tensor, errors: bool) -> Tensor:
        """Chunk by chunk along the sequence; the logits of a chunk are computed again in the backward pass.

        Under sequence parallelism a chunk takes the same rows of every rank's part.
        """
        parts, (rows, batch) = self.layers.sequence_parts, x_nBC.shape[:2]
        targets = F.pad(targets_NB, (0, 0, 0, parts * rows - targets_NB.shape[0])).view(parts, rows, batch)
        columns = pad_to_multiple(self.vocabulary, self.layers.tensor_parallel) // self.layers.tensor_parallel
        fused = takes_fused(x_nBC.device.type, x_nBC.dtype, self.layers.tensor_parallel)
        element = x_nBC.element_size() if fused else 4
        size = max(1, LOGITS_CHUNK_BYTES // (element * parts * batch * columns))

        def chunk(x: Tensor, wanted: Tensor) -> Tensor:
            logits = self.linear(x) if fused else self._logits(x)
            wrong = self.layers.top_one_error(logits.detach(), wanted) if errors else None
            losses = fused_cross_entropy(logits, wanted) if fused else self.layers.cross_entropy(logits, wanted)
            return losses if wrong is None else torch.stack([losses, wrong], dim=-1)

        out, kinds = [], [2] if errors else []
        for x, wanted in zip(x_nBC.split(size), targets.split(size, dim=1), strict=True):
            flat = wanted.reshape(-1, batch)
            if size < rows and torch.is_grad_enabled():
                out.append(checkpoint(chunk, x, flat, use_reentrant=False).view(*wanted.shape, *kinds))
            else:
                out.append(chunk(x, flat).view(*wanted.shape, *kinds))
        return torch.cat(out, dim=1).view(parts * rows, batch, *kinds)


class Hidden(NamedTuple):
    """What goes from layer to layer: activations (n, B, C), the condition (B, C) and shared modulation (B, 6, C)."""

    x: Tensor
    cond: Tensor
    shared: Tensor | None


class HMAR(nn.Module):
    """The transformer over token maps of growing size, or one stage of it on a pipeline.

    Args:
        config: sizes and attention.
        schedule: the scales.
        codebook_size: V.
        latent_channels: Z of the tokenizer.
        mask_branch: build the mask branch too (stage 2 and composite models).
        layers: plain or tensor-parallel layers.
        seed: of the initial weights.
        stage: the run of layers to build; default all of them.
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
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        self.config, self.schedule, self.codebook_size = config, schedule, codebook_size
        self.layers = layers if layers is not None else TorchLayers()
        self.stage = stage if stage is not None else Stage(range(config.depth))
        self.has_mask_branch = mask_branch
        self.training_backend: Backend = config.attention.backend  #: of attention while training
        self.bf16_attention: frozenset[str] = frozenset()  #: layers whose scales are too large for `te_fp8`
        self.graphs: BlockGraphs | None = None  #: replays the blocks in training; the engine sets it
        self.input_tensor: Tensor | None = None  #: packed activations of the stage before; a pipeline sets it
        init = Initializer(seed, math.sqrt(1 / (3 * config.resolved_width)))
        if self.stage.first:
            self._build_embeddings(latent_channels, init)
        numbers = self.stage.layers
        self.blocks = nn.ModuleDict({str(i): Block(f"blocks.{i}", config, self.layers, init) for i in numbers})
        if self.stage.last:
            self.head = Head("head", config.resolved_width, codebook_size, self.layers, init)
        if mask_branch:
            own = [i for i in numbers if i in self.mask_layer_numbers]
            self.mask_blocks = nn.ModuleDict(
                {str(i): Block(f"mask_blocks.{i}", config, self.layers, init) for i in own}
            )
            if self.stage.last:
                self.mask_head = Head("mask_head", config.resolved_width, codebook_size, self.layers, init)
        self.register_buffer("level_ids", schedule.level_ids(), persistent=False)
        self.set_recompute("none")

    def _build_embeddings(self, latent_channels: int, init: Initializer) -> None:
        config, width = self.config, self.config.resolved_width

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
        self.pos_embed = table("pos_embed", 1, self.schedule.num_tokens, width)
        self.level_embed = table("level_embed", self.schedule.num_scales, width)
        if config.shared_aln:
            fill = init.normal("shared_ada_lin.weight")
            self.shared_ada_lin = self.layers.column(width, 6 * width, fill, bias=True, gather=True)
        if self.has_mask_branch:
            self.mask_embed = table("mask_embed", 1, width)

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what the backward pass recomputes instead of keeping.

        `none`; `selective`: what is cheap (norms, GELU, attention that keeps copies of q and k); `full`: whole blocks.
        """
        self.recompute = recompute
        for module in self.modules():
            if isinstance(module, Attention | FeedForward | Block):
                module.recompute = recompute == "selective"

    @property
    def mask_layer_numbers(self) -> range:
        """Global numbers of the mask branch's layers, d−m … d−1."""
        return range(self.config.depth - self.config.resolved_mask_layers, self.config.depth)

    def forward(
        self,
        labels_B: Tensor | None = None,
        teacher_input_BNZ: Tensor | None = None,
        token_features_BNZ: Tensor | None = None,
        mask_BN: Tensor | None = None,
        *,
        branch: Branch = "next_scale",
        drop_path: Tensor | None = None,
        targets_BN: Tensor | None = None,
        errors: bool = False,
    ) -> Tensor:
        """Teacher-forced logits of every position, or their cross-entropy; on a pipeline, this stage's part of it.

        Args:
            labels_B: (B,) int64 classes; `num_classes` is the unconditional one. First stage only.
            teacher_input_BNZ: (B, N−1, Z), f̂ of the scales before, area-downsampled. First stage only.
            token_features_BNZ: (B, N−1, Z), φ_k(e_k)↓ of the tokens themselves; first stage, mask branch only.
            mask_BN: (B, N−1) bool, True where the token is to be predicted; first stage, mask branch only.
            drop_path: (depth, 2, B) residual factors, or None for none.
            targets_BN: (B, N) int64 tokens, or None for logits. Last stage only.
            errors: give top-1 errors beside the cross-entropy.

        Returns:
            (B, N) float32 cross-entropy in nats where `targets_BN` is given, with errors (2, B, N); else logits
            (N, B, V/tp) float32; of a stage that is not the last, packed activations (see `pack`).
        """
        attention, length = self.config.attention, self.schedule.num_tokens
        backend = self.training_backend if self.training else attention.backend
        attend = SequenceAttention(self.schedule, attention.pattern, backend, self.bf16_attention)
        if self.stage.first:
            assert labels_B is not None
            cond = self.condition(labels_B)
            x = torch.cat(
                [
                    self.embed(slice(0, 1), cond),
                    self.embed(slice(1, None), cond, teacher_input_BNZ, token_features_BNZ, mask_BN),
                ]
            )
            hidden = self.enter(x, cond)
        else:
            assert self.input_tensor is not None
            hidden = self.unpack(self.input_tensor)
        hidden = self.run_blocks(hidden, branch, attend, length, drop_path)
        if not self.stage.last:
            return self.pack(hidden)
        targets = None if targets_BN is None else targets_BN.t().contiguous()
        out = self.leave(hidden, branch, length, targets, errors)
        return out if targets is None else out.permute(*range(out.ndim - 1, -1, -1))

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
        length = x_NBC.shape[0]
        return self.leave(
            self.run_blocks(self.enter(x_NBC, cond_BC), branch, attend, length, drop_path), branch, length
        )

    def enter(self, x_NBC: Tensor, cond_BC: Tensor) -> Hidden:
        """What the first layer takes: this rank's part of the sequence, the condition and the shared modulation."""
        shared = None
        if self.config.shared_aln:
            shared = self.shared_ada_lin(F.silu(cond_BC)).unflatten(-1, (6, -1))
        return Hidden(self.layers.scatter_sequence(x_NBC), cond_BC, shared)

    def run_blocks(
        self, hidden: Hidden, branch: Branch, attend: Attend, length: int, drop_path: Tensor | None = None
    ) -> Hidden:
        """The layers of this stage as `branch` runs them; `length` counts the real tokens of the whole sequence."""
        x, cond, shared = hidden
        blocks = [(number, self.block(number, branch)) for number in self.stage.layers]
        with self.layers.low_precision(self.training):
            if self.graphs is not None and self.training and torch.is_grad_enabled():
                full = self.recompute == "full"
                run = self.graphs.run(branch, blocks, full, attend, length, x, cond, shared, drop_path)
                return Hidden(run, cond, shared)
            for number, block in blocks:
                factors = None if drop_path is None else drop_path[number]
                given = (x, cond, shared, attend, length, factors)
                if self.recompute == "full" and torch.is_grad_enabled():
                    x = self.layers.recompute(block, *given)
                else:
                    x = block(*given)
        return Hidden(x, cond, shared)

    def leave(
        self, hidden: Hidden, branch: Branch, length: int, targets_NB: Tensor | None = None, errors: bool = False
    ) -> Tensor:
        """The head of `branch` on the last layer's output; see `Head.forward`."""
        head = self.mask_head if branch == "masked" else self.head
        return shortened(head(hidden.x, hidden.cond, targets_NB, errors), length)

    @property
    def extra_rows(self) -> int:
        """Rows that travel in front of packed activations: the condition, and the shared modulation where there is."""
        return 7 if self.config.shared_aln else 1

    def pack(self, hidden: Hidden) -> Tensor:
        """One tensor for the next stage, (extra_rows + n, B, C)."""
        x, cond, shared = hidden
        return torch.cat([cond[None], x] if shared is None else [cond[None], shared.transpose(0, 1), x])

    def unpack(self, packed: Tensor) -> Hidden:
        """What `pack` packed."""
        rows = self.extra_rows
        shared = packed[1:rows].transpose(0, 1) if rows > 1 else None
        return Hidden(packed[rows:], packed[0], shared)

    def block(self, number: int, branch: Branch) -> Block:
        """Layer `number` as `branch` runs it."""
        own = branch == "masked" and number in self.mask_layer_numbers
        found = (self.mask_blocks if own else self.blocks)[str(number)]
        assert isinstance(found, Block)
        return found


def mask_branch_names(names: Iterable[str]) -> dict[str, str]:
    """Name of each parameter of the mask branch that starts from the next-scale branch → that one's name."""
    return {n: n.removeprefix("mask_") for n in names if n.startswith(("mask_blocks.", "mask_head."))}


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
