"""Scale-block attention over packed QKV as one differentiable operator: Triton kernels, launched without autotuning.

`scale_block_attention` takes the raw projection (N, B, 3, H, D) and the heads' scales, and does in one pass forward and
two backward what others need separate normalisations, transposes and a mask for. Under `TRITON_INTERPRET=1` (set before
this file is imported) the same kernels run on a CPU, slowly: that is how they are tested without a GPU.

Axes: N sequence, B batch, H heads of this rank, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hmar_mega.kernels import HEAD_DIMS
from hmar_mega.kernels.scale_block_backward import backward_kernel, delta_kernel
from hmar_mega.kernels.scale_block_forward import STEEP_PROGRAMS, forward_kernel, key_norm_kernel
from hmar_mega.kernels.scale_block_fp8 import FP8_BELOW_LIMIT, fp8_forward_kernel, quantise_kernel
from hmar_mega.kernels.tiles import FP8_KEYS, key_tables, query_tables, shifts
from hmar_mega.scales import Pattern, ScaleSchedule

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        block: own positions of a program.
        inner: positions of a step.
        warps, stages: of 32 threads; steps whose loads are in flight.
        head_group: heads whose programs run side by side; the largest divisor of H up to this is taken.
        registers: most a thread may use; None leaves it to the compiler.
    """

    block: int
    inner: int
    warps: int
    stages: int
    head_group: int = 16
    registers: int | None = None


@dataclass(frozen=True)
class Plan:
    """Launches of one call.

    Attributes:
        forward: of the forward kernel.
        inline_norm: compute 1/|k| where a key is used (head dims that are powers of two); else by a kernel before.
        keys, queries: of the backward kernel's two halves; the same object: one launch does both.
        fp8: of the forward kernel with FP8 products; `inner` divides `tiles.ALIGNMENT`.
    """

    forward: Launch
    inline_norm: bool
    keys: Launch
    queries: Launch
    fp8: Launch = Launch(64, 64, 4, 4, 8)


def plan_for(schedule: ScaleSchedule, pattern: Pattern, dtype: torch.dtype, head_dim: int) -> Plan:
    """The launches for a problem, from measurements on an H100 (benchmarks/NOTES.md)."""
    if dtype == torch.float32:
        both = Launch(64, 32, 8, 1) if head_dim > 64 else Launch(64, 32, 4, 1)
        return Plan(both, False, both, both)
    if head_dim > 64:
        both = Launch(64, 64, 4, 2, 8)
        inline = schedule.num_tokens < 1500 and head_dim == 128
        return Plan(both, inline, both, both, Launch(128, 64, 8, 3, 8))
    if schedule.num_tokens < 1500:
        both = Launch(64, 32, 4, 3, 8, 168)
        return Plan(Launch(64, 64, 4, 3, 8, 128), True, both, both)
    return Plan(Launch(128, 64, 4, 3, 8), False, Launch(64, 64, 4, 3, 8), Launch(64, 64, 4, 3, 8, 168))


def scale_block_attention(
    qkv_NB3HD: Tensor, q_scale_H: Tensor, schedule: ScaleSchedule, pattern: Pattern, fp8_below: float = 0.0
) -> Tensor:
    """Attention within each scale, or over it and all earlier ones, of L2-normalised q (times a scale) and k.

    Args:
        qkv_NB3HD: (N, B, 3, H, D) contiguous float16, bfloat16 or float32, raw.
        q_scale_H: (H,) linear scale of the normalised queries, at most 100; computed in float32.
        schedule: of N tokens.
        pattern: which scales a token sees.
        fp8_below: heads of a smaller `q_scale_H` make their products in FP8, forward, where tokens see at least
            `tiles.FP8_KEYS`; bfloat16 inputs alone. `scale_block_fp8.FP8_BELOW` is what its errors allow; 0: no head.

    Returns:
        (N, B, H·D) in the dtype of `qkv`; accumulated in float32. Gradients of both tensors are exact functions of the
        inputs from run to run.

    Raises:
        ValueError: shapes, dtypes or devices that the kernels do not take.
    """
    check_inputs(qkv_NB3HD, q_scale_H, schedule)
    if fp8_below:
        check_fp8(qkv_NB3HD, schedule, pattern, fp8_below)
    causal = pattern == "block_causal"
    out = _forward(qkv_NB3HD.contiguous(), q_scale_H.float(), list(schedule.patch_nums), causal, fp8_below)
    return out[0].flatten(2)


