"""The attention kernels in Triton's interpreter, where there is no GPU: small sizes, every kind of launch."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import INTERPRETED_TOLERANCE, assert_close, attention_errors, poisoned_memory, relative

from hmar_mega.model.attention import scale_block_attention as attend
from hmar_mega.scales import PATCH_NUMS, Pattern, ScaleSchedule

pytest.importorskip("triton", reason="the kernels need Triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu has these for GPUs", allow_module_level=True)

from hmar_mega.kernels import scale_block_attention as kernels

#: By head dim: one packed tile, and at 64 a packed tile before a scale of two blocks.
SCHEDULES = {32: (1, 2, 7), 64: (1, 2, 9), 96: (1, 3, 7), 128: (1, 2, 3, 6)}
#: A head with a fixed maximum and one with a running one.
Q_SCALES = (4.0, 100.0)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATTERNS = ["block_diagonal", "block_causal"]


@pytest.mark.parametrize("head_dim", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_output_and_gradients(pattern: Pattern, dtype: torch.dtype, head_dim: int):
    """As on a GPU, but with fixed numbers: among so few positions gradients may happen to cancel."""
    torch.manual_seed(head_dim)
    schedule = ScaleSchedule(SCHEDULES[head_dim])
    errors = attention_errors(schedule, pattern, dtype, head_dim, 1, "cpu", "triton", Q_SCALES)
    assert_close(errors, dtype, INTERPRETED_TOLERANCE, Q_SCALES)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_launches_of_long_sequences(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    """Blocks of 128, lengths of keys computed beforehand, and two launches for the two halves of the backward pass."""
    torch.manual_seed(0)
    plan = kernels.plan_for(ScaleSchedule(PATCH_NUMS[512]), pattern, torch.bfloat16, 64)
    assert plan.forward.block == 128
    assert not plan.inline_norm
    assert plan.keys != plan.queries
    monkeypatch.setattr(kernels, "plan_for", lambda *problem: plan)
    errors = attention_errors(ScaleSchedule((1, 2, 8)), pattern, torch.bfloat16, 64, 2, "cpu", "triton", Q_SCALES)
    assert_close(errors, torch.bfloat16, INTERPRETED_TOLERANCE, Q_SCALES)


def test_a_scale_that_is_no_number_shows_in_its_head_alone() -> None:
    """NaN is the output of that head, not what memory held before."""
    schedule = ScaleSchedule((1, 2, 4))
    qkv = torch.randn(schedule.num_tokens, 1, 3, 2, 32)
    with poisoned_memory():
        out = attend(qkv, torch.tensor([4.0, float("nan")]), schedule, "block_diagonal", "triton")
    assert out[..., :32].isfinite().all()
    assert out[..., 32:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_zeros_leave_the_other_gradients_right(dtype: torch.dtype) -> None:
    """A q and a k of length zero, whose inverse float16 does not hold. Their own gradients are divided by eps."""
    torch.manual_seed(0)
    schedule = ScaleSchedule((1, 2, 4))
    qkv = torch.randn(schedule.num_tokens, 1, 3, 1, 32)
    qkv[7, 0, 0], qkv[9, 0, 1] = 0.0, 0.0
    qkv = qkv.to(dtype).requires_grad_()
    incoming = torch.randn(schedule.num_tokens, 1, 32)
    exact = qkv.detach().double().requires_grad_()
    gradients = []
    for x, backend in ((qkv, "triton"), (exact, "reference")):
        out = attend(x, torch.tensor([4.0]), schedule, "block_diagonal", backend)
        (gradient,) = torch.autograd.grad(out, x, incoming.to(x.dtype))
        gradient = gradient.clone()
        gradient[7, 0, 0], gradient[9, 0, 1] = 0.0, 0.0
        gradients.append(gradient)
    assert relative(*gradients) < 2e-2
