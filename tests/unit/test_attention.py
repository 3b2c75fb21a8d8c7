"""Scale-block attention: the backends agree, and a token sees its own scale (HMAR) or also the earlier ones (VAR)."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random_normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hmar_mega.model.attention import (
    ScaleAttention,
    SequenceAttention,
    scale_block_attention,
    split_normalised,
)
from hmar_mega.scales import ScaleSchedule

SCHEDULE = ScaleSchedule((1, 2, 3, 4))
B, H, D = 2, 3, 8
PATTERNS = pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
Q_SCALE = torch.tensor([4.0, 1.0, 100.0])


def packed(schedule: ScaleSchedule = SCHEDULE, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_normal(schedule.num_tokens, B, 3, H, D, seed=seed, dtype=dtype)


def by_hand(qkv: Tensor, q_scale: Tensor, schedule: ScaleSchedule, pattern: str) -> Tensor:
    """One query of one head of one sample at a time, in float64."""
    level = [k for k, p in enumerate(schedule.patch_nums) for _ in range(p * p)]
    out = torch.zeros(len(level), qkv.shape[1], H, D, dtype=torch.float64)
    for b in range(qkv.shape[1]):
        for h in range(H):
            q, k, v = qkv[:, b, :, h].double().unbind(1)
            for i, own in enumerate(level):
                seen = [
                    j for j, other in enumerate(level) if other == own or (pattern != "block_diagonal" and other < own)
                ]
                scores = [float(q_scale[h] * (q[i] @ k[j]) / (q[i].norm() * k[j].norm())) for j in seen]
                weights = [math.exp(s - max(scores)) for s in scores]
                out[i, b, h] = sum(w * v[j] for w, j in zip(weights, seen, strict=True)) / sum(weights)
    return out.flatten(2)


@PATTERNS
@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
def test_every_backend_is_attention_one_query_at_a_time(pattern: str, backend: str):
    qkv = packed()
    out = scale_block_attention(qkv, Q_SCALE, SCHEDULE, pattern, backend)
    assert out.shape == (SCHEDULE.num_tokens, B, H * D)
    torch.testing.assert_close(out.double(), by_hand(qkv, Q_SCALE, SCHEDULE, pattern), rtol=1e-4, atol=1e-5)


@PATTERNS
@given(
    patch_nums=st.lists(st.integers(2, 6), min_size=1, max_size=3, unique=True).map(lambda p: (1, *sorted(p))),
    seed=st.integers(0, 1000),
)
def test_sdpa_equals_the_reference_with_gradients(pattern: str, patch_nums: tuple[int, ...], seed: int):
    schedule = ScaleSchedule(patch_nums)
    results = []
    for backend in ("reference", "sdpa"):
        qkv, q_scale = packed(schedule, seed).requires_grad_(), Q_SCALE.clone().requires_grad_()
        out = scale_block_attention(qkv, q_scale, schedule, pattern, backend)
        (out * random_normal(*out.shape, seed=seed + 1)).sum().backward()
        results.append((out.detach(), qkv.grad, q_scale.grad))
    for name, expected, found in zip(("output", "d qkv", "d q_scale"), *results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)


@PATTERNS
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_float64_is_computed_in_float64(pattern: str, backend: str):
    """The yardstick of kernels must not lose digits on the way: 1e-12, not the 1e-7 of a float32 norm."""
    qkv = packed(dtype=torch.float64)
    out = scale_block_attention(qkv, Q_SCALE.double(), SCHEDULE, pattern, backend)
    torch.testing.assert_close(out, by_hand(qkv, Q_SCALE, SCHEDULE, pattern), rtol=1e-10, atol=1e-12)


@PATTERNS
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("touched", range(4))
def test_a_token_reaches_its_own_scale_or_also_later_ones(pattern: str, backend: str, touched: int):
    qkv = packed()
    changed = qkv.clone()
    changed[SCHEDULE.offsets[touched + 1] - 1] += 1.0  # the last token of the scale
    before, after = (scale_block_attention(x, Q_SCALE, SCHEDULE, pattern, backend) for x in (qkv, changed))
    for scale in range(4):
        moved = not torch.equal(before[SCHEDULE.span(scale)], after[SCHEDULE.span(scale)])
        assert moved == (scale == touched or (pattern == "block_causal" and scale > touched))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_every_token_of_a_scale_sees_every_other(backend: str):
    qkv = packed().requires_grad_()
    out = scale_block_attention(qkv, torch.ones(H), SCHEDULE, "block_diagonal", backend)
    out[SCHEDULE.offsets[2]].sum().backward()  # the first token of scale 3
    reached = qkv.grad[:, 0, 2].abs().sum((-1, -2)) > 0
    assert reached.nonzero().flatten().tolist() == list(range(SCHEDULE.offsets[2], SCHEDULE.offsets[3]))


def test_queries_have_the_length_of_their_scale_and_keys_length_one():
    qkv = packed() * 37
    q, k, v = split_normalised(qkv, Q_SCALE)
    assert q.shape == k.shape == v.shape == (B, H, SCHEDULE.num_tokens, D)
    torch.testing.assert_close(q.norm(dim=-1), Q_SCALE[None, :, None].expand(B, H, SCHEDULE.num_tokens))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(B, H, SCHEDULE.num_tokens))
    assert torch.equal(v[1, 2], qkv[:, 1, 2, 2])


def test_attention_ignores_the_length_of_queries_and_keys_but_not_of_values():
    qkv = packed()
    longer = qkv * torch.tensor([5.0, 0.1, 1.0])[:, None, None]
    doubled = qkv * torch.tensor([1.0, 1.0, 2.0])[:, None, None]
    out, same, twice = (scale_block_attention(x, Q_SCALE, SCHEDULE, "block_diagonal") for x in (qkv, longer, doubled))
    torch.testing.assert_close(same, out, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(twice, 2 * out)


@PATTERNS
def test_bf16_stays_bf16_and_close(pattern: str):
    qkv = packed()
    full = by_hand(qkv, Q_SCALE[:1].expand(3), SCHEDULE, pattern)
    for backend in ("reference", "sdpa"):
        out = scale_block_attention(qkv.bfloat16(), Q_SCALE[:1].expand(3).bfloat16(), SCHEDULE, pattern, backend)
        assert out.dtype == torch.bfloat16
        assert (out.double() - full).abs().max() < 0.05


def test_a_sequence_of_another_length_is_refused():
    with pytest.raises(ValueError, match="qkv has 29 positions, the schedule 30"):
        scale_block_attention(packed()[:-1], Q_SCALE, SCHEDULE, "block_diagonal")


@PATTERNS
def test_scale_by_scale_equals_the_whole_sequence(pattern: str):
    """Sampling's caches against the teacher-forced forward, two layers with caches of their own."""
    stepwise, whole = ScaleAttention(pattern), SequenceAttention(SCHEDULE, pattern)
    layers = {"blocks.0.attn": packed(seed=1), "blocks.1.attn": packed(seed=2)}
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    for scale in range(SCHEDULE.num_scales):
        for name, qkv in layers.items():
            parts[name].append(stepwise(name, qkv[SCHEDULE.span(scale)], Q_SCALE))
    for name, qkv in layers.items():
        torch.testing.assert_close(torch.cat(parts[name]), whole(name, qkv, Q_SCALE), rtol=1e-4, atol=1e-5)


def test_block_diagonal_sampling_keeps_nothing():
    attend = ScaleAttention("block_diagonal")
    attend("blocks.0.attn", packed()[:1], Q_SCALE)
    assert not attend.cache
