"""The plan as tables for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.table import Table

from hmar_mega.model.hmar import LOGITS_CHUNK_BYTES
from hmar_mega.planning import cost, memory, rates
from hmar_mega.planning.cluster import GIB, Cluster
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.layouts import Plan
from hmar_mega.planning.scaling import WEAK_IMAGES, Curve, Point
from hmar_mega.planning.workload import Workload

#: Width of tables where there is no terminal to ask.
WIDTH = 124

MEMORY_PARTS = (
    "weights", "gradients", "optimizer", "fp8", "ema", "tokenizer", "activations", "logits", "graphs", "buffers",
    "step",
)  # fmt: skip
TIME_PARTS = (
    "products", "attention", "elementwise", "host", "tensor", "pipeline", "bubble", "data", "update",
)  # fmt: skip

#: What the parts are called in tables.
WORDS = {
    "products": "matrix products", "host": "host-bound", "tensor": "tensor-parallel traffic",
    "pipeline": "pipeline traffic", "data": "data-parallel traffic", "update": "clip + AdamW",
    "elementwise": "norms, elementwise", "step": "(reduction and update)", "ema": "moving average",
    "buffers": "buckets, gathered weights", "bubble": "pipeline bubble", "logits": "logits",
    "fp8": "FP8 copies of weights", "graphs": "tensors of CUDA graphs",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """All that one run of the planner found.

    Attributes:
        name: of the configuration.
        parameters: of the whole model.
        model: one line about it.
        own: the layout that the configuration asks for, or None when it cannot be.
        own_problem: why it cannot be, or does not fit.
        plans: ranked legal layouts.
        best: the recommended one, or None when nothing fits.
        why: why that one, or why none.
        fp8: `precision.fp8`.
        work: what is planned, with the kernels that it is planned with.
        calibration: one line about where times come from.
    """

    name: str
    parameters: int
    model: str
    cluster: Cluster
    batch: int
    own: Plan | None
    own_problem: str
    plans: list[Plan]
    best: Plan | None
    why: str
    factor: float
    fp8: str
    work: Workload
    calibration: str
    curves: list[Curve] = field(default_factory=list)


def to_json(report: Report, top: int) -> dict[str, Any]:
    """Everything in plain types; sizes in bytes, times in seconds, `top` layouts."""
    return {
        "config": report.name,
        "model": {"parameters": report.parameters, "about": report.model},
        "cluster": {**report.cluster.model_dump(exclude={"launch"}), "gpus": report.cluster.gpus},
        "global_batch_size": report.batch,
        "own": {"plan": report.own and plan_json(report.own, report.cluster), "problem": report.own_problem},
        "recommended": report.best and plan_json(report.best, report.cluster),
        "why": report.why,
        "layouts": [plan_json(plan, report.cluster) for plan in report.plans[:top]],
        "legal_layouts": len(report.plans),
        "scaling": {
            curve.kind: [
                {
                    "gpus": point.gpus,
                    "global_batch_size": point.batch,
                    "plan": point.plan and plan_json(point.plan, report.cluster),
                    "efficiency": curve.efficiency(point),
                    "why_not": point.why_not,
                }
                for point in curve.points
            ]
            for curve in report.curves
        },
        "calibration": {"factor": report.factor, "about": report.calibration},
        "assumptions": assumptions(report),
    }


def plan_json(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """One layout in plain types."""
    return {
        "layout": asdict(plan.layout),
        "overrides": plan.layout.overrides,
        "fits": plan.fits,
        "bytes": {**asdict(plan.memory), "state": plan.memory.state, "peak": plan.memory.peak},
        "cost": {**asdict(plan.cost), "step": plan.cost.step, "communication": plan.cost.communication},
        "images_per_s": plan.images_per_s,
        "mfu": plan.mfu(cluster),
    }


def show(report: Report, console: Console, top: int) -> None:
    """Print the report."""
    cluster = report.cluster
    console.print(f"[bold]{report.name}[/]: {report.model}")
    console.print(
        f"[bold]{cluster.name}[/]: {cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu}, {cluster.memory_gib:g} GiB "
        f"each ({cluster.usable_bytes / GIB:.1f} usable), batch {report.batch:,}"
    )
    console.print(f"times: {report.calibration}\n", highlight=False)
    console.print(_layout_table(report, top))
    if report.own_problem:
        console.print(f"\n[bold yellow]this configuration's own layout:[/] {report.own_problem}", highlight=False)
    columns = [("yours", report.own), ("recommended", report.best)]
    shown = [(title, plan) for title, plan in columns if plan is not None]
    if report.own is not None and report.best is not None and report.own.layout == report.best.layout:
        shown = [("yours = recommended", report.best)]
    if shown:
        bytes_table = _parts("bytes a GPU (GiB)", shown, MEMORY_PARTS, _memory_cell, "peak", _peak_cell)
        time_table = _parts("time of a step (ms)", shown, TIME_PARTS, _time_cell, "step", _step_cell)
        console.print(Columns([bytes_table, time_table], padding=(1, 4)))
    for curve in report.curves:
        console.print(_curve_table(curve, cluster))
    if report.best is not None:
        console.print(f"[bold green]recommended:[/] {describe(report.best.layout)}: {report.why}", highlight=False)
        console.print("  " + " ".join(report.best.layout.overrides), highlight=False, soft_wrap=True)
    else:
        console.print(f"[bold red]nothing fits:[/] {report.why}", highlight=False)
    console.print("\n[bold]assumptions[/]")
    for line in assumptions(report):
        console.print(f"· {line}", highlight=False)


def describe(layout: Layout) -> str:
    """A layout in a few words, axes of one left out."""
    parts = []
    if layout.tensor > 1:
        parts.append(f"tp {layout.tensor}{'+sp' if layout.sequence else ''}")
    if layout.pipeline > 1:
        parts.append(f"pp {layout.pipeline}" + (f"×{layout.virtual}" if layout.virtual > 1 else ""))
    parts.append(f"dp {layout.data}")
    parts.append(f"ZeRO {layout.zero}")
    if layout.recompute != "none":
        parts.append(f"{layout.recompute} recompute")
    return ", ".join(parts)


def _layout_table(report: Report, top: int) -> Table:
    table = Table(
        title=f"layouts: the first {min(top, len(report.plans))} of {len(report.plans)}", title_justify="left"
    )
    for name in ("", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("micro × acc.", "GiB", "step ms", "img/s", "MFU", "bubble", "comm."):
        table.add_column(name, justify="right", no_wrap=True)
    if report.own is not None:
        table.add_row("yours", *_plan_cells(report.own, report.cluster), end_section=True)
    for number, plan in enumerate(report.plans[:top], 1):
        table.add_row(str(number), *_plan_cells(plan, report.cluster), style="bold" if plan is report.best else "")
    return table


def _plan_cells(plan: Plan, cluster: Cluster) -> list[str]:
    layout, spent = plan.layout, plan.cost
    room = f"{plan.memory.peak / GIB:.1f}"
    return [
        describe(layout),
        f"{layout.micro_batch} × {layout.accumulation}",
        room if plan.fits else f"[red]{room} too much[/]",
        f"{spent.step * 1e3:,.0f}",
        f"{plan.images_per_s:,.0f}",
        f"{plan.mfu(cluster):.1%}",
        f"{spent.bubble / spent.step:.1%}",
        f"{spent.communication / spent.step:.1%}",
    ]


def _parts(
    title: str,
    shown: Sequence[tuple[str, Plan]],
    names: Sequence[str],
    cell: Callable[[Plan, str], str],
    total: str,
    total_cell: Callable[[Plan], str],
) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for column, _ in shown:
        table.add_column(column, justify="right")
    for name in names:
        if all(float(cell(plan, name).replace(",", "")) == 0 for _, plan in shown):
            continue
        table.add_row(WORDS.get(name, name), *(cell(plan, name) for _, plan in shown), end_section=name == names[-1])
    table.add_row(total, *(total_cell(plan) for _, plan in shown), style="bold")
    return table


def _memory_cell(plan: Plan, name: str) -> str:
    return f"{getattr(plan.memory, name) / GIB:.2f}"


def _peak_cell(plan: Plan) -> str:
    return f"{plan.memory.peak / GIB:.2f}"


def _time_cell(plan: Plan, name: str) -> str:
    return f"{getattr(plan.cost, name) * 1e3:,.1f}"


def _step_cell(plan: Plan) -> str:
    return f"{plan.cost.step * 1e3:,.1f}"


def _curve_table(curve: Curve, cluster: Cluster) -> Table:
    about = "the same batch" if curve.kind == "strong" else f"{WEAK_IMAGES} images a GPU"
    table = Table(
        title=f"{curve.kind} scaling, {about}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("GPUs", justify="right", no_wrap=True)
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    for name in ("micro × acc.", "GiB", "step ms", "img/s", "MFU", "bubble", "comm.", "eff."):
        table.add_column(name, justify="right", no_wrap=True)
    for point in curve.points:
        table.add_row(f"{point.gpus:,}", f"{point.batch:,}", *_point_cells(curve, point, cluster))
    return table


def _point_cells(curve: Curve, point: Point, cluster: Cluster) -> list[str]:
    efficiency = curve.efficiency(point)
    if point.plan is None or efficiency is None:
        return [f"[dim]{point.why_not}[/]"]
    return [*_plan_cells(point.plan, cluster), f"{efficiency:.0%}"]


def assumptions(report: Report) -> list[str]:
    """What the figures stand on."""
    c = report.cluster
    chunk, graphs = f"{LOGITS_CHUNK_BYTES / 2**20:.0f} MiB", "blocks are not replayed as CUDA graphs"
    kernels = f"plain torch, attention {report.work.backend}; logits are float32, in chunks of {chunk}"
    if report.work.fused:
        kernels = (
            "the own kernels of AdaLN, residuals, GELU and, with the codebook on one rank, cross-entropy, on logits in "
            f"the compute format in chunks of {chunk}; attention {report.work.backend}"
        )
    if report.work.graphs:
        graphs = (
            "without tensor and pipeline parallelism and ZeRO 3 blocks are replayed as CUDA graphs: their activations "
            "and update take memory beside each other"
        )
    attention = "the measured times of SDPA called scale by scale, scaled with the matrix-product rate"
    if report.work.backend == "triton":
        attention = "the rate of the own kernels' bytes and products at two measured shapes"
    fp8 = []
    if report.fp8 != "none":
        least, most = rates.FP8_LINEAR_LEAST, rates.FP8_LINEAR_MOST
        fp8.append(
            f"products of FP8 linears take {rates.FP8_LINEAR_TIME:.2f} of bf16's time, the median of three shapes on "
            f"an H100 ({least:.2f} to {most:.2f}, weights converted every time); their "
            "copies of weights take two bytes a parameter; activations are counted as in bf16, which is more than FP8 "
            "keeps"
        )
    if report.fp8 == "linears_and_attention":
        fp8.append("FP8 attention is not modelled: attention is planned as in bf16")
    return [
        *fp8,
        "weights, gradients and optimizer are counted exactly as DeepSpeed 0.19.8 lays them; a GPU may allocate its "
        f"{c.memory_gib:g} GiB less {c.reserved_gib:g} for CUDA and NCCL and {c.fragmentation:.0%} lost to fragments",
        f"activations: every tensor that autograd saves, by formula, with {kernels}; {graphs}",
        f"DeepSpeed's bucket of {memory.BUCKET_ELEMENTS / 1e6:.0f} M elements is there except under bf16 with ZeRO 1",
        f"matrix products at {c.bf16_tflops:g} TFLOP/s (peak {c.bf16_peak_tflops:g}), memory at {c.memory_gb_per_s:,g} "
        f"GB/s, attention at {attention}",
        f"links: {c.intra_node_gb_per_s:g} GB/s a GPU inside a node, {c.inter_node_gb_per_s:g} between nodes, latency "
        f"{c.intra_node_latency_us:g} and {c.inter_node_latency_us:g} µs; rings inside nodes, trees for latency",
        "ZeRO 1 and 2 reduce gradients without overlap; ZeRO 3 hides its traffic behind "
        f"{cost.ZERO3_OVERLAP:.0%} of the compute; "
        "tensor-parallel traffic hides only behind weight gradients; bubble (pp − 1)/(vpp · m)",
        "efficiency: images a second and GPU, by those at the best number of GPUs; no congestion",
        "reading data, evaluation, checkpoints, stragglers and failures are left out",
    ]
