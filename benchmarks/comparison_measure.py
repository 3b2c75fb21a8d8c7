"""Measuring a trained variant: samples, their distance to held-out images with intervals, and what sampling costs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from comparison_variants import CFG_SCALES, MASK_CFGS, PUBLISHED, TOP_K, TOP_P, Passes, mask_schedules

from hmar_mega.evaluation.measures import measure
from hmar_mega.evaluation.networks import FeatureNetwork, open_network
from hmar_mega.evaluation.statistics import Statistics, gather
from hmar_mega.inference.pipeline import ImageModel
from hmar_mega.inference.sampler import SampleSettings

#: Seeds of the images that choose the guidance, and of those whose figures are told: never the same.
SWEEP_SEED, FINAL_SEED = 10_000_000, 0

#: Calls that a time of sampling is the median of.
TIMED_CALLS = 5

#: Images whose features are taken at once.
FEATURE_BATCH = 200

Figures = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Judge:
    """A feature network and what it says of the held-out images.

    Attributes:
        batch: images sampled at once.
    """

    network: FeatureNetwork
    real: Statistics
    device: torch.device
    batch: int

    @classmethod
    def of(cls, images: np.ndarray, network: str, device: torch.device, batch: int) -> Judge:
        """The judge of images beside these, (m, R, R, 3) uint8."""
        opened = open_network(network, None, device)
        return cls(opened, _statistics(_features(opened, images)), device, batch)

    def figures(self, images: np.ndarray, replicates: int) -> Figures:
        """Value and 95 % interval of every measure of images (n, R, R, 3) uint8; without replicates, of FID alone."""
        chunks = _features(self.network, images)
        fake, real = _statistics(chunks), self.real
        if not replicates:
            fake, real = replace(fake, features=None), replace(real, features=None)
        found = measure(lambda: chunks, fake, real, replicates, self.device)
        return {m.name: {"value": m.value, "low": m.low, "high": m.high} for m in found if m.value is not None}


def _features(network: FeatureNetwork, images: np.ndarray) -> list[dict[str, np.ndarray]]:
    chunks = []
    for at in range(0, len(images), FEATURE_BATCH):
        found = network.extract(torch.from_numpy(images[at : at + FEATURE_BATCH]))
        chunk = {"pooled": found.pooled.numpy(), "spatial": found.spatial.numpy()}
        if found.log_probabilities is not None:
            chunk["log_probabilities"] = found.log_probabilities.numpy()
        chunks.append(chunk)
    return chunks


def _statistics(chunks: list[dict[str, np.ndarray]]) -> Statistics:
    """Without spatial features: sFID would double the time."""
    found = gather(chunks, sum(len(chunk["pooled"]) for chunk in chunks))
    return replace(found, spatial_mean=None, spatial_covariance=None)


def settings_of(model: ImageModel, cfg: float, passes: Passes | None = None, mask_cfg: float = 0.0) -> SampleSettings:
    """Sampling settings of the comparison; without `passes` the published schedule, where there is a mask branch."""
    if not model.model.has_mask_branch:
        return model.sample_settings(cfg_scale=cfg, top_k=TOP_K, top_p=TOP_P)
    chosen = passes if passes is not None else mask_schedules(model.schedule)[PUBLISHED]
    guided = {"mask_cfg": mask_cfg} if mask_cfg else {}
    return model.sample_settings(cfg_scale=cfg, top_k=TOP_K, top_p=TOP_P, mask_schedule=chosen, **guided)


def draw(model: ImageModel, settings: SampleSettings, count: int, seed: int, batch: int) -> np.ndarray:
    """`count` images of all classes in turn, (count, R, R, 3) uint8; image i has the seed `seed` + i."""
    images = []
    for at in range(0, count, batch):
        numbers = torch.arange(at, min(at + batch, count), device=model.device)
        _, drawn = model.sampler(numbers % model.num_classes, numbers + seed, settings)
        images.append(drawn.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)


def sampling_times(model: ImageModel, settings: SampleSettings, batch: int) -> dict[str, Any]:
    """ms an image: as sampled by default, on a GPU as CUDA graphs where that can be, and kernel by kernel."""
    found: dict[str, Any] = {"batch": batch}
    usual = model.sampler.graphs
    for name, graphs in (("default", True), ("plain", False)):
        model.sampler.graphs = graphs
        times = []
        for number in range(2 + TIMED_CALLS):
            started = time.perf_counter()
            draw(model, settings, batch, number * batch, batch)  # ends with a copy to the host
            times.append(1e3 * (time.perf_counter() - started) / batch)
        found[f"{name}_ms"] = statistics.median(times[2:])
        if name == "default":
            found["graphs"] = model.sampler.why_not(batch, settings) is None
    model.sampler.graphs = usual
    return found


def guidance_sweep(model: ImageModel, judge: Judge, count: int) -> dict[str, float]:
    """FID at every guidance of the grid, on images that are measured for nothing else."""
    found = {}
    for cfg in CFG_SCALES:
        images = draw(model, settings_of(model, cfg), count, SWEEP_SEED, judge.batch)
        found[f"{cfg:g}"] = _fid(judge, images)
    return found


def mask_sweep(model: ImageModel, judge: Judge, count: int, cfg: float) -> list[dict[str, Any]]:
    """FID, passes and ms an image of every mask schedule, and of the published one with guided mask passes."""
    rows = []
    trials = [(name, passes, 0.0) for name, passes in mask_schedules(model.schedule).items()]
    trials += [(PUBLISHED, mask_schedules(model.schedule)[PUBLISHED], mask_cfg) for mask_cfg in MASK_CFGS]
    for name, passes, mask_cfg in trials:
        settings = settings_of(model, cfg, passes, mask_cfg)
        draw(model, settings, judge.batch, 0, judge.batch)  # warms up
        started = time.perf_counter()
        images = draw(model, settings, count, SWEEP_SEED, judge.batch)
        milliseconds = 1e3 * (time.perf_counter() - started) / count
        rows.append(
            {"schedule": name, "passes": sum(len(entry) for entry in passes), "mask_cfg": mask_cfg,
             "fid": _fid(judge, images), "plain_ms": milliseconds}
        )  # fmt: skip
    return rows


def _fid(judge: Judge, images: np.ndarray) -> float:
    value = judge.figures(images, 0)["FID"]["value"]
    assert value is not None
    return value
