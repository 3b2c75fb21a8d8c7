"""Backward kernels of scale-block attention, with the gradients of QK normalisation and of the heads' scales fused in.

Names of tiles: M own positions, J those of a step, D head dim padded to a power of two. With q̂ = q/|q|, k̂ = k/|k|,
scale s and logits s·q̂·k̂, P the softmax and dS = P·(dP − delta), delta = rowsum(dO·O):

    dv = Pᵀ·dO;  a_q = dS·k̂;  a_k = dSᵀ·q̂;  ds = Σ q̂·a_q
    dq = s/|q|·(a_q − q̂(q̂·a_q));  dk = s/|k|·(a_k − k̂(k̂·a_k))

Every gradient is summed by one program in one order: the result is the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hmar_mega.kernels.scale_block_forward import (
    FIELDS,
    LOG2_E,
    NORM_EPS,
    SIZES,
    load_rows,
    place,
    product,
    visible_pairs,
)

#: Gradients of logits are multiplied by at most this before they are rounded to float16, which does not hold the 1e12
#: of a zero row. Rows shorter than 1e-4 then turn the gradients of the others by less than they should.
MOST_IN_FLOAT16 = tl.constexpr(1e4)


@triton.jit
def factor_of_gradient(inverse, dtype: tl.constexpr):
    """1/|x| as gradients of that dtype bear it."""
    return tl.minimum(inverse, MOST_IN_FLOAT16) if dtype == tl.float16 else inverse


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    out, d_out, q_norm, delta, scaled_delta, places, tokens, row_length, batch, heads, d_row, d_sample, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """rowsum(dO·O), and that over |q|, of BLOCK_M positions of one sample and head.

    d_row, d_sample: strides of d_out (N, B, H·D).
    """
    pid = tl.program_id(0)
    head, rest = pid % heads, pid // heads
    sample, block = rest % batch, rest // batch
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    own = rows < tokens
    width = heads * D
    o = load_rows(out + sample.to(tl.int64) * width + head * D, rows, tokens, batch * width, D, BLOCK_D)
    do = load_rows(d_out + sample.to(tl.int64) * d_sample + head * D, rows, tokens, d_row, D, BLOCK_D)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = (sample.to(tl.int64) * heads + head) * row_length + tl.load(places + rows, mask=own, other=0)
    tl.store(delta + at, total, mask=own)
    factor = factor_of_gradient(tl.load(q_norm + at, mask=own, other=0.0), do.dtype)
    tl.store(scaled_delta + at, total * factor, mask=own)


@triton.jit
def sum_over_queries(
    a_k, dv, k, v, k_factor, qkv_rows, q_column, do_rows, do_column, lse_rows, delta_rows, norm_rows, line, shift, low,
    high, first, packed, levels, own_level, CAUSAL: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to own keys' gradients what queries [low, high) send back; matrices are transposed, (M keys, J queries).

    Log-sums are +inf in the gaps between scales, so that what lies there weighs nothing; `delta_rows` are over |q|.
    """
    zeros = tl.zeros([k.shape[0], BLOCK_J], tl.float32)
    for start in range(low, high, BLOCK_J):
        queries = start + tl.arange(0, BLOCK_J)
        q = qkv_rows.load([start, q_column])
        do = do_rows.load([start, do_column])
        q_inverse = norm_rows.load([line, start + shift]).reshape([BLOCK_J])
        log_total = lse_rows.load([line, start + shift]).reshape([BLOCK_J])
        correction = delta_rows.load([line, start + shift]).reshape([BLOCK_J])
        if CAUSAL:  # the walk starts at an aligned place before the first query that sees the own keys
            log_total = tl.where(queries >= first, log_total, float("inf"))
        logits = product(k, tl.trans(q), zeros, PRECISION) * (k_factor[:, None] * q_inverse[None, :])
        p = tl.exp2(logits - log_total[None, :])
        if packed:
            p = tl.where(visible_pairs(levels, queries, own_level, CAUSAL, True), p, 0.0)
        dp = product(v, tl.trans(do), zeros, PRECISION)
        dv = product(p.to(do.dtype), do, dv, PRECISION)
        ds = p * (dp * factor_of_gradient(q_inverse, q.dtype)[None, :] - correction[None, :])
        a_k = product(ds.to(q.dtype), q, a_k, PRECISION)
    return a_k, dv