def check_fp8(qkv: Tensor, schedule: ScaleSchedule, pattern: Pattern, fp8_below: float) -> None:
    """Raise ValueError unless the FP8 kernels take these and have something to do."""
    if not 0 < fp8_below <= FP8_BELOW_LIMIT:
        raise ValueError(f"fp8_below is {fp8_below:g}; it must be from 0, for no FP8, to {FP8_BELOW_LIMIT:g}")
    if qkv.dtype != torch.bfloat16:
        raise ValueError(f"FP8 attention takes bfloat16, not {qkv.dtype}; set precision.compute=bf16")
    most = schedule.num_tokens if pattern == "block_causal" else max(schedule.scale_lengths)
    if most < FP8_KEYS:
        raise ValueError(
            f"FP8 attention is for tokens that see at least {FP8_KEYS} others, and with patch_nums "
            f"{schedule.patch_nums} they see {most}; set precision.fp8=linears"
        )


def check_inputs(qkv: Tensor, q_scale: Tensor, schedule: ScaleSchedule) -> None:
    """Raise ValueError unless the kernels take these."""
    if qkv.ndim != 5 or qkv.shape[0] != schedule.num_tokens or qkv.shape[2] != 3:
        raise ValueError(f"qkv is {tuple(qkv.shape)}; it must be (N={schedule.num_tokens}, B, 3, H, D)")
    if qkv.dtype not in DTYPES:
        raise ValueError(f"attention.backend=triton takes float16, bfloat16 and float32, not {qkv.dtype}")
    if qkv.shape[-1] not in HEAD_DIMS:
        raise ValueError(
            f"attention.backend=triton takes head_dim {', '.join(map(str, HEAD_DIMS))}, not {qkv.shape[-1]}; "
            "use attention.backend=sdpa"
        )
    if q_scale.shape != qkv.shape[3:4]:
        raise ValueError(f"q_scale is {tuple(q_scale.shape)}; it must hold one scale for each of {qkv.shape[3]} heads")
    if not qkv.is_cuda and not qkv.is_meta and not interpreted():
        raise ValueError(
            f"attention.backend=triton needs tensors on a CUDA GPU, not on {qkv.device.type}; "
            "use attention.backend=sdpa"
        )


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


def precision() -> str:
    """How kernels multiply: float32 operands in full, not as TF32."""
    return "interpreted" if interpreted() else "ieee"


@torch.library.custom_op("hmar_mega::scale_block_attention", mutates_args=())
def _forward(
    qkv: Tensor, q_scale: Tensor, patch_nums: list[int], causal: bool, fp8_below: float
) -> tuple[Tensor, Tensor]:
    """Output (N, B, H, D) and, for the backward pass, log2-sum, 1/|q| and 1/|k|: one (3, B, H, row length) float32."""
    schedule, pattern = _problem(patch_nums, causal)
    tokens, batch, _, heads, dim = qkv.shape
    plan = plan_for(schedule, pattern, qkv.dtype, dim)
    launch = plan.forward
    out = qkv.new_empty(tokens, batch, heads, dim)
    tables = key_tables(schedule, pattern, launch.block, launch.inner, qkv.device)
    rows = _new_rows(qkv, 3, tables.row_length)
    lse, q_norm, k_norm = rows
    shape = _shape_arguments(qkv)
    inline_norm = plan.inline_norm and not fp8_below
    with _device(qkv):
        if fp8_below:
            _launch_fp8(qkv, q_scale, out, rows, plan.fp8, schedule, pattern, fp8_below)
        elif not inline_norm:
            key_norm_kernel[(triton.cdiv(tokens, 64) * batch * heads,)](
                qkv, k_norm, tables.places, tokens, rows.shape[-1], batch, heads, BLOCK_M=64, **shape
            )
        for kind, programs in _forward_launches(qkv.dtype, len(tables.tiles), batch * heads, fp8_below):
            forward_kernel[(programs,)](
                qkv, _blocks(qkv, launch.inner), _line_blocks(k_norm, launch.inner), q_scale, out, lse, q_norm, k_norm,
                tables.tiles, tables.levels, fp8_below, len(tables.tiles), rows.shape[-1], batch, heads, CAUSAL=causal,
                BLOCK_M=launch.block, BLOCK_J=launch.inner, HEAD_GROUP=_divisor(heads, launch.head_group), HEADS=kind,
                INLINE_NORM=inline_norm, PRECISION=precision(), num_warps=launch.warps, num_stages=launch.stages,
                maxnreg=launch.registers, **shape,
            )  # fmt: skip
    return out, rows


