"""Tile tables of the attention kernels: what their programs visit, how much of it is padding, where values lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmar_mega.kernels.tiles import (
    ALIGNMENT,
    WORDS,
    Tables,
    Tile,
    key_tables,
    key_tiles,
    query_tables,
    query_tiles,
)
from hmar_mega.scales import PATCH_NUMS, Pattern, ScaleSchedule

PATTERNS: tuple[Pattern, ...] = ("block_diagonal", "block_causal")

schedules = st.sets(st.integers(2, 20), min_size=1, max_size=6).map(lambda p: ScaleSchedule((1, *sorted(p))))
problems = given(schedules, st.sampled_from(PATTERNS), st.sampled_from([64, 128]), st.sampled_from([32, 64]))


def visits(tiles: list[Tile], tables: Tables, masked_first: bool) -> Tensor:
    """(N, N): how often each (own, other) position pair is counted, masks applied where the kernels apply them."""
    counted = torch.zeros(len(tables.seen), len(tables.seen), dtype=torch.int32)
    for tile in tiles:
        own, other = slice(tile.start, tile.stop), torch.arange(tile.low, tile.high)
        low, high = tables.seen[own].T
        visible = (other >= low[:, None]) & (other < high[:, None])
        unmasked = other >= tile.edge if masked_first else other < tile.edge
        counted[own, tile.low : tile.high] += (visible | unmasked).int()
    return counted


@problems
@settings(max_examples=30)
def test_every_pair_that_sees_itself_is_visited_once_and_no_other(
    schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int
):
    wanted = schedule.attention_mask(pattern, torch.device("cpu")).int()
    given_problem = (schedule, pattern, block, inner)
    by_query = visits(key_tiles(*given_problem), key_tables(*given_problem, "cpu"), masked_first=False)
    assert torch.equal(by_query, wanted)
    by_key = visits(query_tiles(*given_problem), query_tables(*given_problem, "cpu"), masked_first=True)
    assert torch.equal(by_key.T, wanted)


def visits_by_level(tiles: list[Tile], tables: Tables, causal: bool, own_keys: bool) -> Tensor:
    """The same by what the bf16 kernels look at: levels in packed tiles, and the first query of a walk before it."""
    tokens = len(tables.seen)
    counted = torch.zeros(tokens, tokens, dtype=torch.int32)
    for tile in tiles:
        own, other = slice(tile.start, tile.stop), torch.arange(tile.low, tile.high)
        own_level, other_level = tables.levels[own][:, None], tables.levels[other][None, :]
        visible = torch.ones(tile.stop - tile.start, len(other), dtype=torch.bool)
        if own_keys and causal:
            visible &= other >= tile.first
        if tile.packed:
            seen = own_level <= other_level if own_keys else own_level >= other_level
            visible &= seen if causal else own_level == other_level
        counted[own, tile.low : tile.high] += visible.int()
    return counted


@problems
@settings(max_examples=30)
def test_levels_show_the_same_pairs(schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int):
    wanted, causal = schedule.attention_mask(pattern, torch.device("cpu")).int(), pattern == "block_causal"
    given_problem = (schedule, pattern, block, inner)
    by_query = visits_by_level(key_tiles(*given_problem), key_tables(*given_problem, "cpu"), causal, own_keys=False)
    assert torch.equal(by_query, wanted)
    by_key = visits_by_level(query_tiles(*given_problem), query_tables(*given_problem, "cpu"), causal, own_keys=True)
    assert torch.equal(by_key.T, wanted)
    # what stands behind the last position sees nothing and is not seen
    behind = key_tables(*given_problem, "cpu").levels[schedule.num_tokens :]
    assert len(behind) >= inner
    assert bool((behind > schedule.num_scales).all() if causal else (behind < 0).all())


@problems
def test_programs_fit_their_blocks_and_come_longest_first(
    schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int
):
    for tiles in (key_tiles(schedule, pattern, block, inner), query_tiles(schedule, pattern, block, inner)):
        assert sorted(p for t in tiles for p in range(t.start, t.stop)) == list(range(schedule.num_tokens))
        assert max(t.stop - t.start for t in tiles) <= block
        assert [t.work for t in tiles] == sorted((t.work for t in tiles), reverse=True)
    # keys that need no mask fill whole steps: the forward kernel does not look whether a step passes their end
    assert all((t.edge - t.low) % inner == 0 for t in key_tiles(schedule, pattern, block, inner))


@problems
def test_walks_read_rows_of_values_at_aligned_places_of_their_own(
    schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int
):
    for make, tabulate in ((key_tiles, key_tables), (query_tiles, query_tables)):
        tables = tabulate(schedule, pattern, block, inner, "cpu")
        places = tables.places.tolist()
        assert len(set(places)) == schedule.num_tokens
        assert max(places) < tables.row_length
        assert tables.row_length % ALIGNMENT == 0
        # blocks of FP8 keys start where walks over keys do; everything else only needs whole 16 bytes
        start = ALIGNMENT if make is key_tiles or pattern == "block_diagonal" else WORDS
        for tile in make(schedule, pattern, block, inner):
            assert (tile.low + tile.shift) % start == 0
            assert tile.edge == tile.high or (tile.edge + tile.shift) % WORDS == 0
            for position in (tile.start, tile.stop - 1, tile.low, tile.high - 1):
                assert places[position] == position + tile.shift


@pytest.mark.parametrize(("resolution", "expected"), [(256, 1.19), (512, 1.04), (1024, 1.01)])
def test_padding_adds_little_to_the_work(resolution: int, expected: float):
    """Pairs in whole 64 × 64 blocks over Σ p⁴; 128 × 128 blocks that each sample's scales share take 2.37 at 256 px."""
    schedule = ScaleSchedule(PATCH_NUMS[resolution])
    tiles = key_tiles(schedule, "block_diagonal", 64, 64)
    padded = sum(64 * 64 * -(-(t.high - t.low) // 64) for t in tiles)
    assert padded / sum(n * n for n in schedule.scale_lengths) == pytest.approx(expected, abs=0.005)
