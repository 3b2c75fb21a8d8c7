"""The published transformer layouts (SPEC §7): names, shapes, and what a file's keys say it is; pure functions.

| kind | branches | attention |
|---|---|---|
| `nvlabs-hmar` | both, over shared base blocks | block-diagonal |
| `nvlabs-next-scale` | next-scale | block-diagonal |
| `nvlabs-masked` | mask, with the base blocks it shares | block-diagonal |
| `var` | next-scale | block-causal |

Values are the same in both worlds, also `attn.scale_mul_1H11`: VAR keeps a_h there, the logarithm of the linear scale
s_h = exp(min(a_h, ln 100)), as we do in `attn.log_scale`. Only its shape differs, and buffers are made anew, so that
import and export are exact inverses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from hmar_mega.checkpoint.key_lists import listed
from hmar_mega.errors import UserError
from hmar_mega.scales import Pattern, ScaleSchedule

Kind = Literal["nvlabs-hmar", "nvlabs-next-scale", "nvlabs-masked", "var"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

LEVELS, MASK_BUFFER, ZERO_BIAS = "lvl_1L", "attn_bias_for_masking", "attn.zero_k_bias"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelShape:
    """What the sizes of a published model follow from: width 64·depth, `depth` heads, feed-forward 4·width."""

    depth: int
    num_classes: int
    codebook_size: int
    latent_channels: int
    patch_nums: tuple[int, ...]
    shared_aln: bool
    mask_layers: int  #: of the mask branch, wherever there is one

    @property
    def width(self) -> int:
        """C."""
        return 64 * self.depth

    @property
    def schedule(self) -> ScaleSchedule:
        """The scales."""
        return ScaleSchedule(self.patch_nums)


@dataclass(frozen=True)
class Entry:
    """One tensor of a published file: our name for it (None for buffers, which are made anew) and its shape there."""

    ours: str | None
    shape: Shape

    @property
    def our_shape(self) -> Shape:
        """(1, H, 1, 1) is (H,) with us."""
        heads = self.ours is not None and self.ours.endswith(".log_scale")
        return (self.shape[1],) if heads else self.shape


def default_mask_layers(depth: int) -> int:
    """Blocks of the mask branch where a file does not tell: 8, or half of fewer than 16."""
    return 8 if depth >= 16 else max(1, depth // 2)


def layout(kind: Kind, shape: ModelShape) -> dict[str, Entry]:
    """Every key of a published file of this kind."""
    base = shape.depth - shape.mask_layers
    found = _embeddings(kind, shape)
    if kind == "nvlabs-hmar":
        for i in range(base):
            found |= _block(f"base_blocks.{i}", f"blocks.{i}", shape)
        for i in range(shape.mask_layers):
            found |= _block(f"ns_blocks.{i}", f"blocks.{base + i}", shape)
            found |= _block(f"mask_blocks.{i}", f"mask_blocks.{base + i}", shape)
        return found | _head("ns_head", "head", shape) | _head("mask_head", "mask_head", shape)
    masked = kind == "nvlabs-masked"
    for i in range(shape.depth):
        found |= _block(f"blocks.{i}", f"mask_blocks.{i}" if masked and i >= base else f"blocks.{i}", shape)
    return found | _head("head", "mask_head" if masked else "head", shape)


def _embeddings(kind: Kind, shape: ModelShape) -> dict[str, Entry]:
    width, schedule = shape.width, shape.schedule
    tokens, masked = schedule.num_tokens, kind in ("nvlabs-hmar", "nvlabs-masked")
    found = {
        "pos_start": Entry("pos_start", (1, 1, width)),
        "pos_1LC": Entry("pos_embed", (1, tokens, width)),
        LEVELS: Entry(None, (1, tokens)),
        MASK_BUFFER: Entry(None, (1, 1, tokens, tokens)),
        "word_embed.weight": Entry("word_embed.weight", (width, shape.latent_channels)),
        "word_embed_bias" if masked else "word_embed.bias": Entry("word_embed.bias", (width,)),
        "class_emb.weight": Entry("class_embed.weight", (shape.num_classes + 1, width)),
        "lvl_embed.weight": Entry("level_embed", (schedule.num_scales, width)),
    }
    if masked:
        found["mask_embed.weight"] = Entry("mask_embed", (1, width))
    if shape.shared_aln:
        found["shared_ada_lin.1.weight"] = Entry("shared_ada_lin.weight", (6 * width, width))
        found["shared_ada_lin.1.bias"] = Entry("shared_ada_lin.bias", (6 * width,))
    return found


def _block(name: str, ours: str, shape: ModelShape) -> dict[str, Entry]:
    width = shape.width
    parts: dict[str, tuple[str | None, Shape]] = {
        "attn.scale_mul_1H11": ("attn.log_scale", (1, shape.depth, 1, 1)),
        "attn.q_bias": ("attn.q_bias", (width,)),
        "attn.v_bias": ("attn.v_bias", (width,)),
        ZERO_BIAS: (None, (width,)),
        "attn.mat_qkv.weight": ("attn.qkv.weight", (3 * width, width)),
        "attn.proj.weight": ("attn.proj.weight", (width, width)),
        "attn.proj.bias": ("attn.proj.bias", (width,)),
        "ffn.fc1.weight": ("ffn.fc1.weight", (4 * width, width)),
        "ffn.fc1.bias": ("ffn.fc1.bias", (4 * width,)),
        "ffn.fc2.weight": ("ffn.fc2.weight", (width, 4 * width)),
        "ffn.fc2.bias": ("ffn.fc2.bias", (width,)),
    }
    if shape.shared_aln:
        parts["ada_gss"] = ("ada_gss", (1, 1, 6, width))
    else:
        parts["ada_lin.1.weight"] = ("ada_lin.weight", (6 * width, width))
        parts["ada_lin.1.bias"] = ("ada_lin.bias", (6 * width,))
    return {
        f"{name}.{theirs}": Entry(None if our is None else f"{ours}.{our}", size)
        for theirs, (our, size) in parts.items()
    }


def _head(name: str, ours: str, shape: ModelShape) -> dict[str, Entry]:
    width, codes = shape.width, shape.codebook_size
    return {
        f"{name}_nm.ada_lin.1.weight": Entry(f"{ours}.ada_lin.weight", (2 * width, width)),
        f"{name}_nm.ada_lin.1.bias": Entry(f"{ours}.ada_lin.bias", (2 * width,)),
        f"{name}.weight": Entry(f"{ours}.linear.weight", (codes, width)),
        f"{name}.bias": Entry(f"{ours}.linear.bias", (codes,)),
    }


# ------------------------------------------------------------------------------------------------------- recognition


def recognise(names: Iterable[str], where: object) -> str:
    """`vqvae`, or the kind of a transformer as far as its keys tell: `next-scale` is also what VAR has.

    Raises:
        UserError: when the keys are of none of them.
    """
    names = set(names)
    if "quantize.embedding.weight" in names:
        return "vqvae"
    if any(n.startswith(("base_blocks.", "ns_blocks.")) for n in names):
        return "nvlabs-hmar"
    if any(re.match(r"blocks\.\d+\.attn\.", n) for n in names):
        return "nvlabs-masked" if names & {"mask_embed.weight", "word_embed_bias"} else "next-scale"
    found = listed(sorted(names), where, "found")
    raise UserError(
        f"{where} is no published HMAR, VAR or VQ-VAE file: its {len(names)} keys ({found}) are of another model"
    )


def infer_shape(kind: Kind, shapes: Mapping[str, Shape], levels: Tensor | None, where: object) -> ModelShape:
    """Depth, classes, scales and the rest, from a file's keys and shapes.

    Args:
        kind: as recognised.
        levels: the values of `lvl_1L`, where the file has it.

    Raises:
        UserError: when what they follow from is missing, or a depth goes with no such width.
    """
    head = "ns_head.weight" if kind == "nvlabs-hmar" else "head.weight"
    needed = ("pos_start", "class_emb.weight", "word_embed.weight", "lvl_embed.weight", "pos_1LC", LEVELS, head)
    missing = [name for name in needed if name not in shapes]
    if missing or levels is None:
        raise UserError(f"{where} is not a whole {kind} file: it lacks {', '.join(missing)}")
    flat = [name for name in needed if len(shapes[name]) < (1 if name == LEVELS else 2)]
    if flat:
        raise UserError(f"{where} is damaged: {flat[0]} has shape {shapes[flat[0]]}")
    if kind == "nvlabs-hmar":
        base, own = _count("base_blocks", shapes), _count("ns_blocks", shapes)
        depth, mask_layers = base + own, own
    else:
        depth = _count("blocks", shapes)
        mask_layers = default_mask_layers(depth)
    width = shapes["class_emb.weight"][1]
    if not depth or width != 64 * depth:
        fits = f", that of depth {width // 64}" if width % 64 == 0 else ""
        raise UserError(
            f"{where} has {depth} blocks, but width {width}{fits}: a published model of depth {depth} has width "
            f"{64 * depth}; {_blocks_off(kind, depth, width // 64)}, or it is a model of another kind"
        )
    return ModelShape(
        depth=depth,
        num_classes=shapes["class_emb.weight"][0] - 1,
        codebook_size=shapes[head][0],
        latent_channels=shapes["word_embed.weight"][1],
        patch_nums=scales_of(levels, where),
        shared_aln="shared_ada_lin.1.weight" in shapes,
        mask_layers=mask_layers,
    )


def _blocks_off(kind: Kind, depth: int, wanted: int) -> str:
    """Which blocks a file of `depth` lacks, or has too many of; a composite's may be of any of its branches."""
    word = "missing" if depth < wanted else "surplus"
    if kind == "nvlabs-hmar":
        return f"blocks are {word}"
    first, last = sorted((depth, wanted))
    return f"blocks.{first}.*{f' to blocks.{last - 1}.*' if last - first > 1 else ''} {word}"


