"""The compute-optimal frontier: parabolas of loss over model size at fixed compute, and the model for a budget.

Approach 2 of Hoffmann et al. (arXiv 2203.15556): at each budget C the log of the loss is a parabola in log N, whose
lowest point is N_opt(C); these lie on a power law N_opt ∝ C^a.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.flops import train_flops_per_image
from hmar_mega.scaling.cells import count_parameters, sized
from hmar_mega.scaling.results import Point
from hmar_mega.scaling.spec import Size, without_layout

#: Depths that a recommendation chooses among.
DEPTHS = range(1, 65)


@dataclass(frozen=True)
class Parabola:
    """One budget: log L ≈ c0 + c1·log N + c2·log²N.

    Attributes:
        flops: C.
        coefficients: (c2, c1, c0), of log(N / center).
        optimum: N of the lowest point, None where the curve has none or it lies outside the sizes measured.
        why_not: what is in the way then.
    """

    flops: float
    center: float
    coefficients: tuple[float, float, float]
    optimum: float | None
    loss: float | None
    why_not: str = ""

    def __call__(self, size: float) -> float:
        """Loss at N."""
        return float(np.exp(np.polyval(self.coefficients, math.log(size / self.center))))


@dataclass(frozen=True)
class Frontier:
    """N_opt = scale · C^exponent, from at least two budgets."""

    exponent: float
    scale: float

    def size(self, flops: float) -> float:
        """Non-embedding parameters of the best model for a budget."""
        return self.scale * float(flops**self.exponent)


@dataclass(frozen=True)
class Recommendation:
    """What to train with a budget.

    Attributes:
        wanted: N_opt of the frontier.
        depth, non_embedding, parameters: of the nearest model of depth d and width 64·d.
        images: that the budget buys it.
        extrapolated: by which factor the budget is above the largest measured one; at most 1 within.
    """

    flops: float
    wanted: float
    depth: int
    non_embedding: int
    parameters: int
    images: float
    extrapolated: float


def iso_flop_groups(points: Sequence[Point]) -> dict[float, list[Point]]:
    """The runs of every iso-FLOP budget, by its FLOPs."""
    groups: dict[float, list[Point]] = {}
    for point in points:
        for group in point.groups:
            if group.startswith("flops="):
                groups.setdefault(float(group.removeprefix("flops=")), []).append(point)
    return dict(sorted(groups.items()))


def parabola(flops: float, points: Sequence[Point], quantity: str) -> Parabola:
    """Fit one budget by least squares.

    Raises:
        UserError: for fewer than three sizes.
    """
    sizes = np.array([point.non_embedding for point in points], dtype=float)
    if len(np.unique(sizes)) < 3:
        raise UserError(f"the budget of {flops:.3g} FLOPs has {len(np.unique(sizes))} finished sizes; it needs 3")
    center = float(np.exp(np.log(sizes).mean()))
    at, losses = np.log(sizes / center), np.log([point.values[quantity] for point in points])
    c2, c1, c0 = (float(c) for c in np.polyfit(at, losses, 2))
    if c2 <= 0:
        return Parabola(flops, center, (c2, c1, c0), None, None, "the loss does not rise again: no lowest point")
    lowest = -c1 / (2 * c2)
    if not at.min() <= lowest <= at.max():
        side = "smaller" if lowest < at.min() else "larger"
        return Parabola(
            flops, center, (c2, c1, c0), None, None, f"the lowest point is outside the sizes: add {side} ones"
        )
    loss = float(np.exp(c0 - c1 * c1 / (4 * c2)))
    return Parabola(flops, center, (c2, c1, c0), center * math.exp(lowest), loss)


def frontier(parabolas: Sequence[Parabola]) -> Frontier:
    """The line through the optima in logarithms, by least squares.

    Raises:
        UserError: for fewer than two optima.
    """
    optima = [(p.flops, p.optimum) for p in parabolas if p.optimum is not None]
    if len(optima) < 2:
        raise UserError(
            f"{len(optima)} of {len(parabolas)} iso-FLOP budgets have their best size inside the sizes measured; a "
            "frontier needs 2: add iso_flop budgets with at least 3 sizes around the optimum"
        )
    flops, sizes = np.log(np.array(optima)).T
    slope, intercept = np.polyfit(flops, sizes, 1)
    return Frontier(float(slope), float(np.exp(intercept)))


def recommend(line: Frontier, flops: float, base: Config, measured: float) -> Recommendation:
    """The model of depth d and width 64·d nearest to the frontier at a budget.

    Args:
        base: configuration with the schedule, classes and tokenizer of the sweep.
        measured: the largest budget of the sweep.
    """
    wanted = line.size(flops)
    models = {}
    for depth in DEPTHS:
        with contextlib.suppress(UserError):  # depths that the settings of the sweep forbid, such as mask_layers
            models[depth] = sized(without_layout(base), Size(depth=depth))
    counts = {depth: count_parameters(model) for depth, model in models.items()}
    depth = min(counts, key=lambda d: abs(math.log(counts[d][1] / wanted)))
    return Recommendation(
        flops=flops,
        wanted=wanted,
        depth=depth,
        non_embedding=counts[depth][1],
        parameters=counts[depth][0],
        images=flops / train_flops_per_image(models[depth]),
        extrapolated=flops / measured,
    )
