"""Cross-entropy of rows of logits as one differentiable operator: each pass reads the logits once, in their own format.

−log p(target) = log Σ exp(x − max x) − (x_target − max x), and its gradient (softmax(x) − onehot)·g, which the backward
pass writes over the logits: no float32 copy, no probabilities and no second buffer of (rows, V) ever exist. Arithmetic
is float32. Under `TRITON_INTERPRET=1` (set before this file is imported) the same kernels run on a CPU, slowly.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Most columns that a program holds at a time.
LARGEST_BLOCK = 8192

#: Columns that each 32 threads of a program hold.
COLUMNS_PER_WARP = 512


@triton.jit
def forward_kernel(logits, targets, losses, log_sums, V: tl.constexpr, BLOCK: tl.constexpr):
    """−log p(target) and log Σ exp of one row: logits (rows, V), targets (rows,) int64, results (rows,) float32."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    maximum = tl.full([], -float("inf"), tl.float32)
    shift = tl.full([], 0.0, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    wanted = tl.full([], -float("inf"), tl.float32)  # stays there for a target that is no column
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(maximum, tl.max(x, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # a block may hold nothing but −inf
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift), 0)
        wanted = tl.maximum(wanted, tl.max(tl.where(columns == target, x, -float("inf")), 0))
        maximum = higher
    tl.store(losses + row, tl.log(total) - (wanted - shift))
    tl.store(log_sums + row, tl.log(total) + shift)


@triton.jit
def gradient_kernel(logits, targets, log_sums, incoming, V: tl.constexpr, BLOCK: tl.constexpr):
    """Replace the logits of one row by (softmax − onehot)·incoming; shapes as in `forward_kernel`, incoming float32."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    log_sum = tl.load(log_sums + row)
    factor = tl.load(incoming + row)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        at = logits + row * V + columns
        x = tl.load(at, mask=columns < V, other=0.0).to(tl.float32)
        gradient = (tl.exp(x - log_sum) - tl.where(columns == target, 1.0, 0.0)) * factor
        tl.store(at, gradient.to(logits.dtype.element_ty), mask=columns < V)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p(target) of every row.

    Args:
        logits: (…, V) contiguous float16, bfloat16 or float32. The backward pass overwrites them with their gradient:
            nothing else may read them after this call. What autograd itself still needs of them it refuses to lose,
            a second backward pass over the same graph included.
        targets: (…) int64 in [0, V); another target costs +inf.

    Returns:
        (…) float32.

    Raises:
        ValueError: shapes, formats or devices that the kernels do not take.
    """
    if logits.dtype not in DTYPES or targets.dtype != torch.int64:
        raise ValueError(
            f"cross-entropy takes logits in float16, bfloat16 or float32 and targets in int64, not {logits.dtype} and "
            f"{targets.dtype}"
        )
    if logits.shape[:-1] != targets.shape or not logits.is_contiguous():
        raise ValueError(
            f"logits are {tuple(logits.shape)} with strides {logits.stride()}, targets {tuple(targets.shape)}: logits "
            "must be contiguous, with one row for each target"
        )
    if not logits.is_cuda and not logits.is_meta and not interpreted():
        raise ValueError(
            f"the cross-entropy kernels need tensors on a CUDA GPU, not on {logits.device.type}; use "
            "torch.nn.functional.cross_entropy"
        )
    losses, _ = _forward(logits, targets.contiguous())
    return losses


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


@torch.library.custom_op("hmar_mega::cross_entropy", mutates_args=())
def _forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and, for the backward pass, log Σ exp, each of the shape of `targets`, float32."""
    losses, log_sums = _like_targets(targets), _like_targets(targets)
    with _device(logits):
        forward_kernel[(targets.numel(),)](logits, targets, losses, log_sums, **_launch(logits.shape[-1]))
    return losses, log_sums


@_forward.register_fake
def _(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _like_targets(targets), _like_targets(targets)


@torch.library.custom_op("hmar_mega::cross_entropy_gradient_", mutates_args=("logits",))
def _replace_by_gradient(logits: Tensor, targets: Tensor, log_sums: Tensor, incoming: Tensor) -> None:
    """Overwrite the logits with their gradient, given that of the losses."""
    incoming = incoming.float().contiguous()
    with _device(logits):
        gradient_kernel[(targets.numel(),)](logits, targets, log_sums, incoming, **_launch(logits.shape[-1]))


@_replace_by_gradient.register_fake
def _(logits: Tensor, targets: Tensor, log_sums: Tensor, incoming: Tensor) -> None:
    return None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor, None]:
    logits, targets, log_sums = ctx.saved_tensors
    _replace_by_gradient(logits, targets, log_sums, incoming)
    return logits, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _like_targets(targets: Tensor) -> Tensor:
    return torch.empty_like(targets, dtype=torch.float32)


def _launch(columns: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(columns), LARGEST_BLOCK)
    return {"V": columns, "BLOCK": block, "num_warps": max(1, block // COLUMNS_PER_WARP)}


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device("cpu")