@triton.jit
def sum_over_keys(
    a_q, q, do, row_factor, log_total, correction, qkv_rows, k_column, v_column, norm_rows, line, shift, low, high,
    packed, levels, own_level, CAUSAL: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to own queries' gradients what keys [low, high) send back. In the gaps between scales 1/|k| is 0."""
    zeros = tl.zeros([q.shape[0], BLOCK_J], tl.float32)
    for start in range(low, high, BLOCK_J):
        keys = start + tl.arange(0, BLOCK_J)
        k = qkv_rows.load([start, k_column])
        v = qkv_rows.load([start, v_column])
        k_inverse = norm_rows.load([line, start + shift]).reshape([BLOCK_J])
        if CAUSAL:  # scales follow each other without gaps
            k_inverse = tl.where(keys < high, k_inverse, 0.0)
        logits = product(q, tl.trans(k), zeros, PRECISION) * (row_factor[:, None] * k_inverse[None, :])
        p = tl.exp2(logits - log_total[:, None])
        if packed:
            p = tl.where(visible_pairs(levels, keys, own_level, CAUSAL, False), p, 0.0)
        dp = product(do, tl.trans(v), zeros, PRECISION)
        ds = p * (dp - correction[:, None]) * factor_of_gradient(k_inverse, k.dtype)[None, :]
        a_q = product(ds.to(k.dtype), k, a_q, PRECISION)
    return a_q


@triton.jit
def through_norm(raw, inverse, a, scale):
    """Gradient of a raw vector from that of its unit vector over the scale, and unit·a: (M, D), (M,)."""
    unit = raw.to(tl.float32) * inverse[:, None]
    along = tl.sum(unit * a, 1)
    # a vector shorter than eps was divided by eps, not by its length: nothing to project out
    projected = tl.where(inverse * NORM_EPS < 0.999, along, 0.0)
    return (a - unit * projected[:, None]) * (scale * inverse)[:, None], along


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    qkv, d_out, qkv_rows, do_rows, lse_rows, scaled_delta_rows, q_norm_rows, k_norm_rows, q_scale, lse, delta, q_norm,
    k_norm, d_qkv, d_scale, query_tiles, key_tiles, levels, num_tiles, row_length, batch, heads, d_row, d_sample,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, HEAD_GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of one sample and head: of its keys and values (KEYS), then of its queries (QUERIES).

    The `_rows` are descriptors with blocks of BLOCK_J rows: of qkv (N, B·3·H·D), d_out (N, B·H·D), and of lse, delta
    and the norms (B·H, row_length). d_qkv (N, B, 3, H, D); d_scale (T, B, H) float32, partial sums; query_tiles: for
    KEYS, who own keys and walk over queries; key_tiles: for QUERIES; d_row, d_sample: strides of d_out (N, B, H·D). The
    rest as in the forward kernel.
    """
    tile, sample, head = place(tl.program_id(0), num_tiles, heads, HEAD_GROUP)
    stride = batch.to(tl.int64) * 3 * heads * D
    offset = (sample.to(tl.int64) * 3 * heads + head) * D
    q_base, k_base, v_base = qkv + offset, qkv + offset + heads * D, qkv + offset + 2 * heads * D
    do_base = d_out + sample.to(tl.int64) * d_sample + head * D
    q_column = (sample * 3 * heads + head) * D
    do_column = sample * d_sample + head * D
    line = sample * heads + head
    at = line.to(tl.int64) * row_length
    scale = tl.load(q_scale + head)
    columns = tl.arange(0, BLOCK_D)

    if KEYS:
        start = tl.load(query_tiles + tile * FIELDS)
        stop = tl.load(query_tiles + tile * FIELDS + 1)
        low = tl.load(query_tiles + tile * FIELDS + 2)
        high = tl.load(query_tiles + tile * FIELDS + 4)
        shift = tl.load(query_tiles + tile * FIELDS + 5)
        packed = tl.load(query_tiles + tile * FIELDS + 6) != 0
        first = tl.load(query_tiles + tile * FIELDS + 7)
        rows = start + tl.arange(0, BLOCK_M)
        own = rows < stop
        k = load_rows(k_base, rows, stop, stride, D, BLOCK_D)
        v = load_rows(v_base, rows, stop, stride, D, BLOCK_D)
        k_inverse = tl.load(k_norm + at + shift + rows, mask=own, other=0.0)
        own_level = tl.load(levels + rows, mask=own, other=0)
        a_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        factor = k_inverse * (scale * LOG2_E)
        a_k, dv = sum_over_queries(
            a_k, dv, k, v, factor, qkv_rows, q_column, do_rows, do_column, lse_rows, scaled_delta_rows, q_norm_rows,
            line, shift, low, high, first, packed, levels, own_level, CAUSAL, BLOCK_J, PRECISION,
        )  # fmt: skip
        dk, _ = through_norm(k, k_inverse, a_k, scale)
        keep = own[:, None] & (columns[None, :] < D)
        target = d_qkv + offset + heads * D + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        tl.store(target, dk.to(d_qkv.dtype.element_ty), mask=keep)
        tl.store(target + heads * D, dv.to(d_qkv.dtype.element_ty), mask=keep)

    if QUERIES:
        start = tl.load(key_tiles + tile * FIELDS)
        stop = tl.load(key_tiles + tile * FIELDS + 1)
        low = tl.load(key_tiles + tile * FIELDS + 2)
        high = tl.load(key_tiles + tile * FIELDS + 4)
        shift = tl.load(key_tiles + tile * FIELDS + 5)
        packed = tl.load(key_tiles + tile * FIELDS + 6) != 0
        rows = start + tl.arange(0, BLOCK_M)
        own = rows < stop
        q = load_rows(q_base, rows, stop, stride, D, BLOCK_D)
        do = load_rows(do_base, rows, stop, d_row, D, BLOCK_D)
        q_inverse = tl.load(q_norm + at + shift + rows, mask=own, other=0.0)
        log_total = tl.load(lse + at + shift + rows, mask=own, other=float("inf"))
        correction = tl.load(delta + at + shift + rows, mask=own, other=0.0)
        own_level = tl.load(levels + rows, mask=own, other=0)
        a_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        factor = q_inverse * (scale * LOG2_E)
        a_q = sum_over_keys(
            a_q, q, do, factor, log_total, correction, qkv_rows, q_column + heads * D, q_column + 2 * heads * D,
            k_norm_rows, line, shift, low, high, packed, levels, own_level, CAUSAL, BLOCK_J, PRECISION,
        )  # fmt: skip
        dq, along = through_norm(q, q_inverse, a_q, scale)
        keep = own[:, None] & (columns[None, :] < D)
        tl.store(
            d_qkv + offset + rows.to(tl.int64)[:, None] * stride + columns[None, :],
            dq.to(d_qkv.dtype.element_ty), mask=keep,
        )  # fmt: skip
        tl.store(d_scale + (tile * batch + sample) * heads + head, tl.sum(along, 0))
