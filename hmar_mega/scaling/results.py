"""What the finished cells of a sweep measured: a point a cell, with its sizes, losses and errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmar_mega.errors import UserError
from hmar_mega.metrics import read_metrics
from hmar_mega.scaling.state import cell_folder, read_sweep, state_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One finished run.

    Attributes:
        groups: budgets that asked for it.
        parameters: total; non_embedding: of the blocks.
        images, flops: of training.
        values: by quantity: `loss/all`, `loss/last`, `loss/1` … `loss/K` in nats a token, and `error/…` alike.
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
    finished = [e for e in entries if state_of(folder, e, 1).state == "finished"]
    if not finished:
        raise UserError(
            f"none of the {len(entries)} cells of {folder} is finished; see `hmar-mega sweep status {folder}`"
        )
    if len(finished) < len(entries):
        log.warning("%d of %d cells are not finished and are left out", len(entries) - len(finished), len(entries))
    return sorted((_point(folder, entry) for entry in finished), key=lambda point: point.flops)


def _point(folder: Path, entry: dict[str, Any]) -> Point:
    path = cell_folder(folder, entry["cell"])
    rows = [r for r in read_metrics(path / "run") if r["kind"] == "val" and r["step"] == entry["steps"]]
    if not rows or "scale_error" not in rows[-1]:
        raise UserError(f"{path}/run/metrics.jsonl has no validation with errors at its last step, {entry['steps']}")
    return Point(
        cell=entry["cell"],
        groups=tuple(entry["groups"]),
        depth=entry["depth"],
        seed=entry["seed"],
        parameters=entry["parameters"],
        non_embedding=entry["non_embedding"],
        images=entry["images"],
        flops=entry["flops"],
        values=row_values(rows[-1]),
    )


def row_values(row: dict[str, Any]) -> dict[str, float]:
    """The quantities of a validation row of metrics.jsonl."""
    values = {}
    for name, kind in (("loss", ""), ("error", "_error")):
        values[f"{name}/all"], values[f"{name}/last"] = row[f"all_scales{kind}"], row[f"last_scale{kind}"]
        for number, value in enumerate(row[f"scale_{name}"], 1):
            if value is not None:
                values[f"{name}/{number}"] = value
    return values


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
