"""Which images of a set are kept for validation: a share of every class, always the same ones."""

from __future__ import annotations

import numpy as np

from hmar_mega.data.order import permutation
from hmar_mega.errors import UserError
from hmar_mega.rng import Purpose


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int = 0, groups: np.ndarray | None = None
) -> np.ndarray:
    """Mark the share `fraction` of every class, at least one image and not all, (n,) bool.

    Args:
        labels: (n,).
        groups: (n,), numbers of what stays on one side; of which the share is then taken, and not of images.

    Raises:
        UserError: when `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction={fraction}: use a number between 0 and 1, for example 0.1")
    is_val = np.zeros(len(labels), dtype=bool)
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        label = int(labels[members[0]])
        units = members if groups is None else np.unique(groups[members])
        taken = min(max(1, round(fraction * len(units))), len(units) - 1)
        chosen = units[permutation(len(units), seed, label, Purpose.SPLIT_ORDER)[:taken]]
        is_val[chosen if groups is None else members[np.isin(groups[members], chosen)]] = True
    return is_val
