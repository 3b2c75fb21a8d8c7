"""All measures of one set of images beside another, each with an interval, and what speaks against trusting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from hmar_mega.errors import UserError
from hmar_mega.evaluation.distances import (
    NEIGHBOURS,
    FrechetReference,
    bootstrap_weights,
    inception_score,
    kernel_distance,
    manifold_coverage,
)
from hmar_mega.evaluation.statistics import Statistics

#: Below it FID is biased upwards by more than papers differ.
ENOUGH = 10_000

#: Fewer images have no measure worth a name.
FEWEST = 20

#: Splits of the Inception Score; of 50 000 images 5 000 each, as in ADM's evaluator.
SPLITS = 10

#: Half the width of a 95 % interval in standard deviations.
Z_95 = 1.96

#: A pass over the features, chunk by chunk.
Chunks = Callable[[], Iterable[dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        name: of the measure, without the network's.
        value: None where it cannot be had, which `note` explains.
        low, high: 95 % interval, value ± 1.96 standard deviations over bootstrap replicates; None without replicates.
        note: on how many images, or why there is no value.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


def check_count(count: int, what: str) -> None:
    """Raise UserError for too few images."""
    if count < FEWEST:
        raise UserError(f"{what} has {count} images; at least {FEWEST} are needed, and {ENOUGH} for a figure to trust")


def measure(
    chunks: Chunks, fake: Statistics, real: Statistics | None, replicates: int, device: torch.device | None = None
) -> list[Measure]:
    """Every measure.

    Intervals tell how much figures vary with the draw of the images that are measured. The reference is taken as it
    is, but for recall, which is a share of its images. Resampled images repeat, which shifts FID upwards: hence the
    standard deviation of the replicates around the value itself, not their percentiles.

    Args:
        chunks: features of the images, in order.
        fake: their statistics.
        real: of the reference; None: only what needs none.
        replicates: bootstrap replicates; 0: no intervals.
        device: of the linear algebra, in float64; default the CPU.

    Raises:
        UserError: when the reference's statistics have other dims.
    """
    measures = _distances(chunks, fake, real, replicates, device) if real is not None else []
    measures.append(_score(chunks, replicates))
    if real is not None:
        measures += _of_features(fake, real, replicates, device)
    return measures


def warnings_for(fake: Statistics, real: Statistics | None) -> list[str]:
    """What makes figures unreliable, a sentence each."""
    told = []
    for what, given in (("the images", fake), ("the reference", real)):
        if given is None:
            continue
        if given.count is None:
            told.append(f"{what}: from how many images its statistics are is not said")
            continue
        if given.count < ENOUGH:
            told.append(f"{what}: {given.count} are fewer than {ENOUGH}, so that FID and sFID are biased upwards")
        if given.count <= len(given.mean):
            told.append(
                f"{what}: {given.count} images cannot fill a covariance of {len(given.mean)} features: it is "
                "rank-deficient, and FID far too large; KID has no such bias"
            )
    return told


def _distances(
    chunks: Chunks, fake: Statistics, real: Statistics, replicates: int, device: torch.device | None
) -> list[Measure]:
    kinds = [("FID", "pooled", (real.mean, real.covariance), (fake.mean, fake.covariance))]
    spatial = real.spatial_mean, real.spatial_covariance, fake.spatial_mean, fake.spatial_covariance
    if not any(part is None for part in spatial):
        mean, covariance, own_mean, own_covariance = (np.asarray(part) for part in spatial)
        kinds.append(("sFID", "spatial", (mean, covariance), (own_mean, own_covariance)))
    measures = []
    weights = bootstrap_weights(fake.count or 0, replicates)[1:]
    for name, field, theirs, ours in kinds:
        if len(theirs[0]) != len(ours[0]):
            raise UserError(f"the reference has {len(theirs[0])} {field} features, the network gives {len(ours[0])}")
        reference = FrechetReference(*theirs, device)
        value = reference.distance(*ours)
        drawn = reference.resampled(partial(_field, chunks, field), weights, ours[0])
        measures.append(_measure(name, value, drawn, f"{fake.count} images"))
    if len(kinds) == 1:
        measures.append(Measure("sFID", None, note="the reference has no spatial statistics"))
    return measures


def _field(chunks: Chunks, name: str) -> Iterator[np.ndarray]:
    return (chunk[name] for chunk in chunks())


def _score(chunks: Chunks, replicates: int) -> Measure:
    parts = [chunk["log_probabilities"] for chunk in chunks() if "log_probabilities" in chunk]
    if not parts:
        return Measure("IS", None, note="the network has no classes")
    logs = np.concatenate(parts)
    scores = inception_score(logs, bootstrap_weights(len(logs), replicates), SPLITS)
    return _measure("IS", scores[0], scores[1:], f"{len(logs)} images, {SPLITS} splits")


def _of_features(fake: Statistics, real: Statistics, replicates: int, device: torch.device | None) -> list[Measure]:
    names = ("KID", "precision", "recall")
    if fake.features is None or real.features is None:
        return [Measure(name, None, note="the reference has no features, only statistics") for name in names]
    fakes, reals = len(fake.features), len(real.features)
    weights = bootstrap_weights(fakes, replicates)
    note = f"{fakes} images, {reals} of the reference"
    distances = kernel_distance(fake.features, real.features, weights, device)
    measures = [_measure("KID", distances[0], distances[1:], note)]
    for name, points, manifold in (
        ("precision", fake.features, real.features), ("recall", real.features, fake.features),
    ):  # fmt: skip
        inside = manifold_coverage(points, manifold, device=device)
        shares = bootstrap_weights(len(points), replicates) @ inside / len(points)
        measures.append(_measure(name, shares[0], shares[1:], f"{note}, {NEIGHBOURS} neighbours"))
    return measures


def _measure(name: str, value: float, drawn: Iterable[float], note: str) -> Measure:
    values = [float(v) for v in drawn]
    if len(values) < 2:
        return Measure(name, float(value), note=note)
    half = Z_95 * float(np.std(values, ddof=1))
    return Measure(name, float(value), float(value) - half, float(value) + half, note)
