"""The one shim that lets Megatron-core run without CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def cpu_for_cuda() -> Iterator[None]:
    """Where there is no CUDA, answer mcore's questions about it with the CPU; elsewhere do nothing.

    mcore allocates gathered tensors on `torch.cuda.current_device()` and calls `torch.cuda.synchronize()`.
    """
    if torch.cuda.is_available():
        yield
        return
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")),
        mock.patch.object(torch.cuda, "synchronize", return_value=None),
    ):
        yield
