"""The command `hmar-mega plan`: memory, time and layouts of a configuration on a cluster, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmar_mega.errors import UserError
from hmar_mega.parsers import add_command, add_config_arguments

if TYPE_CHECKING:
    from hmar_mega.config import Config
    from hmar_mega.planning.cluster import Cluster
    from hmar_mega.planning.layouts import Plan
    from hmar_mega.planning.report import Report


def add_plan_parser(subparsers: Any) -> None:
    """Add `plan` to the sub-parsers of `hmar-mega`; it sets `run`, a function of the arguments."""
    parser = add_command(
        subparsers,
        "plan",
        "what a run needs on a cluster: memory, time, and the layout to take; no GPU needed",
        "Memory and time of a configuration on a cluster, its legal layouts, and the one to take and why.\n"
        "Needs no GPU. Memory is counted; times are predictions from measured kernel rates.",
        "  hmar-mega plan train/d36-s-512 --cluster h100-8x8\n"
        "  hmar-mega plan train/10b-512 --cluster h100-8x8 --scaling --plot scaling.png --json plan.json",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--cluster", default="h100-8x1", help="YAML file, or the name of a packaged cluster (default: %(default)s)"
    )
    parser.add_argument("--nodes", type=_positive, help="nodes, instead of the cluster's")
    parser.add_argument("--gpus-per-node", type=_positive, help="GPUs a node, instead of the cluster's")
    parser.add_argument("--top", type=_positive, default=10, help="layouts to list (default: %(default)s)")
    parser.add_argument("--scaling", action="store_true", help="also project strong and weak scaling, 1 to 4096 GPUs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the projection as a PNG; implies --scaling")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - prints it instead of the tables")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="measured steps (benchmarks/plan_memory.py writes them) instead of those that came with the package",
    )
    parser.set_defaults(run=_run_plan)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return number


def _run_plan(args: argparse.Namespace) -> int:
    from hmar_mega.config_io import config_to_yaml, load_config

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(config_to_yaml(config), end="")
        return 0
    from rich.console import Console

    from hmar_mega.files import write_atomic
    from hmar_mega.planning.cluster import load_cluster
    from hmar_mega.planning.report import WIDTH, show, to_json
    from hmar_mega.planning.workload import with_tokenizer

    cluster = load_cluster(args.cluster, args.nodes, args.gpus_per_node)
    report = make_report(
        args.config, with_tokenizer(config), cluster, args.scaling or args.plot is not None, args.calibration
    )
    if args.json == "-":
        print(json.dumps(to_json(report, args.top), indent=1))
    else:
        show(report, Console(width=None if sys.stdout.isatty() else WIDTH), args.top)
    if args.json not in (None, "-"):
        write_atomic(Path(args.json), json.dumps(to_json(report, args.top), indent=1))
    if args.plot is not None:
        from hmar_mega.planning.plot import plot_scaling

        plot_scaling(report, args.plot)
    return 0


def make_report(
    name: str, config: Config, cluster: Cluster, scaling: bool = False, calibration_file: Path | None = None
) -> Report:
    """Plan a configuration on a cluster.

    Args:
        scaling: project strong and weak scaling too.
        calibration_file: measured steps; None takes those of the package.

    Raises:
        UserError: when the calibration cannot be read.
    """
    from hmar_mega.planning import rates
    from hmar_mega.planning.layout import Layout
    from hmar_mega.planning.layouts import calibration, plan_layout, ranked, reason
    from hmar_mega.planning.report import Report
    from hmar_mega.planning.scaling import best_of, project
    from hmar_mega.planning.tensors import parameter_count
    from hmar_mega.planning.workload import Workload

    steps = rates.STEPS if calibration_file is None else rates.read_steps(calibration_file)
    factor, work = calibration(steps), Workload.of(config, cluster.device)
    plans = ranked(config, cluster, factor)
    found = best_of(plans, cluster, config.data.global_batch_size)
    own, problem = None, ""
    try:
        own = plan_layout(work, Layout.of(config, cluster.gpus), cluster, factor)
    except UserError as err:
        problem = str(err)
    if own is not None and not own.fits:
        problem = _too_much(own, found.plan, cluster)
    parameters = parameter_count(work)
    return Report(
        name=name,
        parameters=parameters,
        model=f"{parameters / 1e6:,.1f} M parameters, depth {work.depth}, width {work.width}, {work.heads} heads, "
        f"{config.schedule.resolution} px = {work.tokens:,} tokens, {config.stage.name}, {work.compute}"
        f"{' with FP8 linears' if work.fp8 else ''}, "
        f"{work.flops_per_image / 1e12:.2f} TFLOP an image",
        cluster=cluster,
        batch=config.data.global_batch_size,
        own=own,
        own_problem=problem,
        plans=plans,
        best=found.plan,
        why=reason(found.plan, plans, cluster) if found.plan is not None else _nothing(found.why_not, cluster),
        factor=factor,
        fp8=config.precision.fp8,
        work=work,
        calibration=f"predicted from kernel rates × {factor:.2f}, the median of measured / predicted of {len(steps)} "
        f"measured step{'s' if len(steps) > 1 else ''} ({'; '.join(sorted({s.source for s in steps}))})",
        curves=project(config, cluster, factor) if scaling else [],
    )


def _too_much(own: Plan, best: Plan | None, cluster: Cluster) -> str:
    from hmar_mega.planning.cluster import GIB
    from hmar_mega.planning.report import describe

    parts = {
        n: getattr(own.memory, n)
        for n in ("weights", "gradients", "optimizer", "fp8", "activations", "logits", "graphs", "buffers")
    }
    largest = max(parts, key=lambda n: parts[n])
    words = (
        f"it needs {own.memory.peak / GIB:.1f} GiB a GPU and {cluster.usable_bytes / GIB:.1f} are usable; most of it "
        f"is {largest} ({parts[largest] / GIB:.1f} GiB)"
    )
    return words if best is None else f"{words}; use {describe(best.layout)}, micro-batch {best.layout.micro_batch}"


def _nothing(why_not: str, cluster: Cluster) -> str:
    return (
        f"on {cluster.gpus} GPUs, {why_not}; use more GPUs or ones with more memory (--nodes, --cluster), or another "
        "data.global_batch_size"
    )
