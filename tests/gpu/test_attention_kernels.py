"""The Triton attention kernels on a GPU, against float64, for every schedule, pattern, number format and head dim."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_close, attention_errors

from hmar_mega.scales import PATCH_NUMS, Pattern, ScaleSchedule

pytestmark = pytest.mark.gpu

SCHEDULES = {
    **{str(r): p for r, p in PATCH_NUMS.items()},
    "two": (1, 16),
    "odd": (1, 3, 7, 11, 13, 17, 19, 23),
    "steep": (1, 2, 31, 45),
}


@pytest.mark.parametrize("head_dim", [64, 128, 32, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_output_and_gradients(pattern: Pattern, name: str, dtype: torch.dtype, head_dim: int) -> None:
    """Output and gradients of q, k, v and the scale, into poisoned memory, from a gradient that is not contiguous."""
    schedule = ScaleSchedule(SCHEDULES[name])
    batch = 1 if schedule.num_tokens > 4000 else 3
    assert_close(attention_errors(schedule, pattern, dtype, head_dim, batch, "cuda", "triton"), dtype)


@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_backward_repeats_itself(pattern: Pattern) -> None:
    """Gradients are the same bits from call to call."""
    from hmar_mega.kernels.scale_block_attention import scale_block_attention

    schedule = ScaleSchedule(PATCH_NUMS[512])
    qkv = torch.randn(schedule.num_tokens, 2, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scale = torch.full((4,), 4.0, device="cuda", requires_grad=True)
    incoming = torch.randn(schedule.num_tokens, 2, 256, device="cuda", dtype=torch.bfloat16)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(scale_block_attention(qkv, scale, schedule, pattern), (qkv, scale), incoming)

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_compiled_and_recomputed() -> None:
    """The operator is one node of torch.compile's graph, and non-reentrant recomputation gives the same gradients."""
    from hmar_mega.kernels.scale_block_attention import scale_block_attention

    schedule = ScaleSchedule(PATCH_NUMS[256])
    qkv = torch.randn(schedule.num_tokens, 2, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scale = torch.full((2,), 4.0, device="cuda", requires_grad=True)

    def attend(qkv: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale_block_attention(qkv * 1.5, scale, schedule, "block_diagonal").sin()

    plain = attend(qkv, scale)
    wanted = torch.autograd.grad(plain.sum(), (qkv, scale))
    compiled = torch.compile(attend, fullgraph=True)(qkv, scale)
    torch.testing.assert_close(compiled, plain, rtol=2e-2, atol=2e-2)
    for found, truth in zip(torch.autograd.grad(compiled.sum(), (qkv, scale)), wanted, strict=True):
        assert (found - truth).norm() <= 2e-2 * truth.norm()
    again = torch.utils.checkpoint.checkpoint(attend, qkv, scale, use_reentrant=False)
    for found, truth in zip(torch.autograd.grad(again.sum(), (qkv, scale)), wanted, strict=True):
        assert torch.equal(found, truth)
