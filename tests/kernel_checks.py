"""What every attention kernel is held to: the float64 reference on fresh random inputs, head by head."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
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

#: Largest relative error of the scale's gradient, for scales up to 20 and above; see `telling_gradient`.
SCALE_TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float16: (5e-3, 5e-2), torch.bfloat16: (3e-2, 0.3)}


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


def telling_gradient(attend: Callable[[Tensor], Tensor], q_scale_H: Tensor) -> Tensor:
    """A random incoming gradient that also pulls every output the way in which it moves with its head's scale.

    Under a random one alone the terms of a scale's gradient cancel, and an error of all of it would not show.

    Args:
        attend: exact attention as a function of the scales, (N, B, H·D) float64.
    """
    with torch.no_grad():
        moved = attend(q_scale_H * 1.001) - attend(q_scale_H * 0.999)
    by_head = moved.unflatten(-1, (len(q_scale_H), -1))
    length = by_head.norm(dim=-1, keepdim=True)
    pull = torch.where(length > 1e-9, by_head / length.clamp(min=1e-9), 0.0) * by_head.shape[-1] ** 0.5
    return torch.randn_like(moved) + pull.flatten(-2)


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
    exact, exact_scale = qkv.detach().double().requires_grad_(), q_scale.detach().double().requires_grad_()
    dense = "reference" if tokens < 4000 else "sdpa"  # one dense mask, or one dense matrix a scale
    incoming = telling_gradient(lambda s: scale_block_attention(exact, s, schedule, pattern, dense), exact_scale)
    incoming = incoming.transpose(0, 1).contiguous().transpose(0, 1).to(dtype)
    with poisoned_memory():
        out = scale_block_attention(qkv, q_scale, schedule, pattern, backend)  # type: ignore[arg-type]
        d_qkv, d_scale = torch.autograd.grad(out, (qkv, q_scale), incoming)
    assert out.dtype == d_qkv.dtype == dtype
    assert d_scale.dtype == torch.float32

    truth = scale_block_attention(exact, exact_scale, schedule, pattern, dense)
    d_exact, d_exact_scale = torch.autograd.grad(truth, (exact, exact_scale), incoming.double())
    found = []
    by_head = (tokens, batch, heads, head_dim)
    for h in range(heads):
        errors = {"out": relative(out.view(by_head)[:, :, h], truth.view(by_head)[:, :, h])}
        for i, name in enumerate(("dq", "dk", "dv")):
            errors[name] = relative(d_qkv[:, :, i, h], d_exact[:, :, i, h])
        errors["scale"] = relative(d_scale[h], d_exact_scale[h])
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
        limits = {"out": out, "dq": gradient, "dk": gradient, "dv": gradient}
        # Cut off instead of rounded, as the interpreter does to bfloat16, outputs are all too small, and so are the
        # sums from which steep scales take their gradient: there it says nothing.
        scale_limit = SCALE_TOLERANCE[dtype][s > 20]
        if tolerance is TOLERANCE or dtype != torch.bfloat16:
            limits["scale"] = scale_limit
        elif s <= 20:
            limits["scale"] = 0.15
        for name, limit in limits.items():
            assert errors[name] <= limit, f"scale {s}: {name} is off by {errors[name]:.2e}, allowed {limit:.0e}"
