"""Power laws, L(x) = A·x^−α or E + A·x^−α, fitted robustly to log L, with bootstrap confidence intervals.

The residuals are those of log L, under Huber's loss (as in Hoffmann et al., arXiv 2203.15556), whose width follows from
the residuals' own spread; minimised by damped Gauss-Newton steps from many starts, all at once. Intervals come from
resampling the residuals. Axes: B problems solved at once, n points, p parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from hmar_mega.errors import UserError

Array = NDArray[np.float64]

#: Width of Huber's loss in units of the residuals' spread: 95 % as efficient as least squares on normal residuals.
HUBER = 1.345

#: Smallest width, in log L; what Hoffmann et al. take.
SMALLEST_WIDTH = 1e-3

#: Median absolute deviation of a normal distribution by its standard deviation.
MAD_OF_NORMAL = 0.6745

#: Most steps of the minimisation, a relative gain below which it ends, and a damping above which no step helps.
MAX_STEPS, GAIN, LARGEST_DAMPING = 200, 1e-9, 1e6

#: Resamples of an interval, and the share of them it covers.
RESAMPLES, COVERAGE = 400, 0.95


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law.

    Attributes:
        exponent: α.
        scale: A, at x = 1.
        irreducible: E; 0 where the law has none.
        exponent_interval, irreducible_interval: from the bootstrap, `COVERAGE` of it.
        spread: of the residuals of log L (1.4826 · median absolute deviation).
        correlation: Pearson's, of log x and log L.
        points: n.
        bootstrap: (B, 3) of (log A, α, log E) of the resamples; log E is −inf without irreducible term.
    """

    exponent: float
    scale: float
    irreducible: float
    exponent_interval: tuple[float, float]
    irreducible_interval: tuple[float, float]
    spread: float
    correlation: float
    points: int
    bootstrap: Array

    def __call__(self, x: ArrayLike) -> Array:
        """The law at x."""
        return self.irreducible + self.scale * np.asarray(x, dtype=float) ** -self.exponent

    def interval(self, x: float) -> tuple[float, float]:
        """Where L lies at x by the resamples, the residuals' own spread not counted."""
        log_scale, exponent, log_floor = self.bootstrap.T
        with np.errstate(over="ignore"):
            values = np.exp(np.logaddexp(log_floor, log_scale - exponent * math.log(x)))
        return _interval(values)


