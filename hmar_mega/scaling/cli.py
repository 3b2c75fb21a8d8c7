"""The commands `hmar-mega sweep …`: plan, submit, run, status and fit of a scaling-law sweep."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmar_mega.errors import UserError, refuse_options
from hmar_mega.parsers import add_command

if TYPE_CHECKING:
    from rich.console import Console

    from hmar_mega.config import Config
    from hmar_mega.scaling.plan import PlannedCell
    from hmar_mega.scaling.spec import SweepSpec

log = logging.getLogger(__name__)

#: Columns of tables that do not go to a terminal.
WIDTH = 150


def add_sweep_parser(subparsers: Any) -> None:
    """Add `sweep` and its commands to the sub-parsers of `hmar-mega`; each sets `run`, a function of the arguments."""
    parser = add_command(
        subparsers,
        "sweep",
        "scaling laws: plan, run and fit a grid of sizes, data and compute",
        "Scaling-law sweeps: plan the cells of a SWEEP.yaml, run them, see where they stand, fit power laws.",
        "  hmar-mega sweep plan SWEEP.yaml\n  hmar-mega sweep submit SWEEP.yaml --local 1\n"
        "  hmar-mega sweep status SWEEP.yaml\n  hmar-mega sweep fit SWEEP.yaml --flops 1e18",
    )
    commands = parser.add_subparsers(dest="sweep_command", metavar="COMMAND", required=True)
    _add_plan(commands)
    _add_submit(commands)
    _add_run(commands)
    _add_status(commands)
    _add_fit(commands)


def _add_plan(commands: Any) -> None:
    parser = add_command(
        commands, "plan", "the cells with parameters, FLOPs, layout, memory, hours and cost; writes nothing", "",
        "  hmar-mega sweep plan SWEEP.yaml --json plan.json",
    )  # fmt: skip
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON; - prints it instead of the table")
    parser.set_defaults(run=_run_plan)


def _add_submit(commands: Any) -> None:
    parser = add_command(
        commands, "submit", "train what is missing: new cells, stopped ones, failed ones", "",
        "  hmar-mega sweep submit SWEEP.yaml --local 2 --minutes 20\n"
        "  hmar-mega sweep submit SWEEP.yaml --slurm 8 --cluster ours.yaml --time 4:00:00",
    )  # fmt: skip
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", type=_positive, metavar="N", help="processes here, N cells at a time (default: 1)")
    where.add_argument("--slurm", type=_positive, metavar="N", help="one SLURM array, N tasks at a time")
    parser.add_argument("--minutes", type=float, help="with --local: save and stop after so long, to go on later")
    slurm = parser.add_argument_group("with --slurm")
    slurm.add_argument("--cluster", help="YAML file or name, as of `hmar-mega launch` (default: the sweep's)")
    slurm.add_argument("--time", help="limit of one job, such as 4:00:00; cells that take longer go on in another")
    slurm.add_argument("--partition", help="instead of the cluster's")
    slurm.add_argument(
        "--max-restarts", type=_positive, metavar="R", help="how often a task starts again (default: 50)"
    )
    slurm.add_argument("--dependency", help="as sbatch takes it, such as afterok:123")
    slurm.add_argument("--option", action="append", metavar="--KEY=VALUE", help="another option of sbatch")
    parser.add_argument("--max-attempts", type=_positive, help="instead of the sweep's; higher retries cells given up")
    parser.add_argument(
        "--accept-changed-data", action="store_true",
        help="let finished cells stand though data or tokenizer have changed since, as by rounding on another machine",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; with --slurm, show the script")
    parser.set_defaults(run=_run_submit)


def _add_run(commands: Any) -> None:
    parser = add_command(
        commands, "run", "one attempt of one cell, in the foreground; what submit starts", "",
        "  hmar-mega sweep run runs/sweep d4-w256-n51200-s0-0a1b2c3d",
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="DIR", help="the sweep's folder")
    parser.add_argument("cell", metavar="CELL")
    parser.add_argument("--processes", type=_positive, default=1, help="GPUs of a cell (default: 1)")
    parser.set_defaults(run=_run_run)


def _add_status(commands: Any) -> None:
    parser = add_command(
        commands, "status", "where every cell stands, and why", "", "  hmar-mega sweep status SWEEP.yaml --json -"
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml|DIR")
    parser.add_argument("--json", metavar="FILE", help="write JSON; - prints it instead of the table")
    parser.set_defaults(run=_run_status)


def _add_fit(commands: Any) -> None:
    parser = add_command(
        commands, "fit", "power laws, the largest model predicted, the best model for a budget; plots and a page", "",
        "  hmar-mega sweep fit SWEEP.yaml --flops 1e18 --flops 1e19",
    )  # fmt: skip
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml|DIR")
    parser.add_argument("--flops", type=float, action="append", default=[], help="recommend a model for this budget")
    parser.add_argument("--out", type=Path, help="folder of the results (default: DIR/fit)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.set_defaults(run=_run_fit)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return number


def _planned(path: Path, cluster: str | None = None) -> tuple[SweepSpec, Config, list[PlannedCell]]:
    """Of a sweep's file, planned for its own cluster or for another."""
    from hmar_mega.scaling.cells import expand
    from hmar_mega.scaling.plan import plan_cells
    from hmar_mega.scaling.spec import load_sweep

    spec, base = load_sweep(path)
    if cluster is not None:
        spec = spec.model_copy(update={"cluster": cluster})
    return spec, base, plan_cells(spec, expand(spec, base))


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _write_json(where: str, tree: object) -> None:
    from hmar_mega.files import write_atomic

    text = json.dumps(tree, indent=1)
    if where == "-":
        print(text)
    else:
        write_atomic(Path(where), text)


