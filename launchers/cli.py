"""The commands `hmar-mega launch` and `hmar-mega status`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmar_mega.errors import UserError
from hmar_mega.launchers.prepare import CELL_RUN, MAX_RESTARTS
from hmar_mega.parsers import add_command, add_config_arguments

if TYPE_CHECKING:
    from rich.table import Table

    from hmar_mega.config import Config
    from hmar_mega.launchers.job import Job
    from hmar_mega.launchers.status import RunStatus
    from hmar_mega.planning.cluster import Cluster


def add_launcher_parsers(subparsers: Any) -> None:
    """Add `launch` and `status` to the sub-parsers of `hmar-mega`; they set `run`, a function of the arguments."""
    parser = add_command(
        subparsers, "launch", "train on a SLURM cluster, through preemption and lost nodes; or on this machine",
        "Writes RUN/launch (configuration, code revision, job script) and submits the script. The job saves and\n"
        "requeues itself before its time limit, when preempted and when a node is lost, until training is complete.",
        "  hmar-mega launch train/d24-256 --cluster h100-8x8 --nodes 4 --time 12:00:00 run.dir=/shared/runs/d24 …\n"
        "  hmar-mega launch train/d24-256 --cluster h100-8x8 --dry-run run.dir=/shared/runs/d24\n"
        "  hmar-mega launch train/d8-256 --local 2 run.dir=runs/small …",
    )  # fmt: skip
    add_config_arguments(parser)
    parser.add_argument("--cluster", help="YAML file, or the name of a packaged cluster (configs/cluster)")
    parser.add_argument("--local", type=_positive, metavar="N", help="N processes on this machine instead, by torchrun")
    parser.add_argument("--nodes", type=_positive, help="instead of the cluster's")
    parser.add_argument("--gpus-per-node", type=_positive, help="GPUs, or processes where there are none, of a node")
    parser.add_argument("--time", help="limit of one job, such as 12:00:00 or 1-12:00:00")
    parser.add_argument("--partition", help="instead of the cluster's")
    parser.add_argument("--name", help="of the job (default: the run directory's)")
    parser.add_argument(
        "--max-restarts", type=_count, metavar="R", help="how often a job starts again (default: 50; with --local: 0)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the job script; write and submit nothing")
    parser.set_defaults(run=_run_launch)

    parser = add_command(
        subparsers, "status", "where runs stand: queued, running, preempted, failed and why",
        "", "  hmar-mega status runs/d16 runs/d24 --watch\n  hmar-mega status --json",
    )  # fmt: skip
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories (default: those below runs)")
    parser.add_argument("--watch", action="store_true", help="look again and again, until all have ended")
    parser.add_argument("--every", type=float, default=5, help="seconds between looks, with --watch (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run_status)


def _positive(text: str) -> int:
    if (number := _count(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return number


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(text)


def _run_launch(args: argparse.Namespace) -> int:
    from hmar_mega.config_io import config_to_yaml, load_config
    from hmar_mega.launchers.prepare import launch_config

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(config_to_yaml(config), end="")
        return 0
    config = launch_config(config)
    if (args.cluster is None) == (args.local is None):
        raise UserError("say where to train: either --cluster NAME (see configs/cluster), or --local N processes here")
    if args.local is not None:
        return _launch_local(args, config)
    return _launch_job(args, config)


def _launch_local(args: argparse.Namespace, config: Config) -> int:
    from hmar_mega.launchers.local import local_command, run_local
    from hmar_mega.launchers.prepare import prepare

    _check_layout(config, args.local)
    run, restarts = Path(str(config.run.dir)), args.max_restarts or 0
    if args.dry_run:
        print(" ".join(local_command(run, args.local, restarts)))
        return 0
    _check_free(run)
    prepare(config, {}, sys.argv)
    status: int = run_local(run, args.local, restarts)
    return status


def _launch_job(args: argparse.Namespace, config: Config) -> int:
    from hmar_mega.launchers import limits
    from hmar_mega.launchers.prepare import prepare
    from hmar_mega.launchers.slurm import job_files, render, submit
    from hmar_mega.planning.cluster import load_cluster

    cluster = load_cluster(args.cluster, args.nodes, args.gpus_per_node)
    job = make_job(args, config, cluster)
    _check_layout(config, cluster.gpus)
    limits.check(job, args.dry_run)
    if args.dry_run:
        print(render(job), end="")
        return 0
    _check_free(job.folder)
    prepare(config, job_files(job), sys.argv)
    number = submit(job)
    print(f"job {number}: {cluster.nodes} × {cluster.gpus_per_node} processes; hmar-mega status {job.folder} --watch")
    return 0


def make_job(args: argparse.Namespace, config: Config, cluster: Cluster) -> Job:
    """What is asked for on the command line, and by the cluster where it says nothing.

    Raises:
        UserError: when a time is none.
    """
    from hmar_mega.launchers.slurm import run_job

    run, launch = Path(str(config.run.dir)), cluster.launch
    restarts = MAX_RESTARTS if args.max_restarts is None else args.max_restarts
    return run_job(
        run, cluster, args.name or run.name, args.time or launch.time, args.partition or launch.partition, restarts
    )


def _check_free(run: Path) -> None:
    """Refuse a run that a job works on or waits for: its configuration and scripts would change under it."""
    from hmar_mega.launchers.status import ask_queue, busy

    if who := busy(run, ask_queue()):
        raise UserError(
            f"run.dir={run} is in use by {who}; wait until it has ended (hmar-mega status {run} --watch), stop it "
            "(scancel, or SIGTERM to the process: it saves itself), or choose another run.dir"
        )


def _check_layout(config: Config, processes: int) -> None:
    """Refuse a number of processes that cannot be laid out, without importing torch."""
    tp, pp = config.parallel.tensor_parallel, config.parallel.pipeline_parallel
    if processes % (tp * pp):
        raise UserError(
            f"{processes} processes are not a multiple of tensor_parallel={tp} × pipeline_parallel={pp}; use a "
            f"multiple of {tp * pp}, or other parallel settings (hmar-mega plan lists those that fit)"
        )
    if config.data.global_batch_size % (processes // (tp * pp)):
        data, batch = processes // (tp * pp), config.data.global_batch_size
        raise UserError(
            f"data.global_batch_size={batch} does not divide by the {data} data-parallel processes; use "
            f"{data * max(1, round(batch / data))}, or another number of processes"
        )


def _run_status(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    runs = args.runs or find_runs(Path("runs"))
    if not runs:
        raise UserError("no run is given, and there is none below runs/; name run directories: hmar-mega status RUN …")
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run} is not a run directory; give folders that hmar-mega launch or train wrote")
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows = look(runs)
    if args.json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
        return 0
    if not args.watch:
        console.print(table_of(rows))
        return 0
    with Live(table_of(rows), console=console, auto_refresh=False) as live:
        while not all(row.state in ("completed", "failed", "cancelled", "stopped") for row in rows):
            time.sleep(args.every)
            rows = look(runs)
            live.update(table_of(rows), refresh=True)
    return 0


def find_runs(folder: Path) -> list[Path]:
    """Folders below `folder`, at any depth to two, that a run has been in; sorted."""
    found = {
        path.parent.parent for path in (*folder.glob("*/launch/config.yaml"), *folder.glob("*/*/launch/config.yaml"))
    }
    found |= {path.parent for path in (*folder.glob("*/checkpoints"), *folder.glob("*/*/checkpoints"))}
    return sorted(found)


def look(runs: list[Path]) -> list[RunStatus]:
    """Where all of them stand now, with one question to SLURM."""
    from hmar_mega.launchers.status import ask_queue, read_status

    queue = ask_queue()
    return [read_status(run, queue) for run in runs]


#: How states are shown.
COLOURS = {
    "completed": "green", "running": "cyan", "starting": "cyan", "queued": "yellow", "requeued": "yellow",
    "preempted": "yellow", "failed": "red", "cancelled": "magenta",
}  # fmt: skip


def table_of(rows: list[RunStatus]) -> Table:
    """The rows as a table."""
    from rich.table import Table

    table = Table("run", "state", "step", "left", "job", "nodes", "restarts", "reason", box=None, pad_edge=False)
    for row in rows:
        step = "" if row.step is None else f"{row.step}/{row.total if row.total is not None else '?'}"
        left = "" if row.seconds_left is None else duration(row.seconds_left)
        state = f"[{COLOURS.get(row.state, 'white')}]{row.state}[/]"
        reason = row.reason.replace("[", r"\[")
        run = Path(row.run)
        name = run.parent.name if run.name == CELL_RUN else run.name
        table.add_row(name, state, step, left, row.job, row.nodes, str(row.restarts), reason)
    return table


def duration(seconds: float) -> str:
    """`3 d 4 h`, `2 h 5 min`, `40 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
