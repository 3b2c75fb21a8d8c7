"""Which layouts of a configuration are legal on a cluster, what each needs, and which to take.

Legality is not written here: every candidate goes through the configuration's own checks (`parse_config`) and the
checks of batch sizes that training makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from hmar_mega.config import Config
from hmar_mega.config_io import parse_config
from hmar_mega.errors import UserError
from hmar_mega.micro_batches import batches_fit
from hmar_mega.planning.cluster import GIB, Cluster
from hmar_mega.planning.cost import Cost, cost_of
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.memory import Memory, worst_rank
from hmar_mega.planning.rates import STEPS, MeasuredStep, time_factor
from hmar_mega.planning.workload import Workload

#: Largest micro-batch tried.
LARGEST_MICRO_BATCH = 128

#: Step times nearer to each other than this are the same; then the simpler layout is taken.
SAME_TIME = 0.05


@dataclass(frozen=True)
class Plan:
    """A layout with what it needs.

    Attributes:
        fits: the peak fits into the GPU.
    """

    layout: Layout
    memory: Memory
    cost: Cost
    fits: bool

    @property
    def images_per_s(self) -> float:
        """Of all GPUs."""
        return self.cost.images_per_s

    @property
    def images_per_gpu(self) -> float:
        """Images a second and GPU."""
        return self.images_per_s / self.layout.world

    def mfu(self, cluster: Cluster) -> float:
        """Model FLOPs by what the GPUs could do at their datasheet's bf16 peak."""
        return self.cost.flops / self.cost.step / (self.layout.world * cluster.bf16_peak_tflops * 1e12)


def plan_layout(work: Workload, layout: Layout, cluster: Cluster, factor: float = 1.0) -> Plan:
    """Memory and cost of one layout."""
    memory = worst_rank(work, layout)
    return Plan(layout, memory, cost_of(work, layout, cluster, factor), memory.peak <= cluster.usable_bytes)


