"""Static tables of the tiles that scale-block attention kernels work on: pure, made once per schedule.

A program of a kernel owns up to `block` consecutive positions, of one scale or of several small ones packed together,
and walks over the positions that they see (forward, query gradients) or that see them (key and value gradients).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hmar_mega.scales import Pattern, ScaleSchedule


@dataclass(frozen=True)
class Tile:
    """What one program does.

    Attributes:
        start, stop: own positions.
        low, high: the other positions: walked from `low` in steps of the inner block to `high`.
        edge: where element masks end or begin. Walking over keys: every own position sees all of `low:edge` and the
            steps of `edge:high` need a mask. Walking over queries: the steps of `low:edge` need a mask.
    """

    start: int
    stop: int
    low: int
    edge: int
    high: int

    @property
    def work(self) -> int:
        """Query-key pairs, padding apart."""
        return (self.stop - self.start) * (self.high - self.low)


def runs(schedule: ScaleSchedule, block: int) -> list[tuple[int, int, int, int]]:
    """Own positions of every program: (start, stop, first scale, last scale).

    Consecutive scales that fit into a block together share one; a longer scale is cut into blocks.
    """
    found: list[tuple[int, int, int, int]] = []
    packed: tuple[int, int] | None = None
    for scale, length in enumerate(schedule.scale_lengths):
        start, stop = schedule.offsets[scale], schedule.offsets[scale + 1]
        if packed is not None and stop - schedule.offsets[packed[0]] <= block:
            packed = (packed[0], scale)
            continue
        if packed is not None:
            found.append((schedule.offsets[packed[0]], schedule.offsets[packed[1] + 1], *packed))
            packed = None
        if length <= block:
            packed = (scale, scale)
        else:
            found += [(at, min(at + block, stop), scale, scale) for at in range(start, stop, block)]
    if packed is not None:
        found.append((schedule.offsets[packed[0]], schedule.offsets[packed[1] + 1], *packed))
    return found


def key_tiles(schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int) -> list[Tile]:
    """Programs that own queries and walk over the keys these see, longest first."""
    tiles = []
    for start, stop, first, last in runs(schedule, block):
        low = schedule.offsets[first] if pattern == "block_diagonal" else 0
        high = schedule.offsets[last + 1]
        seen_by_first = schedule.offsets[first + 1]
        seen_by_all = low if pattern == "block_diagonal" and first < last else seen_by_first
        tiles.append(Tile(start, stop, low, low + (seen_by_all - low) // inner * inner, high))
    return sorted(tiles, key=lambda t: -t.work)


def query_tiles(schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int) -> list[Tile]:
    """Programs that own keys and walk over the queries that see these, longest first."""
    tiles = []
    for start, stop, first, last in runs(schedule, block):
        low = schedule.offsets[first]
        high = schedule.offsets[last + 1] if pattern == "block_diagonal" else schedule.num_tokens
        if first == last:
            edge = low
        elif pattern == "block_diagonal":
            edge = high
        else:  # queries of the last own scale and of later ones see every own key
            edge = min(high, low + -(-(schedule.offsets[last] - low) // inner) * inner)
        tiles.append(Tile(start, stop, low, edge, high))
    return sorted(tiles, key=lambda t: -t.work)


@dataclass(frozen=True)
class Tables:
    """Device copies of the tables.

    Attributes:
        tiles: (T, 5) int32, the fields of `Tile`.
        seen: (N, 2) int32, first and past-last position of the own ones' counterparts, for element masks.
    """

    tiles: Tensor
    seen: Tensor


@cache
def key_tables(schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int, device: torch.device | str) -> Tables:
    """Of `key_tiles`; `seen` are the keys that each query sees."""
    low = [0 if pattern == "block_causal" else schedule.offsets[k] for k in range(schedule.num_scales)]
    return _tables(schedule, key_tiles(schedule, pattern, block, inner), low, list(schedule.offsets[1:]), device)


@cache
def query_tables(
    schedule: ScaleSchedule, pattern: Pattern, block: int, inner: int, device: torch.device | str
) -> Tables:
    """Of `query_tiles`; `seen` are the queries that see each key."""
    ends = schedule.offsets[1:] if pattern == "block_diagonal" else (schedule.num_tokens,) * schedule.num_scales
    return _tables(schedule, query_tiles(schedule, pattern, block, inner), schedule.offsets[:-1], ends, device)


def _tables(
    schedule: ScaleSchedule,
    tiles: list[Tile],
    low: list[int] | tuple[int, ...],
    high: list[int] | tuple[int, ...],
    device: torch.device | str,
) -> Tables:
    levels = schedule.level_ids()
    seen = torch.tensor([low, high], dtype=torch.int32).T[levels].contiguous()
    rows = torch.tensor([(t.start, t.stop, t.low, t.edge, t.high) for t in tiles], dtype=torch.int32)
    return Tables(rows.to(device), seen.to(device))