def fit_power_law(x: Sequence[float], y: Sequence[float], irreducible: bool, seed: int = 0) -> PowerLaw:
    """Fit a law.

    Args:
        x: model sizes, images or FLOPs, above 0.
        y: losses or errors, above 0.
        irreducible: with the term E.

    Raises:
        UserError: for fewer than 3 different x (5 with irreducible term), or numbers that are not above 0.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    least = 5 if irreducible else 3
    if len(np.unique(xs)) < least:
        raise UserError(
            f"{len(np.unique(xs))} different sizes or budgets are too few for a power law "
            f"{'with' if irreducible else 'without'} irreducible term; at least {least} are needed"
        )
    if not (np.isfinite(xs).all() and np.isfinite(ys).all() and (xs > 0).all() and (ys > 0).all()):
        raise UserError("a power law is fitted to logarithms: sizes and losses must be finite and above 0")
    log_x, log_y = np.log(xs), np.log(ys)
    center = float(log_x.mean())
    problem = _Problem(log_x - center, irreducible)
    best, width = _robust(problem, log_y)
    predicted = problem.predict(best[None])[0]
    residuals = log_y - predicted
    samples = _resample(problem, best, predicted, residuals, width, seed)
    samples = np.concatenate([best[None], samples])
    if not irreducible:
        samples = np.column_stack([samples, np.full(len(samples), -np.inf)])
    samples[:, 0] += samples[:, 1] * center  # from the centred x to x = 1
    log_scale, exponent, log_floor = samples[0]
    return PowerLaw(
        exponent=float(exponent),
        scale=float(np.exp(log_scale)),
        irreducible=float(np.exp(log_floor)),
        exponent_interval=_interval(samples[1:, 1]),
        irreducible_interval=_interval(np.exp(samples[1:, 2])),
        spread=float(np.median(np.abs(residuals)) / MAD_OF_NORMAL),
        correlation=float(np.corrcoef(log_x, log_y)[0, 1]) if log_y.std() > 0 else 0.0,
        points=len(xs),
        bootstrap=samples[1:],
    )


@dataclass(frozen=True)
class _Problem:
    """log L = logaddexp(a − αx, e) of centred log x (n,), or a − αx; parameters (a, α, e) or (a, α)."""

    x: Array
    irreducible: bool

    def predict(self, parameters: Array) -> Array:
        """(B, p) → (B, n)."""
        line = parameters[:, :1] - parameters[:, 1:2] * self.x
        return np.logaddexp(line, parameters[:, 2:]) if self.irreducible else line

    def jacobian(self, parameters: Array) -> Array:
        """(B, p) → (B, n, p)."""
        line = parameters[:, :1] - parameters[:, 1:2] * self.x
        if not self.irreducible:
            return np.stack([np.ones_like(line), -self.x * np.ones_like(line)], axis=-1)
        share = np.exp(line - np.logaddexp(line, parameters[:, 2:]))
        return np.stack([share, -self.x * share, 1 - share], axis=-1)

    def starts(self, log_y: Array) -> Array:
        """(B, p) places to start from: a grid of exponents and, below the least loss, of irreducible terms."""
        middle = float(np.median(log_y))
        exponents = (0.02, 0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
        if not self.irreducible:
            return np.array([[middle, a] for a in exponents])
        least = float(log_y.min())
        floors = [least - gap for gap in (0.01, 0.1, 0.3, 0.7, 1.5, 3.0)]
        return np.array(
            [[middle + math.log(max(1e-3, 1 - math.exp(e - middle))), a, e] for a in exponents for e in floors]
        )


def _robust(problem: _Problem, log_y: Array) -> tuple[Array, float]:
    """(parameters, width of Huber's loss): first almost absolute deviations, then as wide as their spread allows."""
    starts, targets = problem.starts(log_y), log_y[None]
    rough = _best(problem, starts, targets, SMALLEST_WIDTH)
    residuals = log_y - problem.predict(rough[None])[0]
    spread = float(np.median(np.abs(residuals))) / MAD_OF_NORMAL
    width = max(SMALLEST_WIDTH, HUBER * spread)
    return _best(problem, np.concatenate([starts, rough[None]]), targets, width), width


def _best(problem: _Problem, starts: Array, targets: Array, width: float) -> Array:
    found, losses = _minimise(problem, starts, np.broadcast_to(targets, (len(starts), targets.shape[1])), width)
    return np.asarray(found[np.argmin(losses)])


def _resample(problem: _Problem, best: Array, predicted: Array, residuals: Array, width: float, seed: int) -> Array:
    """(B, p) fits to the law plus residuals drawn from its own.

    Residuals are enlarged by √(n / (n − p)), for what the fit has taken out of them, and by the ratio of Student's
    quantile to the normal one, since few of them tell their own spread badly.
    """
    n, p = len(residuals), len(best)
    generator = np.random.default_rng(seed)
    free, tail = max(1, n - p), (1 + COVERAGE) / 2
    enlarged = (residuals - np.median(residuals)) * math.sqrt(n / free) * stdtrit(free, tail) / ndtri(tail)
    targets = predicted + generator.choice(enlarged, size=(RESAMPLES, n))
    tries = [_minimise(problem, np.broadcast_to(best, (RESAMPLES, p)), targets, width)]
    if problem.irreducible:  # also from a lower irreducible term
        other = best - np.array([0.0, 0.0, 0.5])
        tries.append(_minimise(problem, np.broadcast_to(other, (RESAMPLES, p)), targets, width))
    losses = np.stack([loss for _, loss in tries])
    return np.asarray(np.stack([found for found, _ in tries])[np.argmin(losses, axis=0), np.arange(RESAMPLES)])


def _minimise(problem: _Problem, starts: Array, targets: Array, width: float) -> tuple[Array, Array]:
    """Levenberg-Marquardt with Huber weights, B problems at once: (B, p), (B, n) → parameters (B, p), losses (B,)."""
    at = np.array(starts, dtype=float)
    damping = np.full(len(at), 1e-2)
    residuals = targets - problem.predict(at)
    loss = _huber(residuals, width)
    identity, going = np.eye(at.shape[1]), np.arange(len(at))
    for _ in range(MAX_STEPS):
        now, left = at[going], residuals[going]
        jacobian = problem.jacobian(now)
        weighted = jacobian * np.minimum(1, width / np.maximum(np.abs(left), 1e-300))[..., None]
        normal = weighted.transpose(0, 2, 1) @ jacobian
        diagonal = np.einsum("bii->bi", normal)[..., None] * identity
        gradient = (weighted * left[..., None]).sum(axis=1)
        damped = normal + damping[going, None, None] * diagonal + 1e-12 * identity
        trial = now + np.clip(np.linalg.solve(damped, gradient[..., None])[..., 0], -2.0, 2.0)
        trial_residuals = targets[going] - problem.predict(trial)
        gain = loss[going] - _huber(trial_residuals, width)
        better = gain > 0
        at[going[better]], residuals[going[better]] = trial[better], trial_residuals[better]
        ended = np.where(better, gain <= GAIN * loss[going], damping[going] >= LARGEST_DAMPING)
        loss[going[better]] -= gain[better]
        damping[going] = np.maximum(np.where(better, damping[going] / 4, damping[going] * 6), 1e-12)
        going = going[~ended]
        if not len(going):
            break
    return at, loss


def _huber(residuals: Array, width: float) -> Array:
    """Σ of Huber's loss over the points."""
    size = np.abs(residuals)
    values = np.where(size <= width, 0.5 * size**2, width * (size - 0.5 * width))
    return np.asarray(values.sum(axis=-1))


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