def _run_plan(args: argparse.Namespace) -> int:
    from hmar_mega.scaling.contents import missing_contents
    from hmar_mega.scaling.plan import plan_json, show_plan
    from hmar_mega.scaling.state import entries_of

    spec, base, planned = _planned(args.sweep)
    entries_of(Path(spec.dir), planned)
    if missing := missing_contents(base.model_dump(mode="json"), planned[0].cell.contents):
        log.warning("names of cells are provisional, since they follow from data too: %s not here", ", ".join(missing))
    if args.json != "-":
        show_plan(spec, planned, _console())
    if args.json is not None:
        _write_json(args.json, plan_json(planned))
    return 0


def _run_submit(args: argparse.Namespace) -> int:
    from hmar_mega.planning.workload import with_tokenizer
    from hmar_mega.scaling.local import run_local
    from hmar_mega.scaling.state import entries_of, write_sweep

    if args.slurm is None:
        names = ("cluster", "time", "partition", "max_restarts", "dependency", "option")
        refuse_options("they are SLURM's, and --slurm N is not given", **{name: getattr(args, name) for name in names})
    else:
        refuse_options("it is for --local; with --slurm there is --time", minutes=args.minutes)
    spec, base, planned = _planned(args.sweep, args.cluster)
    folder, attempts = Path(spec.dir).absolute(), args.max_attempts or spec.max_attempts
    _require_contents(base, planned)
    if args.dry_run:
        entries = entries_of(folder, planned, args.accept_changed_data)
    else:
        entries, added = write_sweep(folder, spec, with_tokenizer(base), planned, args.accept_changed_data)
        log.info("%s: %d cells, %d of them new", folder, len(planned), len(added))
    wanted = _to_train(folder, entries, attempts)
    if not wanted:
        log.info("nothing to train")
        return 0
    if args.slurm is not None:
        return _submit_array(args, spec, folder, wanted)
    if args.dry_run:
        print("\n".join(wanted))
        return 0
    outcome = run_local(folder, wanted, spec.processes, args.local or 1, attempts, args.minutes)
    log.info(
        "%d finished, %d stopped, %d given up, %d refused",
        len(outcome.finished), len(outcome.stopped), len(outcome.gave_up), len(outcome.refused),
    )  # fmt: skip
    return 1 if outcome.gave_up or outcome.refused else 0


