"""What the measures need of a set of images: moments, and features of some; in memory and in a file.

A file is an .npz in the layout of ADM's references (mu, sigma, mu_s, sigma_s) that also holds the network's name and
digest, the number of images and up to `KEPT` features, which KID, precision and recall need. A file without a name is
taken for one of ADM's, whose network is Inception.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hmar_mega.errors import UserError
from hmar_mega.evaluation.images import NPZ_ERRORS
from hmar_mega.evaluation.moments import Moments
from hmar_mega.evaluation.networks import FeatureNetwork
from hmar_mega.files import open_atomic
from hmar_mega.inference.storage import write_npz

#: Features of KID, precision and recall: of more images, evenly spaced ones.
KEPT = 10_000

#: The pooled and spatial dims of Inception.
INCEPTION_DIMS = (2048, 2023)


@dataclass(frozen=True)
class Statistics:
    """Of one set of images.

    Attributes:
        count: images; None where a file does not say.
        mean, covariance: of pooled features, (D,) and (D, D) float64.
        spatial_mean, spatial_covariance: of spatial features, or None.
        features: (≤ KEPT, D) float32, or None.
    """

    count: int | None
    mean: np.ndarray
    covariance: np.ndarray
    spatial_mean: np.ndarray | None = None
    spatial_covariance: np.ndarray | None = None
    features: np.ndarray | None = None


def gather(chunks: Iterable[dict[str, np.ndarray]], count: int) -> Statistics:
    """The statistics of features in chunks, one chunk in memory at a time."""
    chosen = np.unique(np.linspace(0, count - 1, min(count, KEPT)).round().astype(int))
    pooled: Moments | None = None
    spatial: Moments | None = None
    kept, start = [], 0
    for chunk in chunks:
        stop = start + len(chunk["pooled"])
        kept.append(chunk["pooled"][chosen[(chosen >= start) & (chosen < stop)] - start])
        own, own_spatial = Moments.of(chunk["pooled"]), Moments.of(chunk["spatial"])
        pooled = own if pooled is None else pooled.merged(own)
        spatial = own_spatial if spatial is None else spatial.merged(own_spatial)
        start = stop
    if pooled is None or spatial is None:
        raise ValueError("no features to gather")
    return Statistics(count, pooled.mean, pooled.covariance, spatial.mean, spatial.covariance, np.concatenate(kept))


def save_statistics(path: Path, statistics: Statistics, network: FeatureNetwork) -> None:
    """Write a file that is whole or absent."""
    arrays: dict[str, Any] = {
        "mu": statistics.mean, "sigma": statistics.covariance, "mu_s": statistics.spatial_mean,
        "sigma_s": statistics.spatial_covariance, "features": statistics.features,
        "count": np.asarray(statistics.count), "network": np.asarray(network.name),
        "network_digest": np.asarray(network.digest),
    }  # fmt: skip
    with open_atomic(path) as file:
        write_npz(file, {name: array for name, array in arrays.items() if array is not None})


def holds_statistics(path: Path) -> bool:
    """Whether a file is an .npz with mu and sigma; UserError when it is an .npz that cannot be opened."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except NPZ_ERRORS as err:
        raise UserError(f"{path} cannot be read as an .npz: {err}; make or fetch it anew") from None
    if not names & {"mu.npy", "arr_0.npy"}:
        raise UserError(f"{path} has neither mu and sigma nor arr_0, but {', '.join(sorted(names)) or 'nothing'}")
    return "mu.npy" in names


def load_statistics(path: Path, network: FeatureNetwork) -> Statistics:
    """Read a file of statistics.

    Raises:
        UserError: when it is damaged, holds what no statistics can be, or is of another network.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files if name != "arr_0"}
    except NPZ_ERRORS as err:
        raise UserError(f"{path} is damaged: {err}; make or fetch it anew") from None
    _check_network(path, arrays, network)
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in arrays) != (covariance in arrays):
            raise UserError(f"{path} has one of {mean} and {covariance}, and needs both; make or fetch it anew")
        if mean in arrays:
            _check_moments(path, arrays[mean], arrays[covariance], mean, covariance)
    count = int(arrays["count"]) if "count" in arrays else None
    real = {k: v.astype(np.float64) for k, v in arrays.items() if k in ("mu", "sigma", "mu_s", "sigma_s")}
    return Statistics(count, real["mu"], real["sigma"], real.get("mu_s"), real.get("sigma_s"), arrays.get("features"))


def _check_network(path: Path, arrays: dict[str, np.ndarray], network: FeatureNetwork) -> None:
    if "network" in arrays:
        name, digest = str(arrays["network"]), str(arrays.get("network_digest", "unknown"))
        if (name, digest) != (network.name, network.digest):
            raise UserError(
                f"{path} holds statistics of the network {name} ({digest}), not of {network.label}: their distance "
                f"means nothing; use --network {name} with those weights, or make the statistics anew"
            )
    elif network.name != "inception":
        raise UserError(
            f"{path} does not name its network, so it is taken for ADM's Inception, not {network.label}: their "
            "distance means nothing; use --network inception --weights FILE, or images as reference"
        )
    elif arrays["mu"].shape != INCEPTION_DIMS[:1]:
        raise UserError(f"{path} has mu of shape {arrays['mu'].shape}, and Inception gives {INCEPTION_DIMS[:1]}")


def _check_moments(path: Path, mean: np.ndarray, covariance: np.ndarray, *names: str) -> None:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path} has {names[0]} of shape {mean.shape} and {names[1]} of {covariance.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} has numbers in {names[0]} or {names[1]} that are not finite; make or fetch it anew")
