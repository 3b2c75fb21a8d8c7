"""Everything `sweep fit` works out from the finished cells: laws, the held-out largest model, the frontier."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hmar_mega.config import Config
from hmar_mega.config_io import parse_config
from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic
from hmar_mega.scaling import results
from hmar_mega.scaling.frontier import (
    Frontier,
    Parabola,
    Recommendation,
    frontier,
    iso_flop_groups,
    parabola,
    recommend,
)
from hmar_mega.scaling.laws import PowerLaw, fit_power_law
from hmar_mega.scaling.results import Point
from hmar_mega.scaling.state import read_sweep, sweep_file

log = logging.getLogger(__name__)

#: Of a sweep folder: what the smaller models predicted of the largest, kept from before that was measured.
PREDICTION_FILE = "prediction.json"

#: Quantities with a law in every variable; single scales have one in N.
MAIN_QUANTITIES = ("loss/last", "loss/all", "error/last", "error/all")


#: Why there is nothing to fit in a variable.
NO_GROUP = {
    "N": "no number of images was seen by three sizes (budgets.iso_data with three sizes)",
    "D": "no size was trained on three numbers of images (three images in budgets.iso_data or iso_parameters)",
    "C": "no run is finished",
}


@dataclass(frozen=True)
class Law:
    """A fitted law with what it was fitted to; `law` is None, with the reason, where it could not be."""

    quantity: str
    variable: str
    irreducible: bool
    law: PowerLaw | None
    points: tuple[Point, ...]
    why_not: str = ""


@dataclass(frozen=True)
class Prediction:
    """The largest model, predicted from the smaller ones.

    Attributes:
        size: its non-embedding parameters.
        before: whether this was written down before it was measured; else it was merely left out of the fit.
        low, high: of the predicted mean, by the bootstrap.
        measured: mean over seeds, None where it is not trained yet.
    """

    quantity: str
    irreducible: bool
    size: int
    images: int
    from_cells: tuple[str, ...]
    made: str
    before: bool
    predicted: float
    low: float
    high: float
    measured: float | None = None

    @property
    def error(self) -> float | None:
        """Relative, of the prediction."""
        return None if self.measured is None else self.predicted / self.measured - 1


@dataclass(frozen=True)
class Fit:
    """All results of `sweep fit`."""

    points: tuple[Point, ...]
    laws: tuple[Law, ...]
    predictions: tuple[Prediction, ...]
    parabolas: tuple[Parabola, ...]
    line: Frontier | None
    recommendations: tuple[Recommendation, ...]
    notes: tuple[str, ...]


def fit_sweep(folder: Path, budgets: Sequence[float], seed: int = 0) -> Fit:
    """Fit the finished cells of a sweep folder, by its sweep.json and results alone.

    Args:
        budgets: FLOPs to recommend a model for.

    Raises:
        UserError: when no cell is finished.
    """
    points, base = results.finished_points(folder), parse_config(sweep_file(folder)["base"])
    notes = results.mixed_data(points)
    # first, so that the prediction is on disk before the largest model is looked at
    predictions = predict_largest(folder, points, seed, notes)
    laws = all_laws(points, seed)
    parabolas, line, recommended = _frontier(points, base, budgets, notes)
    return Fit(tuple(points), tuple(laws), tuple(predictions), tuple(parabolas), line, tuple(recommended), tuple(notes))


def all_laws(points: Sequence[Point], seed: int = 0) -> list[Law]:
    """L and Err in N, D and C, of the last scale and over all, with and without irreducible term; each scale in N."""
    scales = [name for name in points[0].values if name not in MAIN_QUANTITIES]
    wanted = [(quantity, variable) for variable in results.VARIABLES for quantity in MAIN_QUANTITIES]
    wanted += [(quantity, "N") for quantity in scales]
    found = []
    for quantity, variable in wanted:
        if not all(quantity in point.values for point in points):
            continue
        chosen = _chosen(points, quantity, variable)
        found += [_law(chosen, quantity, variable, irreducible, seed) for irreducible in (False, True)]
    return found


def _chosen(points: Sequence[Point], quantity: str, variable: str) -> list[Point]:
    if variable == "N":
        return results.at_most_data(points)
    return results.at_largest_size(points) if variable == "D" else results.pareto(points, quantity)


def _law(points: Sequence[Point], quantity: str, variable: str, irreducible: bool, seed: int) -> Law:
    of = results.VARIABLES[variable]
    if not points:
        return Law(quantity, variable, irreducible, None, (), NO_GROUP[variable])
    try:
        law = fit_power_law([of(p) for p in points], [p.values[quantity] for p in points], irreducible, seed)
    except UserError as err:
        return Law(quantity, variable, irreducible, None, tuple(points), str(err))
    return Law(quantity, variable, irreducible, law, tuple(points))


def predict_largest(folder: Path, points: Sequence[Point], seed: int, notes: list[str]) -> list[Prediction]:
    """Predict the largest size of the sweep from the smaller ones on the same images.

    What is predicted while the largest is not measured is kept in PREDICTION_FILE, made anew when more cells are in,
    and compared once the largest is measured.
    """
    entries = read_sweep(folder)
    sized = results.at_most_data(points) if points else []
    shared = set.intersection(*(set(results.data_budgets(point.groups)) for point in sized)) if sized else set()
    budget = max(shared, key=results.budget_images, default="")
    images = round(results.budget_images(budget)) if budget else 0
    sizes = {e["non_embedding"] for e in entries if budget in e["groups"]}
    largest = max(sizes, default=0)
    smaller = [point for point in sized if point.non_embedding < largest]
    measured = [point for point in sized if point.non_embedding == largest]
    others, kept = _kept_predictions(folder, largest, images)
    if kept and (measured or {point.cell for point in smaller} <= set(kept[0].from_cells)):
        return [_compare(prediction, measured) for prediction in kept]
    made = []
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    for quantity in MAIN_QUANTITIES:
        for irreducible in (False, True):
            law = _law(smaller, quantity, "N", irreducible, seed).law
            if law is None:
                continue
            low, high = law.interval(largest)
            cells = tuple(point.cell for point in smaller)
            value = float(law(largest))
            made.append(Prediction(quantity, irreducible, largest, images, cells, now, not measured, value, low, high))
    if not made:
        notes.append("no prediction of the largest model: it needs at least 3 smaller sizes on the same images")
    elif not measured:
        write_atomic(folder / PREDICTION_FILE, json.dumps([asdict(p) for p in [*others, *made]], indent=1))
        log.info("predicted the largest model before it is measured: %s", folder / PREDICTION_FILE)
    return [_compare(prediction, measured) for prediction in made]


def _kept_predictions(folder: Path, largest: int, images: int) -> tuple[list[Prediction], list[Prediction]]:
    """Those of other sizes and amounts of data, and those of this one."""
    path = folder / PREDICTION_FILE
    if not path.exists():
        return [], []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    found = [Prediction(**{**row, "from_cells": tuple(row["from_cells"])}) for row in rows]
    mine = [p for p in found if (p.size, p.images) == (largest, images)]
    return [p for p in found if p not in mine], mine


def _compare(prediction: Prediction, measured: Sequence[Point]) -> Prediction:
    if not measured:
        return prediction
    values = [point.values[prediction.quantity] for point in measured]
    return Prediction(**{**asdict(prediction), "measured": sum(values) / len(values)})


def _frontier(
    points: Sequence[Point], base: Config, budgets: Sequence[float], notes: list[str]
) -> tuple[list[Parabola], Frontier | None, list[Recommendation]]:
    parabolas: list[Parabola] = []
    groups = iso_flop_groups(points)
    for flops, group in groups.items():
        try:
            parabolas.append(parabola(flops, group, "loss/all"))
        except UserError as err:
            notes.append(str(err))
    notes += [f"budget of {p.flops:.3g} FLOPs: {p.why_not}" for p in parabolas if p.why_not]
    if not groups:
        notes.append("no frontier and no recommended model: the sweep has no budgets.iso_flop")
        return [], None, []
    try:
        line = frontier(parabolas)
    except UserError as err:
        notes.append(f"no frontier and no recommended model: {err}")
        return parabolas, None, []
    largest = max(p.flops for p in parabolas)
    return parabolas, line, [recommend(line, flops, base, largest) for flops in budgets or [largest]]
