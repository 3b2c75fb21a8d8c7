"""The transformer as sampling runs it: whatever does not change from pass to pass is computed once an image, or once.

Once a model: QKV biases, query scales, and position and level embeddings of each scale with the word embedding's bias.
Once an image: the AdaLN modulation of every layer and head (it depends on the class alone), from one row for each label
and one for the negative class, and the uniform numbers of all passes. Each pass then embeds f̂ once for both halves of
guidance, runs the blocks with each residual fused into the norm that follows it, and on a GPU draws in one launch
(`kernels.sampling`). Block-diagonal models in one process only. Axes: n tokens of a scale, B images, C width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hmar_mega.inference.sampler import SampleSettings, SamplingState
from hmar_mega.kernels import triton_runs_on
from hmar_mega.model.attention import split_normalised
from hmar_mega.model.elementwise import bias_gelu, gated_residual_norm, modulated_norm
from hmar_mega.model.hmar import HMAR, Branch, Head
from hmar_mega.model.layer import Block
from hmar_mega.model.layers_quantized import QuantizedLinear
from hmar_mega.model.layers_torch import TorchLayers
from hmar_mega.rng import Purpose, uniform
from hmar_mega.sequence import Codes, to_positions

log = logging.getLogger(__name__)

Rows = tuple[Tensor, ...]


def why_not_packed(model: HMAR) -> str | None:
    """Why `PackedHMAR` cannot run such a model; None when it can."""
    if model.config.attention.pattern != "block_diagonal":
        return "block-causal models grow a key/value cache from scale to scale"
    if not isinstance(model.layers, TorchLayers):
        return f"the layers are {type(model.layers).__name__}, split over ranks or computed by another library"
    return None


class PackedBlock:
    """A block's weights, those of the model itself, with its biases and query scales ready to use."""

    def __init__(self, block: Block, kernels: bool) -> None:
        attention, feed_forward = block.attn, block.ffn
        self.block, self.kernels = block, kernels
        self.heads = (3, attention.local_heads, attention.head_dim)
        self.qkv = attention.qkv
        self.qkv_bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        self.q_scale = attention.q_scale().contiguous()
        self.proj, self.fc1, self.fc2 = attention.proj, feed_forward.fc1, feed_forward.fc2

    def attend(self, x_nBC: Tensor) -> Tensor:
        """Attention of one scale before its projection, (n, B, C): dense, one call."""
        qkv = self.qkv(x_nBC, self.qkv_bias).unflatten(-1, self.heads)
        if qkv.shape[0] == 1:  # the only token attends to itself alone
            return qkv[:, :, 2].flatten(2)
        if self.kernels:
            from hmar_mega.kernels.qk_norm import normalise_qk_

            q, k, v = normalise_qk_(qkv, self.q_scale).permute(2, 1, 3, 0, 4)
        else:
            q, k, v = split_normalised(qkv, self.q_scale)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).permute(2, 0, 1, 3).flatten(2)

    def __call__(self, x_nBC: Tensor, normed_nBC: Tensor, own: Rows) -> tuple[Tensor, Tensor]:
        """x after attention, and the feed-forward branch that is still to be added to it, without its bias."""
        gamma1, _, _, scale2, _, shift2 = own
        branch, bias = self.proj(self.attend(normed_nBC), apart=True)
        x_nBC, normed = gated_residual_norm(x_nBC, branch, bias, gamma1, scale2, shift2)
        if isinstance(self.fc1, QuantizedLinear):
            hidden = self.fc1.gelu(normed)
        else:
            hidden = bias_gelu(*self.fc1(normed, apart=True))
        return x_nBC, self.fc2(hidden, apart=True)[0]


@dataclass(frozen=True)
class Modulation:
    """Everything that the classes of a batch decide.

    Attributes:
        first: x of the first scale before its place is added, (B or 2B, C).
        blocks: γ1 γ2 s1 s2 b1 b2 of each block, by its number and whether it is of the mask branch alone; (B or 2B, C).
        heads: scale and shift of each head.
    """

    first: Tensor
    blocks: dict[tuple[int, bool], Rows]
    heads: dict[Branch, Rows]


