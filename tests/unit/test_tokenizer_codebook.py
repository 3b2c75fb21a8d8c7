"""Usage of the codebook a scale, its first codes, and the renewal of dead codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hmar_mega.parallel.partition import Partition
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.codebook import CodebookUsage, draw_rows, kmeans, renew_codes, seed_codebook
from hmar_mega.tokenizer.quantizer import MultiScaleQuantizer, area_down

V, Z = 8, 3
SCHEDULE = ScaleSchedule((1, 2))


def usage() -> CodebookUsage:
    return CodebookUsage(torch.zeros(2, V), SCHEDULE)


def tokens(first: list[int], second: list[int]) -> Tensor:
    """One sample per entry of `first`; `second` holds four tokens a sample."""
    return torch.cat([torch.tensor(first)[:, None], torch.tensor(second).view(-1, 4)], dim=1)


def test_hits_are_counted_for_each_scale_in_place():
    hits = torch.zeros(2, V)
    CodebookUsage(hits, SCHEDULE).update([tokens([3], [0, 1, 1, 1]), tokens([3], [0, 1, 1, 1])], step=0)
    assert hits[0].tolist() == pytest.approx([0, 0, 0, 0.02, 0, 0, 0, 0])
    assert hits[1].tolist() == pytest.approx([0.02, 0.06, 0, 0, 0, 0, 0, 0])


def test_perplexity_counts_codes_used_evenly():
    u = usage()
    u.update([tokens([5], [0, 1, 2, 3])], step=0)
    assert u.perplexity().tolist() == pytest.approx([1.0, 4.0])


def test_fraction_used_looks_back_over_a_window_of_steps():
    u = usage()
    assert u.fraction_used(step=0, window=100).tolist() == [0, 0]
    u.update([tokens([0], [0, 1, 2, 3])], step=0)
    u.update([tokens([1], [4, 4, 4, 4])], step=1)
    assert u.fraction_used(step=1, window=2).tolist() == [2 / V, 5 / V]
    assert u.fraction_used(step=1, window=1).tolist() == [1 / V, 1 / V]


def test_a_code_is_dead_when_no_scale_used_it_for_so_many_steps():
    u = usage()
    u.update([tokens([7], [0, 1, 2, 3])], step=5)
    assert u.dead(step=5, patience=6).tolist() == [4, 5, 6]
    assert u.dead(step=5, patience=7).tolist() == []
    assert u.dead(step=9, patience=5).tolist() == [4, 5, 6]
    assert u.dead(step=10, patience=5).tolist() == list(range(V))


def test_collapse_is_named_for_the_scale_it_strikes():
    u = usage()
    u.update([tokens([5, 5], [0, 1, 2, 3, 4, 5, 6, 7])], step=0)
    assert u.collapsed() == [0]
    u.update([tokens([1, 2], [0, 0, 0, 0, 0, 0, 0, 0])], step=1)
    assert u.collapsed() == []


def test_rows_are_drawn_without_repetition_and_repeat_for_the_same_position():
    rows = [torch.arange(3.0)[:, None], torch.arange(3.0, 15.0)[:, None]]
    drawn = draw_rows(rows, 10, seed=1, position=4, purpose=8)
    assert len(set(drawn.flatten().tolist())) == 10
    assert torch.equal(drawn, draw_rows(rows, 10, seed=1, position=4, purpose=8))
    assert not torch.equal(drawn, draw_rows(rows, 10, seed=1, position=5, purpose=8))
    assert not torch.equal(drawn, draw_rows(rows, 10, seed=2, position=4, purpose=8))
    assert sorted(draw_rows(rows, 99, seed=1, position=4, purpose=8).flatten().tolist()) == list(range(15))


def test_a_scale_of_few_rows_is_drawn_from_as_often_as_one_of_many():
    rows = [torch.zeros(4, 1), torch.ones(64, 1)]
    drawn = torch.cat([draw_rows(rows, 1, seed=0, position=i, purpose=8) for i in range(400)])
    assert 0.42 < drawn.mean() < 0.58  # 3 standard deviations of 400 fair coins


def trained_quantizer() -> tuple[MultiScaleQuantizer, torch.optim.Optimizer, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(V, Z, SCHEDULE)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.0)
    out = quantizer(torch.randn(2, Z, 2, 2))
    quantizer.embedding.weight.square().sum().backward()
    out.loss.backward()
    optimizer.step()
    return quantizer, optimizer, out.rows


def owned(quantizer: MultiScaleQuantizer, optimizer: torch.optim.Optimizer, start: int = 0) -> Partition:
    weight = quantizer.embedding.weight
    moments = {k: optimizer.state[weight][k].view(-1)[start:] for k in ("exp_avg", "exp_avg_sq")}
    return Partition(start, weight.numel(), weight.data.view(-1)[start:], moments)


def test_dead_codes_become_residuals_of_the_batch_and_lose_their_moments():
    quantizer, optimizer, rows = trained_quantizer()
    before = quantizer.embedding.weight.detach().clone()
    u = usage()
    u.update([tokens([7], [0, 1, 2, 3])], step=9)
    assert renew_codes(quantizer, owned(quantizer, optimizer), u, rows, patience=10, seed=0, step=9) == 3
    dead, alive = [4, 5, 6], [0, 1, 2, 3, 7]
    after, pool = quantizer.embedding.weight.detach(), torch.cat(rows).tolist()
    assert all(code in pool for code in after[dead].tolist())
    assert torch.equal(after[alive], before[alive])
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[quantizer.embedding.weight][name]
        assert (moment[dead] == 0).all()
        assert (moment[alive] != 0).all()


def test_renewed_codes_get_a_full_term_before_they_are_dead_again():
    quantizer, optimizer, rows = trained_quantizer()
    u = usage()
    arguments = {"patience": 5, "seed": 0}
    part = owned(quantizer, optimizer)
    assert renew_codes(quantizer, part, u, rows, step=3, **arguments) == 0
    assert renew_codes(quantizer, part, u, rows, step=4, **arguments) == V
    assert renew_codes(quantizer, part, u, rows, step=8, **arguments) == 0
    assert renew_codes(quantizer, part, u, rows, step=9, **arguments) == V


def test_no_more_codes_are_renewed_than_the_batch_has_rows():
    quantizer, optimizer, rows = trained_quantizer()
    few = tuple(r[:1] for r in rows)
    assert renew_codes(quantizer, owned(quantizer, optimizer), usage(), few, patience=1, seed=0, step=5) == 2


def test_the_first_codebook_shares_its_codes_among_the_scales():
    quantizer, f = MultiScaleQuantizer(V, Z, SCHEDULE), torch.randn(6, Z, 2, 2)
    seed_codebook(quantizer, f, seed=0)
    codes = quantizer.embedding.weight.tolist()
    means = area_down(f, 1).flatten(1).tolist()
    assert sum(code in means for code in codes) == V // 2
    assert len({tuple(code) for code in codes}) == V
    x = torch.randn(1, Z, 5, 5)
    assert all(torch.equal(phi(x), x) for phi in quantizer.phi)


def test_a_batch_smaller_than_the_codebook_leaves_copies_that_nothing_chooses():
    quantizer, f = MultiScaleQuantizer(64, Z, SCHEDULE), torch.randn(3, Z, 2, 2)
    seed_codebook(quantizer, f, seed=0)
    assert len({tuple(code) for code in quantizer.embedding.weight.tolist()}) == 3 + 12
    assert quantizer.encode(f).max() < 15
    # The first scale holds one code for each image, so only the others can err.
    assert torch.equal(quantizer.embedding(quantizer.encode(f)[:, 0]), area_down(f, 1).flatten(1))


def test_a_process_that_owns_a_part_of_the_codebook_forgets_the_moments_of_that_part_alone():
    quantizer, optimizer, rows = trained_quantizer()
    u, start = usage(), 5 * Z + 1  # in the middle of code 5
    u.update([tokens([7], [0, 1, 2, 3])], step=9)
    renew_codes(quantizer, owned(quantizer, optimizer, start), u, rows, patience=10, seed=0, step=9)
    moment = optimizer.state[quantizer.embedding.weight]["exp_avg"].view(-1)
    assert (moment[start : 7 * Z] == 0).all()
    assert (moment[:start] != 0).all()
    assert (moment[7 * Z :] != 0).all()


def test_kmeans_finds_centres_and_leaves_those_without_rows():
    rows = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
    centres = kmeans(rows, torch.tensor([[1.5], [11.0], [99.0]]))
    assert centres.flatten().tolist() == [1.0, 12.0, 99.0]


def test_kmeans_starts_a_codebook_nearer_to_the_residuals_than_samples_do():
    f = torch.randn(64, Z, 2, 2, generator=torch.Generator().manual_seed(0))

    def error(use_kmeans: bool) -> float:
        quantizer = MultiScaleQuantizer(V, Z, SCHEDULE)
        seed_codebook(quantizer, f, seed=0, use_kmeans=use_kmeans)
        return float((quantizer.f_hat(quantizer.encode(f)) - f).square().mean())

    assert error(True) < 0.97 * error(False)


def test_a_factorised_codebook_has_its_rank_and_starts_and_renews_within_it():
    quantizer, f = MultiScaleQuantizer(V, Z, SCHEDULE, code_channels=2), torch.randn(6, Z, 2, 2)
    seed_codebook(quantizer, f, seed=0)
    assert quantizer.embedding.weight.shape == (V, 2)
    assert quantizer.codebook.shape == (V, Z)
    assert torch.linalg.matrix_rank(quantizer.codebook.detach()) == 2
    code = quantizer.codebook.detach()
    torch.testing.assert_close(quantizer.stored(code), quantizer.embedding.weight.detach())
    out = quantizer(f)
    torch.testing.assert_close(out.f_hat, quantizer.f_hat(out.tokens))
    u = usage()
    assert renew_codes(quantizer, None, u, out.rows, patience=1, seed=0, step=5) == V
