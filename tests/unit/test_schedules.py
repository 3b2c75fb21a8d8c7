"""Learning rate and weight decay by optimizer step (SPEC §4)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmar_mega.config_io import load_config
from hmar_mega.schedules import Schedule

IMAGES = 1_281_167  # ImageNet's training set


def schedule(**given: object) -> Schedule:
    settings = {
        "total_steps": 1001, "warmup_steps": 200, "peak_lr": 1.0, "warmup_start": 0.005, "flat_fraction": 0.05,
        "final_ratio": 0.1, "weight_decay": 0.05, "weight_decay_end": None,
    }  # fmt: skip
    return Schedule(**{**settings, **given})


SCHEDULES = st.builds(
    lambda warm, after, flat, final: schedule(
        total_steps=warm + after, warmup_steps=warm, flat_fraction=flat, final_ratio=final
    ),
    st.integers(0, 300), st.integers(2, 2000), st.floats(0, 0.99), st.floats(0, 1),
)  # fmt: skip


def test_d16_at_256_by_hand():
    config = load_config(None, ["data.global_batch_size=768", "optim.epochs=200", "optim.base_lr=1e-4"])
    plan = Schedule.of(config, IMAGES)
    assert plan.total_steps == math.ceil(200 * IMAGES / 768) == 333_638
    assert plan.warmup_steps == round(4 * IMAGES / 768) == 6673
    assert plan.peak_lr == pytest.approx(3e-4)
    assert plan.lr(0) == pytest.approx(0.005 * 3e-4)
    assert plan.lr(333_637) == pytest.approx(0.1 * 3e-4)
    assert {plan.decay(s) for s in (0, 1000, 333_637)} == {0.05}


def test_warm_up_is_linear_from_its_start():
    plan = schedule()
    assert plan.lr(0) == 0.005
    assert plan.lr(100) == pytest.approx((0.005 + 1) / 2)
    assert plan.lr(199) == pytest.approx(0.005 + 0.995 * 199 / 200)
    assert plan.lr(200) == 1.0


def test_flat_for_its_share_of_the_steps_after_warm_up_then_linear():
    plan = schedule()  # steps 200 … 1000, of which 5 % are 40
    assert {plan.lr(s) for s in range(200, 240)} == {1.0}
    assert plan.lr(241) < 1.0
    falls = [plan.lr(s) - plan.lr(s + 1) for s in range(241, 1000)]
    assert max(falls) == pytest.approx(min(falls))
    assert plan.lr(1000) == pytest.approx(0.1, rel=1e-12)


@given(plan=SCHEDULES)
def test_every_schedule_peaks_after_warm_up_and_ends_exactly_at_its_final_ratio(plan: Schedule):
    assert plan.lr(plan.warmup_steps) == pytest.approx(1.0)
    assert plan.lr(plan.total_steps - 1) == pytest.approx(plan.final_ratio, abs=1e-12)
    assert plan.lr(plan.total_steps + 10) == pytest.approx(plan.final_ratio, abs=1e-12)


@given(plan=SCHEDULES)
def test_every_schedule_rises_then_never_rises_again(plan: Schedule):
    rates = [plan.lr(s) for s in range(plan.total_steps)]
    rising, falling = rates[: plan.warmup_steps + 1], rates[plan.warmup_steps :]
    assert rising == sorted(rising)
    assert all(b <= a + 1e-12 for a, b in pairwise(falling))
    assert all(0 <= r <= 1 + 1e-12 for r in rates)


def test_a_schedule_without_warm_up_starts_at_its_peak():
    assert schedule(warmup_steps=0).lr(0) == 1.0


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 1), (5, 5)])
def test_the_shortest_schedules_stay_within_bounds(total: int, warmup: int):
    plan = schedule(total_steps=total, warmup_steps=warmup)
    assert all(0.005 <= plan.lr(s) <= 1 for s in range(total + 1))
    assert plan.decay(0) == 0.05


def test_changing_weight_decay_follows_a_half_cosine_over_all_steps():
    plan = schedule(weight_decay_end=0.08)
    assert plan.decay(0) == pytest.approx(0.05)
    assert plan.decay(250) == pytest.approx(0.08 - 0.03 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert plan.decay(500) == pytest.approx(0.065)
    assert plan.decay(1000) == pytest.approx(0.08)
    assert plan.decay(2000) == pytest.approx(0.08)


def test_the_learning_rate_is_scaled_by_the_global_batch():
    rates = [
        Schedule.of(load_config(None, [f"data.global_batch_size={b}", "optim.base_lr=8e-5"]), 10_000).peak_lr
        for b in (256, 1024)
    ]
    assert rates == pytest.approx([8e-5, 3.2e-4])


def test_a_data_set_smaller_than_a_batch_still_makes_a_step():
    config = load_config(None, ["optim.epochs=1", "data.global_batch_size=768"])
    assert Schedule.of(config, 10).total_steps == 1
