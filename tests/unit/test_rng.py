"""Philox4x32-10: published known answers, and that draws depend on (seed, position, purpose) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hmar_mega.rng import Purpose, philox4x32, uniform

WORD = 2**32 - 1
words = st.integers(0, WORD)


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """The ten rounds as Salmon et al. (SC 2011) write them, in unbounded integers."""
    c, k = list(counter), list(key)
    for round_number in range(10):
        if round_number:
            k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c


def draw(seed: int, position: int, purpose: int, count: int) -> list[float]:
    return uniform(torch.tensor([seed]), torch.tensor([position]), purpose, count)[0].tolist()


# The generator


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    """The test vectors published with Random123 by the authors of the generator."""
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == answer
    assert philox_in_python(counter, key) == answer


@given(st.lists(words, min_size=4, max_size=4), st.lists(words, min_size=2, max_size=2))
def test_philox_agrees_with_unbounded_integers(counter: list[int], key: list[int]) -> None:
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == philox_in_python(counter, key)


# Uniform numbers


@given(st.integers(0, 2**62), st.integers(0, 2**62), words, st.integers(1, 13))
def test_uniform_is_the_top_24_bits_of_the_counted_words(seed: int, position: int, purpose: int, count: int) -> None:
    """Fixes the layout (block, purpose, position low, position high), on which every resumed run relies."""
    expected: list[float] = []
    for block in range((count + 3) // 4):
        answer = philox_in_python([block, purpose, position & WORD, position >> 32], [seed & WORD, seed >> 32])
        expected += [(w >> 8) / 2**24 for w in answer]
    assert draw(seed, position, purpose, count) == expected[:count]


def test_uniform_shape_dtype_and_broadcast() -> None:
    one_seed = uniform(torch.tensor(7), torch.arange(5), Purpose.DROP_PATH, 3)
    assert one_seed.shape == (5, 3)
    assert one_seed.dtype == torch.float32
    assert torch.equal(one_seed, uniform(torch.full((5,), 7), torch.arange(5), Purpose.DROP_PATH, 3))


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**40), st.integers(0, 20), st.integers(0, 20))
def test_a_longer_row_starts_with_the_shorter_one(seed: int, position: int, short: int, more: int) -> None:
    row = draw(seed, position, Purpose.MASK_POSITION, short + more)
    assert len(row) == short + more
    assert row[:short] == draw(seed, position, Purpose.MASK_POSITION, short)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2**40)), min_size=1, max_size=8), st.randoms())
def test_a_row_knows_nothing_of_its_batch(rows: list[tuple[int, int]], random: object) -> None:
    """Any order and any split into micro-batches draws the same numbers for a sample."""
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    seeds, positions = torch.tensor(rows).unbind(1)
    together = uniform(seeds, positions, Purpose.LABEL_DROP, 6)
    shuffled = uniform(seeds[order], positions[order], Purpose.LABEL_DROP, 6)
    assert torch.equal(shuffled, together[order])
    assert [draw(s, p, Purpose.LABEL_DROP, 6) for s, p in rows] == together.tolist()


# Statistics: fixed seeds, so that these pass or fail for good. The bounds are five standard deviations.

N = 1 << 16


def column(seed: int, purpose: int) -> Tensor:
    """One number of each of N consecutive positions, as label drop draws them, (N,) float64."""
    return uniform(torch.tensor([seed]), torch.arange(N), purpose, 1)[:, 0].double()


def row(seed: int, position: int, purpose: int) -> Tensor:
    """N numbers of one position, as a mask draws them, (N,) float64."""
    return uniform(torch.tensor([seed]), torch.tensor([position]), purpose, N)[0].double()


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    correlation = np.corrcoef(a.numpy(), b.numpy())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(N)


@pytest.mark.parametrize("across", ["positions", "numbers of one position"])
def test_numbers_are_uniform_in_the_unit_interval(across: str) -> None:
    numbers = column(0, Purpose.LABEL_DROP) if across == "positions" else row(0, 3, Purpose.DROP_PATH)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    bins = 64
    counts = np.bincount((numbers.numpy() * bins).astype(int), minlength=bins)
    chi_square = ((counts - N / bins) ** 2 / (N / bins)).sum()
    assert abs(chi_square - (bins - 1)) < 5 * np.sqrt(2 * (bins - 1))
    assert abs(numbers.mean().item() - 0.5) < 5 / np.sqrt(12 * N)


def test_purposes_are_independent() -> None:
    streams = {purpose: column(0, purpose) for purpose in Purpose}
    for a in Purpose:
        for b in Purpose:
            if a < b:
                assert_uncorrelated(streams[a], streams[b])


def test_seeds_and_neighbouring_positions_are_independent() -> None:
    assert_uncorrelated(column(0, Purpose.DROP_PATH), column(1, Purpose.DROP_PATH))
    assert_uncorrelated(row(0, 0, Purpose.DROP_PATH), row(0, 1, Purpose.DROP_PATH))
    numbers = row(0, 0, Purpose.DROP_PATH)
    assert_uncorrelated(numbers, numbers.roll(1))


def test_positions_and_seeds_beyond_32_bits_are_told_apart() -> None:
    assert draw(0, 5, 1, 4) != draw(0, 5 + 2**32, 1, 4)
    assert draw(5, 0, 1, 4) != draw(5 + 2**32, 0, 1, 4)


def test_purposes_do_not_collide_with_sampling_streams() -> None:
    """Sampling draws from SAMPLE·(scale + 1) + pass: distinct up to 4096 passes a scale, unlike other purposes."""
    sampling = [Purpose.SAMPLE * (scale + 1) + step for scale in range(20) for step in range(4096)]
    assert len(set(sampling)) == len(sampling)
    assert not set(sampling) & {int(p) for p in Purpose if p != Purpose.SAMPLE}
