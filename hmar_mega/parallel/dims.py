"""The grid of ranks: the only place that knows which process does what.

"axis" here means an axis of that grid (tensor, pipeline, data); "dim" everywhere else means a dimension of a tensor.
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
    """Sizes of the axes and this process's place on them.

    Tensor ranks are neighbours and pipeline ranks lie furthest apart, as mcore lays them:
    rank = (pp_rank·data_parallel + dp_rank)·tensor_parallel + tp_rank.
    """

    tensor_parallel: int
    data_parallel: int
    rank: int
    local_rank: int
    pipeline_parallel: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor_parallel * self.data_parallel * self.pipeline_parallel

    @property
    def tp_rank(self) -> int:
        """Place on the tensor axis."""
        return self.rank % self.tensor_parallel

    @property
    def dp_rank(self) -> int:
        """Place on the data axis."""
        return self.rank // self.tensor_parallel % self.data_parallel

    @property
    def pp_rank(self) -> int:
        """Place on the pipeline axis."""
        return self.rank // (self.tensor_parallel * self.data_parallel)

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes losses."""
        return self.pp_rank == self.pipeline_parallel - 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and shared files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def grid(config: Config, world: int, rank: int = 0, local_rank: int = 0) -> ParallelDims:
    """The place of `rank` among `world` processes.

    Raises:
        UserError: when the number of processes does not fit `parallel`.
    """
    tp, pp = config.parallel.tensor_parallel, config.parallel.pipeline_parallel
    if world % (tp * pp):
        heads = config.model.resolved_heads
        fits = [t for t in range(1, world // pp + 1) if world % (t * pp) == 0 and heads % t == 0]
        given = f"tensor_parallel={tp}" + (f" × pipeline_parallel={pp}" if pp > 1 else "")
        raise UserError(
            f"{given} does not divide the {world} processes; start a multiple of {tp * pp} processes "
            f"(torchrun --nproc-per-node {tp * pp} …), or set "
            + (f"parallel.tensor_parallel to one of {fits}" if fits else "parallel.pipeline_parallel=1")
        )
    return ParallelDims(tp, world // (tp * pp), rank, local_rank, pp)


@contextmanager
def parallel_world(config: Config) -> Iterator[ParallelDims]:
    """Join the processes started by torchrun (or be alone) and lay the tensor-, pipeline- and data-parallel groups.

    Raises:
        UserError: when the number of processes does not fit `parallel`.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # lets mcore overlap its all-reduces with matrix products
    world, rank, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    dims = grid(config, world, rank, local_rank)
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

    tp, pp, vpp = (getattr(config.parallel, f"{axis}_parallel") for axis in ("tensor", "pipeline", "virtual_pipeline"))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
    )
    if dims.is_main:
        stages = f"pipeline {pp}{f' ({vpp} runs of layers each)' if vpp > 1 else ''} × " if pp > 1 else ""
        log.info("%d process(es) over %s: tensor %d × %sdata %d", world, backend, tp, stages, dims.data_parallel)
    try:
        with cpu_for_cuda():
            yield dims
    except UserError as err:
        err.rank = rank  # perhaps this rank's alone: every rank must speak
        raise
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
