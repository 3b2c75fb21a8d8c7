"""The block's elementwise work: plain torch anywhere, one fused Triton kernel each on a GPU.

Axes: N sequence, B batch, C width. Both ways compute the same formulas; the kernels do it in float32 inside.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

LAYER_NORM_EPS = 1e-6


def modulated_norm(x_NBC: Tensor, scale_BC: Tensor, shift_BC: Tensor) -> Tensor:
    """LN(x)·(1 + scale) + shift, LN without affine, eps 1e-6."""
    if fused(x_NBC.device.type, x_NBC.dtype):
        from hmar_mega.kernels.adaln import AdaLN

        return AdaLN.apply(x_NBC, None, None, None, scale_BC, shift_BC, LAYER_NORM_EPS)[1]
    return F.layer_norm(x_NBC, x_NBC.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale_BC) + shift_BC


def gated_residual(x_NBC: Tensor, branch_NBC: Tensor, bias_C: Tensor | None, gamma_BC: Tensor) -> Tensor:
    """x + γ·(branch + bias); no bias: the branch has it."""
    if fused(x_NBC.device.type, x_NBC.dtype):
        from hmar_mega.kernels.adaln import AdaLN

        return AdaLN.apply(x_NBC, branch_NBC, bias_C, gamma_BC, None, None, LAYER_NORM_EPS)[0]
    return x_NBC + gamma_BC * (branch_NBC if bias_C is None else branch_NBC + bias_C)


def gated_residual_norm(
    x_NBC: Tensor, branch_NBC: Tensor, bias_C: Tensor | None, gamma_BC: Tensor, scale_BC: Tensor, shift_BC: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and the `modulated_norm` of it."""
    if fused(x_NBC.device.type, x_NBC.dtype):
        from hmar_mega.kernels.adaln import AdaLN

        return AdaLN.apply(x_NBC, branch_NBC, bias_C, gamma_BC, scale_BC, shift_BC, LAYER_NORM_EPS)
    x_NBC = gated_residual(x_NBC, branch_NBC, bias_C, gamma_BC)
    return x_NBC, modulated_norm(x_NBC, scale_BC, shift_BC)


def bias_gelu(x: Tensor, bias_C: Tensor | None) -> Tensor:
    """GELU(x + bias), tanh form; (…, C)."""
    if bias_C is not None and fused(x.device.type, x.dtype):
        from hmar_mega.kernels.adaln import BiasGelu

        return BiasGelu.apply(x, bias_C)
    return F.gelu(x if bias_C is None else x + bias_C, approximate="tanh")


def gelu_input(x: Tensor, bias_C: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What `bias_gelu` is to take so that it keeps nothing else: in plain torch GELU keeps the sum, not x."""
    if bias_C is None or fused(x.device.type, x.dtype):
        return x, bias_C
    return x + bias_C, None


def shortened(x: Tensor, length: int) -> Tensor:
    """The first `length` rows; x itself where it has no more, since the gradient of a slice is a copy."""
    return x if x.shape[0] == length else x[:length]


@contextmanager
def recomputed(value: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Within: an operation that keeps the whole of `value` for its gradient keeps `compute` instead.

    For values that are cheap to compute again from what is kept anyway: norms, activations. `compute` must not need
    gradients; it is called once for every operation that kept the value.
    """

    def pack(kept: Tensor) -> Any:
        same = kept.untyped_storage()._cdata == storage and kept.numel() == size and kept.is_contiguous()
        return (compute, kept.shape) if same else kept

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        function, shape = packed
        with torch.no_grad():
            again: Tensor = function().view(shape)
        return again

    # not the address: tensors without memory, in which a step is traced, have none
    storage, size = value.untyped_storage()._cdata, value.numel()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@cache
def fused(device: str, dtype: torch.dtype) -> bool:
    """Whether the kernels take such tensors; says once what was chosen."""
    if device != "cuda":
        chosen = f"plain torch: the fused kernels need a CUDA GPU, not {device}"
    elif importlib.util.find_spec("triton") is None:
        chosen = "plain torch: the fused kernels need Triton, which is not installed"
    elif dtype not in (torch.float32, torch.float16, torch.bfloat16):
        chosen = f"plain torch: the fused kernels do not take {dtype}"
    else:
        chosen = "fused Triton kernels"
    log.info("AdaLN, residuals and GELU in %s: %s", str(dtype).removeprefix("torch."), chosen)
    return chosen.startswith("fused")
