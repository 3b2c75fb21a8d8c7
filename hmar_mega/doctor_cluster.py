"""What the doctor looks at for larger runs: SLURM, the speed of the disk, processes that talk, the wrong `apex`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from hmar_mega.doctor_item import Item

#: Below so many bytes a second, checkpoints and shards hold training up.
SLOW_STORAGE = 100e6

#: What is written and read back.
STORAGE_BYTES = 64 << 20

#: Seconds that the processes of the reduction may take, most of it to import torch.
COLLECTIVE_SECONDS = 180


def inspect_cluster() -> list[Item]:
    """All of them; the reduction starts a process a GPU, or two without one, and takes some seconds."""
    return [*inspect_apex(), inspect_slurm(), inspect_storage(Path.cwd()), inspect_collective()]


def inspect_apex() -> list[Item]:
    """`apex` where it is importable: NVIDIA's, or an unrelated package of that name."""
    if importlib.util.find_spec("apex") is None:
        return []
    try:
        theirs = importlib.util.find_spec("apex.optimizers") is not None
    except ImportError:
        theirs = False
    if theirs:
        return [Item("apex", "NVIDIA's")]
    advice = (
        "an unrelated package: `pip install apex` does not give NVIDIA's, which is built from its sources. Remove it: "
        "pip uninstall apex. Nothing here needs either: optim.impl=auto takes another fused AdamW"
    )
    return [Item("apex", "not NVIDIA's", "warning", advice)]


def inspect_slurm() -> Item:
    """SLURM's version, partitions, and whether srun starts containers (pyxis)."""
    if shutil.which("sbatch") is None:
        return Item("SLURM", "-", "missing", "no sbatch: hmar-mega launch works with --local here, not with --cluster")
    version = _output("sinfo", "--version") or "unknown version"
    partitions = _output("sinfo", "-h", "-o", "%R").split()
    if not partitions:
        advice = "sinfo names no partition: the controller does not answer; see SLURM_CONF or ask who runs the cluster"
        return Item("SLURM", version, "warning", advice)
    pyxis = "with pyxis" if "--container-image" in _output("srun", "--help") else "without pyxis"
    return Item("SLURM", f"{version.removeprefix('slurm ')} {pyxis}: {', '.join(dict.fromkeys(partitions))}")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def inspect_storage(folder: Path) -> Item:
    """How fast a file in `folder` is written, until it is on disk, and read back, not from memory where that can be."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(STORAGE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            while file.read(len(block)):
                pass
            read = time.perf_counter()
    except OSError as err:
        return Item("storage here", "-", "warning", f"{folder} cannot be written: {err.strerror}; start runs elsewhere")
    write, back = STORAGE_BYTES / (written - started), STORAGE_BYTES / (read - written)
    value = f"writes {write / 1e6:.0f} MB/s, reads {back / 1e6:.0f} MB/s"
    if min(write, back) < SLOW_STORAGE:
        advice = f"below {SLOW_STORAGE / 1e6:.0f} MB/s, saving and reading shards hold training up; use a faster disk"
        return Item("storage here", value, "warning", advice)
    return Item("storage here", value)


def inspect_collective() -> Item:
    """A reduction over processes of this machine, as training would start them: NCCL, or gloo without a GPU."""
    gpus = torch.cuda.device_count()
    count, backend = gpus or 2, "NCCL" if gpus else "gloo"
    name = f"{backend}, {count} process{'es' if count > 1 else ''}"
    with socket.socket() as probe, tempfile.TemporaryDirectory() as reports:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        probe.close()
        shared = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        shared |= {"SLURMD_NODENAME": "here", "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "hmar_mega.launchers.collective", reports],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for rank in range(count)
        ]  # fmt: skip
        until = time.monotonic() + COLLECTIVE_SECONDS
        try:
            for process in processes:
                process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            advice = f"no answer within {COLLECTIVE_SECONDS} s: several processes cannot train together here"
            return Item(name, "-", "warning", advice)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        report = Path(reports) / "here.collective"
        verdict = report.read_text() if report.exists() else "the processes died"
    if not verdict.startswith("ok"):
        return Item(name, "-", "warning", f"{verdict}; several processes cannot train together here")
    return Item(name, verdict.removeprefix("ok").strip() or "one GPU: nothing to reduce over")