def _submit_array(args: argparse.Namespace, spec: SweepSpec, folder: Path, wanted: list[str]) -> int:
    from hmar_mega.launchers import limits
    from hmar_mega.launchers.prepare import MAX_RESTARTS
    from hmar_mega.scaling import array
    from hmar_mega.scaling.plan import cell_cluster

    cluster = cell_cluster(spec.cluster, spec.processes)
    job = array.array_job(
        folder, cluster, spec.name, args.time or cluster.launch.time, args.partition or cluster.launch.partition,
        args.max_restarts or MAX_RESTARTS, len(wanted), args.slurm, args.dependency, args.option or (),
    )  # fmt: skip
    limits.check(job, args.dry_run)
    if args.dry_run:
        print(array.render(job), end="")
        return 0
    number = array.submit(job, wanted, sys.argv)
    log.info(
        "%d cells are SLURM array %s, %d at a time; hmar-mega sweep status %s", len(wanted), number, args.slurm, folder
    )
    return 0


def _require_contents(base: Config, planned: list[PlannedCell]) -> None:
    """Refuse to train what cannot be identified."""
    from hmar_mega.scaling.contents import missing_contents

    if missing := missing_contents(base.model_dump(mode="json"), planned[0].cell.contents):
        raise UserError(
            f"{' and '.join(missing)}: not here, or not set. What is trained on is a part of what a cell is, so submit "
            "where the data and the tokenizer are; `sweep plan` does without them"
        )


def _to_train(folder: Path, entries: list[dict[str, Any]], max_attempts: int) -> list[str]:
    """Cells to start, after a line for each that is not begun for the first time."""
    from hmar_mega.scaling.array import queued_cells
    from hmar_mega.scaling.state import state_of

    queued, wanted = queued_cells(folder), []
    counts: dict[str, int] = {}
    for entry in entries:
        found = state_of(folder, entry, max_attempts, queued)
        counts[found.state] = counts.get(found.state, 0) + 1
        if found.state in ("new", "stopped", "failed"):
            wanted.append(found.name)
        if found.state == "failed":
            log.info(
                "cell %s: retried after %d of %d failures: %s", found.name, found.attempts, max_attempts, found.reason
            )
        if found.state == "gave up":
            log.warning(
                "cell %s: given up after %d failures, last: %s; --max-attempts %d tries it again",
                found.name, found.attempts, found.reason, found.attempts + 1,
            )  # fmt: skip
        if found.state == "refused":
            log.warning(
                "cell %s: refused, and tried again only with other settings or data: %s", found.name, found.reason
            )
    log.info("cells: %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    return wanted


def _run_run(args: argparse.Namespace) -> int:
    from hmar_mega.scaling.attempt import run_cell

    return run_cell(args.folder, args.cell, args.processes)


def _run_status(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from rich.table import Table

    from hmar_mega.scaling.array import queued_cells
    from hmar_mega.scaling.state import state_of, sweep_file

    folder = _folder(args.sweep)
    tree, queued = sweep_file(folder), queued_cells(folder)
    states = [state_of(folder, entry, tree["max_attempts"], queued) for entry in tree["cells"]]
    if args.json is not None:
        _write_json(args.json, [asdict(found) for found in states])
    if args.json == "-":
        return 0
    table = Table(box=None)
    for name in ("cell", "state", "step", "val loss", "failures", "reason"):
        table.add_column(name, justify="right" if name in ("step", "val loss", "failures") else "left")
    for found in states:
        loss = "" if found.loss is None else f"{found.loss:.4f}"
        step = f"{found.step:,}/{found.steps:,}"
        table.add_row(found.name, found.state, step, loss, str(found.attempts or ""), found.reason)
    _console().print(table)
    return 0


def _run_fit(args: argparse.Namespace) -> int:
    from hmar_mega.scaling.fitting import fit_sweep
    from hmar_mega.scaling.report import show_fit, write_fit
    from hmar_mega.scaling.state import sweep_file

    if any(flops <= 0 for flops in args.flops):
        raise UserError(f"--flops {min(args.flops)} must be above 0")
    folder = _folder(args.sweep)
    name = str(sweep_file(folder)["name"])
    fit = fit_sweep(folder, args.flops, args.seed)
    page = write_fit(fit, name, args.out or folder / "fit")
    show_fit(fit, name, _console())
    print(f"page: {page}")
    return 0


def _folder(sweep: Path) -> Path:
    """The folder of a sweep that is given by it, or by its file."""
    from hmar_mega.scaling.spec import load_sweep

    return sweep if sweep.is_dir() else Path(load_sweep(sweep)[0].dir)
