"""Forward kernel of scale-block attention: QK normalisation, logits, softmax and values in one pass over packed QKV.

Names of tiles: M own queries, J keys of a step, D head dim padded to a power of two. Logits are dot products of the
raw vectors times 1/|q|, 1/|k| and the head's scale, so no operand is rounded again after the projection. Softmax runs
in base 2. No logit is larger than the head's scale: where the range that this leaves fits into float32's exponents, a
fixed maximum replaces the running one, and nothing is ever rescaled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hmar_mega.kernels import tiles as tables

#: `tiles.FP8_KEYS`, for kernels.
FP8_KEYS = tl.constexpr(tables.FP8_KEYS)

#: `tiles.FIELDS`, for kernels.
FIELDS = tl.constexpr(tables.FIELDS)

LOG2_E = tl.constexpr(1.4426950408889634)

#: As `torch.nn.functional.normalize` (eps of the norm).
NORM_EPS = tl.constexpr(1e-12)

#: Below this scale the range of the logits, 2·scale·log2(e) = 202, fits into the exponents −124 … 78 whatever the
#: maximum, with room for sums over 2^13 keys of values up to 2^36.
FIXED_MAX_BELOW, LOWEST_EXPONENT = tl.constexpr(70.0), tl.constexpr(124.0)

#: Programs that share the tiles of a head above it.
STEEP_PROGRAMS = 4

#: Arguments on whose values no kernel is specialised: one compilation serves every batch and number of heads.
SIZES = ["num_tiles", "tokens", "row_length", "batch", "heads"]


@triton.jit
def inverse_norm(x):
    """1 / max(|x|, eps) of each row in float32."""
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), NORM_EPS)


@triton.jit
def load_rows(base, rows, limit, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) from rows `stride` elements apart; zeros at rows ≥ limit and columns ≥ D."""
    columns = tl.arange(0, BLOCK_D)
    mask = rows[:, None] < limit
    if D < BLOCK_D:
        mask = mask & (columns[None, :] < D)
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in float32; `interpreted` widens the operands: Triton's interpreter multiplies bfloat16 as bits."""
    if PRECISION == "interpreted":
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def place(pid, num_tiles, heads, HEAD_GROUP: tl.constexpr):
    """Program → (tile, sample, head): heads of a group vary fastest, then tiles, the longest first, groups, samples."""
    local, rest = pid % HEAD_GROUP, pid // HEAD_GROUP
    tile, rest = rest % num_tiles, rest // num_tiles
    groups = heads // HEAD_GROUP
    return tile, rest // groups, (rest % groups) * HEAD_GROUP + local


@triton.jit
def in_fp8(tiles, tile, scale, fp8_below):
    """Whether the tile of a head with this scale is computed in FP8 (`scale_block_fp8`)."""
    keys = tl.load(tiles + tile * FIELDS + 4) - tl.load(tiles + tile * FIELDS + 2)
    return (scale < fp8_below) & (keys >= FP8_KEYS)


@triton.jit
def visible_pairs(levels, others, own_level, CAUSAL: tl.constexpr, OWN_KEYS: tl.constexpr):
    """(M, J): which of the other positions see, or are seen by, which of the own ones."""
    other_level = tl.load(levels + others)
    if not CAUSAL:
        return own_level[:, None] == other_level[None, :]
    if OWN_KEYS:
        return own_level[:, None] <= other_level[None, :]
    return own_level[:, None] >= other_level[None, :]


