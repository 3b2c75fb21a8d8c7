"""The Triton attention kernels with FP8 products on a GPU, against float64: small scales in FP8, the others not."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_close, attention_errors

from hmar_mega.scales import PATCH_NUMS, Pattern, ScaleSchedule

pytestmark = pytest.mark.gpu

SCHEDULES = {**{str(r): p for r, p in PATCH_NUMS.items()}, "two": (1, 16), "odd": (1, 3, 7, 11, 17, 19, 23)}


@pytest.mark.parametrize("head_dim", [64, 128, 32, 96])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_output_and_gradients(pattern: Pattern, name: str, head_dim: int) -> None:
    """Output and gradients of q, k, v and the scale, into poisoned memory, from a gradient that is not contiguous."""
    schedule = ScaleSchedule(SCHEDULES[name])
    batch = 1 if schedule.num_tokens > 4000 else 3
    found = attention_errors(schedule, pattern, torch.bfloat16, head_dim, batch, "cuda", "triton_fp8")
    assert_close(found, torch.bfloat16, fp8_below=10.0)


def test_the_same_bits_again_and_through_torch_compile() -> None:
    """Forward and backward repeat themselves, and the operator is one node of torch.compile's graph."""
    from hmar_mega.kernels.scale_block_attention import scale_block_attention

    schedule = ScaleSchedule(PATCH_NUMS[512])
    qkv = torch.randn(schedule.num_tokens, 2, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scale = torch.tensor([4.0, 9.0, 10.0, 30.0], device="cuda", requires_grad=True)
    incoming = torch.randn(schedule.num_tokens, 2, 256, device="cuda", dtype=torch.bfloat16)

    def attend(qkv: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale_block_attention(qkv, scale, schedule, "block_diagonal", 10.0)

    first, compiled = attend(qkv, scale), torch.compile(attend, fullgraph=True)
    wanted = torch.autograd.grad(first, (qkv, scale), incoming)
    for again in (attend, compiled):
        out = again(qkv, scale)
        assert torch.equal(out, first)
        found = torch.autograd.grad(out, (qkv, scale), incoming)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
