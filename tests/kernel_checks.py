"""What every attention kernel is held to: the float64 reference on fresh random inputs, head by head."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hmar_mega.model.attention import scale_block_attention
from hmar_mega.scales import Pattern, ScaleSchedule

#: One head for each: where training starts, where a fixed maximum ends, and the largest there is.
Q_SCALES = (1.0, 4.0, 20.0, 41.5, 100.0)

Tolerance = dict[torch.dtype, tuple[tuple[float, float], tuple[float, float]]]

#: Largest relative error of output, and of the gradients of q, k and v, by dtype. Rounding of the logits grows with the
#: scale: the second pair is for scales above 20.
TOLERANCE: Tolerance = {
    torch.float32: ((4e-6, 1e-5), (4e-6, 4e-5)),
    torch.float16: ((1e-3, 2e-3), (1e-3, 4e-3)),
    torch.bfloat16: ((8e-3, 1.2e-2), (8e-3, 2.5e-2)),
}

#: The same in Triton's interpreter, which cuts bfloat16 off instead of rounding it: errors are twice as large, and all
#: to the same side.
INTERPRETED_TOLERANCE = TOLERANCE | {torch.bfloat16: ((1.2e-2, 4e-2), (1.2e-2, 8e-2))}

#: The same where products of the forward pass are made in FP8, up to a scale of 10.
FP8_TOLERANCE = (6e-2, 2e-2)

#: Largest error of the scale's gradient, relative to the root of the summed squares of its rows' terms.
SCALE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}


def mend_interpreter() -> None:
    """Let Triton 3.6's interpreter read loop bounds from memory under NumPy 2.4.

    It keeps a scalar as an array of one element, which NumPy no longer takes for a number.
    """
    from triton.runtime import interpreter

    theirs = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        theirs(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    mend_interpreter()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN: an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖; NaN where anything is NaN."""
    return float((found.detach().double() - truth.detach()).norm() / truth.detach().norm())


def scale_gradient_size(d_q: Tensor, q: Tensor, scale: float) -> float:
    """Root of the summed squares of the terms of one head's scale gradient, from (…, D) of q and its gradient.

    It is the sum over all rows of q̂·a: its terms are about as large as |a| ≈ |dq|·|q|/s, and cancel.
    """
    return float((d_q.norm(dim=-1) * q.norm(dim=-1)).detach().norm() / scale)


def attention_errors(
    schedule: ScaleSchedule,
    pattern: Pattern,
    dtype: torch.dtype,
    head_dim: int,
    batch: int,
    device: str,
    backend: str,
    q_scales: tuple[float, ...] = Q_SCALES,
) -> list[dict[str, float]]:
    """For each of `q_scales`, one head each: errors of output, dq, dk, dv, and of the scale's gradient.

    Inputs are drawn anew; lengths of q and k vary by orders of magnitude, and the incoming gradient is not contiguous.
    """
    heads, tokens = len(q_scales), schedule.num_tokens
    qkv = torch.randn(tokens, batch, 3, heads, head_dim, device=device)
    qkv[:, :, :2] *= 10 ** torch.empty(tokens, batch, 2, heads, 1, device=device).uniform_(-1, 1)
    qkv = qkv.to(dtype).requires_grad_()
    q_scale = torch.tensor(q_scales, device=device, requires_grad=True)
    incoming = torch.randn(batch, tokens, heads * head_dim, device=device).to(dtype).transpose(0, 1)
    with poisoned_memory():
        out = scale_block_attention(qkv, q_scale, schedule, pattern, backend)  # type: ignore[arg-type]
        d_qkv, d_scale = torch.autograd.grad(out, (qkv, q_scale), incoming)
    assert out.dtype == d_qkv.dtype == dtype
    assert d_scale.dtype == torch.float32

    exact, exact_scale = qkv.detach().double().requires_grad_(), q_scale.detach().double().requires_grad_()
    dense = "reference" if tokens < 4000 else "sdpa"  # one dense mask, or one dense matrix a scale
    truth = scale_block_attention(exact, exact_scale, schedule, pattern, dense)
    d_exact, d_exact_scale = torch.autograd.grad(truth, (exact, exact_scale), incoming.double())
    found = []
    by_head = (tokens, batch, heads, head_dim)
    for h, s in enumerate(q_scales):
        errors = {"out": relative(out.view(by_head)[:, :, h], truth.view(by_head)[:, :, h])}
        for i, name in enumerate(("dq", "dk", "dv")):
            errors[name] = relative(d_qkv[:, :, i, h], d_exact[:, :, i, h])
        size = scale_gradient_size(d_exact[:, :, 0, h], exact[:, :, 0, h], s)
        errors["scale"] = abs(float(d_scale[h].double() - d_exact_scale[h])) / size
        found.append(errors)
    return found


def assert_close(
    found: list[dict[str, float]],
    dtype: torch.dtype,
    tolerance: Tolerance = TOLERANCE,
    q_scales: tuple[float, ...] = Q_SCALES,
    fp8_below: float = 0.0,
) -> None:
    """Fail, naming head and gradient, unless every error is within the dtype's tolerance; NaN never is.

    Heads of a smaller scale than `fp8_below` have that of FP8, and must show that they were computed in it.
    """
    for s, errors in zip(q_scales, found, strict=True):
        out, gradient = FP8_TOLERANCE if s < fp8_below else tolerance[dtype][s > 20]
        assert s >= fp8_below or errors["out"] > 1e-2, f"scale {s}: {errors['out']:.2e} is too good for FP8"
        limits = {"out": out, "dq": gradient, "dk": gradient, "dv": gradient, "scale": SCALE_TOLERANCE[dtype]}
        for name, error in errors.items():
            assert error <= limits[name], f"scale {s}: {name} is off by {error:.2e}, allowed {limits[name]:.0e}"
