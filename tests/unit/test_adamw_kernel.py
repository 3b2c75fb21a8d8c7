"""The single-pass AdamW kernel against torch's AdamW in float64, interpreted without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from hmar_mega.kernels.adamw import BLOCK, Chunks, Update, accumulate_, adamw_, total_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: Sizes of which every tensor starts at a multiple of eight elements, and such that none but the first does.
LENGTHS = {"aligned": (BLOCK + 8, 64, 16), "odd": (BLOCK + 3, 1, 130)}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
def test_updates_are_those_of_torch(lengths: tuple[int, ...], dtype: torch.dtype, clip: float) -> None:
    count = sum(lengths)
    masters, moments = torch.randn(count, device=DEVICE), torch.zeros(2, count, device=DEVICE)
    weights = torch.full((count,), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    exact = masters.double().requires_grad_()
    reference = torch.optim.AdamW([exact], betas=(0.9, 0.95), eps=1e-8)
    chunks = Chunks(lengths, DEVICE)
    assert chunks.aligned == (lengths == LENGTHS["aligned"])
    for step in range(1, 4):
        gradients = [torch.randn(n, device=DEVICE).to(dtype) for n in lengths]
        norm = total_norm(gradients)
        for group in reference.param_groups:
            group.update(lr=0.01 * step, weight_decay=0.1 * step)
        update = Update(0.01 * step, 0.1 * step, (0.9, 0.95), 1e-8, step, clip)
        adamw_(masters, *moments, weights, gradients, chunks, norm, update)
        exact.grad = torch.cat(gradients).double()
        torch.testing.assert_close(norm.double(), exact.grad.norm(), rtol=1e-5, atol=0)
        if clip:
            torch.nn.utils.clip_grad_norm_([exact], clip)
        reference.step()
        torch.testing.assert_close(masters.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    state = reference.state[exact]
    torch.testing.assert_close(moments[0].double(), state["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(moments[1].double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-8)
    assert torch.equal(weights, masters.bfloat16())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_norm_that_is_not_finite_changes_nothing(bad: float) -> None:
    tensors = [torch.randn(100, device=DEVICE) for _ in range(3)]
    weights = torch.randn(100, device=DEVICE).bfloat16()
    before = [t.clone() for t in (*tensors, weights)]
    gradients = [torch.randn(100, device=DEVICE)]
    gradients[0][50] = bad
    norm = total_norm(gradients)
    assert not norm.isfinite()
    adamw_(*tensors, weights, gradients, Chunks([100], DEVICE), norm, Update(0.1, 0.1, (0.9, 0.95), 1e-8, 1, 1.0))
    for now, then in zip((*tensors, weights), before, strict=True):
        assert torch.equal(now, then)


def test_gradients_of_another_layout_are_refused() -> None:
    chunks, update = Chunks([100], DEVICE), Update(0.1, 0.1, (0.9, 0.95), 1e-8, 1, 1.0)
    tensors = [torch.randn(100, device=DEVICE) for _ in range(4)]
    norm = torch.ones((), device=DEVICE)
    with pytest.raises(ValueError, match="99 gradients; these chunks are of 100 elements"):
        adamw_(*tensors, [torch.randn(99, device=DEVICE)], chunks, norm, update)
    with pytest.raises(ValueError, match="must be contiguous and all float32 or all bfloat16"):
        adamw_(*tensors, [torch.randn(100, device=DEVICE).half()], chunks, norm, update)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_copied_and_added_in_float32(dtype: torch.dtype) -> None:
    total = torch.full((BLOCK + 5,), torch.nan, device=DEVICE)
    first, second = (torch.randn(BLOCK + 5, device=DEVICE).to(dtype) for _ in range(2))
    accumulate_(total, first, add=False)
    assert torch.equal(total, first.float())
    accumulate_(total, second, add=True)
    assert torch.equal(total, first.float() + second.float())
