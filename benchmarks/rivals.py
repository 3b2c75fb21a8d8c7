"""Other ways to compute scale-block attention that exist on a machine: what `attention.py` compares ours with.

Axes: N sequence, B batch, H heads, D head dim. A rival is given q, k and v normalised, q scaled, so its softmax scale
is 1. In the `alone` timing they already lie as it likes them best; in the `whole` timing they come out of the packed
projection (N, B, 3, H, D) and its output goes back to (N, B, H·D), which is what a block of the model needs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hmar_mega.model.attention import split_normalised
from hmar_mega.scales import Pattern, ScaleSchedule

Tensors = tuple[Tensor, ...]

#: Dims of (B, H, N, D) in the order in which a rival wants them in memory.
ORDERS = {"BHND": (0, 1, 2, 3), "NBHD": (2, 0, 1, 3), "BNHD": (0, 2, 1, 3)}


class Unavailable(Exception):
    """This rival cannot run here, and why."""


@dataclass(frozen=True)
class Problem:
    """One attention to compute."""

    schedule: ScaleSchedule
    pattern: Pattern
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def elements(self) -> int:
        """N·B·H·D: of one of q, k and v."""
        return self.schedule.num_tokens * self.batch * self.heads * self.head_dim


@dataclass(frozen=True)
class Rival:
    """One way to compute it.

    Attributes:
        order: of q, k and v in memory, a key of `ORDERS`.
        arrange: q, k, v in that order → what `attend` takes; views only.
        attend: the attention itself; tensors → outputs.
        merge: outputs → (N, B, H·D).
    """

    order: str
    attend: Callable[..., Tensors]
    merge: Callable[[Tensors], Tensor]
    arrange: Callable[[Tensor, Tensor, Tensor], Tensors] = lambda q, k, v: (q, k, v)


def normalised(qkv_NB3HD: Tensor, q_scale_H: Tensor, order: str) -> Tensors:
    """q, k and v as the model defines them, contiguous in `order`."""
    return tuple(x.permute(ORDERS[order]).contiguous() for x in split_normalised(qkv_NB3HD, q_scale_H))


@cache
def compiled_normalised() -> Callable[[Tensor, Tensor, str], Tensors]:
    """`normalised` as a user who cares for speed has it: fused by torch.compile."""
    return torch.compile(normalised)


def compile_once(qkv_NB3HD: Tensor, q_scale_H: Tensor) -> None:
    """Mark N, B and H as sizes that change, so that all rows share what is compiled for an order."""
    for dim in (0, 1, 3):
        torch._dynamo.maybe_mark_dynamic(qkv_NB3HD, dim)
    torch._dynamo.maybe_mark_dynamic(q_scale_H, 0)


def whole(rival: Rival, normalise: Callable[[Tensor, Tensor, str], Tensors]) -> Callable[[Tensor, Tensor], Tensor]:
    """From the packed projection and the query scales to (N, B, H·D)."""

    def run(qkv_NB3HD: Tensor, q_scale_H: Tensor) -> Tensor:
        return rival.merge(rival.attend(*rival.arrange(*normalise(qkv_NB3HD, q_scale_H, rival.order))))

    return run


def sdpa_dense(problem: Problem) -> Rival:
    """One call with a dense mask, added to the logits."""
    seen = problem.schedule.attention_mask(problem.pattern, problem.device)
    mask = torch.zeros(seen.shape, dtype=problem.dtype, device=problem.device).masked_fill_(~seen, float("-inf"))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0),)

    return Rival("BHND", attend, _merge_bhnd)


def sdpa_scales(problem: Problem) -> Rival:
    """One call a scale without a mask; every scale is a contiguous block of a sequence-first tensor."""
    lengths, count = list(problem.schedule.scale_lengths), problem.schedule.num_scales

    def arrange(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        # split, not slices: its backward pass is one concatenation, that of slices as many whole tensors of zeros
        return tuple(part.permute(1, 2, 0, 3) for x in (q, k, v) for part in x.split(lengths))

    def attend(*parts: Tensor) -> Tensors:
        q, k, v = parts[:count], parts[count : 2 * count], parts[2 * count :]
        if problem.pattern == "block_causal":
            k, v = (tuple(torch.cat(x[: scale + 1], dim=2) for scale in range(count)) for x in (k, v))
        return tuple(F.scaled_dot_product_attention(a, b, c, scale=1.0) for a, b, c in zip(q, k, v, strict=True))

    def merge(outputs: Tensors) -> Tensor:
        return torch.cat([_merge_bhnd((out,)) for out in outputs])

    return Rival("NBHD", attend, merge, arrange)


def flex(problem: Problem) -> Rival:
    """FlexAttention with a block mask, compiled for the shape."""
    if problem.device.type != "cuda":
        raise Unavailable("its compiled kernels need a CUDA device")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 64  # every row is a shape and a mask of its own
    level = problem.schedule.level_ids(problem.device)
    causal = problem.pattern == "block_causal"

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return level[query] >= level[key] if causal else level[query] == level[key]

    tokens = problem.schedule.num_tokens
    mask = create_block_mask(seen, None, None, tokens, tokens, device=problem.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        return (compiled(q, k, v, block_mask=mask, scale=1.0),)

    return Rival("BHND", attend, _merge_bhnd)


def varlen(problem: Problem) -> Rival:
    """torch's variable-length attention: every scale of every sample is a sequence."""
    lengths, longest = _sequences(problem)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as err:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.attention.varlen") from err

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return (varlen_attn(q, k, v, lengths, lengths, longest, longest, scale=1.0),)

    return Rival("BNHD", attend, _merge_thd(problem))


