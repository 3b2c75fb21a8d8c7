"""Jobs for SLURM: what is asked of a cluster, job scripts made of a template, and their submission.

The one way in which runs (`slurm.py`) and the arrays of sweeps (`hmar_mega/scaling/array.py`) reach SLURM.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmar_mega.errors import UserError
from hmar_mega.launchers.prepare import JOB_FILE, python_of, templates
from hmar_mega.planning.cluster import Cluster
from hmar_mega.planning.launch_settings import seconds_of


@dataclass(frozen=True)
class Job:
    """What is asked of a cluster: all that a script is rendered from.

    Attributes:
        folder: absolute; all that the job writes lies below it, so that all nodes must see it.
        cluster: the nodes of the job, or of one task of an array.
        time: limit, as SLURM writes times.
        max_restarts: how often it may start again, for whatever reason.
        scripts: the folder of its scripts.
        log: what the script itself prints, with SLURM's patterns.
        tasks_per_node: that srun starts.
        options: of sbatch, after those of the cluster.
        tasks: of an array, at a time.

    Raises:
        UserError: when the time is none.
    """

    folder: Path
    cluster: Cluster
    name: str
    time: str
    partition: str | None
    max_restarts: int
    scripts: Path
    log: Path
    tasks_per_node: int
    options: tuple[str, ...] = ()
    tasks: int = 1

    def __post_init__(self) -> None:
        try:
            seconds_of(self.time)
        except ValueError as err:
            raise UserError(f"--time: {err}") from None

    @property
    def nodes(self) -> int:
        """On which it may run at the same time."""
        return self.cluster.nodes * self.tasks


def fill(template: str, job: Job, values: Mapping[str, str]) -> str:
    """The text of a template with its places filled in: what every job has, and `values`."""
    launch = job.cluster.launch
    text = (templates() / f"{template}.sbatch").read_text(encoding="utf-8")
    everywhere = {
        "directives": "\n".join(f"#SBATCH {option}" for option in directives(job)),
        "max_restarts": str(job.max_restarts),
        "python": "python" if launch.container is not None else shlex.quote(python_of(launch.virtualenv)),
        "container": shlex.join(_apptainer(job)),
        "srun_options": shlex.join(_srun_options(job)),
        "environment": "\n".join(_environment(job)),
        "health": shlex.join(_health_options(job)),
        "gpus_per_node": str(job.cluster.gpus_per_node),
    }
    filled = {**everywhere, **values}
    return re.sub(r"@(\w+)@", lambda match: filled.get(match[1], match[0]), text)


def with_network(job: Job, script: str) -> dict[str, str]:
    """The script and the network's variables that it reads, by name in the folder of scripts."""
    files, network = {JOB_FILE: script}, job.cluster.launch.network
    if network != "none":
        name = f"network-{network}.sh"
        files[name] = (templates() / name).read_text(encoding="utf-8")
    return files


def directives(job: Job) -> list[str]:
    """The options of sbatch, one a line of the script."""
    launch, cluster = job.cluster.launch, job.cluster
    options = [
        f"--job-name={quoted(job.name)}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        f"--time={job.time}",
        f"--output={quoted(str(job.log))}",
        "--open-mode=append",
        f"--chdir={quoted(str(Path.cwd()))}",
        "--requeue",  # without --no-kill: a job whose script lost its node would stay, with nothing running in it
        f"--signal=B:USR1@{launch.signal_seconds}",
    ]
    named = {"partition": job.partition, "account": launch.account, "qos": launch.qos, "mem": launch.memory}
    options += [f"--{option}={value}" for option, value in named.items() if value is not None]
    if (cpus := _cpus_per_task(job)) is not None:
        options.append(f"--cpus-per-task={cpus}")
    if cluster.device == "cuda":
        gpus = cluster.gpus_per_node
        options.append(f"--gres=gpu:{gpus}" if launch.gpu_option == "gres" else f"--gpus-per-node={gpus}")
    return [*options, *launch.sbatch_options, *job.options]


def quoted(text: str) -> str:
    """A value as sbatch reads it in a script: a space or # outside of quotes would end it."""
    if re.search(r"[\s#\"'\\]", text) is None:
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _cpus_per_task(job: Job) -> int | None:
    """Those of a GPU's process, as many times as a task has processes."""
    cpus = job.cluster.launch.cpus_per_task
    return None if cpus is None else cpus * job.cluster.gpus_per_node // job.tasks_per_node


def _mounts(job: Job) -> list[str]:
    """What a container must see: what the job writes, where it starts, and what the cluster asks for."""
    assert job.cluster.launch.container is not None
    own = dict.fromkeys([f"{job.folder}:{job.folder}", f"{Path.cwd()}:{Path.cwd()}"])
    return [*own, *job.cluster.launch.container.mounts]


def _apptainer(job: Job) -> list[str]:
    container = job.cluster.launch.container
    if container is None or container.kind != "apptainer":
        return []
    binds = [word for mount in _mounts(job) for word in ("--bind", mount)]
    return ["apptainer", "exec", *(["--nv"] if job.cluster.device == "cuda" else []), *binds, container.image]


def _srun_options(job: Job) -> list[str]:
    launch = job.cluster.launch
    options = [f"--cpu-bind={launch.cpu_bind}"]
    if (cpus := _cpus_per_task(job)) is not None:  # since 22.05 srun does not take it from sbatch
        options.append(f"--cpus-per-task={cpus}")
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
        lines.append(f'. "$scripts/network-{launch.network}.sh"')
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
    if health.collective and job.tasks_per_node * job.cluster.nodes > 1:
        options += ["--collective", f"{health.min_gb_per_s:g}"]  # job.sh wants it last
    return options


def sbatch(script: Path, options: Sequence[str] = ()) -> str:
    """Hand a script over to SLURM; the job's number.

    Raises:
        UserError: with what sbatch says, when it refuses.
    """
    # from inside a job: that job's settings must not be handed on
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script)],
            capture_output=True, text=True, timeout=60, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as err:
        raise UserError(f"sbatch does not answer ({err}); the script is {script}") from None
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {done.stderr.strip()}; the script is {script}")
    return done.stdout.strip().split(";")[0]