def _launch_fp8(
    qkv: Tensor, q_scale: Tensor, out: Tensor, rows: Tensor, launch: Launch, schedule: ScaleSchedule, pattern: Pattern,
    fp8_below: float,
) -> None:  # fmt: skip
    """Norms of all keys into `rows`; output and rows of what is computed in FP8."""
    tokens, batch, _, heads, dim = qkv.shape
    lse, q_norm, k_norm = rows
    tables = key_tables(schedule, pattern, launch.block, launch.inner, qkv.device)
    length, blocks = tables.row_length, tables.row_length // launch.inner
    keys = qkv.new_empty(batch * heads * length, dim, dtype=torch.float8_e4m3fn)
    values = qkv.new_empty(batch * heads * dim, length, dtype=torch.float8_e4m3fn)
    exponents = lse.new_empty(batch * heads, blocks)
    shape = _shape_arguments(qkv)
    quantise_kernel[(blocks * batch * heads,)](
        qkv, q_scale, k_norm, keys, values, exponents, tables.positions, fp8_below, tokens, length, batch, heads,
        BLOCK=launch.inner, PRECISION=precision(), **shape,
    )  # fmt: skip
    key_rows = TensorDescriptor.from_tensor(keys, [launch.inner, shape["BLOCK_D"]])
    value_rows = TensorDescriptor.from_tensor(values, [shape["BLOCK_D"], launch.inner])
    fp8_forward_kernel[(len(tables.tiles) * batch * heads,)](
        qkv, key_rows, value_rows, exponents, q_scale, out, lse, q_norm, tables.tiles, tables.seen, fp8_below,
        len(tables.tiles), tokens, length, batch, heads, BLOCK_M=launch.block, BLOCK_J=launch.inner,
        BLOCKS=triton.next_power_of_2(blocks), HEAD_GROUP=_divisor(heads, launch.head_group), PRECISION=precision(),
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers, **shape,
    )  # fmt: skip


@_forward.register_fake
def _(qkv: Tensor, q_scale: Tensor, patch_nums: list[int], causal: bool, fp8_below: float) -> tuple[Tensor, Tensor]:
    tokens, batch, _, heads, dim = qkv.shape
    _, length = shifts(*_problem(patch_nums, causal))
    return qkv.new_empty(tokens, batch, heads, dim), _new_rows(qkv, 3, length)


