"""Mean and covariance of features in one pass: float64 sums of chunks, merged exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Of n feature vectors.

    Attributes:
        count: n.
        mean: (D,) float64.
        scatter: (D, D) float64, Σ (x − mean)(x − mean)ᵀ.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """The moments of one chunk; features: (n, D), any float, n at least 1."""
        values = features.astype(np.float64)
        mean = values.mean(0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets: the pairwise update of Chan, Golub and LeVeque (1979)."""
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        between = np.outer(step, step) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) float64, normalised by n − 1 as `numpy.cov` does."""
        covariance: np.ndarray = self.scatter / (self.count - 1)
        return covariance