def _count(prefix: str, names: Iterable[str]) -> int:
    """One more than the highest block number."""
    pattern = re.compile(rf"{prefix}\.(\d+)\.")
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)


def scales_of(levels: Tensor, where: object) -> tuple[int, ...]:
    """patch_nums from the level id of every position: scale k has p_k² of them.

    Raises:
        UserError: when they are no schedule.
    """
    ids = levels.flatten().tolist()
    if any(not isinstance(k, int) or not 0 <= k < len(ids) for k in ids):
        raise UserError(f"{where} is damaged: {LEVELS} holds what are no scale numbers")
    counts = [ids.count(k) for k in range(max(ids, default=-1) + 1)]
    sides = tuple(math.isqrt(n) for n in counts)
    legal = len(sides) > 1 and sides[0] == 1 and all(b > a for a, b in pairwise(sides)) and ids == sorted(ids)
    if not legal or any(p * p != n for p, n in zip(sides, counts, strict=True)):
        raise UserError(f"{where} is damaged: {LEVELS} gives its scales {counts} tokens, which are no growing squares")
    return sides


# ----------------------------------------------------------------------------------------------------------- buffers


def mask_buffer(schedule: ScaleSchedule, pattern: Pattern) -> Tensor:
    """`attn_bias_for_masking`, (1, 1, N, N) float32: 0 where a query may attend, −∞ elsewhere."""
    allowed = schedule.attention_mask(pattern)
    return torch.zeros(allowed.shape).masked_fill_(~allowed, -math.inf)[None, None]


