"""Static tables of the tiles that scale-block attention kernels work on: pure, made once per schedule.

A program of a kernel owns up to `block` consecutive positions, of one scale or of several small ones packed together,
and walks over the positions that they see (forward, query gradients) or that see them (key and value gradients).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache

import torch
from torch import Tensor

from hmar_mega.scales import Pattern, ScaleSchedule

#: Consecutive small scales of up to so many positions together share a tile, whatever the block.
PACK = 64

#: Places of a row at which a scale's values may start. The GPU's copy engine reads from multiples of 16 bytes, and a
#: block of FP8 keys and values, which has an exponent of its own, must be a step of every walk.
ALIGNMENT = 64

#: Float32 values in 16 bytes.
WORDS = 4

#: Fewest keys that a tile must see to be computed in FP8 at heads where that is right.
FP8_KEYS = 256


@dataclass(frozen=True)
class Tile:
    """What one program does.

    Attributes:
        start, stop: own positions.
        low, high: the other positions: walked from `low` in steps of the inner block to `high`.
        edge: where element masks end or begin. Walking over keys: every own position sees all of `low:edge` and the
            steps of `edge:high` need a mask. Walking over queries: the steps of `low:edge` need a mask.
        shift: of the walk's positions in rows of values (see `shifts`).
        packed: whether several scales share the tile, whose pairs then need a mask in every step.
        first: position at which the first own scale starts.
    """

    start: int
    stop: int
    low: int
    edge: int
    high: int
    shift: int
    packed: bool
    first: int

    @property
    def work(self) -> int:
        """Query-key pairs, padding apart."""
        return (self.stop - self.start) * (self.high - self.low)


#: Numbers of a tile in its table.
FIELDS = len(fields(Tile))


def runs(schedule: ScaleSchedule, block: int) -> list[tuple[int, int, int, int]]:
    """Own positions of every program: (start, stop, first scale, last scale).

    Consecutive scales of at most `PACK` positions together share a program; longer ones are cut into blocks.
    """
    found: list[tuple[int, int, int, int]] = []
    packed: tuple[int, int] | None = None
    for scale, length in enumerate(schedule.scale_lengths):
        start, stop = schedule.offsets[scale], schedule.offsets[scale + 1]
        if packed is not None and stop - schedule.offsets[packed[0]] <= PACK:
            packed = (packed[0], scale)
            continue
        if packed is not None:
            found.append((schedule.offsets[packed[0]], schedule.offsets[packed[1] + 1], *packed))
            packed = None
        if length <= PACK:
            packed = (scale, scale)
        else:
            found += [(at, min(at + block, stop), scale, scale) for at in range(start, stop, block)]
    if packed is not None:
        found.append((schedule.offsets[packed[0]], schedule.offsets[packed[1] + 1], *packed))
    return found


def shifts(schedule: ScaleSchedule, pattern: Pattern) -> tuple[list[int], int]:
    """How far the rows of values of each scale are moved up, and how long a row is with that.

    Kernels keep numbers of every query and key (log-sums, norms, FP8 values) in rows that are read from aligned places
    alone. A walk over block-diagonal positions starts where its scales start: these places are moved up to `ALIGNMENT`.
    """
    if pattern == "block_causal":
        return [0] * schedule.num_scales, _align(schedule.num_tokens)
    moved, end = [0] * schedule.num_scales, 0
    for start, stop, first, last in runs(schedule, schedule.num_tokens):
        at = _align(end)
        moved[first : last + 1] = [at - start] * (last + 1 - first)
        end = at + stop - start
    return moved, _align(end)


def _align(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def key_tiles(schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int) -> list[Tile]:
    """Programs that own queries and walk over the keys these see, longest first."""
    tiles, (moved, _) = [], shifts(schedule, pattern)
    for start, stop, first, last in runs(schedule, block):
        low = schedule.offsets[first] if pattern == "block_diagonal" else 0
        high = schedule.offsets[last + 1]
        seen_by_first = schedule.offsets[first + 1]
        seen_by_all = low if pattern == "block_diagonal" and first < last else seen_by_first
        edge = low + (seen_by_all - low) // inner * inner
        tiles.append(Tile(start, stop, low, edge, high, moved[first], first < last, schedule.offsets[first]))
    return sorted(tiles, key=lambda t: -t.work)


def query_tiles(schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int) -> list[Tile]:
    """Programs that own keys and walk over the queries that see these, longest first."""
    tiles, (moved, _) = [], shifts(schedule, pattern)
    for start, stop, first, last in runs(schedule, block):
        own = schedule.offsets[first]
        if pattern == "block_diagonal":
            low, high = own, schedule.offsets[last + 1]
            unmasked = low if first == last else high
        else:  # queries of the last own scale and of later ones see every own key
            low, high = own // WORDS * WORDS, schedule.num_tokens
            unmasked = schedule.offsets[last]
        edge = min(high, low + -(-(unmasked - low) // inner) * inner)
        tiles.append(Tile(start, stop, low, edge, high, moved[first], first < last, schedule.offsets[first]))
    return sorted(tiles, key=lambda t: -t.work)


@dataclass(frozen=True)
class Tables:
    """Device copies of the tables.

    Attributes:
        tiles: (T, `FIELDS`) int32, the fields of `Tile`.
        levels: (N + `ALIGNMENT`,) int32, the scale of every position; behind them one that sees and is seen by none.
        seen: (N, 2) int32, first and past-last position of the own ones' counterparts, for element masks.
        places: (N,) int32, where each position's value is in a row.
        positions: (row_length,) int32, which position's value is at a place; N in the gaps.
        row_length: of such rows, a multiple of `ALIGNMENT`.
    """

    tiles: Tensor
    levels: Tensor
    seen: Tensor
    places: Tensor
    positions: Tensor
    row_length: int


@cache
def key_tables(schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int, device: torch.device | str) -> Tables:
    """Of `key_tiles`; `seen` are the keys that each query sees."""
    low = [0 if pattern == "block_causal" else schedule.offsets[k] for k in range(schedule.num_scales)]
    return _tables(schedule, pattern, key_tiles(schedule, pattern, block, inner), low, schedule.offsets[1:], device)


@cache
def query_tables(
    schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int, device: torch.device | str
) -> Tables:
    """Of `query_tiles`; `seen` are the queries that see each key."""
    high = schedule.offsets[1:] if pattern == "block_diagonal" else (schedule.num_tokens,) * schedule.num_scales
    low = schedule.offsets[:-1]
    return _tables(schedule, pattern, query_tiles(schedule, pattern, block, inner), low, high, device)


def _tables(
    schedule: ScaleSchedule,
    pattern: Pattern,
    tiles: list[Tile],
    low: Sequence[int],
    high: Sequence[int],
    device: torch.device | str,
) -> Tables:
    levels = schedule.level_ids()
    moved, length = shifts(schedule, pattern)
    seen = torch.tensor([low, high], dtype=torch.int32).T[levels].contiguous()
    places = (torch.arange(len(levels)) + torch.tensor(moved)[levels]).int()
    positions = torch.full((length,), len(levels), dtype=torch.int32)
    positions[places.long()] = torch.arange(len(levels), dtype=torch.int32)
    behind = torch.full((ALIGNMENT,), -1 if pattern == "block_diagonal" else 2**30)
    padded = torch.cat([levels, behind]).int()
    rows = torch.tensor([astuple(t) for t in tiles], dtype=torch.int32)
    return Tables(rows.to(device), padded.to(device), seen.to(device), places.to(device), positions.to(device), length)