def legal_layouts(config: Config, cluster: Cluster) -> Iterator[Layout]:
    """Every layout of `config` that its own checks accept on the whole cluster."""
    world, sizes = cluster.gpus, config.data.batch_plan.sizes
    tree = config.model_dump(mode="json")
    for tensor in (t for t in range(1, cluster.gpus_per_node + 1) if world % t == 0):
        for sequence in {False, tensor > 1}:
            for pipeline in (p for p in range(1, world // tensor + 1) if world // tensor % p == 0):
                data = world // tensor // pipeline
                if any(size % data for size in sizes) or pipeline > config.model.depth:
                    continue
                for virtual in _virtual(config.model.depth, pipeline):
                    for zero in (1, 2, 3):
                        yield from _accepted(tree, tensor, sequence, pipeline, virtual, data, zero, sizes)


def _virtual(depth: int, pipeline: int) -> list[int]:
    return [1] if pipeline == 1 else [v for v in (1, 2, 3, 4) if v * pipeline <= depth]


def _accepted(
    tree: dict[str, Any],
    tensor: int,
    sequence: bool,
    pipeline: int,
    virtual: int,
    data: int,
    zero: int,
    batches: tuple[int, ...],
) -> Iterator[Layout]:
    share, least = batches[-1] // data, math.gcd(*batches) // data
    sizes = [b for b in range(1, min(least, LARGEST_MICRO_BATCH) + 1) if least % b == 0]
    parallel = {
        **tree["parallel"], "tensor_parallel": tensor, "sequence_parallel": sequence, "pipeline_parallel": pipeline,
        "virtual_pipeline_parallel": virtual, "zero_stage": zero,
    }  # fmt: skip
    try:
        parse_config({**tree, "parallel": parallel})
    except UserError:
        return
    for size in sizes:
        if not all(batches_fit(batch // (data * size), pipeline, virtual) for batch in batches):
            continue
        for recompute in ("none", "selective", "full"):
            yield Layout(tensor, sequence, pipeline, virtual, data, zero, recompute, size, share // size)


def ranked(config: Config, cluster: Cluster, factor: float = 1.0) -> list[Plan]:
    """All legal layouts, those that fit first, by step time and then by simplicity.

    Of every (tensor, sequence, pipeline, virtual, ZeRO) only the best recomputation and micro-batch is kept.
    """
    work = Workload.of(config, cluster.device)
    best: dict[tuple[int, bool, int, int, int], Plan] = {}
    enough: tuple[object, ...] = ()
    for layout in legal_layouts(config, cluster):
        key = (layout.tensor, layout.sequence, layout.pipeline, layout.virtual, layout.zero)
        if enough == (*key, layout.micro_batch):
            continue  # it fits with less recomputation
        plan = plan_layout(work, layout, cluster, factor)
        if plan.fits:
            enough = (*key, layout.micro_batch)
        if key not in best or _order(plan) < _order(best[key]):
            best[key] = plan
    plans = sorted(best.values(), key=_order)
    if plans and plans[0].fits:
        limit = plans[0].cost.step * (1 + SAME_TIME)
        near = [p for p in plans if p.fits and p.cost.step <= limit]
        plans.remove(simplest := min(near, key=lambda p: (_complexity(p.layout), p.cost.step)))
        plans.insert(0, simplest)
    return plans


def _order(plan: Plan) -> tuple[bool, float, float]:
    """Fitting ones by time; then those that do not fit, by memory."""
    return (not plan.fits, plan.cost.step if plan.fits else plan.memory.peak, plan.memory.peak)


def _complexity(layout: Layout) -> tuple[int, int, int, int]:
    """Fewer axes first, then less ZeRO, recomputation and tensor parallelism."""
    axes = (layout.tensor > 1) + 2 * (layout.pipeline > 1) + (layout.virtual > 1)
    return axes, layout.zero, ("none", "selective", "full").index(layout.recompute), layout.tensor


def reason(plan: Plan, plans: list[Plan], cluster: Cluster) -> str:
    """Why `plan` is the one to take, in a sentence."""
    layout, usable = plan.layout, cluster.usable_bytes
    room = f"{plan.memory.peak / GIB:.1f} of {usable / GIB:.1f} GiB"
    fitting = [p for p in plans if p.fits]
    words = f"fastest of {len(fitting)} that fit, of {len(plans)} legal ones, {room} a GPU"
    if layout.tensor == 1 and layout.pipeline == 1:
        why = "the model fits without splitting it, so that only gradients and weights cross the network"
    else:
        plain = [p for p in plans if p.layout.tensor == 1 and p.layout.pipeline == 1]
        if not plain:
            why = f"data parallelism alone cannot use {layout.world} GPUs at a batch of {plan.cost.images}"
        elif not any(p.fits for p in plain):
            least = min(p.memory.peak for p in plain)
            why = f"data parallelism alone needs at least {least / GIB:.1f} GiB a GPU"
        else:
            fastest = min((p for p in plain if p.fits), key=lambda p: p.cost.step)
            why = f"{fastest.cost.step / plan.cost.step - 1:.0%} faster than data parallelism alone"
    return f"{words}; {why}"


@cache
def calibration(steps: tuple[MeasuredStep, ...] = STEPS) -> float:
    """Median of measured / predicted time of the measured steps, each predicted without calibration."""
    from hmar_mega.config_io import load_config
    from hmar_mega.planning.cluster import load_cluster

    ratios = []
    for step in steps:
        config, cluster = load_config(step.config, step.overrides), load_cluster(step.cluster).resized(1)
        predicted = cost_of(Workload.of(config, cluster.device), Layout.of(config, 1), cluster)
        ratios.append(predicted.images_per_s / step.images_per_s)
    return time_factor(ratios)


def with_batch(config: Config, batch: int) -> Config:
    """The configuration with another global batch and the micro-batch left open."""
    data = config.data.model_copy(update={"global_batch_size": batch, "micro_batch_size": None})
    return config.model_copy(update={"data": data})
