"""Random files of exactly the published layouts, key by key from SPEC §2 and §7; knows nothing of the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Maker:
    """Random tensors by name, convolutions such that activations keep their size; on the meta device only shapes."""

    def __init__(self, seed: int, device: str = "cpu", std: float = 0.3) -> None:
        self.tensors: Tensors = {}
        self.std, self.device = std, device
        self.generator = torch.Generator().manual_seed(seed)

    def put(self, name: str, *shape: int) -> None:
        std = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) == 4 and shape[0] > 1 else self.std
        self.tensors[name] = (
            torch.empty(shape, device="meta")
            if self.device == "meta"
            else torch.randn(shape, generator=self.generator) * std
        )

    def both(self, name: str, *shape: int) -> None:
        """A weight and the bias of its first dimension."""
        self.put(f"{name}.weight", *shape)
        self.put(f"{name}.bias", shape[0])


def make_transformer(
    kind: str,
    depth: int = 2,
    classes: int = 5,
    codes: int = 32,
    channels: int = 8,
    patch_nums: tuple[int, ...] = (1, 2, 4),
    shared: bool = False,
    mask_layers: int = 1,
    seed: int = 0,
    device: str = "cpu",
    std: float = 0.3,
) -> Tensors:
    """A file of kind `nvlabs-hmar`, `nvlabs-next-scale`, `nvlabs-masked` or `var`."""
    make, width = Maker(seed, device, std), 64 * depth
    tokens = sum(p * p for p in patch_nums)
    make.put("pos_start", 1, 1, width)
    make.put("pos_1LC", 1, tokens, width)
    level = torch.tensor([k for k, p in enumerate(patch_nums) for _ in range(p * p)], dtype=torch.int64)
    if device == "meta":
        make.tensors["lvl_1L"] = torch.empty(1, tokens, dtype=torch.int64, device=device)
        make.tensors["attn_bias_for_masking"] = torch.empty(1, 1, tokens, tokens, device=device)
    else:
        make.tensors["lvl_1L"] = level.view(1, tokens)
        query, key = level.view(tokens, 1), level.view(1, tokens)
        seen = query >= key if kind == "var" else query == key
        make.tensors["attn_bias_for_masking"] = torch.where(seen, 0.0, -torch.inf).view(1, 1, tokens, tokens)
    make.put("word_embed.weight", width, channels)
    masked = kind in ("nvlabs-hmar", "nvlabs-masked")
    make.put("word_embed_bias" if masked else "word_embed.bias", width)
    if masked:
        make.put("mask_embed.weight", 1, width)
    make.put("class_emb.weight", classes + 1, width)
    make.put("lvl_embed.weight", len(patch_nums), width)
    if shared:
        make.both("shared_ada_lin.1", 6 * width, width)
    if kind == "nvlabs-hmar":
        groups = {"base_blocks": depth - mask_layers, "ns_blocks": mask_layers, "mask_blocks": mask_layers}
        heads = ("ns_head", "mask_head")
    else:
        groups, heads = {"blocks": depth}, ("head",)
    for group, count in groups.items():
        for i in range(count):
            make_block(make, f"{group}.{i}", width, depth, shared)
    for head in heads:
        make.both(f"{head}_nm.ada_lin.1", 2 * width, width)
        make.both(head, codes, width)
    return make.tensors


def make_block(make: Maker, name: str, width: int, heads: int, shared: bool) -> None:
    make.put(f"{name}.attn.scale_mul_1H11", 1, heads, 1, 1)
    if make.device != "meta":
        make.tensors[f"{name}.attn.scale_mul_1H11"] += math.log(4)
    make.put(f"{name}.attn.q_bias", width)
    make.put(f"{name}.attn.v_bias", width)
    make.tensors[f"{name}.attn.zero_k_bias"] = torch.zeros(width, device=make.device)
    make.put(f"{name}.attn.mat_qkv.weight", 3 * width, width)
    make.both(f"{name}.attn.proj", width, width)
    make.both(f"{name}.ffn.fc1", 4 * width, width)
    make.both(f"{name}.ffn.fc2", width, 4 * width)
    if shared:
        make.put(f"{name}.ada_gss", 1, 1, 6, width)
    else:
        make.both(f"{name}.ada_lin.1", 6 * width, width)


def make_pair(depth: int = 4, mask_layers: int = 2, **sizes: object) -> tuple[Tensors, Tensors]:
    """A next-scale file and the masked file of a stage 2 that started from it: shared parts are equal."""
    first = make_transformer("nvlabs-next-scale", depth, seed=1, **sizes)  # type: ignore[arg-type]
    second = make_transformer("nvlabs-masked", depth, seed=2, **sizes)  # type: ignore[arg-type]
    trained = tuple(f"blocks.{i}." for i in range(depth - mask_layers, depth)) + ("head", "mask_embed")
    for name in second:
        if not name.startswith(trained):
            second[name] = first[name.replace("word_embed_bias", "word_embed.bias")].clone()
    return first, second


def make_vqvae(
    base: int = 32,
    mult: tuple[int, ...] = (1, 1, 2),
    codes: int = 32,
    channels: int = 8,
    scales: int = 3,
    seed: int = 0,
    device: str = "cpu",
) -> Tensors:
    """A VQ-VAE file; the published one has base 160, multipliers 1 1 2 2 4, 4096 codes, 32 channels, 10 scales."""
    make, last = Maker(seed, device, std=0.1), len(mult) - 1
    widths = [base * m for m in mult]

    def norm(name: str, width: int) -> None:
        make.both(name, width)
        if device != "meta":
            make.tensors[f"{name}.weight"] += 1

    def residual(name: str, before: int, after: int) -> None:
        norm(f"{name}.norm1", before)
        make.both(f"{name}.conv1", after, before, 3, 3)
        norm(f"{name}.norm2", after)
        make.both(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            make.both(f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        make.both(f"{name}.qkv", 3 * width, width, 1, 1)
        make.both(f"{name}.proj_out", width, width, 1, 1)

    def middle(name: str) -> None:
        residual(f"{name}.mid.block_1", widths[-1], widths[-1])
        attention(f"{name}.mid.attn_1", widths[-1])
        residual(f"{name}.mid.block_2", widths[-1], widths[-1])

    make.both("encoder.conv_in", base, 3, 3, 3)
    for i, width in enumerate(widths):
        before = base if i == 0 else widths[i - 1]
        for j in range(2):
            residual(f"encoder.down.{i}.block.{j}", before if j == 0 else width, width)
            if i == last:
                attention(f"encoder.down.{i}.attn.{j}", width)
        if i < last:
            make.both(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
    middle("encoder")
    norm("encoder.norm_out", widths[-1])
    make.both("encoder.conv_out", channels, widths[-1], 3, 3)
    make.both("decoder.conv_in", widths[-1], channels, 3, 3)
    middle("decoder")
    for i, width in enumerate(widths):
        before = widths[-1] if i == last else widths[i + 1]
        for j in range(3):
            residual(f"decoder.up.{i}.block.{j}", before if j == 0 else width, width)
            if i == last:
                attention(f"decoder.up.{i}.attn.{j}", width)
        if i > 0:
            make.both(f"decoder.up.{i}.upsample.conv", width, width, 3, 3)
    norm("decoder.norm_out", widths[0])
    make.both("decoder.conv_out", 3, widths[0], 3, 3)
    make.std = 0.5
    make.put("quantize.embedding.weight", codes, channels)
    make.put("quantize.ema_vocab_hit_SV", scales, codes)
    for i in range(4):
        make.both(f"quantize.quant_resi.qresi_ls.{i}", channels, channels, 3, 3)
    make.both("quant_conv", channels, channels, 3, 3)
    make.both("post_quant_conv", channels, channels, 3, 3)
    return make.tensors
