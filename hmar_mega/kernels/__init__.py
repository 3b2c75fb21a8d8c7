"""GPU kernels. Only this file can be imported without Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

#: Head dims that the attention kernels take.
HEAD_DIMS = (32, 64, 96, 128)


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton is installed and runs kernels there: on a GPU, or anywhere in its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
