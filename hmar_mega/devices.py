"""Which device a command computes on."""

from __future__ import annotations

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
