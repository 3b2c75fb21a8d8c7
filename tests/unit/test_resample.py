"""Resampling against F.interpolate in float64, for every size of the published schedules; token ids with either."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hmar_mega import resample
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule
from hmar_mega.tokenizer import quantizer
from hmar_mega.tokenizer.quantizer import MultiScaleQuantizer

PAIRS = [(p, patch_nums[-1]) for patch_nums in PATCH_NUMS.values() for p in patch_nums[:-1]]


def interpolated(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(x, size=(size, size), mode="bicubic")


@pytest.mark.parametrize(("small", "large"), [*PAIRS, (2, 5), (7, 11)])
def test_enlargement_is_that_of_interpolate(small: int, large: int):
    x = torch.randn(2, 3, small, small)
    exact = interpolated(x.double(), large)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):  # of bfloat16, its rounding of x
        found = resample.bicubic_up(x.to(dtype), large)
        assert found.dtype == torch.float32
        assert (found - exact).norm() <= limit * exact.norm()


def test_enlargement_of_a_transposed_map_and_its_gradient():
    rows = torch.randn(2, 9, 3, requires_grad=True)  # (B, p², Z), as codes come
    incoming = torch.randn(2, 3, 8, 8)
    wanted = torch.autograd.grad(interpolated(rows.transpose(1, 2).unflatten(2, (3, 3)), 8), rows, incoming)
    with torch.inference_mode():
        resample.bicubic_up(torch.zeros(1, 1, 3, 3), 8)  # a matrix made here must serve gradients too
    found = torch.autograd.grad(resample.bicubic_up(rows.transpose(1, 2).unflatten(2, (3, 3)), 8), rows, incoming)
    torch.testing.assert_close(found, wanted)


def test_autocast_does_not_reach_it():
    x = torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = resample.bicubic_up(x, 16)
    assert torch.equal(found, resample.bicubic_up(x, 16))


def test_averages_and_constants():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resample.area_down(x, 2).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert resample.area_down(x, 3)[0, 0, 1, 1] == x[0, 0, 1:3, 1:3].mean()
    torch.testing.assert_close(resample.bicubic_up(torch.full((1, 1, 2, 2), 3.0), 5), torch.full((1, 1, 5, 5), 3.0))


def test_the_same_size_is_the_identity():
    x = torch.randn(1, 2, 4, 4)
    assert resample.area_down(x, 4) is x
    assert resample.bicubic_up(x, 4) is x


def test_maps_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="3 × 4 cannot be enlarged to 8 × 8"):
        resample.bicubic_up(torch.zeros(1, 1, 3, 4), 8)


@torch.no_grad()
def test_token_ids_are_those_of_interpolate(monkeypatch: pytest.MonkeyPatch):
    """A rounding error may only decide between codes that are equally near, and what follows from that choice."""
    same = total = 0
    for seed in range(3):
        torch.manual_seed(seed)
        q = MultiScaleQuantizer(512, 8, ScaleSchedule(PATCH_NUMS[256]))
        f = 2 * torch.randn(16, 8, 16, 16)
        found = q.encode(f)
        with monkeypatch.context() as other:
            other.setattr(quantizer, "bicubic_up", interpolated)
            same += int((q.encode(f) == found).sum())
        total += found.numel()
    assert same >= 0.9999 * total, f"{total - same} of {total} token ids differ"
