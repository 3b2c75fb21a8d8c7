"""Block-diagonal attention through Transformer Engine's cuDNN kernels, in bf16 or fp16 and partly in FP8.

Half precision: one variable-length (`thd`) call over all (sample, scale) sequences. It wants each of them contiguous,
hence one transpose each way.

FP8: Hopper has it for dense sequences of head dim 128 alone. So each scale of at least `FP8_MIN_TOKENS` tokens, dense
and contiguous as it lies in the (N, B, …) order, is one `sbhd` call, and all smaller scales together stay one `thd`
call in half precision: they hold a few percent of the matrix work and would only cost the host's time.

TE's `DotProductAttention` is not used. Its delayed scaling feeds back the largest *normalised* softmax weight, about
1/s, and applies 448/amax to exp(x − max) ≤ 1, so that from the second step on P saturates and the output is wrong; and
it costs 1.5 ms of the host's time a call. Its kernels are called with quantizers of our own instead, whose scales need
no history, so there is no state to save, to reduce over ranks or to restore for recomputation:

- S: the constant `S_SCALE` (P ≤ 1, and 1/256 of it is still a normal number of e4m3);
- q, k, v together: |q| ≤ s_h, |k| ≤ 1 by the L2 normalisation, v by its own largest value, which also bounds o;
- dO by its own largest value; dP ≤ 2·|dO_i|·|v_j| by Cauchy–Schwarz; dQ, dK, dV by the same bound times s_h with a few
  binades of room: e5m2 has 30 binades of normal numbers.

All are powers of two, by which scaling is exact. Axes: N sequence, B batch, H heads, D head dim, T = packed tokens.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch  # noqa: F401  # it loads transformer_engine_torch
import transformer_engine_torch as tex
from torch import Tensor
from transformer_engine.pytorch.cpp_extensions.fused_attn import (
    AttnBiasType,
    AttnMaskType,
    FusedAttnBackend,
    QKVLayout,
    SoftmaxType,
    fused_attn_bwd,
    fused_attn_fwd,
)
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

from hmar_mega.config_precision import FP8_HEAD_DIM
from hmar_mega.errors import UserError
from hmar_mega.scales import Pattern, ScaleSchedule

log = logging.getLogger(__name__)

#: Smallest scale that is computed in FP8, in tokens.
FP8_MIN_TOKENS = 256

#: What softmax weights are multiplied by before they become e4m3, whose largest number is 448.
S_SCALE = 256.0

E4M3, E5M2 = tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2
_LARGEST = {E4M3: 448.0, E5M2: 57344.0}
_TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}

#: Room of dQ, dK, dV above s_h·D·max|dO|·max|v|, which alone is about 16 times what they typically can be.
_GRADIENT_ROOM = 4.0


def te_attention(qkv_NB3HD: Tensor, q_scale_H: Tensor, schedule: ScaleSchedule, pattern: Pattern) -> Tensor:
    """`scale_block_attention` in half precision: (N, B, 3, H, D) bf16 or fp16 → (N, B, H·D).

    Raises:
        UserError: for another pattern than block_diagonal, another dtype, or where cuDNN has no kernel.
    """
    _check(qkv_NB3HD, pattern)
    q, k, v = _normalised(qkv_NB3HD, q_scale_H)
    return _packed(q, k, v, schedule.scale_lengths).flatten(2)


def te_fp8_attention(qkv_NB3HD: Tensor, q_scale_H: Tensor, schedule: ScaleSchedule, pattern: Pattern) -> Tensor:
    """`scale_block_attention` with the larger scales in FP8: (N, B, 3, H, D) bf16 → (N, B, H·D).

    Below a head dim of 128 the FP8 scales are zero-padded to it.

    Raises:
        UserError: as `te_attention`.
    """
    _check(qkv_NB3HD, pattern)
    if qkv_NB3HD.dtype != torch.bfloat16:
        raise UserError(f"FP8 attention is for bf16 models, not {qkv_NB3HD.dtype}; set precision.compute=bf16")
    large = fp8_scales(schedule)
    if not large:
        raise UserError(
            f"FP8 attention is for scales of at least {FP8_MIN_TOKENS} tokens, and patch_nums {schedule.patch_nums} "
            "has none; set precision.fp8=linears"
        )
    q, k, v = _normalised(qkv_NB3HD, q_scale_H)
    bound = q_scale_H.detach().float().max()
    split = schedule.span(large[0]).start
    out = [_packed(q[:split], k[:split], v[:split], schedule.scale_lengths[: large[0]])] if split else []
    lengths = schedule.scale_lengths[large[0] :]
    out.append(_Fp8.apply(q[split:], k[split:], v[split:], bound, lengths))
    return torch.cat(out).flatten(2)


def fp8_scales(schedule: ScaleSchedule) -> list[int]:
    """The scales that FP8 attention computes in FP8: the last ones, which are the largest."""
    return [k for k, length in enumerate(schedule.scale_lengths) if length >= FP8_MIN_TOKENS]


def _check(qkv: Tensor, pattern: Pattern) -> None:
    if pattern != "block_diagonal":
        raise UserError(
            f"attention.backend=te attends block-diagonally alone, not {pattern}: Transformer Engine has no kernel for "
            "that mask; use attention.backend=sdpa"
        )
    if qkv.dtype not in (torch.bfloat16, torch.float16) or not qkv.is_cuda:
        raise UserError(
            f"attention.backend=te computes bf16 and fp16 on CUDA, not {qkv.dtype} on {qkv.device.type}; set "
            "precision.compute=bf16, or attention.backend=sdpa"
        )


def _normalised(qkv: Tensor, q_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (unit length × scale), k (unit length) and v, each (N, B, H, D) contiguous; norms in float32."""
    q, k, v = qkv.unbind(2)
    q = F.normalize(q.float(), dim=-1) * q_scale.float()[:, None]
    k = F.normalize(k.float(), dim=-1)
    return q.to(v.dtype).contiguous(), k.to(v.dtype).contiguous(), v.contiguous()


