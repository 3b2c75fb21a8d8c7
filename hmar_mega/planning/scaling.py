"""Projections over the number of GPUs: the same batch on more of them (strong), and more batch with them (weak)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.planning.cluster import GIB, Cluster
from hmar_mega.planning.layouts import Plan, ranked, with_batch

#: GPUs of a projection.
GPUS = tuple(2**i for i in range(13))

#: Weak scaling: images a step and GPU.
WEAK_IMAGES = 8


@dataclass(frozen=True)
class Point:
    """The best layout at one number of GPUs.

    Attributes:
        plan: None where nothing fits or nothing is legal.
        why_not: what stands in the way then.
    """

    gpus: int
    batch: int
    plan: Plan | None
    why_not: str = ""


@dataclass(frozen=True)
class Curve:
    """A projection; `kind` is "strong" or "weak"."""

    kind: str
    points: tuple[Point, ...]

    def efficiency(self, point: Point) -> float | None:
        """Images a second and GPU, by those of the number of GPUs at which they are highest."""
        if point.plan is None:
            return None
        return point.plan.images_per_gpu / max(p.plan.images_per_gpu for p in self.points if p.plan is not None)


def project(config: Config, cluster: Cluster, factor: float, gpus: Iterable[int] = GPUS) -> list[Curve]:
    """Strong scaling at the configuration's batch, and weak scaling at `WEAK_IMAGES` a GPU."""
    counts = list(gpus)
    batches = {"strong": [config.data.global_batch_size] * len(counts), "weak": [WEAK_IMAGES * n for n in counts]}
    return [
        Curve(kind, tuple(_point(config, cluster, factor, n, b) for n, b in zip(counts, sizes, strict=True)))
        for kind, sizes in batches.items()
    ]


def _point(config: Config, cluster: Cluster, factor: float, gpus: int, batch: int) -> Point:
    try:
        part = cluster.resized(gpus)
    except UserError as err:
        return Point(gpus, batch, None, str(err))
    return best_of(ranked(with_batch(config, batch), part, factor), part, batch)


def best_of(plans: Sequence[Plan], cluster: Cluster, batch: int) -> Point:
    """The first of ranked layouts, or why there is none."""
    if not plans:
        return Point(cluster.gpus, batch, None, f"no layout divides a batch of {batch}")
    if not plans[0].fits:
        least = min(p.memory.peak for p in plans) / GIB
        return Point(cluster.gpus, batch, None, f"needs {least:.0f} GiB a GPU, {cluster.usable_bytes / GIB:.0f} usable")
    return Point(cluster.gpus, batch, plans[0])