class PackedHMAR:
    """An HMAR ready to sample; see the file.

    Args:
        model: in evaluation mode, its weights not changed afterwards.
        kernels: run the Triton kernels of normalisation and sampling; None: where there is a CUDA GPU and Triton.

    Raises:
        ValueError: for a model that `why_not_packed` refuses.
    """

    @torch.inference_mode()
    def __init__(self, model: HMAR, kernels: bool | None = None) -> None:
        reason = why_not_packed(model)
        if reason is not None:
            raise ValueError(f"this model cannot be packed for sampling: {reason}; use generate_tokens")
        self.model = model
        device = model.pos_start.device
        self.kernels = (device.type == "cuda" and triton_runs_on(device)) if kernels is None else kernels
        self.draws_in_one = self.kernels and _drawn_in_one(model.codebook_size)
        shared = {(int(n), False): block for n, block in model.blocks.items()}
        own = {(int(n), True): block for n, block in model.mask_blocks.items()} if model.has_mask_branch else {}
        self.blocks = {key: PackedBlock(block, self.kernels) for key, block in (shared | own).items()}  # type: ignore[arg-type]
        self.heads: dict[Branch, Head] = {"next_scale": model.head}
        if model.has_mask_branch:
            self.heads["masked"] = model.mask_head
        bias = model.word_embed.bias
        self.places = []
        for scale in range(model.schedule.num_scales):
            span = model.schedule.span(scale)
            place = model.level_embed[scale].float() + model.pos_embed[0, span].float()
            self.places.append((place if scale == 0 else place + bias.float()).to(model.pos_embed.dtype))

    def keys(self, branch: Branch) -> list[tuple[int, bool]]:
        """Keys of the blocks that `branch` runs, in order."""
        own = self.model.mask_layer_numbers if branch == "masked" else range(0)
        return [(number, number in own) for number in range(self.model.config.depth)]

    def modulation(self, labels_B: Tensor, negative: int, halves: int) -> Modulation:
        """The modulation of all layers and heads for both halves of guidance; the negative class is computed once."""
        model, batch = self.model, len(labels_B)
        classes = labels_B if halves == 1 else torch.cat([labels_B, torch.full_like(labels_B[:1], negative)])
        order = torch.arange(halves * batch, device=labels_B.device).clamp(max=batch)
        cond = model.condition(classes)
        shared = model.shared_ada_lin(F.silu(cond)).unflatten(-1, (6, -1)) if model.config.shared_aln else None

        def rows(values: Sequence[Tensor]) -> Rows:
            return torch.stack(list(values), 1)[order].unbind(1)

        blocks = {key: rows(packed.block.modulation(cond, shared)) for key, packed in self.blocks.items()}
        heads = {name: rows(head.ada_lin(F.silu(cond)).chunk(2, dim=-1)) for name, head in self.heads.items()}
        return Modulation((cond + model.pos_start[0])[order], blocks, heads)

    def embed(
        self, scale: int, first: Tensor, input_BnZ: Tensor | None, features_BnZ: Tensor | None, mask_Bn: Tensor | None
    ) -> Tensor:
        """Input activations, (n, rows, C); see `HMAR.embed`. `first` (rows, C) says how many rows there are."""
        place, rows = self.places[scale][:, None], len(first)
        if input_BnZ is None:
            x = first[None]
        else:
            if mask_Bn is not None and features_BnZ is not None:
                input_BnZ = input_BnZ + features_BnZ.masked_fill(mask_Bn[..., None], 0.0)
            x = F.linear(input_BnZ.to(self.model.word_embed.weight.dtype), self.model.word_embed.weight)
            x = x.transpose(0, 1)
            if rows > len(input_BnZ):
                x = x.repeat(1, 2, 1)
        x = x + place
        if mask_Bn is not None:
            masked = mask_Bn.t()[..., None].repeat(1, rows // len(mask_Bn), 1)
            x = torch.where(masked, x + self.model.mask_embed, x)
        return x

    def logits(self, x_nBC: Tensor, branch: Branch, given: Modulation) -> Tensor:
        """Blocks and head of `branch` on the first rows of `given`: (n, rows, C) → (n, rows, V), the weights' dtype."""
        rows, keys = x_nBC.shape[1], self.keys(branch)
        own = [tuple(v[:rows] for v in given.blocks[key]) for key in keys]
        scale, shift = (v[:rows] for v in given.heads[branch])
        norms = [*((values[2], values[4]) for values in own[1:]), (scale, shift)]
        normed = modulated_norm(x_nBC, own[0][2], own[0][4])
        for key, values, following in zip(keys, own, norms, strict=True):
            x_nBC, branch_nBC = self.blocks[key](x_nBC, normed, values)
            bias = self.blocks[key].fc2.bias
            x_nBC, normed = gated_residual_norm(x_nBC, branch_nBC, bias, values[1], *following)
        logits: Tensor = self.heads[branch].linear(normed)
        return logits


class PackedState(SamplingState):
    """`SamplingState` that asks a `PackedHMAR`; nothing in it waits for the device: a CUDA graph can hold it."""

    def __init__(
        self, packed: PackedHMAR, codes: Codes, labels_B: Tensor, seeds_B: Tensor, settings: SampleSettings
    ) -> None:
        super().__init__(packed.model, codes, labels_B, seeds_B, settings)
        self.packed = packed
        guided = max(*self.strengths, *self.mask_strengths) > 0
        negative = packed.model.config.num_classes if settings.negative_class is None else settings.negative_class
        self.modulation = packed.modulation(labels_B, negative, 2 if guided else 1)
        self.numbers = all_numbers(seeds_B, settings.mask_schedule)

    def sample(
        self,
        scale: int,
        branch: Branch,
        strength: float,
        attempt: int,
        features: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One pass; draws in one launch where the kernels run, from the numbers of the plain path."""
        if not self.packed.draws_in_one or self.settings.more_smooth is not None:
            return super().sample(scale, branch, strength, attempt, features, mask)
        logits = self._halves(scale, branch, strength, features, mask)
        from hmar_mega.kernels.sampling import sample_tokens

        numbers = self.numbers[scale, attempt][:, : logits.shape[0]]
        return *sample_tokens(logits, numbers, strength, self.settings.top_k, self.settings.top_p), None

    def logits(
        self, scale: int, branch: Branch, strength: float, features: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Guided logits (B, n, V) float32 of one scale."""
        both = self._halves(scale, branch, strength, features, mask).float().transpose(0, 1)
        if len(both) == self.batch:
            return both
        return (1 + strength) * both[: self.batch] - strength * both[self.batch :]

    def _halves(
        self, scale: int, branch: Branch, strength: float, features: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """(n, B or 2B, V), the unconditional half behind the conditional one where there is guidance."""
        first = self.modulation.first[: (2 if strength > 0 else 1) * self.batch]
        given = None
        if self.f_hat is not None:
            given = to_positions(self.f_hat, self.model.schedule.patch_nums[scale])
        return self.packed.logits(self.packed.embed(scale, first, given, features, mask), branch, self.modulation)


def _drawn_in_one(codebook_size: int) -> bool:
    """Whether the sampling kernel takes so many codes; says so where it does not."""
    from hmar_mega.kernels.sampling import LARGEST_VOCABULARY

    if codebook_size <= LARGEST_VOCABULARY:
        return True
    log.info("tokens are drawn in plain torch: the kernel takes %d codes, not %d", LARGEST_VOCABULARY, codebook_size)
    return False


def all_numbers(seeds_B: Tensor, passes: Sequence[Sequence[int]]) -> dict[tuple[int, int], Tensor]:
    """The uniform numbers of every (scale, pass), (B, n) float32 as `SamplingState.draw` takes them, made together."""
    keys = [(scale, attempt) for scale, counts in enumerate(passes) for attempt in range(len(counts))]
    longest = max(sum(counts) for counts in passes)
    streams = torch.arange(len(keys), device=seeds_B.device)
    purposes = torch.zeros_like(streams)
    for number, (scale, attempt) in enumerate(keys):
        purposes = torch.where(streams == number, Purpose.SAMPLE * (scale + 1) + attempt, purposes)
    seeds = seeds_B.repeat(len(keys))
    rows = uniform(seeds, torch.zeros_like(seeds), purposes.repeat_interleave(len(seeds_B)), longest)
    return dict(zip(keys, rows.view(len(keys), len(seeds_B), longest).unbind(0), strict=True))
