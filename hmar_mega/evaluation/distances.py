"""The measures, as functions of features and statistics; every one is checked against another implementation.

Axes: n images, D feature dims, C classes, R bootstrap replicates. `weights` (R, n) say how often a replicate drew each
image: a row of ones is the measure itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

#: Rows of a distance or kernel matrix that are in memory at once.
BLOCK = 1024

#: Neighbours that span the manifold of precision and recall.
NEIGHBOURS = 3


def bootstrap_weights(count: int, replicates: int, seed: int = 0) -> np.ndarray:
    """(1 + replicates, count) float64: the first row ones, the others `count` draws with replacement."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=replicates)
    return np.concatenate([np.ones((1, count)), draws.astype(np.float64)])


class FrechetReference:
    """The Fréchet distance to one normal distribution: ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), arXiv 1706.08500, eq. 6.

    tr (Σ₁ Σ₂)^½ is the sum of the square roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric: no complex
    numbers, and no offset of the diagonal where a covariance is singular. The root of Σ₁ is taken once.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64.
    """

    def __init__(self, mean: np.ndarray, covariance: np.ndarray) -> None:
        self.mean, self._trace = mean, float(np.trace(covariance))
        values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
        self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, mean: np.ndarray, covariance: np.ndarray) -> float:
        """Distance to a mean (D,) and a covariance (D, D), float64."""
        between = torch.linalg.eigvalsh(self._root @ torch.from_numpy(covariance) @ self._root)
        step = self.mean - mean
        root_trace = float(between.clamp(min=0).sqrt().sum())
        return float(step @ step) + self._trace + float(np.trace(covariance)) - 2 * root_trace


def inception_score(log_probabilities: np.ndarray, weights: np.ndarray, splits: int) -> np.ndarray:
    """exp E KL(p(y|x) ‖ p(y)), arXiv 1606.03498, the mean over consecutive splits; (R,).

    Args:
        log_probabilities: (n, C).
        splits: parts of equal size, ± 1.
    """
    logs = log_probabilities.astype(np.float64)
    p = np.exp(logs)
    negentropy = (p * logs).sum(1)
    scores = []
    for part in np.array_split(np.arange(len(logs)), splits):
        own = weights[:, part]
        total = own.sum(1)
        marginal = own @ p[part] / total[:, None]
        entropy = -(marginal * np.log(np.maximum(marginal, np.finfo(np.float64).tiny))).sum(1)
        scores.append(np.exp(own @ negentropy[part] / total + entropy))
    mean: np.ndarray = np.mean(scores, axis=0)
    return mean


def kernel_distance(fake: np.ndarray, real: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """KID, arXiv 1801.01401: the unbiased squared MMD of k(x, y) = (x·y / D + 1)³ over all pairs; (R,).

    Args:
        fake, real: (n, D), (m, D).
        weights: (R, n) of the fake images; pairs of an image with itself never count.
    """
    dims = fake.shape[1]
    x, y = fake.astype(np.float64), real.astype(np.float64)

    def kernel(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        product: np.ndarray = (rows @ columns.T / dims + 1) ** 3
        return product

    within, across, reals = np.zeros(len(weights)), np.zeros(len(weights)), 0.0
    for rows in _blocks(len(x)):
        within += ((weights[:, rows] @ kernel(x[rows], x)) * weights).sum(1)
        across += weights[:, rows] @ kernel(x[rows], y).sum(1)
    for rows in _blocks(len(y)):
        reals += float(kernel(y[rows], y).sum())
    within -= weights**2 @ ((x * x).sum(1) / dims + 1) ** 3
    reals -= float((((y * y).sum(1) / dims + 1) ** 3).sum())
    total, m = weights.sum(1), len(y)
    distance: np.ndarray = within / (total**2 - (weights**2).sum(1)) + reals / (m * (m - 1)) - 2 * across / (total * m)
    return distance


def manifold_coverage(points: np.ndarray, manifold: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Which points lie in the balls around `manifold` that reach to its k-th neighbour, arXiv 1904.06991; (n,) bool.

    Precision is the share of fake points in the real manifold, recall that of real points in the fake one.

    Args:
        points, manifold: (n, D), (m, D).
    """
    x, y = torch.from_numpy(points).double(), torch.from_numpy(manifold).double()
    # the smallest distance is that to itself
    reach = torch.cat([torch.cdist(y[r], y).kthvalue(neighbours + 1, dim=1).values for r in _blocks(len(y))])
    inside = torch.cat([(torch.cdist(x[r], y) <= reach).any(1) for r in _blocks(len(x))])
    found: np.ndarray = inside.numpy()
    return found


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))
