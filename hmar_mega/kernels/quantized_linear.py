"""Linears of 8-bit weights: int8 weights brought to the input's format in registers; inputs rounded to e4m3.

With few rows a linear takes as long as its weights take to be read, and int8 halves that beside bf16. Products are
summed in float32; the channel's scale, bias and GELU are applied to the sum, which is rounded once. Forward only, for
sampling. Under `TRITON_INTERPRET=1` (set before this file is imported) the same kernels run on a CPU, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmar_mega.kernels.adaln import gelu_parts
from hmar_mega.kernels.scale_block_forward import product
from hmar_mega.kernels.scale_block_fp8 import to_e4m3

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Largest number of e4m3.
E4M3_MAX = 448.0

#: Numbers that a program rounds.
ROUNDED = 2048


@dataclass(frozen=True)
class Tile:
    """Sizes of one program: rows and output channels it makes, inputs it sums over at a time; warps and stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


#: By the most rows that a tile is for. A few rows need many programs with long reads in flight, since the smallest
#: layers have no more than 1 024 output channels; many rows need large products. Reckoned, not measured.
TILES = ((16, Tile(16, 16, 512, 4, 4)), (32, Tile(32, 16, 256, 4, 4)), (64, Tile(64, 32, 128, 4, 4)))
LARGE_TILE = Tile(128, 128, 64, 8, 3)

#: float32 operands take twice the memory of a stage.
FLOAT32_TILE = Tile(16, 16, 128, 4, 2)


@triton.jit(do_not_specialize=["rows"])
def int8_linear_kernel(
    x, weight, scale, bias, out, rows, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x (rows, K), weight (N, K) int8, scale (N,) float32, bias (N,) → out (rows, N); blocks of rows vary fastest."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_at = x + row.to(tl.int64)[:, None] * K + inner[None, :]
    weight_at = weight + column[:, None] * K + inner[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(x_at + start, mask=(row < rows)[:, None], other=0.0)
            b = tl.load(weight_at + start, mask=(column < N)[:, None], other=0)
        else:
            left = (inner < K - start)[None, :]
            a = tl.load(x_at + start, mask=(row < rows)[:, None] & left, other=0.0)
            b = tl.load(weight_at + start, mask=(column < N)[:, None] & left, other=0)
        if PRECISION == "interpreted":  # the interpreter takes the bits of an int8 for those of a bfloat16
            b = b.to(tl.float32)
        acc = product(a, tl.trans(b.to(a.dtype)), acc, PRECISION)
    acc *= tl.load(scale + column, mask=column < N, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        part, _ = gelu_parts(acc)
        acc *= part
    at = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["count"])
def round_kernel(x, scale, out, count, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """out (count,) e4m3 = x/scale, cut off at ±448; scale () float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32) / tl.load(scale)
    value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    tl.store(out + at, to_e4m3(value, PRECISION), mask=at < count)


def int8_linear(
    x: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """scale·(x·Wᵀ) + bias, and GELU (tanh form) of it where asked.

    Args:
        x: (…, K) contiguous float16, bfloat16 or float32.
        weight_NK: (N, K) int8, contiguous.
        scale_N: (N,) float32.
        bias_N: (N,) in any float format, or None.

    Returns:
        (…, N) in x's format.

    Raises:
        ValueError: shapes, formats or devices that the kernel does not take.
    """
    channels, inner = weight_NK.shape
    if x.dtype not in DTYPES or weight_NK.dtype != torch.int8 or x.shape[-1] != inner:
        raise ValueError(
            f"x is {tuple(x.shape)} in {x.dtype}, weights {tuple(weight_NK.shape)} in {weight_NK.dtype}: the kernel "
            "takes (…, K) in float16, bfloat16 or float32, and (N, K) in int8"
        )
    if not (x.is_contiguous() and weight_NK.is_contiguous()):
        raise ValueError(f"x has strides {x.stride()}, weights {weight_NK.stride()}: both must be contiguous")
    _check_device(x)
    rows = x.numel() // inner
    out = x.new_empty(*x.shape[:-1], channels)
    tile = tile_for(rows, x.dtype)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(channels, tile.columns),)
    with _device(x):
        int8_linear_kernel[grid](
            x, weight_NK, scale_N, scale_N if bias_N is None else bias_N, out, rows, N=channels, K=inner,
            BIAS=bias_N is not None, GELU=gelu, PRECISION="interpreted" if interpreted() else "ieee",
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=min(tile.inner, triton.next_power_of_2(max(inner, 16))),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def tile_for(rows: int, dtype: torch.dtype) -> Tile:
    """The tile of so many rows."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    return next((tile for most, tile in TILES if rows <= most), LARGE_TILE)


def round_to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x/scale, cut off at ±448 and rounded to the nearest e4m3, in one launch.

    Args:
        x: any shape, contiguous float16, bfloat16 or float32.
        scale: () float32, on x's device.

    Returns:
        x's shape, float8_e4m3fn.

    Raises:
        ValueError: when x is not contiguous, or on a device that the kernel does not run on.
    """
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}: it must be contiguous")
    _check_device(x)
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    with _device(x):
        round_kernel[(triton.cdiv(x.numel(), ROUNDED),)](
            x, scale, out, x.numel(), BLOCK=ROUNDED, PRECISION="interpreted" if interpreted() else "ieee"
        )
    return out


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device."""
    return not isinstance(int8_linear_kernel, triton.runtime.JITFunction)


def _check_device(x: Tensor) -> None:
    if not x.is_cuda and not interpreted():
        raise ValueError(
            f"the kernels of 8-bit linears need tensors on a CUDA GPU, not on {x.device.type}; "
            "model.layers_quantized computes the same in plain torch"
        )


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device("cpu")
