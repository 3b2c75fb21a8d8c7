"""Mean and covariance of features in one pass: float64 sums of chunks, merged exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Of n feature vectors, each with a weight.

    Attributes:
        count: Σ weights; n where none were given.
        mean: (D,) float64.
        scatter: (D, D) float64, Σ w (x − mean)(x − mean)ᵀ.
    """

    count: float
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, weights: np.ndarray | None = None) -> Moments:
        """The moments of one chunk.

        Args:
            features: (n, D), any float.
            weights: (n,) how often each row counts; None: once.
        """
        values = features.astype(np.float64)
        if weights is None:
            weights = np.ones(len(values))
        count = float(weights.sum())
        mean = weights @ values / count if count else np.zeros(values.shape[1])
        centred = values - mean
        return cls(count, mean, (centred * weights[:, None]).T @ centred)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets: the pairwise update of Chan, Golub and LeVeque (1979)."""
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        between = np.outer(step, step) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) float64, normalised by n − 1 as `numpy.cov` does."""
        covariance: np.ndarray = self.scatter / (self.count - 1)
        return covariance
