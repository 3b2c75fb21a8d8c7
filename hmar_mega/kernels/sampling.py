"""Guidance, top-k, top-p and the draw of a token in one launch: logits are read once and nothing is written but tokens.

The rules are those of `inference.sampler.sample_truncated`. The k-th largest logit, and the least one that top-p keeps,
are found without sorting: floats in order are integers in order, and the largest integer T with Σ weight·[key ≥ T] ≥
target is built bit by bit (weight 1 and target k; weight exp(x − max) and target p of their sum). Arithmetic is
float32, without fused multiply-adds, so that guided logits are bit for bit those of plain torch. Under
`TRITON_INTERPRET=1` (set before this file is imported) the same kernel runs on a CPU, slowly.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Most tokens in a codebook: one program holds a whole row.
LARGEST_VOCABULARY = 16384

#: Numbers that a program holds: rows of a small codebook share one.
PER_PROGRAM = 4096


#: Below the smallest number but 0 that `rng.uniform` gives.
LEAST_NUMBER = tl.constexpr(2.0**-25)


@triton.jit
def key_threshold(keys, weights, target):
    """(ROWS, 1) int32: the largest T of each row with Σ weights·[keys ≥ T] ≥ target (ROWS, 1); the least if none is."""
    found = tl.full(target.shape, -2147483648, tl.int64)
    step = tl.full([], 2147483648, tl.int64)
    for _ in range(32):
        tried = found + step
        reached = tl.sum(tl.where(keys >= tried.to(tl.int32), weights, 0.0), 1, keep_dims=True)
        found = tl.where(reached >= target, tried, found)
        step = step >> 1
    return found.to(tl.int32)


@triton.jit(do_not_specialize=["rows", "batch", "number_stride"])
def sample_kernel(
    logits, numbers, tokens, confidence, rows, batch, number_stride, conditional, unconditional, top_p,
    GUIDED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """logits (n, B or 2B, V); numbers (B, n) with rows `number_stride` apart; tokens, confidence (B, n)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    length = rows // batch
    position, sample = row // batch, row % batch
    inside = (row < rows) & (columns < V)
    halves = 2 if GUIDED else 1
    at = logits + (position.to(tl.int64) * halves * batch + sample) * V + columns
    x = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
    if GUIDED:
        other = tl.load(at + batch.to(tl.int64) * V, mask=inside, other=0.0).to(tl.float32)
        x = conditional * x - unconditional * other
    x = tl.where(x == 0.0, 0.0, x)  # −0 is 0: their integers differ
    bits = x.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    kept = inside
    if TOP_K > 0:
        ones = tl.full([ROWS, BLOCK], 1.0, tl.float32)
        kept = kept & (keys >= key_threshold(keys, ones, tl.full([ROWS, 1], TOP_K * 1.0, tl.float32)))
    highest = tl.max(x, 1, keep_dims=True)
    highest = tl.where(highest == -float("inf"), 0.0, highest)  # of rows without a possible token, as behind the last
    weights = tl.where(kept, tl.exp(x - highest), 0.0)
    if TOP_P:
        kept = kept & (keys >= key_threshold(keys, weights, top_p * tl.sum(weights, 1, keep_dims=True)))
        weights = tl.where(kept, weights, 0.0)
    reached = tl.cumsum(weights, 1)
    total = tl.max(reached, 1, keep_dims=True)
    number = tl.load(numbers + sample.to(tl.int64) * number_stride + position, mask=row < rows, other=0.0)
    # a number of exactly 0 would draw the first possible token however unlikely it is
    hit = (weights > 0.0) & (reached > tl.maximum(number, LEAST_NUMBER) * total)
    first = tl.min(tl.where(hit, columns, V), 1, keep_dims=True)
    # rounding of the sum may leave the very end of [0, 1) to nobody: it belongs to the last possible token
    last = tl.max(tl.where(weights > 0.0, columns, -1), 1, keep_dims=True)
    token = tl.where(first < V, first, tl.where(last >= 0, last, V - 1))
    drawn = tl.sum(tl.where(columns == token, weights, 0.0), 1, keep_dims=True) / total
    target = sample.to(tl.int64) * length + position
    tl.store(tokens + target, token.to(tl.int64), mask=row < rows)
    tl.store(confidence + target, drawn, mask=row < rows)


def sample_tokens(logits: Tensor, numbers: Tensor, strength: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw a token at every position; see `inference.sampler.sample_truncated` for the rules.

    Args:
        logits: (n, B, V) contiguous float16, bfloat16 or float32; with guidance (n, 2B, V), the unconditional half
            behind the conditional one.
        numbers: (B, n) float32, uniform in [0, 1).
        strength: t of the guided logits (1 + t)·conditional − t·unconditional; used where there are 2B samples.
        top_k, top_p: truncation; 0 and 1 keep all.

    Returns:
        tokens (B, n) int64 and their probability after truncation (B, n) float32.

    Raises:
        ValueError: shapes, formats or devices that the kernel does not take.
    """
    length, samples, vocabulary = logits.shape
    batch = numbers.shape[0]
    if logits.dtype not in DTYPES or vocabulary > LARGEST_VOCABULARY:
        raise ValueError(
            f"the sampling kernel takes float16, bfloat16 or float32 logits of at most {LARGEST_VOCABULARY} tokens, "
            f"not {vocabulary} in {logits.dtype}; use inference.sampler.sample_truncated"
        )
    if samples not in (batch, 2 * batch) or numbers.shape[1] != length or not logits.is_contiguous():
        raise ValueError(
            f"logits are {tuple(logits.shape)} with strides {logits.stride()}, numbers {tuple(numbers.shape)}: logits "
            "must be contiguous (n, B, V) or (n, 2B, V), numbers (B, n)"
        )
    if not logits.is_cuda and not interpreted():
        raise ValueError(
            f"the sampling kernel needs tensors on a CUDA GPU, not on {logits.device.type}; use "
            "inference.sampler.sample_truncated"
        )
    numbers = numbers if numbers.stride(1) == 1 else numbers.contiguous()
    tokens = torch.empty(batch, length, dtype=torch.int64, device=logits.device)
    confidence = torch.empty(batch, length, dtype=torch.float32, device=logits.device)
    block = triton.next_power_of_2(vocabulary)
    per_program = max(1, PER_PROGRAM // block)
    rows = batch * length
    with _device(logits):
        sample_kernel[(triton.cdiv(rows, per_program),)](
            logits, numbers, tokens, confidence, rows, batch, numbers.stride(0), 1 + strength, float(strength),
            float(top_p), GUIDED=samples == 2 * batch, TOP_K=top_k if top_k < vocabulary else 0, TOP_P=top_p < 1,
            V=vocabulary, BLOCK=block, ROWS=per_program, num_warps=8 if block <= PER_PROGRAM else 16,
            enable_fp_fusion=False,
        )  # fmt: skip
    return tokens, confidence


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernel, on any device."""
    return not isinstance(sample_kernel, triton.runtime.JITFunction)


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device("cpu")
