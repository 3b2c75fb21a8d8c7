"""The FP8 attention kernels against their own arithmetic in torch: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import poisoned_memory, relative, telling_gradient
from torch import Tensor

from hmar_mega.kernels import tiles
from hmar_mega.model.attention import scale_block_attention as attend
from hmar_mega.scales import Pattern, ScaleSchedule

pytest.importorskip("triton")
from hmar_mega.kernels.scale_block_attention import scale_block_attention
from hmar_mega.kernels.scale_block_fp8 import FP8_BELOW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Tokens of the last scale alone see 256 keys or more: five blocks of keys, the last of them not full.
SCHEDULE = ScaleSchedule((1, 2, 17))
LARGE = SCHEDULE.span(2)

#: Two heads in FP8 and one that is not.
Q_SCALE = (1.0, 9.9, 10.0)


def make_qkv(head_dim: int) -> Tensor:
    """(N, 1, 3, H, D) bf16; values of one block of keys are 50 times those of the others, of another 1e-4 times."""
    qkv = torch.randn(SCHEDULE.num_tokens, 1, 3, len(Q_SCALE), head_dim)
    qkv[5:69, :, 2] *= 50
    qkv[69:133, :, 2] *= 1e-4
    return qkv.to(DEVICE, torch.bfloat16)


def e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


def by_hand(qkv: Tensor, scale: float, pattern: Pattern) -> Tensor:
    """One head of the last scale, (n, D), with every rounding of the kernels: blocks of 64 keys from the first on."""
    low = LARGE.start if pattern == "block_diagonal" else 0
    q, k, v = (x.squeeze(1).float() for x in qkv.unbind(1))
    q, k = (e4m3(256 * F.normalize(x, dim=-1)) for x in (q[LARGE], k[low:]))
    p = torch.exp(scale * (q @ k.t() / 2**16 - 1))
    blocks = v[low:].split(64)
    exponents = torch.tensor([math.ceil(math.log2(float(b.abs().max()))) - 8 for b in blocks]).float()
    out = torch.zeros(len(q), v.shape[1])
    for weights, values, exponent in zip(p.split(64, dim=1), blocks, exponents, strict=True):
        raised = float(exponent - exponents.max()) + 8
        out += e4m3(weights * 2**raised) @ e4m3(values * 2 ** -float(exponent))
    return out * 2 ** (float(exponents.max()) - 8) / p.sum(1, keepdim=True)


@pytest.mark.parametrize(("pattern", "head_dim"), [("block_diagonal", 64), ("block_causal", 32)])
def test_fp8_heads_are_what_the_rounding_makes_of_them(pattern: Pattern, head_dim: int) -> None:
    """Output as computed by hand, small scales and steep heads as without FP8, gradients as of the exact function."""
    qkv = make_qkv(head_dim).requires_grad_()
    q_scale = torch.tensor(Q_SCALE, device=DEVICE, requires_grad=True)
    exact, exact_scale = (x.detach().double().requires_grad_() for x in (qkv, q_scale))
    pull = telling_gradient(lambda s: attend(exact, s, SCHEDULE, pattern, "reference"), exact_scale)
    incoming = pull.to(torch.bfloat16)
    with poisoned_memory():
        out = scale_block_attention(qkv, q_scale, SCHEDULE, pattern, FP8_BELOW)
        gradient, scale_gradient = torch.autograd.grad(out, (qkv, q_scale), incoming)
    without = scale_block_attention(qkv, q_scale, SCHEDULE, pattern)
    assert relative(out[: LARGE.start], without[: LARGE.start].double()) < 2e-3  # norms may be summed in another order
    assert relative(out[..., -head_dim:], without[..., -head_dim:].double()) < 2e-3
    for head, scale in enumerate(Q_SCALE[:2]):
        found = out[LARGE, 0, head * head_dim : (head + 1) * head_dim]
        assert relative(found, by_hand(qkv[:, 0, :, head : head + 1].detach().cpu(), scale, pattern).to(DEVICE)) < 2e-2
        assert relative(found, without[LARGE, 0, head * head_dim : (head + 1) * head_dim]) > 2e-2

    truth = attend(exact, exact_scale, SCHEDULE, pattern, "reference")
    wanted, wanted_scale = torch.autograd.grad(truth, (exact, exact_scale), incoming.double())
    for part in range(3):
        assert relative(gradient[:, :, part], wanted[:, :, part]) < 3e-2
    for head in range(len(Q_SCALE)):
        assert relative(scale_gradient[head], wanted_scale[head]) < 0.15


@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_rows_hold_every_position_once_and_walks_begin_at_blocks(pattern: Pattern) -> None:
    schedule = ScaleSchedule((1, 2, 3, 5, 8, 9, 17))
    for tables in (f(schedule, pattern, 128, 64, "cpu") for f in (tiles.key_tables, tiles.query_tables)):
        assert tables.row_length % 64 == 0
        held = tables.positions[tables.positions < schedule.num_tokens]
        assert held.tolist() == list(range(schedule.num_tokens))
        assert torch.equal(tables.positions[tables.places.long()], torch.arange(schedule.num_tokens).int())
    for tile in tiles.key_tiles(schedule, pattern, 128, 64):
        assert (tile.low + tile.shift) % 64 == 0
        assert (tile.edge - tile.low) % 64 == 0


@pytest.mark.parametrize(
    ("dtype", "patch_nums", "pattern", "below", "words"),
    [
        (torch.float16, (1, 16), "block_diagonal", 10.0, "takes bfloat16, not torch.float16"),
        (torch.bfloat16, (1, 2, 15), "block_diagonal", 10.0, "they see 225; set precision.fp8=linears"),
        (torch.bfloat16, (1, 2, 15), "block_causal", 10.0, "they see 230"),
        (torch.bfloat16, (1, 16), "block_diagonal", 40.0, "fp8_below is 40; it must be from 0, for no FP8, to 39"),
    ],
)
def test_what_cannot_be_computed_in_fp8_is_refused(
    dtype: torch.dtype, patch_nums: tuple[int, ...], pattern: Pattern, below: float, words: str
) -> None:
    schedule = ScaleSchedule(patch_nums)
    qkv = torch.zeros(schedule.num_tokens, 1, 3, 1, 32, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=words):
        scale_block_attention(qkv, torch.ones(1, device=DEVICE), schedule, pattern, below)
