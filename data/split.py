"""Which images of a set are kept for validation: a share of every class, always the same ones."""

from __future__ import annotations

import numpy as np

from hmar_mega.data.order import permutation
from hmar_mega.errors import UserError
from hmar_mega.rng import Purpose


def stratified_split(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Mark the share `fraction` of every class, at least one image and not all, (n,) bool.

    Args:
        labels: (n,).

    Raises:
        UserError: when `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction={fraction}: use a number between 0 and 1, for example 0.1")
    is_val = np.zeros(len(labels), dtype=bool)
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        label = int(labels[members[0]])
        taken = min(max(1, round(fraction * len(members))), len(members) - 1)
        is_val[members[permutation(len(members), seed, label, Purpose.SPLIT_ORDER)[:taken]]] = True
    return is_val
