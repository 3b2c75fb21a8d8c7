"""L2 normalisation of q and k in place, and the learned scale of q: one launch ahead of a dense attention (SPEC §3).

Forward only, for sampling. Arithmetic is float32. Under `TRITON_INTERPRET=1` (set before this file is imported) the
same kernel runs on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Vectors of one head that a program normalises.
VECTORS = 32

#: Of the length that a vector is divided by, as `torch.nn.functional.normalize` has it.
LEAST_LENGTH = 1e-12


@triton.jit(do_not_specialize=["vectors"])
def normalise_kernel(
    qkv, q_scale, vectors, least, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, VECTORS: tl.constexpr
):
    """qkv (rows, 3, H, D) in place; q_scale (H,) float32; `vectors` = rows·2·H, those of q and k."""
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    row, own = vector // (2 * H), vector % (2 * H)
    inside = (vector < vectors) & (columns < D)
    at = qkv + (row.to(tl.int64) * (3 * H) + own) * D + columns
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 1, keep_dims=True)), least)
    scale = tl.load(q_scale + own % H, mask=(own < H) & (vector < vectors), other=1.0)
    tl.store(at, (x / length * scale).to(qkv.dtype.element_ty), mask=inside)


def normalise_qk_(qkv_NB3HD: Tensor, q_scale_H: Tensor) -> Tensor:
    """Make every q of length q_scale and every k of length 1, in place.

    Args:
        qkv_NB3HD: packed projection (N, B, 3, H, D), contiguous, any float format.
        q_scale_H: (H,) float32.

    Returns:
        `qkv_NB3HD`.

    Raises:
        ValueError: when it is not contiguous.
    """
    if not qkv_NB3HD.is_contiguous():
        raise ValueError(f"qkv has strides {qkv_NB3HD.stride()}: it must be contiguous (N, B, 3, H, D)")
    tokens, batch, _, heads, width = qkv_NB3HD.shape
    vectors = tokens * batch * 2 * heads
    with _device(qkv_NB3HD):
        normalise_kernel[(triton.cdiv(vectors, VECTORS),)](
            qkv_NB3HD, q_scale_H, vectors, LEAST_LENGTH, H=heads, D=width, BLOCK_D=triton.next_power_of_2(width),
            VECTORS=VECTORS,
        )  # fmt: skip
    return qkv_NB3HD


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device("cpu")
