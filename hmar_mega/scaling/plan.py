"""What every cell of a sweep needs: parameters, FLOPs, layout, memory, hours, cost; what cannot fit is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from hmar_mega.config import Config
from hmar_mega.config_io import parse_config
from hmar_mega.errors import UserError
from hmar_mega.planning.cluster import GIB, Cluster, load_cluster
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.layouts import Plan, calibration, plan_layout, ranked
from hmar_mega.planning.report import describe
from hmar_mega.planning.workload import Workload
from hmar_mega.scaling.cells import Cell, count_parameters
from hmar_mega.scaling.spec import SweepSpec


@dataclass(frozen=True)
class PlannedCell:
    """A cell with the layout it is trained on.

    Attributes:
        hours: predicted GPU-hours of the training steps; start, evaluation and saving come on top.
        cost: hours · price, None without a price.
    """

    cell: Cell
    plan: Plan
    hours: float
    cost: float | None

    @property
    def config(self) -> Config:
        """The cell's configuration on its layout."""
        tree = self.cell.config.model_dump(mode="json")
        for override in self.plan.layout.overrides:
            key, _, value = override.partition("=")
            section, name = key.split(".")
            tree[section][name] = yaml.safe_load(value)
        return parse_config(tree)


def cell_cluster(name: str, processes: int) -> Cluster:
    """The machines of one cell, of a cluster by its name or file.

    Raises:
        UserError: when the cluster has fewer GPUs than a cell wants.
    """
    cluster = load_cluster(name)
    if processes > cluster.gpus:
        raise UserError(
            f"processes={processes}, but cluster {cluster.name} has {cluster.gpus}; use at most that many, or another "
            "cluster"
        )
    return cluster.resized(processes)


def plan_cells(spec: SweepSpec, cells: Sequence[Cell]) -> list[PlannedCell]:
    """Plan every cell.

    Raises:
        UserError: for cells that fit on no layout; each is named with the nearest size that fits.
    """
    cluster, factor = cell_cluster(spec.cluster, spec.processes), calibration()
    found: list[PlannedCell] = []
    refused: list[str] = []
    best: dict[tuple[Any, ...], Plan | str] = {}
    for cell in cells:
        model = cell.config.model
        # the same size and batch have the same layout, whatever the learning rate, length and seed
        size = (model.depth, model.resolved_width, model.resolved_heads, cell.config.data.global_batch_size)
        if size not in best:
            best[size] = _plan(spec, cell.planned, cluster, factor)
        plan = best[size]
        if isinstance(plan, str):
            refused.append(f"cell {cell.name} {plan}{_nearest(spec, cell, cluster, factor)}")
            continue
        hours = cell.steps * plan.cost.step * plan.layout.world / 3600
        price = spec.price_per_gpu_hour
        found.append(PlannedCell(cell, plan, hours, None if price is None else hours * price))
    if refused:
        raise UserError("\n".join(refused))
    return found


def _plan(spec: SweepSpec, config: Config, cluster: Cluster, factor: float) -> Plan | str:
    """The layout to train on, or why there is none."""
    if spec.layout == "config":
        layout = Layout.of(config, cluster.gpus)
        plans = [plan_layout(Workload.of(config, cluster.device), layout, cluster, factor)]
    else:
        plans = ranked(config, cluster, factor)
    if not plans:
        return f"has no legal layout on {cluster.gpus} GPUs at a batch of {config.data.global_batch_size}"
    if not plans[0].fits:
        least = min(plan.memory.peak for plan in plans) / GIB
        return f"needs {least:.1f} GiB a GPU, and {cluster.usable_bytes / GIB:.1f} of {cluster.gpu} are usable"
    return plans[0]


def _nearest(spec: SweepSpec, cell: Cell, cluster: Cluster, factor: float) -> str:
    """The largest smaller depth with the same settings that fits."""
    tree = cell.planned.model_dump(mode="json")
    for depth in range(cell.config.model.depth - 1, 0, -1):
        tree["model"]["depth"] = depth
        try:
            config = parse_config(tree)
        except UserError:
            continue  # heads or layers that do not divide at this depth
        if not isinstance(_plan(spec, config, cluster, factor), str):
            total, _ = count_parameters(config)
            return f"; the nearest that fits is depth {depth} ({total / 1e6:,.1f} M parameters)"
    return "; no smaller depth fits either: give it more GPUs (processes), another cluster or a smaller batch"


def show_plan(spec: SweepSpec, planned: Sequence[PlannedCell], console: Console) -> None:
    """The table of `sweep plan`."""
    cluster = cell_cluster(spec.cluster, spec.processes)
    table = Table(title=f"sweep {spec.name}: {len(planned)} cells, {cluster.gpus} × {cluster.gpu} each", box=None)
    for name in ("cell", "params", "blocks", "batch", "steps", "base lr", "FLOPs", "layout", "GiB", "GPU-h"):
        table.add_column(name, justify="left" if name in ("cell", "layout") else "right", no_wrap=True)
    if spec.price_per_gpu_hour is not None:
        table.add_column("cost", justify="right")
    for item in planned:
        cell, layout = item.cell, item.plan.layout
        row = [
            cell.name, _short(cell.parameters), _short(cell.non_embedding),
            f"{cell.config.data.global_batch_size:,}", f"{cell.steps:,}", f"{cell.config.optim.base_lr:.2e}",
            f"{cell.flops:.2e}", f"{describe(layout)}, {layout.micro_batch}",
            f"{item.plan.memory.peak / GIB:.1f}", f"{item.hours:.3g}",
        ]  # fmt: skip
        table.add_row(*row, *([] if item.cost is None else [f"{item.cost:,.2f}"]))
    console.print(table)
    hours = sum(item.hours for item in planned)
    price = spec.price_per_gpu_hour
    console.print(
        f"in all {sum(i.cell.flops for i in planned):.3g} FLOPs, {hours:.3g} GPU-hours of training steps"
        + ("" if price is None else f", cost {hours * price:,.2f} at {price} an hour")
        + "; times are predictions, and starting, evaluating and saving come on top"
    )


def plan_json(planned: Sequence[PlannedCell]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "cell": item.cell.name, "groups": list(item.cell.groups), "depth": item.cell.config.model.depth,
            "width": item.cell.config.model.resolved_width, "seed": item.cell.config.run.seed,
            "parameters": item.cell.parameters, "non_embedding": item.cell.non_embedding,
            "images": item.cell.images, "steps": item.cell.steps,
            "global_batch_size": item.cell.config.data.global_batch_size,
            "base_lr": item.cell.config.optim.base_lr, "flops": item.cell.flops,
            "layout": item.plan.layout.overrides, "memory_bytes": item.plan.memory.peak,
            "gpu_hours": item.hours, "cost": item.cost,
        }
        for item in planned
    ]  # fmt: skip


def _short(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e3:.1f} k"
