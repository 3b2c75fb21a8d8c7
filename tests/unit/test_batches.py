"""Batch sizes by position: a ramp in equally long parts, the same from wherever one starts counting."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmar_mega.batches import BatchPlan
from hmar_mega.config_io import ConfigError, load_config


def test_without_a_ramp_every_step_takes_the_full_batch():
    plan = BatchPlan.constant(768)
    assert plan.sizes == (768,)
    assert [plan.size(step) for step in (0, 1, 10**6)] == [768] * 3
    assert plan.position(10**6) == 768 * 10**6
    assert [plan.steps_for(images) for images in (1, 768, 769)] == [1, 1, 2]


def test_a_ramp_by_hand():
    """16 → 48 by 16 over 100 images: two parts of 50. 4 steps of 16 pass image 50, 2 of 32 pass 100."""
    plan = BatchPlan(full=48, start=16, increment=16, images=100)
    assert plan.sizes == (16, 32, 48)
    assert [plan.size(step) for step in range(8)] == [16, 16, 16, 16, 32, 32, 48, 48]
    assert [plan.position(step) for step in range(8)] == [0, 16, 32, 48, 64, 96, 128, 176]
    assert plan.steps_for(64) == 4
    assert plan.steps_for(65) == 5


plans = st.builds(
    lambda start, increment, count, images: BatchPlan(start + increment * count, start, increment, images),
    st.integers(1, 40), st.integers(1, 20), st.integers(1, 6), st.integers(1, 500),
)  # fmt: skip


@given(plan=plans)
def test_steps_positions_and_sizes_tell_one_story(plan: BatchPlan):
    position = 0
    for step, at in enumerate(islice(plan.positions(0), 60)):
        assert at == position == plan.position(step)
        assert plan.size(step) == plan.size_at(at)
        assert plan.steps_for(at + 1) == step + 1
        position += plan.size(step)
    assert list(islice(plan.positions(plan.position(7)), 5)) == [plan.position(step) for step in range(7, 12)]


@given(plan=plans)
def test_sizes_never_shrink_and_the_ramp_ends_where_it_should(plan: BatchPlan):
    sizes = [plan.size(step) for step in range(80)]
    assert sizes == sorted(sizes)
    assert set(sizes) <= set(plan.sizes)
    assert plan.size_at(plan.images + plan.full) == plan.full


def test_a_ramp_that_misses_the_full_batch_is_refused_with_what_fits():
    ramp = "data.batch_ramp={start: 64, increment: 50, images: 1000}"
    with pytest.raises(ConfigError, match=r"from 64 by 50 does not reach global_batch_size=256.*increment of .*64"):
        load_config(None, ["data.global_batch_size=256", ramp])
