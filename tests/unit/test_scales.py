"""ScaleSchedule: golden values of the published schedules, and properties of any schedule against brute force."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmar_mega.scales import (
    MASK_SCHEDULES,
    PATCH_NUMS,
    Pattern,
    ScaleSchedule,
    lognormal_scale_weights,
    mask_schedule_for,
    token_weights,
)

PATTERNS: list[Pattern] = ["block_diagonal", "block_causal"]

#: Any legal schedule small enough to check by brute force: 1, then one to four increasing sides up to 9.
schedules = st.sets(st.integers(2, 9), min_size=1, max_size=4).map(lambda s: ScaleSchedule((1, *sorted(s))))


def level_of_each_position(schedule: ScaleSchedule) -> list[int]:
    return [k for k, p in enumerate(schedule.patch_nums) for _ in range(p * p)]


# Published schedules


@pytest.mark.parametrize(
    ("resolution", "num_scales", "num_tokens", "attended_pairs"),
    [(256, 10, 680, 110_468), (512, 10, 2_240, 1_522_100), (1024, 14, 9_451, 24_587_383)],
)
def test_published_schedules_have_the_published_sizes(
    resolution: int, num_scales: int, num_tokens: int, attended_pairs: int
) -> None:
    schedule = ScaleSchedule(PATCH_NUMS[resolution])
    assert schedule.num_scales == num_scales
    assert schedule.num_tokens == num_tokens
    assert schedule.attended_pairs("block_diagonal") == attended_pairs
    schedule.check_fits(resolution, downsample=16)


@pytest.mark.parametrize(
    ("patch_nums", "table"),
    [(PATCH_NUMS[256], (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)), ((1, 2, 4), (0, 2, 3)), ((1, 2), (0, 3))],
)
def test_phi_table_is_the_published_one(patch_nums: tuple[int, ...], table: tuple[int, ...]) -> None:
    """At K = 10 the scales 2 and 7 lie exactly between two ticks: only float64 rounds them the published way."""
    assert ScaleSchedule(patch_nums).phi_index() == table


@pytest.mark.parametrize(
    ("resolution", "weights"),
    [
        (256, [0.0247, 0.0642, 0.1150, 0.1379, 0.1402, 0.1329, 0.1208, 0.1054, 0.0882, 0.0709]),
        (512, [0.0196, 0.0667, 0.1141, 0.1389, 0.1379, 0.1246, 0.1112, 0.1037, 0.0958, 0.0876]),
    ],
)
def test_lognormal_weights_are_the_published_ones(resolution: int, weights: list[float]) -> None:
    assert lognormal_scale_weights(ScaleSchedule(PATCH_NUMS[resolution])) == pytest.approx(weights, abs=5.1e-5)


@pytest.mark.parametrize(
    ("resolution", "given_schedule", "passes"),
    [
        (256, None, 14),
        (256, [[1], [1, 3], [1, 3, 5], [16]], 13),
        (512, None, 15),
        (1024, None, 20),
        (256, [[1], [1, 3], [1, 1, 2, 5], [16]], 14),
        (512, [[1], [1, 3], [1, 1, 2, 5], [5, 11], [36]], 15),
        (1024, [[1], [1, 3], [1, 1, 2, 5], [3, 5, 8], [25]], 20),
    ],
)
def test_published_mask_schedules_take_the_published_passes(
    resolution: int, given_schedule: list[list[int]] | None, passes: int
) -> None:
    schedule = ScaleSchedule(PATCH_NUMS[resolution])
    entries = mask_schedule_for(schedule, given_schedule)
    assert sum(len(entry) for entry in entries) == passes
    assert tuple(sum(entry) for entry in entries) == schedule.scale_lengths


@pytest.mark.parametrize("resolution", sorted(PATCH_NUMS))
def test_default_mask_schedule_of_a_published_resolution_is_hmars(resolution: int) -> None:
    entries = mask_schedule_for(ScaleSchedule(PATCH_NUMS[resolution]))
    published = MASK_SCHEDULES[resolution]
    assert entries[: len(published)] == published
    assert all(len(entry) == 1 for entry in entries[len(published) :])


# Layout of the sequence


def test_layout_of_a_small_schedule() -> None:
    schedule = ScaleSchedule((1, 2, 4))
    assert schedule.scale_lengths == (1, 4, 16)
    assert schedule.offsets == (0, 1, 5, 21)
    assert schedule.num_tokens == 21
    assert schedule.grid == 4
    assert [schedule.span(k) for k in range(3)] == [slice(0, 1), slice(1, 5), slice(5, 21)]
    assert schedule.cu_seqlens(2).tolist() == [0, 1, 5, 21, 22, 26, 42]


@given(schedules)
def test_level_ids_and_spans_agree_with_counting(schedule: ScaleSchedule) -> None:
    expected = level_of_each_position(schedule)
    level = schedule.level_ids()
    assert level.dtype == torch.int64
    assert level.tolist() == expected
    for k in range(schedule.num_scales):
        assert expected[schedule.span(k)] == [k] * schedule.patch_nums[k] ** 2


@given(schedules, st.integers(1, 4))
def test_cu_seqlens_step_by_one_scale_of_one_sample(schedule: ScaleSchedule, batch: int) -> None:
    cumulative = schedule.cu_seqlens(batch)
    assert cumulative.dtype == torch.int32
    expected = [0]
    for _ in range(batch):
        for p in schedule.patch_nums:
            expected.append(expected[-1] + p * p)
    assert cumulative.tolist() == expected
    assert expected[-1] == batch * schedule.num_tokens


@pytest.mark.parametrize("pattern", PATTERNS)
@given(schedule=st.sets(st.integers(2, 5), min_size=1, max_size=3).map(lambda s: ScaleSchedule((1, *sorted(s)))))
def test_attention_mask_agrees_with_its_definition(schedule: ScaleSchedule, pattern: Pattern) -> None:
    level = level_of_each_position(schedule)
    expected = [[key == query if pattern == "block_diagonal" else key <= query for key in level] for query in level]
    mask = schedule.attention_mask(pattern)
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected
    assert schedule.attended_pairs(pattern) == sum(map(sum, expected))


@given(schedules)
def test_a_schedule_is_a_value(schedule: ScaleSchedule) -> None:
    """Schedules serve as dictionary keys of caches: equal numbers are equal schedules, however they were given."""
    again = ScaleSchedule(list(schedule.patch_nums))  # type: ignore[arg-type]
    assert again == schedule
    assert hash(again) == hash(schedule)


@pytest.mark.parametrize("patch_nums", [(), (1,), (2, 4), (0, 1), (1, 1), (1, 3, 2), (1, 2, 2), (-1, 2)])
def test_illegal_patch_nums_are_refused(patch_nums: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two scales, start at 1 and increase strictly"):
        ScaleSchedule(patch_nums)


def test_a_schedule_that_does_not_fit_the_resolution_says_what_would() -> None:
    with pytest.raises(ValueError, match=r"makes 256 px images, not resolution=512; end patch_nums at 32") as error:
        ScaleSchedule(PATCH_NUMS[256]).check_fits(512, 16)
    assert "set resolution=256" in str(error.value)


# φ


@given(schedules, st.integers(1, 6))
def test_phi_takes_a_nearest_tick_and_uses_first_and_last(schedule: ScaleSchedule, num_phi: int) -> None:
    table = schedule.phi_index(num_phi)
    first = 1 / 12 if num_phi == 4 else 1 / (2 * num_phi)
    step = (1 - 2 * first) / (num_phi - 1) if num_phi > 1 else 0.0
    ticks = [first + i * step for i in range(num_phi)]
    for scale, phi in enumerate(table):
        at = scale / (schedule.num_scales - 1)
        assert abs(ticks[phi] - at) <= min(abs(t - at) for t in ticks) + 1e-12
    assert list(table) == sorted(table)
    assert (table[0], table[-1]) == (0, num_phi - 1)


def test_no_phi_is_refused() -> None:
    with pytest.raises(ValueError, match="num_phi=0"):
        ScaleSchedule((1, 2)).phi_index(0)


# Loss weights


@given(schedules)
def test_lognormal_weights_agree_with_the_formula_in_plain_python(schedule: ScaleSchedule) -> None:
    ratios = [p / schedule.patch_nums[-1] for p in schedule.patch_nums]
    normal = statistics.NormalDist(statistics.mean(ratios), statistics.stdev(ratios))
    density = [normal.pdf(r) for r in reversed(ratios)]
    expected = [d / sum(density) for d in density]
    assert lognormal_scale_weights(schedule).tolist() == pytest.approx(expected, rel=1e-9)


@given(schedules)
def test_token_weights_spread_each_scale_evenly(schedule: ScaleSchedule) -> None:
    per_scale = lognormal_scale_weights(schedule).tolist()
    weights = token_weights(schedule, "lognormal")
    assert weights.dtype == torch.float32
    expected = [w / (p * p) for w, p in zip(per_scale, schedule.patch_nums, strict=True) for _ in range(p * p)]
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert weights.double().sum().item() == pytest.approx(1, abs=1e-6)


@given(schedules)
def test_uniform_token_weights_are_one_over_n(schedule: ScaleSchedule) -> None:
    weights = token_weights(schedule, "uniform")
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([1 / schedule.num_tokens] * schedule.num_tokens, rel=1e-6)


# Mask schedules


@given(schedules)
def test_default_mask_schedule_of_any_schedule_is_legal(schedule: ScaleSchedule) -> None:
    entries = mask_schedule_for(schedule)
    assert tuple(sum(entry) for entry in entries) == schedule.scale_lengths
    assert min(min(entry) for entry in entries) >= 1
    assert entries[0] == (1,)
    assert mask_schedule_for(schedule, entries) == entries


def test_default_mask_schedule_of_an_unpublished_schedule_takes_the_early_scales_in_steps() -> None:
    assert mask_schedule_for(ScaleSchedule((1, 2, 4))) == ((1,), (1, 3), (5, 11))
    assert mask_schedule_for(ScaleSchedule((1, 2))) == ((1,), (1, 3))
    assert mask_schedule_for(ScaleSchedule((1, 2, 4, 8)))[3] == (64,)


@st.composite
def schedule_and_entries(draw: st.DrawFn) -> tuple[ScaleSchedule, list[list[int]]]:
    """A schedule with legal entries for its first scales: each p_k² cut at random places."""
    schedule = draw(schedules)
    entries = []
    for length in schedule.scale_lengths[: draw(st.integers(0, schedule.num_scales))]:
        cuts = draw(st.sets(st.integers(1, length - 1), max_size=4)) if length > 1 else set()
        edges = [0, *sorted(cuts), length]
        entries.append([b - a for a, b in pairwise(edges)])
    return schedule, entries


@given(schedule_and_entries())
def test_any_partition_of_the_first_scales_is_accepted(case: tuple[ScaleSchedule, list[list[int]]]) -> None:
    schedule, entries = case
    result = mask_schedule_for(schedule, entries)
    assert [list(entry) for entry in result[: len(entries)]] == entries
    assert result[len(entries) :] == tuple((n,) for n in schedule.scale_lengths[len(entries) :])


@given(schedule_and_entries(), st.data())
def test_an_entry_that_does_not_sum_to_its_scale_is_refused(
    case: tuple[ScaleSchedule, list[list[int]]], data: st.DataObject
) -> None:
    schedule, entries = case
    if not entries:
        entries = [[1]]
    scale = data.draw(st.integers(0, len(entries) - 1))
    entries[scale][-1] += data.draw(st.integers(1, 5))
    with pytest.raises(ValueError, match=rf"entry .* of scale {scale + 1} must be positive numbers that sum to"):
        mask_schedule_for(schedule, entries)


@pytest.mark.parametrize(
    ("entries", "scale"), [([[1], [5, -1]], 2), ([[1], [0, 4]], 2), ([[1], []], 2), ([[0, 1]], 1), ([[1], [4], [9]], 3)]
)
def test_mask_schedule_errors_name_the_scale(entries: list[list[int]], scale: int) -> None:
    with pytest.raises(ValueError, match=rf"of scale {scale} "):
        mask_schedule_for(ScaleSchedule((1, 2, 4)), entries)


def test_more_mask_schedule_entries_than_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="3 entries for 2 scales; drop the surplus"):
        mask_schedule_for(ScaleSchedule((1, 2)), [[1], [4], [16]])
