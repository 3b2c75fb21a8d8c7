"""Whether processes can talk to each other, and how fast: a reduction in each node, then one over all of them.

Job scripts start it as they start the training, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set:

python -m hmar_mega.launchers.collective REPORTS --min-gb-per-s 50

writes REPORTS/NODE.collective: `ok` and the rates, or what is wrong. NCCL where there is a GPU, else gloo.

Only a node with a fault of its own is blamed: one whose processes do not all come, or cannot reduce among themselves.
The others then try nothing more and are `ok`. A reduction over all nodes that fails nevertheless tells of none of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from hmar_mega.files import write_atomic
from hmar_mega.launchers.health import node_name

#: Long enough for the slowest process to import torch from a cold file system.
TIMEOUT = timedelta(seconds=120)

#: For a reduction, and for word of how it went.
ROUND = timedelta(seconds=50)

#: For all to read what rank 0 said last.
GOODBYE = timedelta(seconds=20)

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


class Unfit(Exception):
    """A node is at fault: this one, or (`blameless`) another."""

    def __init__(self, words: str, blameless: bool = False) -> None:
        super().__init__(words)
        self.blameless = blameless


def agree(store: Store, what: str, word: str, rank: int, size: int, seconds: timedelta) -> list[str]:
    """Each process's word on something, by rank, as rank 0 got them in time; empty for a process that said nothing.

    Raises:
        Unfit: blameless, when rank 0 does not say.
    """
    if rank == 0:
        store.set(f"{what}/{rank}", word)
        until = time.monotonic() + seconds.total_seconds()
        keys = [f"{what}/{other}" for other in range(size)]
        while time.monotonic() < until and not store.check(keys):
            time.sleep(0.05)
        said = [store.get(key).decode() if store.check([key]) else "" for key in keys]
        store.set(what, json.dumps(said))
        return said
    try:
        store.set(f"{what}/{rank}", word)
        store.wait([what], seconds + ROUND)  # rank 0 may have begun to wait later
        answer: list[str] = json.loads(store.get(what))
    except RuntimeError:
        raise Unfit("the first process fell silent", blameless=True) from None  # it leaves no report, which tells
    return answer


def leave(store: Store, rank: int, names: Sequence[str]) -> None:
    """Keep rank 0, whose process holds the store, until all that came have read what they need."""
    keys = [f"left/{other}" for other, name in enumerate(names) if name and other]
    with contextlib.suppress(RuntimeError):  # some process died, which has been noticed
        if rank:
            store.set(f"left/{rank}", "")
        elif keys:
            store.wait(keys, GOODBYE)


def members(names: Sequence[str], node: str, per_node: int) -> list[int]:
    """The ranks of this node, when all processes of all nodes have come.

    Args:
        names: node of each rank, empty for one that did not come.
        per_node: processes that a node has.

    Raises:
        Unfit: naming the ranks that did not come; blameless where this node's are all there.
    """
    own = [rank for rank, name in enumerate(names) if name == node]
    if all(names):
        return own
    absent = ", ".join(str(rank) for rank, name in enumerate(names) if not name)
    words = f"{len(own)} of {per_node} processes of this node came together; of all, ranks {absent} did not come"
    raise Unfit(words, blameless=len(own) >= per_node)


def smoke(first: Path) -> dict[str, float]:
    """Join the processes that the environment describes and reduce; GB/s in this `node`, and over `all` of them.

    Args:
        first: file by which rank 0 tells on the shared disk that it is there.

    Raises:
        RuntimeError: when they compute wrongly, or all cannot reduce together.
        Unfit: when a node is at fault.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, size, is_master=rank == 0, timeout=TIMEOUT, wait_for_workers=False)
    except RuntimeError as err:
        words = f"{address}:{port}, the first process: {str(err).splitlines()[0]}"
        raise Unfit(words, blameless=rank > 0 and not first.exists()) from None
    if rank == 0:
        first.touch()
    names = agree(store, "node", node_name(), rank, size, TIMEOUT)
    try:
        return _rounds(store, names, rank, device)
    finally:
        leave(store, rank, names)


def _rounds(store: Store, names: Sequence[str], rank: int, device: torch.device) -> dict[str, float]:
    """The reductions, of the processes with these nodes, as `smoke` says."""
    size = len(names)
    own = members(names, node_name(), size // int(os.environ.get("SLURM_NNODES", "1")))
    rates, word = {}, "ok"
    if len(own) > 1:
        try:
            rates["node"] = _reduce(PrefixStore(node_name(), store), own.index(rank), len(own), device)
        except RuntimeError as err:
            word = str(err).splitlines()[0]
    words = agree(store, "in node", word, rank, size, ROUND)
    if any(said != "ok" for said in words):
        if any(words[other] != "ok" for other in own):
            raise Unfit("; ".join(f"rank {other}: {words[other] or 'no answer'}" for other in own))
        raise Unfit("another node's processes cannot talk", blameless=True)
    if len(own) < size:
        rates["all"] = _reduce(PrefixStore("all", store), rank, size, device)
    return rates


def _reduce(store: Store, rank: int, size: int, device: torch.device) -> float:
    """GB/s of an all-reduce over a group of its own."""
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=ROUND,
        device_id=device if cuda else None,
    )  # fmt: skip
    try:
        return bandwidth(None, device) / 1e9
    finally:
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of this node, from its first process; 0 when all went well."""
    parser = argparse.ArgumentParser(description="Whether the processes of a job can talk to each other.")
    parser.add_argument("reports", type=Path, help="folder of the reports, which all nodes share")
    parser.add_argument("--min-gb-per-s", type=float, default=0, help="in a node; below, the node is bad")
    args = parser.parse_args(argv)
    try:
        rates = smoke(args.reports / "first-process")
    except Unfit as err:
        verdict = f"ok nothing more was tried: {err}" if err.blameless else f"processes cannot talk: {err}"
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
