"""The block's elementwise work in one pass each, forward and backward: gate, residual, LayerNorm, modulation; bias, GELU.

    x' = x + γ·(y + bias);   h = LN(x')·(1 + scale) + shift          (SPEC §3)

Rows are the (position, sample) pairs of activations (N, B, C); γ, scale and shift (B, C) belong to a sample. All
arithmetic is float32. Gradients of a sample's vectors are summed over its positions in chunks by one program each, and
the chunks by torch: the same order in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Programs that a backward pass is cut into at least, where the input is large enough.
PROGRAMS = 1056

SIZES = ["rows", "tokens", "batch", "per_program"]


@triton.jit
def load_row(base, columns, C: tl.constexpr):
    """C elements in float32, zeros behind them."""
    return tl.load(base + columns, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit
def normalised(x, columns, eps, C: tl.constexpr):
    """(ROWS, BLOCK_C): (x − mean)/√(var + eps) of each row, zeros behind C; and 1/√(var + eps), (ROWS,)."""
    mean = tl.sum(x, 1) / C
    centred = tl.where(columns[None, :] < C, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * inverse[:, None], inverse


@triton.jit(do_not_specialize=SIZES)
def adaln_forward_kernel(
    x, y, bias, gamma, scale, shift, x_out, out, rows, batch, gamma_stride, scale_stride, shift_stride, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """x, y, x_out, out (rows, C); bias (C,); gamma, scale, shift (B, C) with their strides. Without GATE x' is x."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    mask = (row[:, None] < rows) & (columns[None, :] < C)
    at = row.to(tl.int64)[:, None] * C + columns[None, :]
    sample = (row % batch)[:, None]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        branch = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            branch += load_row(bias, columns, C)[None, :]
        value += tl.load(gamma + sample * gamma_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32) * branch
        tl.store(x_out + at, value.to(x_out.dtype.element_ty), mask=mask)
        value = value.to(x_out.dtype.element_ty).to(tl.float32)  # what the backward pass will see
    if NORM:
        unit, _ = normalised(value, columns, eps, C)
        factor = tl.load(scale + sample * scale_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        offset = tl.load(shift + sample * shift_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, (unit * (1.0 + factor) + offset).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def adaln_backward_kernel(
    d_x_out, d_out, x_out, y, bias, gamma, scale, dx, dy, sums, tokens, batch, per_program, gamma_stride, scale_stride,
    eps, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Positions [chunk·per_program, …) of one sample.

    sums (4, chunks, B, C) float32: over the positions, of d_x'·(y + bias), d_x', d_out·unit and d_out, whose names are
    the gradients of γ, of bias before its factor γ, of scale and of shift. dx is d_x' where GATE and NORM, else LN's own.
    """
    sample, chunk = tl.program_id(0) % batch, tl.program_id(0) // batch
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    gate = tl.zeros([BLOCK_C], tl.float32)
    factor = tl.zeros([BLOCK_C], tl.float32)
    added = tl.zeros([BLOCK_C], tl.float32)
    if GATE:
        gate = load_row(gamma + sample * gamma_stride, columns, C)
        if BIAS:
            added = load_row(bias, columns, C)
    if NORM:
        factor = 1.0 + load_row(scale + sample * scale_stride, columns, C)
    to_gamma = tl.zeros([BLOCK_C], tl.float32)
    to_bias = tl.zeros([BLOCK_C], tl.float32)
    to_scale = tl.zeros([BLOCK_C], tl.float32)
    to_shift = tl.zeros([BLOCK_C], tl.float32)
    first = chunk * per_program
    last = tl.minimum(first + per_program, tokens)
    for start in range(first, last, ROWS):
        position = start + tl.arange(0, ROWS)
        mask = (position[:, None] < last) & inside[None, :]
        at = (position.to(tl.int64) * batch + sample)[:, None] * C + columns[None, :]
        total = tl.zeros([ROWS, BLOCK_C], tl.float32)
        if NORM:
            given = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
            unit, inverse = normalised(tl.load(x_out + at, mask=mask, other=0.0).to(tl.float32), columns, eps, C)
            to_scale += tl.sum(given * unit, 0)
            to_shift += tl.sum(given, 0)
            given = given * factor[None, :]
            along = tl.sum(given * unit, 1) / C
            total = (given - (tl.sum(given, 1) / C)[:, None] - unit * along[:, None]) * inverse[:, None]
        if GATE:
            total += tl.load(d_x_out + at, mask=mask, other=0.0).to(tl.float32)
            total = tl.where(mask, total, 0.0)
            branch = tl.load(y + at, mask=mask, other=0.0).to(tl.float32) + added[None, :]
            to_gamma += tl.sum(total * branch, 0)
            to_bias += tl.sum(total, 0)
            tl.store(dy + at, (total * gate[None, :]).to(dy.dtype.element_ty), mask=mask)
        if NORM:
            tl.store(dx + at, total.to(dx.dtype.element_ty), mask=mask)
    plane = (tl.num_programs(0) * C).to(tl.int64)
    target = sums + tl.program_id(0).to(tl.int64) * C + columns
    if GATE:
        tl.store(target, to_gamma, mask=inside)
        tl.store(target + plane, to_bias, mask=inside)
    if NORM:
        tl.store(target + 2 * plane, to_scale, mask=inside)
        tl.store(target + 3 * plane, to_shift, mask=inside)


@triton.jit
def gelu_parts(x):
    """Logistic function that turns x into GELU (tanh form), x·part, and the derivative of the product."""
    inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    part = 1.0 / (1.0 + tl.exp(-inner))
    return part, part + x * part * (1.0 - part) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit(do_not_specialize=SIZES)
def gelu_forward_kernel(x, bias, out, rows, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """out = GELU(x + bias), tanh form; x, out (rows, C), bias (C,)."""
    blocks = tl.cdiv(C, COLUMNS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    mask = (row[:, None] < rows) & (columns[None, :] < C)
    at = row.to(tl.int64)[:, None] * C + columns[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + load_row(bias, columns, C)[None, :]
    part, _ = gelu_parts(value)
    tl.store(out + at, (value * part).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def gelu_backward_kernel(
    d_out, x, bias, dx, sums, rows, per_program, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """dx (rows, C); sums (chunks, C) float32: of dx over the chunk's rows."""
    blocks = tl.cdiv(C, COLUMNS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(0) // blocks
    added = load_row(bias, columns, C)
    total = tl.zeros([COLUMNS], tl.float32)
    first = chunk * per_program
    last = tl.minimum(first + per_program, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row[:, None] < last) & (columns[None, :] < C)
        at = row.to(tl.int64)[:, None] * C + columns[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + added[None, :]
        _, slope = gelu_parts(value)
        gradient = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32) * slope
        total += tl.sum(gradient, 0)
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=mask)
    tl.store(sums + chunk.to(tl.int64) * C + columns, total, mask=columns < C)


class AdaLN(torch.autograd.Function):
    """(x', h) of the file's formula; without `y` x' is x itself and only h comes, without `scale` only x'."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        bias: Tensor | None,
        gamma: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
    ) -> tuple[Tensor | None, Tensor | None]:
        """x, y (N, B, C); bias (C,); gamma, scale, shift (B, C), rows of any stride."""
        x = x.contiguous()
        y = None if y is None else y.contiguous()
        gamma, scale, shift = (None if v is None else _rows(v) for v in (gamma, scale, shift))
        x_out = x if y is None else torch.empty_like(x)
        out = None if scale is None else torch.empty_like(x)
        rows, shape = x.shape[0] * x.shape[1], _shape(x.shape[2])
        flags = {"GATE": y is not None, "NORM": scale is not None, "BIAS": bias is not None}
        with _device(x):
            adaln_forward_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
                x, y, bias, gamma, scale, shift, x_out, out, rows, x.shape[1], _stride(gamma), _stride(scale),
                _stride(shift), eps, **shape, **flags,
            )  # fmt: skip
        ctx.save_for_backward(x_out if scale is not None else None, y, bias, gamma, scale)
        ctx.eps, ctx.flags, ctx.dims = eps, flags, tuple(x.shape)
        return (None if y is None else x_out), out

    @staticmethod
    def backward(ctx: Any, d_x_out: Tensor | None, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments."""
        x_out, y, bias, gamma, scale = ctx.saved_tensors
        tokens, batch, width = ctx.dims
        given = [None if g is None else g.contiguous() for g in (d_x_out, d_out)]
        one = next(g for g in given if g is not None)
        dx = torch.empty_like(one) if ctx.flags["NORM"] else given[0]
        dy = torch.empty_like(y) if y is not None else None
        per_program, chunks = _chunks(tokens, batch)
        sums = one.new_empty(4, chunks, batch, width, dtype=torch.float32)
        with _device(one):
            adaln_backward_kernel[(chunks * batch,)](
                given[0], given[1], x_out, y, bias, gamma, scale, dx, dy, sums, tokens, batch, per_program,
                _stride(gamma), _stride(scale), ctx.eps, **_shape(width), **ctx.flags,
            )  # fmt: skip
        to_gamma = to_bias = to_scale = to_shift = None
        if gamma is not None:
            both = sums[:2].sum(1)
            to_gamma = both[0].to(gamma.dtype)
            to_bias = (both[1] * gamma).sum(0).to(bias.dtype) if bias is not None else None
        if scale is not None:
            both = sums[2:].sum(1)
            to_scale, to_shift = both.to(scale.dtype)
        return dx, dy, to_bias, to_gamma, to_scale, to_shift, None


class BiasGelu(torch.autograd.Function):
    """GELU(x + bias), tanh form: x (…, C), bias (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        """One read, one write."""
        x = x.contiguous()
        out, width = torch.empty_like(x), x.shape[-1]
        rows, tile = x.numel() // width, _gelu_tile(width)
        blocks = triton.cdiv(width, tile["COLUMNS"])
        with _device(x):
            gelu_forward_kernel[(triton.cdiv(rows, tile["ROWS"]) * blocks,)](x, bias, out, rows, C=width, **tile)
        ctx.save_for_backward(x, bias)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of bias comes with that of x."""
        x, bias = ctx.saved_tensors
        width = x.shape[-1]
        rows, tile = x.numel() // width, _gelu_tile(width)
        blocks = triton.cdiv(width, tile["COLUMNS"])
        per_program, chunks = _chunks(rows, blocks)
        dx, sums = torch.empty_like(x), x.new_empty(chunks, width, dtype=torch.float32)
        with _device(x):
            gelu_backward_kernel[(chunks * blocks,)](
                d_out.contiguous(), x, bias, dx, sums, rows, per_program, C=width, **tile
            )
        return dx, sums.sum(0).to(bias.dtype)


def _shape(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"C": width, "BLOCK_C": block, "ROWS": max(1, 2048 // block), "num_warps": 4 if block <= 2048 else 8}


def _gelu_tile(width: int) -> dict[str, int]:
    return {"COLUMNS": min(512, triton.next_power_of_2(width)), "ROWS": 8}


def _chunks(length: int, others: int) -> tuple[int, int]:
    """Positions of a program and number of chunks, so that `others` × chunks are about `PROGRAMS`, at least 8 each."""
    per_program = max(8, triton.cdiv(length * others, PROGRAMS))
    return per_program, triton.cdiv(length, per_program)


def _rows(vector_BC: Tensor) -> Tensor:
    return vector_BC if vector_BC.stride(-1) == 1 else vector_BC.contiguous()


def _stride(vector_BC: Tensor | None) -> int:
    return 0 if vector_BC is None else vector_BC.stride(0)


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device("cpu")
