"""What is refused before a job is submitted: more than a partition has, too long, a folder that nodes do not share."""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hmar_mega.config_base import one_of
from hmar_mega.errors import UserError
from hmar_mega.launchers.job import Job
from hmar_mega.planning.launch_settings import seconds_of

log = logging.getLogger(__name__)

#: File systems that belong to one machine.
LOCAL_FILE_SYSTEMS = {"tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "squashfs"}

#: USR1 may come so many seconds earlier than asked for.
EARLY = 60


@dataclass(frozen=True)
class Limits:
    """Of a partition; None where nothing is known. Time in seconds."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    time: int | None = None


def check(job: Job, dry_run: bool) -> None:
    """Refuse a job that cannot be submitted from here or can never run well.

    Args:
        dry_run: leave out what only matters where it is submitted.

    Raises:
        UserError: naming what was asked for, the limit, and what to do.
    """
    check_job(job, ask_slurm())
    if not dry_run:
        require_sbatch()
        shared, others = job.cluster.launch.shared_folder, other_nodes()
        check_shared(job.folder, shared, job.nodes, others)
        warn_of_current_folder(Path.cwd(), shared, job.nodes, others)


def require_sbatch() -> None:
    """Raise UserError where SLURM's commands are missing."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch here, SLURM's command to submit jobs: run this on a login node of the cluster, look at "
            "the script with --dry-run, or train on this machine with --local N"
        )


def check_job(job: Job, asked: dict[str, Limits]) -> None:
    """Refuse a job that can never start or never end well.

    Args:
        asked: limits by partition as SLURM answers; empty where it cannot be asked.

    Raises:
        UserError: naming what was asked for, the limit, and what to do.
    """
    launch = job.cluster.launch
    known = {
        name: Limits(p.nodes, p.gpus_per_node, seconds_of(p.time) if p.time else None)
        for name, p in launch.partitions.items()
    }
    partition = job.partition
    if partition is not None and (known or asked) and partition not in {**known, **asked}:
        names = one_of(sorted({**known, **asked}))
        raise UserError(f"--partition {partition} is not one of cluster {job.cluster.name}; use {names}")
    there = list(asked or known)
    meant = there[0] if partition is None and len(there) == 1 else partition
    for name, limits in [*known.items(), *asked.items()]:
        if name == meant:
            _check_size(job, name, limits)
    seconds = seconds_of(job.time)
    if seconds <= launch.signal_seconds + EARLY:
        raise UserError(
            f"--time {job.time} leaves no time to train: the run is told to save {launch.signal_seconds} s before the "
            f"limit, and up to {EARLY} s earlier; use more time, or a smaller launch.signal_seconds in the cluster file"
        )


def _check_size(job: Job, name: str, limits: Limits) -> None:
    cluster = job.cluster
    if limits.nodes is not None and cluster.nodes > limits.nodes:
        raise UserError(
            f"{cluster.nodes} nodes are asked for, and partition {name} has {limits.nodes}; use --nodes {limits.nodes} "
            "or fewer, or another --partition"
        )
    gpus = limits.gpus_per_node
    if cluster.device == "cuda" and gpus is not None and cluster.gpus_per_node > gpus:
        raise UserError(
            f"{cluster.gpus_per_node} GPUs a node are asked for ({cluster.gpus} in all), and nodes of partition {name} "
            f"have {gpus}"
            + (f"; use --gpus-per-node {gpus} with more --nodes, or another --partition" if gpus else "; use another")
        )
    if limits.time is not None and seconds_of(job.time) > limits.time:
        raise UserError(
            f"--time {job.time} is over the limit of partition {name}, {_words(limits.time)}; ask for that: a run that "
            "takes longer saves itself and is requeued until it is done"
        )


def _words(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def ask_slurm() -> dict[str, Limits]:
    """Limits of every partition, by `sinfo`; empty where it does not answer."""
    try:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%R|%D|%G|%l"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_sinfo(done.stdout)


def parse_sinfo(text: str) -> dict[str, Limits]:
    """Lines `partition|nodes|gres|time limit`, of which a partition with unlike nodes has several."""
    found: dict[str, Limits] = {}
    for line in text.splitlines():
        name, nodes, gres, time = line.strip().split("|")
        before = found.get(name, Limits(0, 0))
        gpus = sum(_gpu_count(item) for item in gres.split(",") if item.startswith("gpu"))
        found[name] = Limits(
            (before.nodes or 0) + int(nodes),
            max(before.gpus_per_node or 0, gpus),
            None if time in ("infinite", "n/a") else seconds_of(time),
        )
    return found


def _gpu_count(item: str) -> int:
    """`gpu:h100:8(S:0-1)` → 8."""
    number = item.split("(")[0].rpartition(":")[2]
    return int(number) if number.isdecimal() else 1


def other_nodes() -> list[str]:
    """Host names of SLURM's nodes but this machine, by `sinfo`; empty where it does not answer."""
    try:
        done = subprocess.run(["sinfo", "-h", "-N", "-o", "%n"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    here = socket.gethostname()
    return sorted({name for name in done.stdout.split() if name.split(".")[0] != here.split(".")[0]})


def check_shared(folder: Path, shared_folder: str | None, nodes: int, others: Sequence[str] = ()) -> None:
    """Refuse a folder of a run, or of a sweep, that only this machine sees, as well as can be told from here.

    Args:
        nodes: at work at the same time.
        others: nodes besides this machine where a job may start, or go on after it was requeued.

    Raises:
        UserError: naming the folder, and where to put it.
    """
    if shared_folder is not None:
        if not folder.is_relative_to(Path(shared_folder).absolute()):
            raise UserError(
                f"{folder} is not below {shared_folder}, the folder that all nodes of this cluster share "
                "(launch.shared_folder); logs and checkpoints would be lost: choose a folder there (run.dir; dir of a "
                "sweep)"
            )
        return
    kind = file_system(folder)
    if (nodes > 1 or others) and kind in LOCAL_FILE_SYSTEMS:
        where = f"up to {nodes} nodes write there" if nodes > 1 else f"the job may run on another ({others[0]}, say)"
        raise UserError(
            f"{folder} lies on {kind}, a file system of this machine, and {where}; choose a folder that all nodes "
            "share (run.dir; dir of a sweep), or name the shared one as launch.shared_folder in the cluster file"
        )


def warn_of_current_folder(folder: Path, shared_folder: str | None, nodes: int, others: Sequence[str] = ()) -> None:
    """Say so where only this machine may see the folder in which the job starts and relative paths begin."""
    shared = shared_folder is not None and folder.is_relative_to(Path(shared_folder).absolute())
    if not shared and (nodes > 1 or others) and file_system(folder) in LOCAL_FILE_SYSTEMS:
        log.warning(
            "the job starts in %s, on a file system of this machine: where a node has no such folder, it starts in "
            "another and relative paths of data and tokenizer lead nowhere; launch from a folder that all nodes share",
            folder,
        )


def file_system(path: Path) -> str:
    """Kind of the file system that `path` is on or would be, `unknown` where /proc/mounts does not say."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    # of two mounts on one place the later one is seen
    holding = [(len(Path(place).parts), kind) for place, kind in reversed(mounts) if path.is_relative_to(place)]
    return max(holding, default=(0, "unknown"), key=lambda pair: pair[0])[1]
