"""Forward kernels of scale-block attention with FP8 (e4m3) products, for heads of small scales and larger token maps.

A pass before writes the heads' keys and values as Hopper's FP8 products take them, with the axis that is summed over
contiguous: k̂ = k/|k| times `UNIT` as (positions, D), v as (D, positions). No scale needs a history:

- q̂ and k̂ are no longer than 1: `UNIT` brings them into e4m3's range;
- v has one power of two for every block of keys, from its largest value. The attention kernel brings blocks to that of
  the largest by shifting the exponents of their softmax weights;
- softmax weights P ≤ 1 under a fixed maximum, the head's scale: P·`UNIT`. The smallest P is exp(−2·scale), which
  e4m3 can hold up to a scale of about 10: `FP8_BELOW`, above which heads are computed as without FP8.

Sums of weights are taken before these are rounded. Names of tiles as in `scale_block_forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hmar_mega.kernels.scale_block_forward import FIELDS, LOG2_E, SIZES, in_fp8, inverse_norm, load_rows, place, product

#: Heads of a smaller scale are computed in FP8: output errors are 4 % at a scale of 1, 6 % here, 8 % at 12, 13 % at 14.
FP8_BELOW = 10.0

#: Largest `FP8_BELOW` that one may ask for: above, the fixed maximum leaves float32's range.
FP8_BELOW_LIMIT = 39.0

#: What is at most 1 is multiplied by this before it is rounded to e4m3, whose largest number is 448.
UNIT, UNIT_EXPONENT = tl.constexpr(256.0), tl.constexpr(8.0)


@triton.jit
def to_e4m3(x, PRECISION: tl.constexpr):
    """Float32 to the nearest e4m3; `interpreted` rounds beforehand: Triton's interpreter cuts digits off."""
    if PRECISION == "interpreted":  # to four bits, and below 2^-6 to multiples of 2^-9
        carried = x * (2.0**20 + 1.0)
        x = tl.where(tl.abs(x) < 2.0**-6, (x + 1.5 * 2.0**14) - 1.5 * 2.0**14, carried - (carried - x))
    return x.to(tl.float8e4nv)


