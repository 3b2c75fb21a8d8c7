"""The multi-scale quantizer against a plain re-derivation of SPEC §2, and what its gradients and masks promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hmar_mega.errors import UserError
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule
from hmar_mega.tokenizer.quantizer import MultiScaleQuantizer

V, Z = 24, 5
SCHEDULE = ScaleSchedule((1, 2, 3, 6))


def quantizer(schedule: ScaleSchedule = SCHEDULE, seed: int = 0, **settings) -> MultiScaleQuantizer:
    torch.manual_seed(seed)
    return MultiScaleQuantizer(V, Z, schedule, **settings)


def latents(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, Z, SCHEDULE.grid, SCHEDULE.grid, generator=torch.Generator().manual_seed(seed))


def encode_by_hand(q: MultiScaleQuantizer, f: Tensor) -> tuple[list[int], Tensor]:
    """SPEC §2, one sample, one position and one code at a time: token ids and f̂."""
    residual, f_hat, ids = f.clone(), torch.zeros_like(f), []
    for k, p in enumerate(q.schedule.patch_nums):
        last = k == q.schedule.num_scales - 1
        z = residual if last else F.adaptive_avg_pool2d(residual, p)
        chosen = torch.zeros(Z, p, p)
        for row in range(p):
            for column in range(p):
                distances = [float((z[:, row, column] - code).square().sum()) for code in q.embedding.weight]
                ids.append(distances.index(min(distances)))
                chosen[:, row, column] = q.embedding.weight[ids[-1]]
        if not last:
            chosen = F.interpolate(chosen[None], size=f.shape[1:], mode="bicubic", align_corners=False)[0]
        e = 0.5 * chosen + 0.5 * q.phi[q.schedule.phi_index()[k]](chosen)
        f_hat, residual = f_hat + e, residual - e
    return ids, f_hat


@torch.no_grad()
def test_encoding_is_the_residual_loop_of_the_paper():
    q, f = quantizer(), latents()
    tokens = q.encode(f)
    assert tokens.shape == (2, SCHEDULE.num_tokens)
    assert tokens.dtype == torch.int64
    for sample in range(2):
        ids, f_hat = encode_by_hand(q, f[sample])
        assert tokens[sample].tolist() == ids
        torch.testing.assert_close(q.f_hat(tokens)[sample], f_hat)


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40))
def test_nearest_is_brute_force_l2(seed: int, rows: int):
    q = quantizer(seed=seed)
    z = torch.randn(rows, Z, generator=torch.Generator().manual_seed(seed))
    codes = q.embedding.weight.detach().double()
    expected = (z.double()[:, None] - codes).square().sum(-1)
    assert torch.allclose(expected[torch.arange(rows), q.nearest(z)], expected.min(1).values)


def test_nearest_gives_ties_to_the_lower_index():
    q = quantizer()
    with torch.no_grad():
        q.embedding.weight[:] = 9.0
        q.embedding.weight[[7, 13]] = 1.0
    assert q.nearest(torch.ones(3, Z)).tolist() == [7, 7, 7]


def test_nearest_does_not_depend_on_how_many_rows_are_compared_at_once(monkeypatch):
    q, z = quantizer(), torch.randn(50, Z)
    whole = q.nearest(z)
    monkeypatch.setattr("hmar_mega.tokenizer.quantizer.ROWS_AT_ONCE", 7)
    assert torch.equal(q.nearest(z), whole)


def test_znorm_compares_directions_and_ignores_lengths():
    plain, cosine = quantizer(), quantizer(using_znorm=True)
    with torch.no_grad():
        for q in (plain, cosine):
            q.embedding.weight.zero_()
            q.embedding.weight[3, 0], q.embedding.weight[4, 1] = 100.0, 1.0
    z = torch.tensor([[1.0, 0.9, 0.0, 0.0, 0.0]])
    assert plain.nearest(z).item() == 4
    assert cosine.nearest(z).item() == 3
    assert torch.equal(cosine.nearest(z * 50), cosine.nearest(z))


@torch.no_grad()
def test_tokens_and_features_do_not_depend_on_autocast():
    q, f = quantizer(), latents(batch=8)
    tokens, features = q.encode(f), q.f_hat(q.encode(f))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(q.encode(f), tokens)
        assert torch.equal(q.f_hat(tokens), features)
        assert q.f_hat(tokens).dtype == torch.float32


@torch.no_grad()
def test_each_scale_uses_the_phi_the_schedule_names():
    q = quantizer(ScaleSchedule(PATCH_NUMS[256]))
    for i, conv in enumerate(q.phi):
        conv.weight.zero_()
        conv.bias.fill_(i)
    q.embedding.weight.zero_()
    used = [2 * float(q.scale_features(k, torch.zeros(1, n, dtype=torch.int64)).mean()) for k, n in SCALES_256]
    assert used == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


SCALES_256 = list(enumerate(p * p for p in PATCH_NUMS[256]))


@pytest.mark.parametrize("scale", [1, 3])
@torch.no_grad()
def test_codes_not_kept_leave_no_trace_in_any_position(scale: int):
    q = quantizer()
    length = SCHEDULE.scale_lengths[scale]
    keep = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.5
    tokens = torch.randint(V, (2, length), generator=torch.Generator().manual_seed(4))
    other = torch.where(keep, tokens, (tokens + 1) % V)
    assert not torch.equal(tokens, other)
    assert torch.equal(q.scale_features(scale, tokens, keep), q.scale_features(scale, other, keep))
    assert not torch.equal(q.scale_features(scale, tokens), q.scale_features(scale, other))


@torch.no_grad()
def test_keeping_all_is_the_default_and_keeping_none_leaves_the_bias_of_phi():
    q, tokens = quantizer(), torch.randint(V, (2, 4))
    everything = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(q.scale_features(1, tokens, everything), q.scale_features(1, tokens))
    bias = q.phi[q.schedule.phi_index()[1]].bias
    empty = q.scale_features(1, tokens, ~everything)
    torch.testing.assert_close(empty, (0.5 * bias)[None, :, None, None].expand_as(empty))


@torch.no_grad()
def test_a_code_of_zeros_makes_every_scale_at_worst_useless():
    q = quantizer(phi_ratio=0.0)
    q.embedding.weight[0] = 0
    f = latents()
    before = f - sum(q.scale_features(k, q.encode(f)[:, SCHEDULE.span(k)]) for k in range(3))
    after = f - q.f_hat(q.encode(f))
    assert (after.square().sum(1) <= before.square().sum(1) + 1e-6).all()


def test_forward_agrees_with_encode_and_f_hat():
    q, f = quantizer(), latents()
    out = q(f)
    assert torch.equal(out.tokens, q.encode(f))
    torch.testing.assert_close(out.f_hat, q.f_hat(out.tokens))
    assert [tuple(r.shape) for r in out.rows] == [(2 * n, Z) for n in SCHEDULE.scale_lengths]
    assert torch.equal(q.nearest(out.rows[3]), out.tokens[:, SCHEDULE.span(3)].flatten())


def test_the_gradient_of_f_hat_passes_straight_to_the_latent():
    q, f = quantizer(), latents().requires_grad_()
    pull = torch.randn_like(f)
    (q(f).f_hat * pull).sum().backward()
    assert torch.equal(f.grad, pull)
    assert q.embedding.weight.grad is None


def test_the_loss_is_the_mean_over_scales_of_both_errors():
    q, f = quantizer(beta=0.3), latents()
    out = q(f)
    f_hat, errors = torch.zeros_like(f), []
    for k in range(SCHEDULE.num_scales):
        f_hat = f_hat + q.scale_features(k, out.tokens[:, SCHEDULE.span(k)])
        errors.append(1.3 * (f_hat - f).square().mean())
    torch.testing.assert_close(out.loss, sum(errors) / SCHEDULE.num_scales)


def test_beta_weighs_the_encoder_and_not_the_codebook():
    gradients = []
    for beta in (0.25, 0.5):
        q, f = quantizer(beta=beta), latents().requires_grad_()
        q(f).loss.backward()
        gradients.append((f.grad, q.embedding.weight.grad, q.phi[0].weight.grad))
    (f1, e1, p1), (f2, e2, p2) = gradients
    torch.testing.assert_close(2 * f1, f2)
    torch.testing.assert_close(e1, e2)
    torch.testing.assert_close(p1, p2)
    assert f1.abs().sum() > 0
    assert p1.abs().sum() > 0


def test_a_latent_of_another_size_is_refused_with_the_size_it_must_have():
    with pytest.raises(UserError, match=r"\(B, 5, 6, 6\)"):
        quantizer().encode(torch.randn(1, Z, 4, 4))


def test_another_number_of_tokens_is_refused():
    with pytest.raises(UserError, match="which has 50"):
        quantizer().f_hat(torch.zeros(1, 21, dtype=torch.int64))