def pattern_of(buffer: Tensor, schedule: ScaleSchedule, where: object) -> Pattern:
    """Which attention a file's `attn_bias_for_masking` describes; UserError when it is neither."""
    for pattern in PATTERNS:
        if torch.equal(buffer.float(), mask_buffer(schedule, pattern)):
            return pattern
    raise UserError(
        f"{where} is damaged, or of another model: its {MASK_BUFFER} is neither the block-diagonal mask of HMAR nor "
        f"the block-causal one of VAR for patch_nums={schedule.patch_nums}"
    )


def to_ours(kind: Kind, shape: ModelShape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published file's weights under our names, as views."""
    return {
        entry.ours: tensors[name].view(entry.our_shape)
        for name, entry in layout(kind, shape).items()
        if entry.ours is not None
    }


def to_published(kind: Kind, shape: ModelShape, tensors: Mapping[str, Tensor], buffer: Pattern) -> dict[str, Tensor]:
    """A published file's tensors from our weights: views of them, and new buffers."""
    schedule = shape.schedule
    found = {}
    for name, entry in layout(kind, shape).items():
        if entry.ours is not None:
            found[name] = tensors[entry.ours].view(entry.shape)
        elif name == LEVELS:
            found[name] = schedule.level_ids()[None]
        elif name == MASK_BUFFER:
            found[name] = mask_buffer(schedule, buffer)
        else:
            found[name] = torch.zeros(entry.shape)
    return found