def _packed(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Attention within each of the sequences that (n, B, H, D) holds one behind the other; (n, B, H, D)."""
    n, batch = q.shape[:2]
    q, k, v = (x.transpose(0, 1).reshape(batch * n, *x.shape[2:]) for x in (q, k, v))
    out: Tensor = _Packed.apply(q, k, v, _cu_seqlens(lengths, batch, q.device), max(lengths))
    return out.view(batch, n, *out.shape[1:]).transpose(0, 1)


@cache
def _cu_seqlens(lengths: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """Where each (sample, scale) begins, (batch·len(lengths) + 1,) int32; made once, so that no step waits for it."""
    counts = torch.tensor(lengths, dtype=torch.int32).repeat(batch)
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)).to(device)


class _Packed(torch.autograd.Function):
    """cuDNN's `thd` attention over q, k, v (T, H, D); softmax scale 1."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        training = any(ctx.needs_input_grad[:3])
        kernel = _kernel(q.dtype, "thd_thd_thd", training, q.shape[1], q.shape[2], longest)
        # unpadded: a second list of offsets would be compared with the first one, which waits for the device
        out, aux = fused_attn_fwd(
            training, longest, longest, cu_seqlens, cu_seqlens, q, k, v, q.dtype, kernel,
            cu_seqlens_q_padded=cu_seqlens, cu_seqlens_kv_padded=cu_seqlens, attn_scale=1.0,
            qkv_layout="thd_thd_thd", attn_mask_type="padding", cuda_graph=torch.cuda.is_current_stream_capturing(),
        )  # fmt: skip
        if training:
            ctx.save_for_backward(q, k, v, out, cu_seqlens, *aux)
            ctx.kernel, ctx.longest = kernel, longest
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, cu_seqlens, *aux = ctx.saved_tensors
        dtype = _TE_DTYPE[q.dtype]
        dq, dk, dv, *_ = fused_attn_bwd(
            ctx.longest, ctx.longest, cu_seqlens, cu_seqlens, q, k, v, out, gradient.contiguous(), q.dtype, dtype, aux,
            ctx.kernel, cu_seqlens_q_padded=cu_seqlens, cu_seqlens_kv_padded=cu_seqlens, attn_scale=1.0,
            qkv_layout="thd_thd_thd", attn_mask_type="padding", cuda_graph=torch.cuda.is_current_stream_capturing(),
        )  # fmt: skip
        return dq, dk, dv, None, None


class _Fp8(torch.autograd.Function):
    """FP8 attention within each of the dense sequences that q, k, v (n, B, H, D) hold one behind the other."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bound: Tensor, lengths: tuple[int, ...]) -> Tensor:
        _tell_padding(q.shape[-1])
        largest_v = _largest(v)
        scale = _power_of_two(E4M3, torch.maximum(bound, largest_v))
        ctx.scale_o = _power_of_two(E4M3, largest_v)
        q8, k8, v8 = (_pad(_quantize(x, scale, E4M3)) for x in (q, k, v))
        ctx.inverse = scale.reciprocal()
        ctx.batch, ctx.lengths, ctx.dtype, ctx.head_dim = q.shape[1], lengths, q.dtype, q.shape[-1]
        out = torch.empty_like(q)
        saved, at = [q8, k8, v8], 0
        for length in lengths:
            rows = slice(at, at + length)
            at += length
            result, aux = _fp8_forward(ctx, *(x[rows] for x in (q8, k8, v8)), length)
            out[rows] = _values(result, E4M3, q.dtype)[..., : q.shape[-1]]
            saved += [result._data, *aux]
        ctx.save_for_backward(*saved)
        ctx.gradient_bound = _GRADIENT_ROOM * torch.maximum(bound, torch.ones_like(bound)), largest_v
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q8, k8, v8, *rest = ctx.saved_tensors
        gradient = gradient.contiguous()
        largest = _largest(gradient)
        scale = _power_of_two(E5M2, largest)
        gradient8 = _pad(_quantize(gradient, scale, E5M2))
        room, largest_v = ctx.gradient_bound
        scores = ctx.head_dim * largest * largest_v
        quantizers = (
            _constant(S_SCALE, E4M3, q8.device),
            _quantizer(_power_of_two(E5M2, 2 * scores), E5M2),
            _quantizer(_power_of_two(E5M2, room * scores), E5M2),
        )
        inverse, at = scale.reciprocal(), 0
        gradients = [torch.empty(*q8.shape[:-1], ctx.head_dim, dtype=ctx.dtype, device=q8.device) for _ in range(3)]
        for number, length in enumerate(ctx.lengths):
            rows = slice(at, at + length)
            at += length
            out8, *aux = rest[4 * number : 4 * number + 4]
            parts = _fp8_backward(
                ctx, [x[rows] for x in (q8, k8, v8)], out8, _tensor(gradient8[rows], inverse, E5M2), aux, quantizers
            )
            for whole, part in zip(gradients, parts, strict=True):
                whole[rows] = _values(part, E5M2, ctx.dtype)[..., : ctx.head_dim]
        return *gradients, None, None


def _fp8_forward(ctx: Any, q8: Tensor, k8: Tensor, v8: Tensor, length: int) -> tuple[Any, list[Tensor]]:
    """One scale; FP8 output, and what the backward pass needs: row maxima, inverse sums, generator state."""
    cu_seqlens = _cu_seqlens((length,), ctx.batch, q8.device)
    kernel = _kernel(E4M3, "sbhd_sbhd_sbhd", True, q8.shape[2], q8.shape[3], length)
    inputs = [_tensor(x, ctx.inverse, E4M3) for x in (q8, k8, v8)]
    out, aux = fused_attn_fwd(
        True, length, length, cu_seqlens, cu_seqlens, *inputs, ctx.dtype, kernel,
        s_quantizer=_constant(S_SCALE, E4M3, q8.device), o_quantizer=_quantizer(ctx.scale_o, E4M3), attn_scale=1.0,
        qkv_layout="sbhd_sbhd_sbhd", attn_mask_type="no_mask", cuda_graph=torch.cuda.is_current_stream_capturing(),
    )  # fmt: skip
    return out, aux


def _fp8_backward(
    ctx: Any, inputs: list[Tensor], out8: Tensor, gradient: Any, aux: list[Tensor], quantizers: tuple[Any, Any, Any]
) -> list[Any]:
    """One scale; dq, dk, dv in FP8."""
    length = inputs[0].shape[0]
    cu_seqlens = _cu_seqlens((length,), ctx.batch, out8.device)
    kernel = _kernel(E4M3, "sbhd_sbhd_sbhd", True, out8.shape[2], out8.shape[3], length)
    q, k, v = (_tensor(x, ctx.inverse, E4M3) for x in inputs)
    softmax, scores, outputs = quantizers
    result = fused_attn_bwd(
        length, length, cu_seqlens, cu_seqlens, q, k, v, _tensor(out8, ctx.scale_o.reciprocal(), E4M3), gradient,
        ctx.dtype, E5M2, aux, kernel, s_quantizer=softmax, dp_quantizer=scores, dqkv_quantizer=outputs, attn_scale=1.0,
        qkv_layout="sbhd_sbhd_sbhd", attn_mask_type="no_mask", cuda_graph=torch.cuda.is_current_stream_capturing(),
    )  # fmt: skip
    return list(result[:3])


_TE_DTYPE = {torch.bfloat16: tex.DType.kBFloat16, torch.float16: tex.DType.kFloat16, E4M3: E4M3}


@cache
def _kernel(dtype: Any, layout: str, training: bool, heads: int, head_dim: int, length: int) -> Any:
    """TE's name of the kernel for these sizes.

    Raises:
        UserError: when there is none.
    """
    mask = "padding" if layout.startswith("thd") else "no_mask"
    te_dtype = _TE_DTYPE[dtype]
    kernel = tex.get_fused_attn_backend(
        training, te_dtype, te_dtype, QKVLayout[layout], AttnBiasType["no_bias"], AttnMaskType[mask],
        SoftmaxType["vanilla"], 0.0, heads, heads, length, length, head_dim, head_dim, -1, -1, False, False,
    )  # fmt: skip
    if kernel == FusedAttnBackend["No_Backend"]:
        raise UserError(
            f"cuDNN {torch.backends.cudnn.version()} has no {dtype} attention ({layout}, {mask}) at head_dim "
            f"{head_dim} and {length} tokens on {torch.cuda.get_device_name()}; use attention.backend=sdpa, or "
            "precision.fp8=linears (`hmar-mega doctor` shows what runs here)"
        )
    return kernel


@cache
def _tell_padding(head_dim: int) -> None:
    if head_dim < FP8_HEAD_DIM:
        log.info(
            "FP8 attention: head_dim %d is zero-padded to %d, %.1f times the matrix work of the FP8 scales",
            head_dim, FP8_HEAD_DIM, FP8_HEAD_DIM / head_dim,
        )  # fmt: skip


def _pad(data: Tensor) -> Tensor:
    """FP8 data (…, D) as bytes, zero-padded to the head dim that has kernels; a byte 0 is the number 0."""
    missing = FP8_HEAD_DIM - data.shape[-1]
    return F.pad(data, (0, missing)) if missing > 0 else data


def _largest(x: Tensor) -> Tensor:
    """max |x|, float32 scalar on the device."""
    return torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)


def _power_of_two(dtype: Any, largest: Tensor) -> Tensor:
    """The power of two, (1,) float32, that brings `largest` below the largest number of an FP8 format."""
    room = _LARGEST[dtype] / largest.clamp(min=1e-30)
    return torch.exp2(torch.floor(torch.log2(room))).view(1)


def _quantizer(scale: Tensor, dtype: Any) -> Any:
    """TE's quantizer of a given scale; the largest value it is asked to note down goes nowhere."""
    quantizer = Float8Quantizer(scale, torch.zeros_like(scale), dtype, rowwise=True, columnwise=False)
    quantizer.internal = True
    return quantizer


@cache
def _constant(scale: float, dtype: Any, device: torch.device) -> Any:
    return _quantizer(torch.full((1,), scale, device=device), dtype)


def _quantize(x: Tensor, scale: Tensor, dtype: Any) -> Tensor:
    """Bytes of contiguous x·scale in an FP8 format."""
    data: Tensor = tex.quantize(x, _quantizer(scale, dtype))._data
    return data


def _tensor(data: Tensor, inverse_scale: Tensor, dtype: Any) -> Any:
    """TE's FP8 tensor of bytes and the inverse of their scale."""
    return Float8TensorStorage(data=data, fp8_scale_inv=inverse_scale, fp8_dtype=dtype)


def _values(tensor: Any, dtype: Any, into: torch.dtype) -> Tensor:
    """The numbers of an FP8 tensor; scaling by a power of two is exact in any format that has the range."""
    values: Tensor = tensor._data.view(_TORCH[dtype]).to(into)
    return values * tensor._scale_inv.to(into)
