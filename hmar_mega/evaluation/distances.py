"""The measures, as functions of features and statistics; every one is checked against another implementation.

Axes: n images, D feature dims, C classes, R bootstrap replicates. `weights` (R, n) say how often a replicate drew each
image: a row of ones is the measure itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

#: Rows of a distance or kernel matrix that are in memory at once.
BLOCK = 1024

#: Neighbours that span the manifold of precision and recall.
NEIGHBOURS = 3

#: Replicates whose matrices are in memory at once; each such group takes a pass over the features.
TOGETHER = 8

#: A pass over features, chunk by chunk.
Chunks = Callable[[], Iterable[np.ndarray]]


def bootstrap_weights(count: int, replicates: int, seed: int = 0) -> np.ndarray:
    """(1 + replicates, count) float64: the first row ones, the others `count` draws with replacement."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=replicates)
    return np.concatenate([np.ones((1, count)), draws.astype(np.float64)])


class FrechetReference:
    """The Fréchet distance to one normal distribution: ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), arXiv 1706.08500, eq. 6.

    With a factor Σ₁ = F Fᵀ, tr (Σ₁ Σ₂)^½ is the sum of the square roots of the eigenvalues of Fᵀ Σ₂ F, which is
    symmetric: no complex numbers, and no offset of the diagonal where a covariance is singular. F is taken once; it has
    as many columns as Σ₁ has rank r.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64.
        device: where to compute, in float64.
    """

    def __init__(self, mean: np.ndarray, covariance: np.ndarray, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        self._mean, self._trace = self._put(mean), float(np.trace(covariance))
        values, vectors = torch.linalg.eigh(self._put(covariance))
        # below it an eigenvalue is rounding: of a reference with fewer images than dims most are
        kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
        self._factor = vectors[:, kept] * values[kept].sqrt()

    def distance(self, mean: np.ndarray, covariance: np.ndarray) -> float:
        """Distance to a mean (D,) and a covariance (D, D), float64."""
        between = torch.linalg.eigvalsh(self._factor.T @ self._put(covariance) @ self._factor)
        step = self._mean - self._put(mean)
        return float(step @ step + np.trace(covariance) + self._trace - 2 * _root_sum(between))

    def resampled(self, chunks: Chunks, weights: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Distances to resampled sets of features; (R,).

        No replicate's covariance is made in D dims. Features are taken through F first, so that Fᵀ Σ₂ F is a sum over
        the images a replicate drew; where these are fewer than r, its eigenvalues are those of the images' Gram matrix.

        Args:
            chunks: features (n_i, D) of all n images, in order, as often as they are asked for.
            weights: (R, n) how often each replicate drew each image.
            centre: (D,) anything near their mean: it only keeps sums small.
        """
        if not len(weights):
            return np.empty(0)
        drawn = int((weights > 0).sum(1).max())
        if drawn < self._factor.shape[1]:
            return self._resampled_by_gram(chunks, weights, centre)
        found = [
            self._resampled_by_scatter(chunks, weights[start : start + TOGETHER], centre)
            for start in range(0, len(weights), TOGETHER)
        ]
        return np.concatenate(found)

    def _resampled_by_scatter(self, chunks: Chunks, weights: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """`resampled` with an (r, r) eigenproblem a replicate."""
        rank, middle = self._factor.shape[1], self._put(centre)
        scatters = torch.zeros(len(weights), rank, rank, dtype=torch.float64, device=self._device)
        sums = torch.zeros(len(weights), len(middle), dtype=torch.float64, device=self._device)
        squares = torch.zeros(len(weights), dtype=torch.float64, device=self._device)
        start = 0
        for chunk in chunks():
            rows, own = self._put(chunk) - middle, self._put(weights[:, start : start + len(chunk)])
            start += len(chunk)
            sums += own @ rows
            squares += own @ (rows * rows).sum(1)
            seen = rows @ self._factor
            for scatter, counts in zip(scatters, own, strict=True):
                drawn = counts > 0
                scatter += _inner_products(seen[drawn] * counts[drawn, None].sqrt())
        totals = self._put(weights).sum(1)
        shifts = sums / totals[:, None]
        roots = []
        for scatter, total, shift in zip(scatters, totals, shifts @ self._factor, strict=True):
            scatter.addr_(shift, shift, alpha=-float(total))
            roots.append(_root_sum(torch.linalg.eigvalsh(scatter / (total - 1))))
        return self._distances(middle, shifts, squares, totals, torch.stack(roots))

    def _resampled_by_gram(self, chunks: Chunks, weights: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """`resampled` with an eigenproblem of as many dims as a replicate drew images."""
        middle, all_weights = self._put(centre), self._put(weights)
        rows = torch.cat([self._put(chunk) - middle for chunk in chunks()])
        seen = rows @ self._factor
        gram, totals = _inner_products(seen.T), all_weights.sum(1)
        shifts = all_weights @ rows / totals[:, None]
        roots = []
        for counts, total in zip(all_weights, totals, strict=True):
            drawn = counts > 0
            own, share = gram[drawn][:, drawn], counts[drawn] / total
            across = own @ share  # centred at the replicate's own mean
            centred = own - across[:, None] - across + share @ across
            scale = counts[drawn].sqrt()
            roots.append(_root_sum(torch.linalg.eigvalsh(scale[:, None] * centred * scale / (total - 1))))
        return self._distances(middle, shifts, all_weights @ (rows * rows).sum(1), totals, torch.stack(roots))

    def _distances(self, middle: Tensor, shifts: Tensor, squares: Tensor, totals: Tensor, roots: Tensor) -> np.ndarray:
        """Distances from means less `middle` (R, D), weighted sums of squares about it, weights and traces of roots."""
        traces = (squares - totals * (shifts * shifts).sum(1)) / (totals - 1)
        steps = middle + shifts - self._mean
        found: np.ndarray = ((steps * steps).sum(1) + self._trace + traces - 2 * roots).cpu().numpy()
        return found

    def _put(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, torch.float64)


def _inner_products(columns: Tensor) -> Tensor:
    """columnsᵀ columns; on the CPU by NumPy, which makes one half of it and copies the other (BLAS syrk)."""
    if columns.device.type != "cpu":
        return columns.T @ columns
    values = columns.numpy()
    return torch.from_numpy(values.T @ values)


def _root_sum(eigenvalues: Tensor) -> Tensor:
    """Σ √λ; what rounding made negative is 0."""
    total: Tensor = eigenvalues.clamp(min=0).sqrt().sum()
    return total


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


def kernel_distance(
    fake: np.ndarray, real: np.ndarray, weights: np.ndarray, device: torch.device | None = None
) -> np.ndarray:
    """KID, arXiv 1801.01401: the unbiased squared MMD of k(x, y) = (x·y / D + 1)³ over all pairs; (R,).

    Args:
        fake, real: (n, D), (m, D).
        weights: (R, n) of the fake images; pairs of an image with itself never count.
        device: where to compute, in float64.
    """
    dims = fake.shape[1]
    x, y, counts = (torch.from_numpy(values).to(device or "cpu", torch.float64) for values in (fake, real, weights))

    def kernel(rows: Tensor, columns: Tensor) -> Tensor:
        cubed: Tensor = (rows @ columns.T / dims).add_(1).pow_(3)
        return cubed

    within, across = torch.zeros_like(counts[:, 0]), torch.zeros_like(counts[:, 0])
    reals = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in _blocks(len(x)):
        within += ((counts[:, rows] @ kernel(x[rows], x)) * counts).sum(1)
        across += counts[:, rows] @ kernel(x[rows], y).sum(1)
    for rows in _blocks(len(y)):
        reals += kernel(y[rows], y).sum()
    within -= counts**2 @ ((x * x).sum(1) / dims + 1) ** 3
    reals -= (((y * y).sum(1) / dims + 1) ** 3).sum()
    total, m = counts.sum(1), len(y)
    distance = within / (total**2 - (counts**2).sum(1)) + reals / (m * (m - 1)) - 2 * across / (total * m)
    found: np.ndarray = distance.cpu().numpy()
    return found


def manifold_coverage(
    points: np.ndarray, manifold: np.ndarray, neighbours: int = NEIGHBOURS, device: torch.device | None = None
) -> np.ndarray:
    """Which points lie in the balls around `manifold` that reach to its k-th neighbour, arXiv 1904.06991; (n,) bool.

    Precision is the share of fake points in the real manifold, recall that of real points in the fake one.

    Args:
        points, manifold: (n, D), (m, D).
        device: where to compute, in float64.
    """
    x, y = (torch.from_numpy(values).to(device or "cpu", torch.float64) for values in (points, manifold))
    # the smallest distance is that to itself
    reach = torch.cat([torch.cdist(y[r], y).kthvalue(neighbours + 1, dim=1).values for r in _blocks(len(y))])
    inside = torch.cat([(torch.cdist(x[r], y) <= reach).any(1) for r in _blocks(len(x))])
    found: np.ndarray = inside.cpu().numpy()
    return found


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))
