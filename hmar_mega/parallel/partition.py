"""The part of a parameter and of its optimizer's state that one process owns, whoever cut it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Partition:
    """The part of one parameter whose float32 master and Adam moments this process owns.

    Attributes:
        start, stop: range in the flattened local parameter.
        weight: float32 master values of that range, a view.
        moments: `exp_avg` and `exp_avg_sq` of that range, views, absent before the first step; and the moving average
            of the weights where one is kept.
    """

    start: int
    stop: int
    weight: Tensor
    moments: dict[str, Tensor]
