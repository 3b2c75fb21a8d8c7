"""A run as a job of SLURM: its script, and its submission without the nodes that were bad."""

from __future__ import annotations

import shlex
from pathlib import Path

from hmar_mega.launchers.events import add_event
from hmar_mega.launchers.job import Job, fill, sbatch, with_network
from hmar_mega.launchers.prepare import JOB_FILE, LAUNCH_FOLDER
from hmar_mega.planning.cluster import Cluster


def run_job(run: Path, cluster: Cluster, name: str, time: str, partition: str | None, max_restarts: int) -> Job:
    """The job of a run, a task a GPU; `run` is its absolute run directory.

    Raises:
        UserError: when the time is none.
    """
    scripts = run / LAUNCH_FOLDER
    log = scripts / "logs" / "job-%j.log"
    return Job(run, cluster, name, time, partition, max_restarts, scripts, log, cluster.gpus_per_node)


def job_files(job: Job) -> dict[str, str]:
    """The job script and what only it reads, by name in the launch folder."""
    files: dict[str, str] = with_network(job, render(job))
    return files


def render(job: Job) -> str:
    """The job script: the template of the cluster with its places filled in."""
    text: str = fill(job.cluster.launch.template, job, {"run_dir": shlex.quote(str(job.folder))})
    return text


def submit(job: Job) -> str:
    """Hand the script over to SLURM, without the nodes that earlier jobs of this run excluded.

    Returns:
        The job's number.

    Raises:
        UserError: with what sbatch says, when it refuses.
    """
    (job.scripts / "restarts").unlink(missing_ok=True)  # who launches by hand starts counting afresh
    excluded = excluded_nodes(job.folder)
    number: str = sbatch(job.scripts / JOB_FILE, [f"--exclude={','.join(excluded)}"] if excluded else [])
    add_event(job.folder, "submitted", number)
    return number


def excluded_nodes(run: Path) -> list[str]:
    """Nodes that jobs of this run found bad; whoever mended one takes its line out of the file."""
    file = run / LAUNCH_FOLDER / "excluded_nodes"
    return file.read_text().split() if file.exists() else []
