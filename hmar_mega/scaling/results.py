"""What the finished cells of a sweep measured: a point a cell, with its sizes, losses and errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmar_mega.errors import UserError
from hmar_mega.scaling.contents import CONTENTS
from hmar_mega.scaling.record import read_result
from hmar_mega.scaling.state import read_sweep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One finished run.

    Attributes:
        groups: budgets that asked for it.
        parameters: total; non_embedding: of the blocks.
        images, flops: of training.
        values: by quantity: `loss/all`, `loss/last`, `loss/1` … `loss/K` in nats a token, and `error/…` alike.
        contents: fingerprints of data and tokenizer, as CONTENTS has them.
    """

    cell: str
    groups: tuple[str, ...]
    depth: int
    seed: int
    parameters: int
    non_embedding: int
    images: int
    flops: float
    values: dict[str, float]
    contents: tuple[str | None, ...] = ()


#: What a law may be in, by name.
VARIABLES: dict[str, Callable[[Point], float]] = {
    "N": lambda point: float(point.non_embedding),
    "D": lambda point: float(point.images),
    "C": lambda point: point.flops,
}


def finished_points(folder: Path) -> list[Point]:
    """The finished cells of a sweep folder, by FLOPs; the others are counted in the log.

    Raises:
        UserError: when none is finished.
    """
    entries = read_sweep(folder)
    found = [(entry, result) for entry in entries if (result := read_result(folder, entry["cell"])) is not None]
    if not found:
        raise UserError(
            f"none of the {len(entries)} cells of {folder} is finished; see `hmar-mega sweep status {folder}`"
        )
    if len(found) < len(entries):
        log.warning("%d of %d cells are not finished and are left out", len(entries) - len(found), len(entries))
    return sorted((_point(entry, result) for entry, result in found), key=lambda point: point.flops)


def _point(entry: dict[str, Any], result: dict[str, Any]) -> Point:
    return Point(
        cell=entry["cell"],
        groups=tuple(entry["groups"]),
        depth=entry["depth"],
        seed=entry["seed"],
        parameters=entry["parameters"],
        non_embedding=entry["non_embedding"],
        images=entry["images"],
        flops=entry["flops"],
        values=result["values"],
        contents=tuple(result["identity"][name] for name in CONTENTS.values()),
    )


def mixed_data(points: Sequence[Point]) -> list[str]:
    """A note for every thing that runs were not alike in: data and tokenizer, of accepted changes."""
    notes = []
    for number, name in enumerate(CONTENTS.values()):
        kinds = sorted({str(point.contents[number]) for point in points if point.contents})
        if len(kinds) > 1:
            notes.append(f"runs differ in the {name} ({', '.join(kinds)}), which was accepted: --accept-changed-data")
    return notes


def at_most_data(points: Sequence[Point]) -> list[Point]:
    """For laws in N: the runs of the largest iso-data budget that three sizes have finished; none without one.

    By the budget, not by images: batches of different sizes round it up to different numbers.
    """
    sizes: dict[str, set[int]] = {}
    for point in points:
        for group in data_budgets(point.groups):
            sizes.setdefault(group, set()).add(point.non_embedding)
    enough = [group for group, found in sizes.items() if len(found) >= 3]
    largest = max(enough, key=budget_images, default="")
    return [point for point in points if largest in point.groups]


def data_budgets(groups: Sequence[str]) -> list[str]:
    """Of a cell's budgets, those of iso_data."""
    return [group for group in groups if group.startswith("images=")]


def budget_images(group: str) -> float:
    """Images that an iso_data budget asks for."""
    return float(group.removeprefix("images="))


def at_largest_size(points: Sequence[Point]) -> list[Point]:
    """For laws in D: the runs of the largest size that was trained on at least three numbers of images."""
    by_size: dict[int, set[int]] = {}
    for point in points:
        by_size.setdefault(point.non_embedding, set()).add(point.images)
    enough = [size for size, images in by_size.items() if len(images) >= 3]
    return [point for point in points if enough and point.non_embedding == max(enough)]


def pareto(points: Sequence[Point], quantity: str) -> list[Point]:
    """For laws in C: the runs that none of at most as much compute beats in `quantity`."""
    best, kept = float("inf"), []
    for point in sorted(points, key=lambda p: (p.flops, p.values[quantity])):
        if point.values[quantity] < best:
            best = point.values[quantity]
            kept.append(point)
    return kept