def te(problem: Problem) -> Rival:
    """Transformer Engine's `DotProductAttention` in `thd` with a padding mask: cuDNN's fused attention."""
    lengths, longest = _sequences(problem)
    try:
        from transformer_engine.pytorch import DotProductAttention
    except ImportError as err:
        raise Unavailable(f"Transformer Engine cannot be imported: {err}") from err
    layer = DotProductAttention(
        problem.heads,
        problem.head_dim,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding",
        softmax_scale=1.0,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        # with the longest lengths given and no padded ones, it does not ask the GPU for them in every call
        out = layer(q, k, v, cu_seqlens_q=lengths, cu_seqlens_kv=lengths, max_seqlen_q=longest, max_seqlen_kv=longest)
        return (out,)

    return Rival("BNHD", attend, _merge_thd(problem))


def external(path: Path) -> Callable[[Problem], Rival]:
    """A rival in a file of its own: `attention(q, k, v, schedule, pattern)`.

    It is given q, k and v (B, H, N, D), contiguous, normalised and scaled (softmax scale 1), the `ScaleSchedule` and
    `block_diagonal` or `block_causal`; it returns (B, H, N, D) and is differentiable.
    """

    def build(problem: Problem) -> Rival:
        attention = _load(path).attention

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
            return (attention(q, k, v, problem.schedule, problem.pattern),)

        return Rival("BHND", attend, _merge_bhnd)

    return build


#: By the name that `--rivals` takes.
RIVALS: dict[str, Callable[[Problem], Rival]] = {
    "sdpa_dense": sdpa_dense,
    "sdpa_scales": sdpa_scales,
    "flex": flex,
    "varlen": varlen,
    "te": te,
}


@cache
def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise Unavailable(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "attention"):
        raise Unavailable(f"{path} defines no attention(q, k, v, schedule, pattern)")
    return module


def _sequences(problem: Problem) -> tuple[Tensor, int]:
    """Cumulative lengths and the longest; such attention sees one sequence alone, and has half precision on GPUs."""
    if problem.pattern != "block_diagonal":
        raise Unavailable("variable-length attention has no block-causal pattern")
    if problem.device.type != "cuda" or problem.dtype == torch.float32:
        raise Unavailable("it needs a CUDA device and fp16 or bf16")
    return problem.schedule.cu_seqlens(problem.batch, problem.device), max(problem.schedule.scale_lengths)


def _merge_bhnd(outputs: Tensors) -> Tensor:
    return outputs[0].permute(2, 0, 1, 3).flatten(2)


def _merge_thd(problem: Problem) -> Callable[[Tensors], Tensor]:
    def merge(outputs: Tensors) -> Tensor:
        return outputs[0].reshape(problem.batch, problem.schedule.num_tokens, -1).transpose(0, 1).contiguous()

    return merge