@torch.library.custom_op("hmar_mega::scale_block_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, qkv: Tensor, q_scale: Tensor, out: Tensor, rows: Tensor, patch_nums: list[int], causal: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv (N, B, 3, H, D) and of q_scale (H,) float32 from that of the output (N, B, H, D)."""
    schedule, pattern = _problem(patch_nums, causal)
    tokens, batch, _, heads, dim = qkv.shape
    plan = plan_for(schedule, pattern, qkv.dtype, dim)
    d_out = d_out.contiguous()
    d_row, d_sample = d_out.stride()[:2]
    lse, q_norm, k_norm = rows
    d_qkv, deltas = torch.empty_like(qkv), qkv.new_zeros(2, *lse.shape, dtype=torch.float32)
    delta, scaled_delta = deltas
    own = key_tables(schedule, pattern, plan.queries.block, plan.queries.inner, qkv.device)
    d_scale = lse.new_empty(len(own.tiles), batch, heads)
    shape = _shape_arguments(qkv)
    with _device(qkv):
        delta_kernel[(triton.cdiv(tokens, 64) * batch * heads,)](
            out, d_out, q_norm, delta, scaled_delta, own.places, tokens, lse.shape[-1], batch, heads, d_row, d_sample,
            BLOCK_M=64, **shape,
        )  # fmt: skip
        for launch, roles in _backward_launches(plan):
            q_tables = query_tables(schedule, pattern, launch.block, launch.inner, qkv.device)
            k_tables = key_tables(schedule, pattern, launch.block, launch.inner, qkv.device)
            count = len(k_tables.tiles)
            backward_kernel[(count * batch * heads,)](
                qkv, d_out, _blocks(qkv, launch.inner), _blocks(d_out, launch.inner),
                *(_line_blocks(t, launch.inner) for t in (lse, scaled_delta, q_norm, k_norm)), q_scale, lse, delta,
                q_norm, k_norm, d_qkv, d_scale, q_tables.tiles, k_tables.tiles, k_tables.levels, count, lse.shape[-1],
                batch, heads, d_row, d_sample, CAUSAL=causal, BLOCK_M=launch.block, BLOCK_J=launch.inner,
                HEAD_GROUP=_divisor(heads, launch.head_group), PRECISION=precision(), num_warps=launch.warps,
                num_stages=launch.stages, maxnreg=launch.registers, **roles, **shape,
            )  # fmt: skip
    return d_qkv, d_scale.sum((0, 1))


@_backward.register_fake
def _(
    d_out: Tensor, qkv: Tensor, q_scale: Tensor, out: Tensor, rows: Tensor, patch_nums: list[int], causal: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(q_scale)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, q_scale, ctx.patch_nums, ctx.causal, _ = inputs
    ctx.save_for_backward(qkv, q_scale, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, q_scale, out, rows = ctx.saved_tensors
    d_qkv, d_scale = _backward(d_out, qkv, q_scale, out, rows, ctx.patch_nums, ctx.causal)
    return d_qkv, d_scale, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _problem(patch_nums: list[int], causal: bool) -> tuple[ScaleSchedule, Pattern]:
    return ScaleSchedule(tuple(patch_nums)), "block_causal" if causal else "block_diagonal"


def _new_rows(qkv: Tensor, count: int, length: int) -> Tensor:
    """Log-sums, and norms, (count, B, H, row length) float32: +inf and 0, so that gaps between scales count nothing."""
    rows = qkv.new_zeros(count, qkv.shape[1], qkv.shape[3], length, dtype=torch.float32)
    rows[0] = float("inf")
    return rows


def _blocks(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Of a contiguous (N, …, D) as (N, …·D), read in blocks of `rows` × D padded to a power of two."""
    flat = tensor.flatten(1)
    return TensorDescriptor.from_tensor(flat, [rows, triton.next_power_of_2(tensor.shape[-1])])


def _line_blocks(lines: Tensor, length: int) -> TensorDescriptor:
    """Of (B, H, row length) as (B·H, row length), read `length` at a time."""
    return TensorDescriptor.from_tensor(lines.flatten(0, 1), [1, length])


def _shape_arguments(qkv: Tensor) -> dict[str, int]:
    dim = qkv.shape[-1]
    return {"D": dim, "BLOCK_D": triton.next_power_of_2(dim)}


def _forward_launches(dtype: torch.dtype, tiles: int, sequences: int, fp8_below: float) -> list[tuple[str, int]]:
    """Kinds of heads, and programs, of each launch. float16's exponents are too few for weights without a maximum."""
    if dtype == torch.float16:
        return [("all", tiles * sequences)]
    return [("flat_beside_fp8" if fp8_below else "flat", tiles * sequences), ("steep", STEEP_PROGRAMS * sequences)]


def _backward_launches(plan: Plan) -> list[tuple[Launch, dict[str, bool]]]:
    if plan.keys == plan.queries:
        return [(plan.keys, {"KEYS": True, "QUERIES": True})]
    return [(plan.keys, {"KEYS": True, "QUERIES": False}), (plan.queries, {"KEYS": False, "QUERIES": True})]


def _divisor(heads: int, at_most: int) -> int:
    return max(d for d in range(1, at_most + 1) if heads % d == 0)


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device("cpu")
