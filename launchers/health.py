"""Whether a node is fit to train on: GPUs, memory, disk, clock. Job scripts run it once a node, before training.

python -m hmar_mega.launchers.health REPORTS --clocks REPORTS/clocks --gpus 8

writes REPORTS/NODE: `ok`, or what is wrong. Nothing heavy is imported: it must be over in a second.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hmar_mega.files import write_atomic

GIB = 2**30


def node_name() -> str:
    """As SLURM calls this node; outside SLURM its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def visible_gpus() -> int:
    """GPUs that the driver lists and this job may use."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if allowed is None else min(count, len([name for name in allowed.split(",") if name.strip()]))


def available_memory(meminfo: str) -> int:
    """Bytes that programs can still get, from the text of /proc/meminfo; 0 where it does not say."""
    fields = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    return int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024


def skew(clocks: str, node: str) -> float | None:
    """Seconds between a node's clock and the middle one (of two: the earlier); None where the node has none.

    Args:
        clocks: lines `NODE SECONDS`, read on all nodes at about the same time.
    """
    lines = re.findall(r"^(\S+) (\d+(?:\.\d+)?)$", clocks, re.M)  # a site's prolog may print others
    found = {name: float(seconds) for name, seconds in lines}
    return found[node] - statistics.median_low(found.values()) if node in found else None


def faults(
    folder: Path, gpus: int, min_memory_gib: float, min_free_disk_gib: float, skew_s: float, max_clock_skew_s: float
) -> list[str]:
    """What is wrong with this node, in words.

    Args:
        folder: where the run is written.
        gpus: how many there must be; 0 asks for none.
        skew_s: seconds between this node's clock and the middle one of all nodes'.
    """
    found = []
    if gpus and (there := visible_gpus()) < gpus:
        found.append(f"{there} of {gpus} GPUs answer")
    memory = available_memory(Path("/proc/meminfo").read_text()) / GIB
    if memory < min_memory_gib:
        found.append(f"{memory:.1f} GiB of memory are available, {min_memory_gib:g} are needed")
    free = shutil.disk_usage(folder).free / GIB
    if free < min_free_disk_gib:
        found.append(f"{free:.1f} GiB of disk are free in {folder}, {min_free_disk_gib:g} are needed")
    if abs(skew_s) > max_clock_skew_s:
        found.append(f"the clock is {skew_s:+.0f} s from the nodes' middle one, {max_clock_skew_s:g} s are allowed")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of this node; 0 when it is fit."""
    parser = argparse.ArgumentParser(description="Whether this node is fit to train on.")
    parser.add_argument("reports", type=Path, help="folder of the reports, which all nodes share")
    parser.add_argument("--clocks", type=Path, required=True, help="file of the nodes' clocks, read at one time")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--min-memory-gib", type=float, default=0)
    parser.add_argument("--min-free-disk-gib", type=float, default=0)
    parser.add_argument("--max-clock-skew-s", type=float, default=30)
    args = parser.parse_args(argv)
    skew_s = skew(args.clocks.read_text(), node_name())
    if skew_s is None:
        print(f"{node_name()}: its clock could not be read beforehand and is not checked", flush=True)
    found = faults(
        args.reports, args.gpus, args.min_memory_gib, args.min_free_disk_gib, skew_s or 0.0, args.max_clock_skew_s
    )
    write_atomic(args.reports / node_name(), "; ".join(found) or "ok")  # what cannot be written is no report: unfit too
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