@triton.jit
def attend_keys(
    acc, total, maximum, offset, q, row_factor, qkv_rows, k_column, v_column, k_norm, line, shift, low, high, packed,
    levels, own_level, CAUSAL: tl.constexpr, RUNNING: tl.constexpr, INLINE_NORM: tl.constexpr, BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys of [low, high) to the accumulators.

    `offset` is subtracted from all logits, in base 2: the fixed maximum, or nothing where a running one is kept.
    """
    for start in range(low, high, BLOCK_J):
        keys = start + tl.arange(0, BLOCK_J)
        k = qkv_rows.load([start, k_column])
        v = qkv_rows.load([start, v_column])
        k_factor = inverse_norm(k) if INLINE_NORM else k_norm.load([line, start + shift]).reshape([BLOCK_J])
        logits = product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_J], tl.float32), PRECISION)
        added = tl.where(keys < high, -offset, -float("inf"))
        logits = logits * (row_factor[:, None] * k_factor[None, :]) + added[None, :]
        if packed:
            visible = visible_pairs(levels, keys, own_level, CAUSAL, False)
            logits = tl.where(visible, logits, -float("inf"))
        if RUNNING:
            higher = tl.maximum(maximum, tl.max(logits, 1))
            shrink = tl.exp2(maximum - higher)
            acc = acc * shrink[:, None]
            total = total * shrink
            maximum = higher
            logits = logits - maximum[:, None]
        p = tl.exp2(logits)
        total += tl.sum(p, 1)
        acc = product(p.to(v.dtype), v, acc, PRECISION)
    return acc, total, maximum


@triton.jit
def forward_tile(
    qkv, qkv_rows, k_rows, scale, out, lse, q_norm, k_norm, tiles, levels, tile, sample, head, row_length, batch, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, CAUSAL: tl.constexpr,
    RUNNING: tl.constexpr, INLINE_NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one sample and head; see `forward_kernel`."""
    start = tl.load(tiles + tile * FIELDS)
    stop = tl.load(tiles + tile * FIELDS + 1)
    low = tl.load(tiles + tile * FIELDS + 2)
    high = tl.load(tiles + tile * FIELDS + 4)
    shift = tl.load(tiles + tile * FIELDS + 5)
    packed = tl.load(tiles + tile * FIELDS + 6) != 0
    stride = batch.to(tl.int64) * 3 * heads * D
    q_base = qkv + (sample.to(tl.int64) * 3 * heads + head) * D
    k_column = ((sample * 3 + 1) * heads + head) * D
    v_column = k_column + heads * D
    line = sample * heads + head
    at = line.to(tl.int64) * row_length + shift

    rows = start + tl.arange(0, BLOCK_M)
    own = rows < stop
    q = load_rows(q_base, rows, stop, stride, D, BLOCK_D)
    q_inverse = inverse_norm(q)
    tl.store(q_norm + at + rows, q_inverse, mask=own)
    if INLINE_NORM:  # every key is some program's own row
        k = load_rows(q_base + heads * D, rows, stop, stride, D, BLOCK_D)
        tl.store(k_norm + at + rows, inverse_norm(k), mask=own)
    row_factor = q_inverse * (scale * LOG2_E)
    own_level = tl.load(levels + rows, mask=own, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    bound = scale * LOG2_E
    if RUNNING:  # finite, so that a step without any visible key leaves no NaN; below every logit there is
        offset = 0.0
        maximum = tl.zeros([BLOCK_M], tl.float32) - 2.0 * bound - 1.0
    else:
        offset = bound - tl.maximum(2.0 * bound - LOWEST_EXPONENT, 0.0)
        maximum = tl.zeros([BLOCK_M], tl.float32) + offset
    if INLINE_NORM:
        acc, total, maximum = attend_keys(
            acc, total, maximum, offset, q, row_factor, qkv_rows, k_column, v_column, k_rows, line, shift, low, high,
            packed, levels, own_level, CAUSAL, RUNNING, INLINE_NORM, BLOCK_J, PRECISION,
        )  # fmt: skip
    elif packed:
        acc, total, maximum = attend_keys(
            acc, total, maximum, offset, q, row_factor, qkv_rows, k_column, v_column, k_rows, line, shift, low, high,
            True, levels, own_level, CAUSAL, RUNNING, INLINE_NORM, BLOCK_J, PRECISION,
        )  # fmt: skip
    else:
        acc, total, maximum = attend_keys(
            acc, total, maximum, offset, q, row_factor, qkv_rows, k_column, v_column, k_rows, line, shift, low, high,
            False, levels, own_level, CAUSAL, RUNNING, INLINE_NORM, BLOCK_J, PRECISION,
        )  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    keep = own[:, None] & (columns[None, :] < D)
    target = out + ((rows.to(tl.int64) * batch + sample) * heads + head)[:, None] * D + columns[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=keep)
    tl.store(lse + at + rows, maximum + tl.log2(total), mask=own)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv, qkv_rows, k_rows, q_scale, out, lse, q_norm, k_norm, tiles, levels, fp8_below, num_tiles, row_length, batch,
    heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, CAUSAL: tl.constexpr,
    HEAD_GROUP: tl.constexpr, HEADS: tl.constexpr, INLINE_NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries of one sample and head: one tile of them, or every `STEEP_PROGRAMS`-th where HEADS is `steep`.

    HEADS: `all` with a running maximum; `flat`: with a fixed one, those whose scale allows it; `steep`: the others, of
    which there are few; `flat_beside_fp8`: of the flat ones what is not computed in FP8 (`in_fp8`).

    qkv (N, B, 3, H, D) contiguous, and `qkv_rows`, its descriptor (N, B·3·H·D) with blocks (BLOCK_J, BLOCK_D); q_scale
    (H,) float32; out (N, B, H, D); lse, q_norm, k_norm (B, H, row_length) float32: log2 of the softmax's sum, 1/|q|,
    1/|k|. k_norm is written where INLINE_NORM, else read through `k_rows`, its descriptor (B·H, row_length) with blocks
    (1, BLOCK_J).
    """
    if HEADS == "steep":
        sequences = batch * heads
        head, sample = tl.program_id(0) % heads, tl.program_id(0) % sequences // heads
        scale = tl.load(q_scale + head)
        if (scale < FIXED_MAX_BELOW) == 0:  # NaN too, which then is the output
            step = tl.num_programs(0) // sequences
            for tile in tl.range(tl.program_id(0) // sequences, num_tiles, step, num_stages=1):
                forward_tile(
                    qkv, qkv_rows, k_rows, scale, out, lse, q_norm, k_norm, tiles, levels, tile, sample, head,
                    row_length, batch, heads, D, BLOCK_D, BLOCK_M, BLOCK_J, CAUSAL, True, INLINE_NORM, PRECISION,
                )  # fmt: skip
    else:
        tile, sample, head = place(tl.program_id(0), num_tiles, heads, HEAD_GROUP)
        scale = tl.load(q_scale + head)
        own = True if HEADS == "all" else scale < FIXED_MAX_BELOW
        if HEADS == "flat_beside_fp8":
            own = own & (in_fp8(tiles, tile, scale, fp8_below) == 0)
        if own:
            forward_tile(
                qkv, qkv_rows, k_rows, scale, out, lse, q_norm, k_norm, tiles, levels, tile, sample, head,
                row_length, batch, heads, D, BLOCK_D, BLOCK_M, BLOCK_J, CAUSAL, HEADS == "all", INLINE_NORM, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def key_norm_kernel(
    qkv, k_norm, places, tokens, row_length, batch, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """1/|k| of BLOCK_M positions of one sample and head; heads vary fastest."""
    pid = tl.program_id(0)
    head, rest = pid % heads, pid // heads
    sample, block = rest % batch, rest // batch
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    stride = batch.to(tl.int64) * 3 * heads * D
    k = load_rows(qkv + (sample.to(tl.int64) * 3 * heads + heads + head) * D, rows, tokens, stride, D, BLOCK_D)
    line = (sample.to(tl.int64) * heads + head) * row_length
    place = tl.load(places + rows, mask=rows < tokens, other=0)
    tl.store(k_norm + line + place, inverse_norm(k), mask=rows < tokens)
