"""Cells of a sweep as a SLURM array: its job, what is still queued of earlier ones."""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hmar_mega.errors import UserError
from hmar_mega.launchers.job import Job, fill, sbatch, with_network
from hmar_mega.launchers.prepare import JOB_FILE, LAUNCH_FOLDER, prepare_scripts
from hmar_mega.planning.cluster import Cluster
from hmar_mega.scaling import record

log = logging.getLogger(__name__)

#: Of the folder of an array: its cells in the order of their tasks, and the numbers of its jobs.
CELLS_FILE, JOBS_FILE = "cells", "jobs"


def array_job(
    folder: Path, cluster: Cluster, name: str, time: str, partition: str | None, max_restarts: int, cells: int,
    concurrency: int, dependency: str | None = None, options: Sequence[str] = (),
) -> Job:  # fmt: skip
    """The job of the next array of a sweep, a task a cell.

    Args:
        folder: the sweep's, absolute.
        cluster: one cell's.
        cells: how many.
        concurrency: tasks at a time.
        dependency: as sbatch takes it, such as `afterok:123`.
        options: of sbatch, which win.

    Raises:
        UserError: when a cell needs several nodes, or the time is none.
    """
    if cluster.nodes > 1:
        raise UserError(
            f"a cell of {cluster.gpus} processes needs {cluster.nodes} nodes, and a task of an array has one; use "
            f"processes={cluster.gpus_per_node} or fewer, or `hmar-mega launch` for the largest sizes"
        )
    number = 1 + max((int(path.name) for path in (folder / "arrays").glob("[0-9]*")), default=0)
    scripts = folder / "arrays" / f"{number:03d}"
    array = [f"--array=0-{cells - 1}%{concurrency}", *([f"--dependency={dependency}"] if dependency else [])]
    return Job(
        folder, cluster, name, time, partition, max_restarts, scripts, scripts / "task-%a.log", tasks_per_node=1,
        options=(*array, *options), tasks=min(cells, concurrency),
    )  # fmt: skip


def render(job: Job) -> str:
    """The job script of an array."""
    values = {"sweep_dir": shlex.quote(str(job.folder)), "scripts": shlex.quote(str(job.scripts))}
    text: str = fill("array", job, values)
    return text


def submit(job: Job, cells: Sequence[str], command: Sequence[str]) -> str:
    """Write the scripts of an array and hand it over to SLURM; returns and records its job number.

    Raises:
        UserError: with what sbatch says, when it refuses.
    """
    listed = "".join(f"{cell}\n" for cell in cells)
    prepare_scripts(job.scripts, {**with_network(job, render(job)), CELLS_FILE: listed}, command)
    for cell in cells:  # who submits by hand starts counting afresh
        (record.run_folder(job.folder, cell) / LAUNCH_FOLDER / "restarts").unlink(missing_ok=True)
    number: str = sbatch(job.scripts / JOB_FILE)
    with (job.scripts / JOBS_FILE).open("a") as file:
        file.write(f"{number}\n")
    return number


def queued_cells(folder: Path) -> frozenset[str]:
    """Cells whose tasks SLURM still has, by squeue; none where there are no arrays."""
    cells: dict[str, list[str]] = {}  # by job number
    for path in sorted((folder / "arrays").glob(f"*/{JOBS_FILE}")):
        cells |= {number: (path.parent / CELLS_FILE).read_text().split() for number in path.read_text().split()}
    if not cells:
        return frozenset()
    if shutil.which("squeue") is None:
        log.warning("squeue is not on this machine: queued cells of arrays %s look new", ", ".join(cells))
        return frozenset()
    command = ["squeue", "--noheader", "--array", "--format=%F %K", "--me"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"squeue failed, so cells might be submitted twice: {done.stderr.strip()}")
    rows = (line.strip().partition(" ") for line in done.stdout.splitlines())
    return frozenset(cells[job][int(task)] for job, _, task in rows if job in cells and task.isdecimal())
