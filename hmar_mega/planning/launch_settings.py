"""How jobs are started on a cluster: the `launch` section of a cluster description."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hmar_mega.config_base import Section

#: SLURM's ways to write a time: minutes, minutes:seconds, hours:minutes:seconds, and days- before hours[:minutes…].
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")


def seconds_of(text: str) -> int:
    """A SLURM time such as `90`, `30:00`, `12:00:00` or `1-12:00:00`, in seconds.

    Raises:
        ValueError: when it is not one.
    """
    match = TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a time of SLURM; write minutes, hours:minutes:seconds or days-hours:minutes")
    parts = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, seconds = [0, *parts][-3:]
    return (hours * 60 + minutes) * 60 + seconds


def _time(value: Any) -> str:
    """YAML reads an unquoted 12:00:00 as a number of seconds, and 90 is one of minutes: ask for quotes."""
    if not isinstance(value, str):
        raise ValueError('write times in quotes, such as "12:00:00": without them YAML makes a number of it')
    seconds_of(value)
    return value


SlurmTime = Annotated[str, BeforeValidator(_time)]


class Partition(Section):
    """Limits of a partition, known beforehand; where SLURM answers, it is asked too."""

    nodes: int | None = Field(None, ge=1)
    gpus_per_node: int | None = Field(None, ge=1)
    time: SlurmTime | None = Field(None, description="the longest job, as SLURM writes times")


class Container(Section):
    """What the training runs in: `pyxis` (enroot, through srun) or `apptainer`."""

    kind: Literal["pyxis", "apptainer"]
    image: str = Field(description="a .sqsh or .sif file, or an address that the kind understands")
    mounts: list[str] = Field(
        [], description="HOST:CONTAINER; the run directory and the current folder come by themselves"
    )


class Health(Section):
    """What every node must have before training starts on it; a node that has not is excluded."""

    enabled: bool = True
    min_memory_gib: float = Field(0, ge=0, description="available main memory")
    min_free_disk_gib: float = Field(1, ge=0, description="free where the run is written")
    max_clock_skew_s: float = Field(30, gt=0, description="against the middle one of the nodes; srun's start counts")
    collective: bool = Field(True, description="also reduce a tensor in each node and over all of them")
    min_gb_per_s: float = Field(0, ge=0, description="of that reduction in a node, below which the node is bad")


class LaunchSettings(Section):
    """What `hmar-mega launch` writes into a job script; options of the command win over it."""

    template: Literal["srun", "torchrun"] = Field("srun", description="srun: a task a GPU; torchrun: an agent a node")
    partition: str | None = Field(None, description="default: SLURM's own")
    partitions: dict[str, Partition] = Field({}, description="limits by name, checked before submission")
    account: str | None = None
    qos: str | None = None
    time: SlurmTime = Field("1-00:00:00", description="limit of one job; longer runs are requeued until they are done")
    cpus_per_task: int | None = Field(None, ge=1)
    memory: str | None = Field(None, description="of a node, as sbatch --mem takes it; 0 is all of it")
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    cpu_bind: str = Field("cores", description="srun --cpu-bind: keeps the threads of a task on cores near its GPU")
    sbatch_options: list[str] = Field([], description="further lines, such as --exclusive")
    container: Container | None = None
    modules: list[str] = Field([], description="for `module load`")
    virtualenv: str | None = Field(None, description="folder; default: the Python that launches")
    setup: list[str] = Field([], description="shell lines before everything else")
    network: Literal["none", "ethernet", "infiniband", "roce"] = Field(
        "none", description="which of launchers/templates/network-*.sh is read"
    )
    environment: dict[str, str] = Field({}, description="variables, after those of the network")
    signal_seconds: int = Field(300, ge=10, description="how long before the limit a run is told to save and requeue")
    shared_folder: str | None = Field(None, description="runs must lie below it: what every node sees")
    health: Health = Health()
