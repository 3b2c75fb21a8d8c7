"""What the cross-entropy kernel is held to: float64 on fresh random logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernel_checks import poisoned_memory, relative

from hmar_mega.kernels.cross_entropy import cross_entropy

#: Largest relative error of the gradient by format; Triton's interpreter rounds bfloat16 towards zero, twice as coarse.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
INTERPRETED_TOLERANCE = TOLERANCE | {torch.bfloat16: 8e-3}


def check_against_float64(
    shape: tuple[int, ...], columns: int, dtype: torch.dtype, spread: float, device: str, tolerance: float
) -> None:
    """Losses within float32's rounding, the gradient within the format's, from a gradient that is not contiguous."""
    logits = (spread * torch.randn(*shape, columns, device=device) + 3 * spread).to(dtype)
    targets = torch.randint(columns, shape, device=device)
    incoming = torch.rand(*shape[::-1], device=device).permute(*range(len(shape))[::-1])
    exact = logits.double().requires_grad_()
    truth = F.cross_entropy(exact.flatten(0, -2), targets.flatten(), reduction="none").view(shape)
    (wanted,) = torch.autograd.grad(truth, exact, incoming.double())

    logits.requires_grad_()
    with poisoned_memory():
        losses = cross_entropy(logits, targets)
        (found,) = torch.autograd.grad(losses, logits, incoming)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), truth, rtol=2e-6, atol=2e-6)
    assert found.dtype == dtype
    assert relative(found, wanted) <= tolerance
    assert found.data_ptr() == logits.data_ptr(), "the gradient took memory of its own"
