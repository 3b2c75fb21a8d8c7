"""AdamW of mixed-precision training in one pass, and the addition of gradients into float32.

An update reads the gradients once, in the format they are in, and writes float32 masters, both moments and the weights
that the next step computes with; clipping and the decision not to update are made on the GPU. Under
`TRITON_INTERPRET=1` (set before this file is imported) the same kernels run on a CPU, slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of a program.
BLOCK = 4096

#: Largest gradient norm is divided by the norm plus this, as `torch.nn.utils.clip_grad_norm_` does.
CLIP_EPS = tl.constexpr(1e-6)

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

#: Elements that are read at a time where every tensor starts and ends at a multiple of them.
VECTOR = 8


@dataclass(frozen=True)
class Update:
    """Numbers of one AdamW update (Loshchilov and Hutter, 2019, algorithm 2).

    Attributes:
        lr, weight_decay, betas, eps: as in `torch.optim.AdamW`.
        step: 1 for the first update.
        clip: largest norm of all gradients together; 0 for any.
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    step: int
    clip: float


class Chunks:
    """How consecutive gradients, tensors of their own, lie over flat masters, moments and weights: made once.

    Args:
        lengths: elements of each gradient, in the order in which they lie.
        device: of the tensors.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        rows, place = [], 0
        for owner, length in enumerate(lengths):
            starts = range(0, length, BLOCK)
            rows += [(owner, start, place + start, min(BLOCK, length - start)) for start in starts]
            place += length
        self.total = place
        self.count = len(rows)
        self.aligned = all(length % VECTOR == 0 for length in lengths)
        self.table = torch.tensor(rows, dtype=torch.int64).view(-1, 4).to(device)

    def addresses(self, gradients: Sequence[Tensor]) -> Tensor:
        """Where the gradients are: (tensors,) int64 on their device."""
        found = torch.tensor([g.data_ptr() for g in gradients], dtype=torch.int64)
        return found.to(self.table.device, non_blocking=True)


@triton.jit
def adamw_kernel(
    masters, exp_avg, exp_avg_sq, weights, addresses, table, norm, lr, kept, beta1, beta2, step_size, root_correction2,
    eps, clip, DTYPE: tl.constexpr, CLIPS: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk: see `adamw_`. A norm that is no finite number: nothing is written."""
    row = table + tl.program_id(0).to(tl.int64) * 4
    owner, start, place, length = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    total = tl.load(norm)
    if total < float("inf"):
        if ALIGNED:
            start, place, length = (
                tl.multiple_of(start, VECTOR), tl.multiple_of(place, VECTOR), tl.multiple_of(length, VECTOR)
            )  # fmt: skip
        i = tl.arange(0, BLOCK)
        mask = i < length
        gradients = tl.load(addresses + owner).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            gradients = tl.multiple_of(gradients, 16)
        g = tl.load(gradients + start + i, mask=mask, other=0.0).to(tl.float32)
        if CLIPS:
            g *= tl.minimum(clip / (total + CLIP_EPS), 1.0)
        at = place + i
        m = tl.load(exp_avg + at, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
        p = tl.load(masters + at, mask=mask, other=0.0) * kept
        m += (g - m) * (1.0 - beta1)
        v = v * beta2 + g * g * (1.0 - beta2)
        p -= step_size * (m / (tl.sqrt(v) / root_correction2 + eps))
        tl.store(exp_avg + at, m, mask=mask)
        tl.store(exp_avg_sq + at, v, mask=mask)
        tl.store(masters + at, p, mask=mask)
        if INTERPRETED:  # Triton's interpreter cuts digits off: round to bfloat16's eight bits beforehand
            carried = p * (2.0**16 + 1.0)
            p = carried - (carried - p)
        tl.store(weights + at, p.to(weights.dtype.element_ty), mask=mask)


@triton.jit
def accumulate_kernel(total, gradient, count, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """total ← gradient, or total + gradient where ADD; float32 and any format."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    g = tl.load(gradient + i, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        g += tl.load(total + i, mask=mask, other=0.0)
    tl.store(total + i, g, mask=mask)


def adamw_(
    masters: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weights: Tensor, gradients: Sequence[Tensor], chunks: Chunks,
    norm: Tensor, update: Update,
) -> None:  # fmt: skip
    """Update masters and moments (n,) float32 in place, and write the masters, rounded, to `weights` (n,).

    Args:
        gradients: contiguous float32 or bfloat16 tensors, all of one format, which lie over the masters as `chunks`
            says.
        norm: of all gradients of the model, () float32 on the device; not finite: nothing changes.

    Raises:
        ValueError: gradients that are not what `chunks` was made for.
    """
    dtype = gradients[0].dtype
    if dtype not in TRITON_DTYPES or any(g.dtype != dtype or not g.is_contiguous() for g in gradients):
        raise ValueError(f"gradients must be contiguous and all float32 or all bfloat16, not {dtype} and others")
    if sum(g.numel() for g in gradients) != chunks.total or chunks.total > masters.numel():
        raise ValueError(f"{sum(g.numel() for g in gradients)} gradients; these chunks are of {chunks.total} elements")
    beta1, beta2 = update.betas
    adamw_kernel[(chunks.count,)](
        masters, exp_avg, exp_avg_sq, weights, chunks.addresses(gradients), chunks.table, norm, update.lr,
        1.0 - update.lr * update.weight_decay, beta1, beta2, update.lr / (1.0 - beta1**update.step),
        (1.0 - beta2**update.step) ** 0.5, update.eps, update.clip, DTYPE=TRITON_DTYPES[dtype], CLIPS=update.clip > 0,
        ALIGNED=chunks.aligned and all(g.data_ptr() % 16 == 0 for g in gradients),
        INTERPRETED=not isinstance(adamw_kernel, triton.runtime.JITFunction), VECTOR=VECTOR, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def accumulate_(total: Tensor, gradient: Tensor, add: bool) -> None:
    """total ← gradient, or total + gradient: contiguous, of equal size, `total` float32."""
    count = total.numel()
    accumulate_kernel[(triton.cdiv(count, BLOCK),)](total, gradient, count, ADD=add, BLOCK=BLOCK, num_warps=8)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """2-norm of all together, () float32; infinite or NaN where one of them is."""
    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float32)).square().sum().sqrt()
