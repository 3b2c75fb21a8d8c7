"""Whether processes can talk to each other, and how fast: reductions in each node, then over all of them.

Job scripts start it as they start the training, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set:

python -m hmar_mega.launchers.collective REPORTS --min-gb-per-s 50

writes REPORTS/NODE.collective: `ok` and the rates, or what is wrong. NCCL where there is a GPU, else gloo.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hmar_mega.files import write_atomic
from hmar_mega.launchers.health import node_name

#: Long enough for the slowest process to import torch from a cold file system.
TIMEOUT = timedelta(seconds=120)

#: Bytes to reduce on a GPU, and on a CPU.
GPU_BYTES, CPU_BYTES = 256 << 20, 4 << 20


def bandwidth(group: dist.ProcessGroup | None, device: torch.device, repeats: int = 3) -> float:
    """Bytes per second of an all-reduce, as NCCL's tests count bus bandwidth: 2(n−1)/n of the tensor a round.

    Raises:
        RuntimeError: when the sum is wrong.
    """
    size = dist.get_world_size(group)
    tensor = torch.ones((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
    dist.all_reduce(tensor, group=group)
    if not bool((tensor == size).all()):
        raise RuntimeError(f"a sum of ones over {size} processes is {tensor.min():g} to {tensor.max():g}")
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor, group=group)
    _wait(device)
    seconds = (time.perf_counter() - started) / repeats
    return 2 * (size - 1) / size * tensor.numel() * 4 / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def smoke() -> dict[str, float]:
    """Join the processes that the environment describes and reduce; GB/s in this `node`, and over `all` of them.

    Raises:
        RuntimeError: when they do not come together or compute wrongly.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device if cuda else None)
    try:
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, node_name())
        rates = {}
        for name in dict.fromkeys(names):  # every process must make every group
            members = [rank for rank, other in enumerate(names) if other == name]
            group = dist.new_group(members, timeout=TIMEOUT)
            if name == node_name() and len(members) > 1:
                rates["node"] = bandwidth(group, device) / 1e9
        if len(names) > 1:
            rates["all"] = bandwidth(None, device) / 1e9
    finally:
        dist.destroy_process_group()
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of this node, from its first process; 0 when all went well."""
    parser = argparse.ArgumentParser(description="Whether the processes of a job can talk to each other.")
    parser.add_argument("reports", type=Path, help="folder of the reports, which all nodes share")
    parser.add_argument("--min-gb-per-s", type=float, default=0, help="in a node; below, the node is bad")
    args = parser.parse_args(argv)
    try:
        rates = smoke()
    except RuntimeError as err:
        verdict = f"processes cannot talk: {str(err).splitlines()[0]}"
    else:
        words = ", ".join(f"{rate:.2f} GB/s in {where}" for where, rate in rates.items())
        slow = rates.get("node", float("inf")) < args.min_gb_per_s
        verdict = f"slow: {words}; {args.min_gb_per_s:g} are needed" if slow else f"ok {words}"
    if os.environ["LOCAL_RANK"] == "0" or not verdict.startswith("ok"):
        write_atomic(args.reports / f"{node_name()}.collective", verdict)
    return 0 if verdict.startswith("ok") else 1


if __name__ == "__main__":
    raise SystemExit(main())
