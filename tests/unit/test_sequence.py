"""From token ids to inputs, draws and losses: SPEC §3–5 against numpy derivations and hand-computed values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLASSES, SCHEDULE, MixingCodes, N, Z, area, random_normal, random_tokens, tiny_config, tiny_hmar
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hmar_mega import sequence
from hmar_mega.model.hmar import HMAR
from hmar_mega.model.layers_torch import top_one_error
from hmar_mega.objective import Objective, Scores, per_scale_sums
from hmar_mega.scales import ScaleSchedule, token_weights

ODD = ScaleSchedule((1, 2, 3, 5))


@dataclasses.dataclass(frozen=True)
class Batch:
    """What the data reader gives, as far as an objective looks."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor

    def part(self, rows: list[int]) -> Batch:
        return Batch(self.tokens[rows], self.labels[rows], self.positions[rows])


def batch_of(count: int, first: int = 1000) -> Batch:
    return Batch(random_tokens(count), torch.arange(count) % CLASSES, torch.arange(first, first + count))


def masks(count: int, schedule: ScaleSchedule = SCHEDULE, seed: int = 3) -> Tensor:
    return sequence.draw_masks(torch.arange(count), seed, schedule)


# ---------------------------------------------------------------------------------------------------- model inputs


@pytest.mark.parametrize("schedule", [SCHEDULE, ODD])
def test_teacher_input_is_the_accumulated_latent_area_downsampled_to_the_next_scale(schedule: ScaleSchedule):
    codes, tokens = MixingCodes(schedule), random_tokens(2, schedule=schedule)
    given = sequence.teacher_input(tokens, codes, schedule)
    assert given.dtype == torch.float32
    assert given.shape == (2, schedule.num_tokens - 1, Z)
    for sample in range(2):
        f_hat = np.zeros((Z, schedule.grid, schedule.grid))
        expected, start = [], 0
        for k, p in enumerate(schedule.patch_nums[:-1]):
            f_hat = f_hat + codes.numpy_features(k, tokens[sample, start : start + p * p].numpy())
            start += p * p
            expected += list(area(f_hat, schedule.patch_nums[k + 1]).reshape(Z, -1).T)
        np.testing.assert_allclose(given[sample].numpy(), np.array(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask_input", ["leak_free", "reference"])
@pytest.mark.parametrize("schedule", [SCHEDULE, ODD])
def test_token_features_are_a_scales_own_codes_at_its_own_size(schedule: ScaleSchedule, mask_input: str):
    codes, tokens, mask = MixingCodes(schedule), random_tokens(2, schedule=schedule), masks(2, schedule)
    features = sequence.token_features(tokens, mask, codes, schedule, mask_input)
    assert features.dtype == torch.float32
    assert features.shape == (2, schedule.num_tokens - 1, Z)
    for sample in range(2):
        expected, start = [], 1
        for k, p in enumerate(schedule.patch_nums[1:], 1):
            own = slice(start, start + p * p)
            keep = ~mask[sample, start - 1 : start - 1 + p * p].numpy() if mask_input == "leak_free" else None
            latent = codes.numpy_features(k, tokens[sample, own].numpy(), keep)
            expected += list(area(latent, p).reshape(Z, -1).T)
            start += p * p
        np.testing.assert_allclose(features[sample].numpy(), np.array(expected), rtol=1e-5, atol=1e-5)


def test_to_positions_is_row_major_and_leaves_full_size_maps_alone():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert sequence.to_positions(x, 4).flatten().tolist() == list(range(16))
    assert sequence.to_positions(x, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("schedule", [SCHEDULE, ODD])
def test_leak_free_features_of_unmasked_tokens_know_nothing_of_masked_codes(schedule: ScaleSchedule):
    codes, tokens, mask = MixingCodes(schedule), random_tokens(4, schedule=schedule), masks(4, schedule)
    others = random_tokens(4, seed=9, schedule=schedule)
    changed = tokens.clone()
    changed[:, 1:][mask] = others[:, 1:][mask]
    assert (changed != tokens).any()
    for mask_input, leaks in (("leak_free", False), ("reference", True)):
        before = sequence.token_features(tokens, mask, codes, schedule, mask_input)
        after = sequence.token_features(changed, mask, codes, schedule, mask_input)
        assert torch.equal(before[~mask], after[~mask]) is not leaks, mask_input


def test_unmasked_codes_do_reach_the_features_of_their_position():
    codes, tokens, mask = MixingCodes(), random_tokens(1), masks(1)
    position = int((~mask[0]).nonzero()[0])
    changed = tokens.clone()
    changed[0, position + 1] += 1
    before, after = (sequence.token_features(t, mask, codes, SCHEDULE, "leak_free") for t in (tokens, changed))
    assert not torch.equal(before[0, position], after[0, position])


# ----------------------------------------------------------------------------------------------------------- draws


@given(seed=st.integers(0, 2**31 - 1), positions=st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True))
def test_every_scale_masks_the_same_share_rounded_up(seed: int, positions: list[int]):
    schedule = ScaleSchedule((1, 2, 4, 7, 16))
    drawn = sequence.draw_masks(torch.tensor(positions), seed, schedule)
    assert drawn.dtype == torch.bool
    assert drawn.shape == (len(positions), schedule.num_tokens - 1)
    for row in drawn:
        counts = [int(row[schedule.offsets[k] - 1 : schedule.offsets[k + 1] - 1].sum()) for k in range(1, 5)]
        # some r in (0, 1] explains all counts: ⌈r·n⌉ = c exactly when (c − 1)/n < r ≤ c/n
        low = max((c - 1) / n for c, n in zip(counts, schedule.scale_lengths[1:], strict=True))
        high = min(c / n for c, n in zip(counts, schedule.scale_lengths[1:], strict=True))
        assert min(counts) >= 1
        assert low < high


def test_mask_ratios_are_uniform_and_masked_positions_have_no_favourites():
    drawn = masks(4000, ScaleSchedule((1, 2, 16)))
    ratio = drawn[:, 4:].float().mean(1)
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert ratio.quantile(quantile) == pytest.approx(quantile, abs=0.03)
    per_position = drawn[:, 4:].float().mean(0)
    assert per_position.mean() == pytest.approx(0.5 + 0.5 / 256, abs=0.02)
    assert per_position.std() < 2 * 0.5 / math.sqrt(4000)


def test_masked_positions_of_two_samples_with_like_ratios_differ():
    drawn = masks(200, ScaleSchedule((1, 2, 8)))[:, 4:]
    same = sum(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert same < 20


@pytest.mark.parametrize(
    "draw",
    [
        lambda p, seed: sequence.draw_masks(p, seed, SCHEDULE),
        lambda p, seed: sequence.drop_labels(torch.zeros_like(p), p, seed, 0.5, CLASSES),
        lambda p, seed: sequence.drop_path_factors(p, seed, 6, 0.5).permute(2, 0, 1),
    ],
    ids=["masks", "labels", "drop_path"],
)
def test_draws_belong_to_seed_and_stream_position_alone(draw):
    positions = torch.arange(50, 114)
    whole = draw(positions, 5)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(positions[shuffled], 5), whole[shuffled])
    alone = torch.cat([draw(positions[i : i + 1], 5) for i in range(64)])
    assert torch.equal(alone, whole)
    assert not torch.equal(draw(positions, 6), whole)
    assert not torch.equal(draw(positions + 64, 5), whole)


def test_labels_are_dropped_at_the_given_rate():
    positions = torch.arange(20_000)
    labels = positions % CLASSES
    dropped = sequence.drop_labels(labels, positions, 1, 0.1, CLASSES)
    lost = dropped != labels
    assert (dropped[lost] == CLASSES).all()
    assert lost.float().mean() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(sequence.drop_labels(labels, positions, 1, 0.0, CLASSES), labels)
    assert (sequence.drop_labels(labels, positions, 1, 1.0, CLASSES) == CLASSES).all()


def test_drop_path_rises_linearly_and_keeps_its_expectation():
    depth, last = 5, 0.4
    factors = sequence.drop_path_factors(torch.arange(20_000), 1, depth, last)
    assert factors.shape == (depth, 2, 20_000)
    assert factors.dtype == torch.float32
    for layer in range(depth):
        rate = last * layer / (depth - 1)
        for branch in range(2):
            drawn = factors[layer, branch]
            kept = drawn[drawn != 0]
            assert (drawn == 0).float().mean() == pytest.approx(rate, abs=0.015)
            torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
            assert drawn.mean() == pytest.approx(1.0, abs=0.03)
    attention, feed_forward = factors[-1]
    assert ((attention == 0) & (feed_forward == 0)).float().mean() == pytest.approx(last**2, abs=0.015)


def test_one_layer_never_drops():
    assert (sequence.drop_path_factors(torch.arange(100), 0, 1, 0.9) == 1).all()


# ---------------------------------------------------------------------------------------------------------- losses


def test_next_scale_loss_is_the_weighted_sum_over_positions():
    ce = torch.tensor([[1.0, 2.0, 3.0], [0.0, 10.0, 0.5]])
    weights = torch.tensor([0.5, 0.25, 0.25])
    assert sequence.next_scale_loss(ce, weights).tolist() == [1.75, 2.625]


def test_uniform_next_scale_loss_is_the_mean():
    ce = random_normal(3, N)
    torch.testing.assert_close(sequence.next_scale_loss(ce, token_weights(SCHEDULE, "uniform")), ce.mean(1))


def test_masked_loss_is_each_samples_mean_over_its_masked_positions():
    ce = torch.tensor([[100.0, 1.0, 2.0, 3.0], [100.0, 4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert sequence.masked_loss(ce, mask).tolist() == [2.0, 5.0]


def test_bf16_losses_are_summed_in_float32():
    ce = torch.full((1, N), 1.0, dtype=torch.bfloat16)
    assert sequence.next_scale_loss(ce, token_weights(SCHEDULE, "lognormal")).dtype == torch.float32
    assert sequence.masked_loss(ce, torch.ones(1, N - 1, dtype=torch.bool)).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- objective


def objective(stage: str, **stage_settings: object) -> tuple[Objective, HMAR]:
    config = tiny_config(stage, drop_path_rate=0.3)
    config = config.model_copy(update={"stage": config.stage.model_copy(update=stage_settings)})
    model = tiny_hmar(config)
    return Objective(config, MixingCodes(), torch.device("cpu")), model


@pytest.mark.parametrize("stage", ["next_scale", "masked"])
def test_scores_of_a_sample_do_not_depend_on_its_micro_batch(stage: str):
    work, model = objective(stage)
    batch = batch_of(6)
    whole = work.training(model, batch)
    parts = [work.training(model, batch.part(rows)) for rows in ([5, 0], [1], [4, 3, 2])]
    losses = torch.cat([p.loss for p in parts])[[1, 2, 5, 4, 3, 0]]
    torch.testing.assert_close(losses, whole.loss)
    assert losses.std() > 1e-3


@pytest.mark.parametrize("stage", ["next_scale", "masked"])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(stage: str):
    work, model = objective(stage)
    batch = batch_of(6)
    work.training(model, batch).loss.mean().backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for rows in ([0, 1], [2, 3], [4, 5]):
        (work.training(model, batch.part(rows)).loss.mean() / 3).backward()
    for name, parameter in model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_next_scale_objective_by_hand():
    work, model = objective("next_scale", label_drop=0.0)
    batch = batch_of(2)
    scores = work.evaluation(model, batch)
    with torch.no_grad():
        logits = model(batch.labels, sequence.teacher_input(batch.tokens, MixingCodes(), SCHEDULE)).transpose(0, 1)
    ce = -logits.log_softmax(-1).gather(-1, batch.tokens[..., None])[..., 0]
    torch.testing.assert_close(scores.cross_entropy, ce)
    assert scores.errors is not None
    assert torch.equal(scores.errors, (logits.argmax(-1) != batch.tokens).float())
    torch.testing.assert_close(scores.loss, (ce * token_weights(SCHEDULE, "lognormal")).sum(1))
    assert scores.counted.all()


@pytest.mark.parametrize("mask_input", ["leak_free", "reference"])
def test_the_masked_objective_by_hand(mask_input: str):
    work, model = objective("masked", mask_input=mask_input)
    batch = batch_of(2)
    scores = work.evaluation(model, batch)
    mask = sequence.draw_masks(batch.positions, 0, SCHEDULE)
    features = sequence.token_features(batch.tokens, mask, MixingCodes(), SCHEDULE, mask_input)
    given = sequence.teacher_input(batch.tokens, MixingCodes(), SCHEDULE)
    with torch.no_grad():
        logits = model(batch.labels, given, features, mask, branch="masked").transpose(0, 1)
    ce = -logits.log_softmax(-1).gather(-1, batch.tokens[..., None])[..., 0]
    expected = torch.stack([ce[b, 1:][mask[b]].mean() for b in range(2)])
    torch.testing.assert_close(scores.loss, expected)
    assert torch.equal(scores.counted, torch.cat([torch.zeros(2, 1, dtype=torch.bool), mask], dim=1))


def test_training_drops_labels_and_paths_while_evaluation_never_does():
    work, model = objective("next_scale", label_drop=1.0)
    seen = []

    def spy(**inputs: Any) -> Tensor:
        seen.append((inputs["labels_B"].tolist(), inputs.get("drop_path")))
        return model(**inputs)

    batch = batch_of(4)
    work.training(spy, batch)
    work.evaluation(spy, batch)
    (trained, factors), (evaluated, none) = seen
    assert trained == [CLASSES] * 4
    assert factors is not None
    assert factors.shape == (2, 2, 4)
    assert evaluated == batch.labels.tolist()
    assert none is None


def test_per_scale_sums_count_only_predicted_positions():
    work, _ = objective("masked")
    ce = torch.arange(float(N))[None]
    counted = torch.zeros(1, N, dtype=torch.bool)
    counted[0, [2, 4, 20]] = True
    sums = per_scale_sums(Scores(torch.zeros(1), ce, counted), work)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [[0.0, 6.0, 20.0], [0.0, 2.0, 1.0]]
    wrong = torch.ones(1, N)
    wrong[0, 4] = 0.0
    sums = per_scale_sums(Scores(torch.zeros(1), ce, counted, wrong), work)
    assert sums.tolist() == [[0.0, 6.0, 20.0], [0.0, 2.0, 1.0], [0.0, 1.0, 1.0]]


def test_top_one_error_is_shared_among_equal_logits_and_over_ranks():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 1.0, 0.0, 0.0], [float("nan"), 0.0, 0.0, 0.0]])
    targets = torch.tensor([2, 1, 1])
    whole = top_one_error(logits, targets)
    assert whole.tolist() == [0.5, 1.0, 1.0]
    best, counts = logits[:, :2].amax(-1).maximum(logits[:, 2:].amax(-1)), torch.zeros(2, 3)
    for start in (0, 2):  # each rank's part of the sums, and then the sums in its place
        top_one_error(logits[:, start : start + 2], targets, start, counts.add_, lambda x: x.copy_(best))
    shared = top_one_error(logits[:, :2], targets, 0, lambda x: x.copy_(counts), lambda x: x.copy_(best))
    assert shared.tolist() == whole.tolist()
