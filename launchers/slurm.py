"""Job scripts for SLURM: rendering a template for a run on a cluster, and submitting it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hmar_mega.errors import UserError
from hmar_mega.launchers.events import add_event
from hmar_mega.launchers.prepare import JOB_FILE, LAUNCH_FOLDER, python_of, templates
from hmar_mega.planning.cluster import Cluster


@dataclass(frozen=True)
class Job:
    """A run on a cluster: all that a script is rendered from.

    Attributes:
        run: absolute run directory.
        max_restarts: how often the job may start again, for whatever reason.
    """

    run: Path
    cluster: Cluster
    name: str
    time: str
    partition: str | None
    max_restarts: int

    @property
    def processes(self) -> int:
        """One a GPU."""
        return self.cluster.gpus


def job_files(job: Job) -> dict[str, str]:
    """The job script and the network's variables, by name in the launch folder."""
    files = {JOB_FILE: render(job)}
    network = job.cluster.launch.network
    if network != "none":
        name = f"network-{network}.sh"
        files[name] = (templates() / name).read_text(encoding="utf-8")
    return files


def render(job: Job) -> str:
    """The job script: the template of the cluster with its places filled in."""
    launch = job.cluster.launch
    text = (templates() / f"{launch.template}.sbatch").read_text(encoding="utf-8")
    container = launch.container
    apptainer: list[str] = []
    if container is not None and container.kind == "apptainer":
        binds = [word for mount in _mounts(job) for word in ("--bind", mount)]
        nv = ["--nv"] if job.cluster.device == "cuda" else []
        apptainer = ["apptainer", "exec", *nv, *binds, container.image]
    values = {
        "directives": "\n".join(f"#SBATCH {option}" for option in directives(job)),
        "run_dir": shlex.quote(str(job.run)),
        "max_restarts": str(job.max_restarts),
        "python": "python" if container is not None else shlex.quote(python_of(launch.virtualenv)),
        "container": shlex.join(apptainer),
        "srun_options": shlex.join(_srun_options(job)),
        "environment": "\n".join(_environment(job)),
        "health": shlex.join(_health_options(job)),
        "gpus_per_node": str(job.cluster.gpus_per_node),
    }
    return re.sub(r"@(\w+)@", lambda match: values.get(match[1], match[0]), text)


def directives(job: Job) -> list[str]:
    """The options of sbatch, one a line of the script."""
    launch, cluster = job.cluster.launch, job.cluster
    log = job.run / LAUNCH_FOLDER / "logs" / "job-%j.log"
    options = [
        f"--job-name={job.name}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.gpus_per_node}",
        f"--time={job.time}",
        f"--output={log}",
        "--open-mode=append",
        f"--chdir={Path.cwd()}",
        "--requeue",
        "--no-kill",  # a node that dies must not take the script along that decides what follows
        f"--signal=B:USR1@{launch.signal_seconds}",
    ]
    named = {"partition": job.partition, "account": launch.account, "qos": launch.qos, "mem": launch.memory}
    options += [f"--{option}={value}" for option, value in named.items() if value is not None]
    if launch.cpus_per_task is not None:
        options.append(f"--cpus-per-task={launch.cpus_per_task}")
    if cluster.device == "cuda":
        gpus = cluster.gpus_per_node
        options.append(f"--gres=gpu:{gpus}" if launch.gpu_option == "gres" else f"--gpus-per-node={gpus}")
    return [*options, *launch.sbatch_options]


def _mounts(job: Job) -> list[str]:
    """What a container must see: where the run is, where it starts, and what the cluster asks for."""
    assert job.cluster.launch.container is not None
    own = dict.fromkeys([f"{job.run}:{job.run}", f"{Path.cwd()}:{Path.cwd()}"])
    return [*own, *job.cluster.launch.container.mounts]


def _srun_options(job: Job) -> list[str]:
    launch = job.cluster.launch
    options = [f"--cpu-bind={launch.cpu_bind}"]
    if launch.cpus_per_task is not None:  # since 22.05 srun does not take it from sbatch
        options.append(f"--cpus-per-task={launch.cpus_per_task}")
    if job.cluster.device == "cuda":
        options.append("--gpu-bind=none")  # NCCL's copies between GPUs need every process to see all of its node
    if launch.container is not None and launch.container.kind == "pyxis":
        options += [f"--container-image={launch.container.image}", f"--container-mounts={','.join(_mounts(job))}"]
        options.append(f"--container-workdir={Path.cwd()}")
    return options


def _environment(job: Job) -> list[str]:
    """Shell lines: set-up, modules, virtual environment, network, variables."""
    launch = job.cluster.launch
    lines = [*launch.setup]
    lines += [f"module load {shlex.quote(name)}" for name in launch.modules]
    if launch.virtualenv is not None:
        lines.append(f". {shlex.quote(str(Path(launch.virtualenv) / 'bin' / 'activate'))}")
    if launch.network != "none":
        lines.append(f'. "$launch_dir/network-{launch.network}.sh"')
    lines += [f"export {name}={shlex.quote(value)}" for name, value in launch.environment.items()]
    return lines or ["# no modules, network settings or variables in the cluster's description"]


def _health_options(job: Job) -> list[str]:
    health = job.cluster.launch.health
    if not health.enabled:
        return []
    options = [
        "--gpus", str(job.cluster.gpus_per_node if job.cluster.device == "cuda" else 0),
        "--min-memory-gib", f"{health.min_memory_gib:g}", "--min-free-disk-gib", f"{health.min_free_disk_gib:g}",
        "--max-clock-skew-s", f"{health.max_clock_skew_s:g}",
    ]  # fmt: skip
    if health.collective:
        options += ["--collective", f"{health.min_gb_per_s:g}"]  # job.sh wants it last
    return options


def submit(job: Job) -> str:
    """Hand the script over to SLURM, without the nodes that earlier jobs of this run excluded.

    Returns:
        The job's number.

    Raises:
        UserError: with what sbatch says, when it refuses.
    """
    folder = job.run / LAUNCH_FOLDER
    (folder / "restarts").unlink(missing_ok=True)  # who launches by hand starts counting afresh
    excluded = excluded_nodes(job.run)
    options = [f"--exclude={','.join(excluded)}"] if excluded else []
    # a launch from inside a job must not hand that job's settings on
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(folder / JOB_FILE)],
            capture_output=True, text=True, timeout=60, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as err:
        raise UserError(f"sbatch does not answer ({err}); the script is {folder / JOB_FILE}") from None
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {done.stderr.strip()}; the script is {folder / JOB_FILE}")
    number = done.stdout.strip().split(";")[0]
    add_event(job.run, "submitted", number)
    return number


def excluded_nodes(run: Path) -> list[str]:
    """Nodes that jobs of this run found bad; whoever mended one takes its line out of the file."""
    file = run / LAUNCH_FOLDER / "excluded_nodes"
    return file.read_text().split() if file.exists() else []
