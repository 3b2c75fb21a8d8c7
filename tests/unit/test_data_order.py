"""The order of samples: a permutation every epoch, a pure function of (seed, position), the same for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmar_mega.data.order import SampleOrder, permutation
from hmar_mega.data.threads import map_ahead
from hmar_mega.rng import Purpose


def test_golden_order():
    """A change here changes the data every resumed run sees."""
    assert permutation(10, 0, 0, Purpose.EPOCH_ORDER).tolist() == [1, 3, 9, 2, 4, 0, 5, 6, 8, 7]
    large = permutation(300_000, 2**40 + 1, 2**33, Purpose.EPOCH_ORDER)  # 32-bit sort keys would tie here
    assert hashlib.sha256(large.astype("<i8").tobytes()).hexdigest()[:16] == "441117e41fbfd6da"


@given(st.integers(1, 200), st.integers(0, 2**62), st.integers(0, 2**40))
def test_permutation_holds_every_number_once(count, seed, stream):
    assert sorted(permutation(count, seed, stream, Purpose.EPOCH_ORDER).tolist()) == list(range(count))


def test_permutations_differ_by_seed_epoch_and_purpose():
    base = permutation(50, 1, 2, 3).tolist()
    assert base != permutation(50, 2, 2, 3).tolist()
    assert base != permutation(50, 1, 3, 3).tolist()
    assert base != permutation(50, 1, 2, 4).tolist()
    assert base != permutation(50, 1 + 2**32, 2, 3).tolist()


def test_every_place_is_equally_likely():
    """Sample 0 lands on each of 6 places in about 1/6 of 3000 epochs (5 σ)."""
    order = SampleOrder(6, seed=0)
    places = [order.sample_indices(6 * epoch, 6).tolist().index(0) for epoch in range(3000)]
    assert np.abs(np.bincount(places, minlength=6) - 500).max() < 5 * np.sqrt(3000 * 5 / 36)


@given(st.integers(1, 20), st.integers(0, 100), st.integers(0, 70))
def test_ranges_are_the_single_positions_across_epochs(num_samples, start, count):
    order = SampleOrder(num_samples, seed=7)
    singles = [SampleOrder(num_samples, seed=7).sample_index(position) for position in range(start, start + count)]
    assert order.sample_indices(start, count).tolist() == singles


def test_each_sample_once_an_epoch_in_another_order():
    order = SampleOrder(30, seed=0)
    first, second = order.sample_indices(0, 30), order.sample_indices(30, 30)
    assert sorted(first) == sorted(second) == list(range(30))
    assert first.tolist() != second.tolist()
    assert [order.epoch(p) for p in (0, 29, 30, 59, 60)] == [0, 0, 1, 1, 2]


def test_without_shuffle_samples_come_as_stored():
    assert SampleOrder(3, seed=0, shuffle=False).sample_indices(2, 5).tolist() == [2, 0, 1, 2, 0]


def test_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        SampleOrder(0, seed=0)


# map_ahead


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_map_ahead_keeps_the_order_of_items(workers):
    assert list(map_ahead(lambda n: n * n, range(20), workers)) == [n * n for n in range(20)]


def test_map_ahead_holds_a_bounded_number_of_results():
    taken = []
    results = map_ahead(lambda n: n, (taken.append(n) or n for n in range(100)), workers=2, ahead=5)
    assert next(results) == 0
    assert len(taken) == 6
    results.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_map_ahead_raises_where_the_result_would_come(workers):
    results = map_ahead(lambda n: 1 // (2 - n), range(5), workers)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