@triton.jit
def operand_order(x):
    """Within 16 columns, the order in which a thread's part of an FP8 product's result is its part of an operand.

    Column 8i + 2t + b of a result and column 4t + 2i + b of an operand belong to thread t of four: with weights so
    reordered, and values stored so, no register has to move.
    """
    M: tl.constexpr = x.shape[0]
    J: tl.constexpr = x.shape[1]
    return x.reshape([M, J // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([M, J])


@triton.jit(do_not_specialize=SIZES)
def quantise_kernel(
    qkv, q_scale, k_norm, keys, values, exponents, positions, fp8_below, tokens, row_length, batch, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK places of one sample and head; heads vary fastest.

    positions (row_length,) int32: the token at each place, `tokens` in gaps, which become zeros; row_length is a
    multiple of BLOCK. k_norm (B, H, row_length) float32, 1/|k|, is written for every head; keys (B, H, row_length, D)
    and values (B, H, D, row_length) e4m3, exponents (B, H, row_length/BLOCK) float32 for those below `fp8_below`: v is
    values·2^exponent, with places in `operand_order`.
    """
    pid = tl.program_id(0)
    head, rest = pid % heads, pid // heads
    sample, block = rest % batch, rest // batch
    stride = batch.to(tl.int64) * 3 * heads * D
    k_base = qkv + (sample.to(tl.int64) * 3 * heads + heads + head) * D
    line = sample.to(tl.int64) * heads + head
    own = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    keep = columns < D

    rows = tl.load(positions + own)
    k = load_rows(k_base, rows, tokens, stride, D, BLOCK_D)
    k_inverse = inverse_norm(k)
    tl.store(k_norm + line * row_length + own, k_inverse, mask=rows < tokens)
    if tl.load(q_scale + head) < fp8_below:
        unit = k.to(tl.float32) * (k_inverse * UNIT)[:, None]
        target = keys + (line * row_length + own)[:, None] * D + columns[None, :]
        tl.store(target, to_e4m3(unit, PRECISION), mask=keep[None, :])

        i = tl.arange(0, BLOCK)
        rows = tl.load(positions + block * BLOCK + i // 16 * 16 + i // 2 % 2 * 8 + i % 16 // 4 * 2 + i % 2)
        v = load_rows(k_base + heads * D, rows, tokens, stride, D, BLOCK_D).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(v)), 2.0**-100)  # a block of zeros has an exponent too
        exponent = tl.ceil(tl.log2(largest)) - UNIT_EXPONENT
        tl.store(exponents + line * (row_length // BLOCK) + block, exponent)
        target = values + (line * D + columns)[:, None] * row_length + own[None, :]
        tl.store(target, tl.trans(to_e4m3(v * tl.exp2(-exponent), PRECISION)), mask=keep[:, None])


@triton.jit
def attend_keys_fp8(
    acc, total, q, factor, bound, key_rows, value_rows, exponents, largest, line, row_length, shift, begin, end,
    seen_low, seen_high, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys of [begin, end): `acc` in units of 2^largest/UNIT, `total` in ones. q is in units of 1/UNIT."""
    zeros = tl.zeros([q.shape[0], BLOCK_J], tl.float32)
    for start in range(begin, end, BLOCK_J):
        k = key_rows.load([line * row_length + start + shift, 0])
        v = value_rows.load([line * D, start + shift])
        # weights of a block so small vanish in e4m3, whatever its exponent
        raised = tl.maximum(tl.load(exponents + (start + shift) // BLOCK_J) - largest, -64.0) + UNIT_EXPONENT
        logits = product(q, tl.trans(k), zeros, PRECISION) * factor + (raised - bound)
        if MASKED:
            keys = start + tl.arange(0, BLOCK_J)
            visible = (keys[None, :] >= seen_low[:, None]) & (keys[None, :] < seen_high[:, None])
            logits = tl.where(visible, logits, -float("inf"))
        p = tl.exp2(logits)
        total += tl.sum(p, 1) * tl.exp2(-raised)
        acc = product(operand_order(to_e4m3(p, PRECISION)), tl.trans(v), acc, PRECISION)
    return acc, total


@triton.jit(do_not_specialize=SIZES)
def fp8_forward_kernel(
    qkv, key_rows, value_rows, exponents, q_scale, out, lse, q_norm, tiles, seen, fp8_below, num_tiles, tokens,
    row_length, batch, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCKS: tl.constexpr, HEAD_GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one sample and head, where both are computed in FP8 (`in_fp8`); elsewhere nothing.

    `key_rows`, `value_rows`: descriptors of what `quantise_kernel` wrote, as (B·H·row_length, D) and (B·H·D,
    row_length), with blocks (BLOCK_J, BLOCK_D) and (BLOCK_D, BLOCK_J); BLOCKS: a power of two, at least the blocks of a
    row. The rest as in the forward kernel.
    """
    tile, sample, head = place(tl.program_id(0), num_tiles, heads, HEAD_GROUP)
    scale = tl.load(q_scale + head)
    if in_fp8(tiles, tile, scale, fp8_below):
        start = tl.load(tiles + tile * FIELDS)
        stop = tl.load(tiles + tile * FIELDS + 1)
        low = tl.load(tiles + tile * FIELDS + 2)
        edge = tl.load(tiles + tile * FIELDS + 3)
        high = tl.load(tiles + tile * FIELDS + 4)
        shift = tl.load(tiles + tile * FIELDS + 5)
        stride = batch.to(tl.int64) * 3 * heads * D
        line = sample * heads + head
        at = line.to(tl.int64) * row_length + shift
        exponents += line.to(tl.int64) * (row_length // BLOCK_J)

        rows = start + tl.arange(0, BLOCK_M)
        own = rows < stop
        q = load_rows(qkv + (sample.to(tl.int64) * 3 * heads + head) * D, rows, stop, stride, D, BLOCK_D)
        q_inverse = inverse_norm(q)
        tl.store(q_norm + at + rows, q_inverse, mask=own)
        q8 = to_e4m3(q.to(tl.float32) * (q_inverse * UNIT)[:, None], PRECISION)
        seen_low = tl.load(seen + rows * 2, mask=own, other=0)
        seen_high = tl.load(seen + rows * 2 + 1, mask=own, other=tokens)
        blocks = (low + shift) // BLOCK_J + tl.arange(0, BLOCKS)
        walked = blocks * BLOCK_J < high + shift
        largest = tl.max(tl.load(exponents + blocks, mask=walked, other=-float("inf")), 0)

        bound = scale * LOG2_E
        factor = bound / (UNIT * UNIT)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc, total = attend_keys_fp8(
            acc, total, q8, factor, bound, key_rows, value_rows, exponents, largest, line, row_length, shift, low, edge,
            seen_low, seen_high, False, D, BLOCK_J, PRECISION,
        )  # fmt: skip
        acc, total = attend_keys_fp8(
            acc, total, q8, factor, bound, key_rows, value_rows, exponents, largest, line, row_length, shift, edge,
            high, seen_low, seen_high, True, D, BLOCK_J, PRECISION,
        )  # fmt: skip
        columns = tl.arange(0, BLOCK_D)
        keep = own[:, None] & (columns[None, :] < D)
        target = out + ((rows.to(tl.int64) * batch + sample) * heads + head)[:, None] * D + columns[None, :]
        found = acc * (tl.exp2(largest - UNIT_EXPONENT) / total)[:, None]
        tl.store(target, found.to(out.dtype.element_ty), mask=keep)
        tl.store(lse + at + rows, bound + tl.log2(total), mask=own)
