"""The one shim that lets Megatron-core run without CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _CpuTensors(TorchFunctionMode):
    """Makes on the CPU what is asked for with device="cuda": mcore's pipeline schedules do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _CpuOptimizer(_CpuTensors):
    """Also has tensors call themselves CUDA ones, since mcore's optimizers refuse others by the name of their type, and
    leaves them where they are when they are to move to CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def cpu_tensors() -> AbstractContextManager[object]:
    """Around a pipeline schedule: where there is no CUDA, its device="cuda" means the CPU."""
    return nullcontext() if torch.cuda.is_available() else _CpuTensors()


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


@contextmanager
def mcore_on_cpu() -> Iterator[None]:
    """Where there is no CUDA, have all of mcore's training run on the CPU; elsewhere do nothing.

    Beside `cpu_for_cuda` and `cpu_tensors` this covers mcore's `DistributedDataParallel`, its optimizers (also the
    distributed one) and `dist_checkpointing`. Not for DeepSpeed, which asks tensors for their type and needs the true
    one.
    """
    with cpu_for_cuda(), nullcontext() if torch.cuda.is_available() else _CpuOptimizer():
        yield
