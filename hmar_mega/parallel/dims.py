"""The grid of ranks: the only place that knows which process does what.

"axis" here means an axis of that grid (tensor, data); "dim" everywhere else means a dimension of a tensor.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.parallel.cpu import cpu_for_cuda

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the axes and this process's place on them. Tensor ranks are neighbours: rank = dp_rank·tp + tp_rank."""

    tensor_parallel: int
    data_parallel: int
    rank: int
    local_rank: int

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor_parallel * self.data_parallel

    @property
    def tp_rank(self) -> int:
        """Place on the tensor axis."""
        return self.rank % self.tensor_parallel

    @property
    def dp_rank(self) -> int:
        """Place on the data axis."""
        return self.rank // self.tensor_parallel

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and shared files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def parallel_world(config: Config) -> Iterator[ParallelDims]:
    """Join the processes started by torchrun (or be alone) and lay the tensor- and data-parallel groups.

    Raises:
        UserError: when the number of processes does not fit `parallel.tensor_parallel`.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # lets mcore overlap its all-reduces with matrix products
    world, rank, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    tp = config.parallel.tensor_parallel
    if world % tp:
        fits = [t for t in range(1, world + 1) if world % t == 0 and config.model.resolved_heads % t == 0]
        raise UserError(
            f"tensor_parallel={tp} does not divide the {world} processes; start a multiple of {tp} processes "
            f"(torchrun --nproc-per-node {tp} …), or set parallel.tensor_parallel to one of {fits}"
        )
    dims = ParallelDims(tp, world // tp, rank, local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    device_id = dims.device if backend == "nccl" else None
    if world > 1:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even when alone
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT, device_id=device_id)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    if dims.is_main:
        log.info("%d process(es) over %s: tensor %d × data %d", world, backend, tp, dims.data_parallel)
    try:
        with cpu_for_cuda():
            yield dims
    except UserError as err:
        err.rank = rank  # perhaps this rank's alone: every rank must speak
        raise
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
