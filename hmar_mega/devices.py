"""Which device a command computes on, and the memory it took."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from hmar_mega.errors import UserError


def pick_device(wanted: str | torch.device | None = None) -> torch.device:
    """The device named, else the first GPU, else the CPU.

    Raises:
        UserError: when there is no such device here.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"device {str(wanted)!r} does not exist; use cpu, cuda or cuda:0, cuda:1 …") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {str(wanted)!r} is not supported; use cpu, cuda or cuda:0, cuda:1 …")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        have = f"only {count} GPU(s)" if count else "no GPU"
        raise UserError(f"device {wanted} was asked for, but this machine has {have}; use cpu or leave it out")
    return device


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most so far: of a GPU what torch reserved, graphs included; else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        # getrusage would tell the peak of the process that started this one, where that was larger
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        found = None
    if found is not None:
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
