"""What DeepSpeed asks of a model-parallel unit, answered from mcore's `parallel_state`.

DeepSpeed wants `get_{model,data,tensor_model,pipeline_model}_parallel_{rank,world_size,group}`; mcore has no
`get_model_parallel_rank` or `_world_size`.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state


class MpuAdapter:
    """The model-parallel unit passed to `deepspeed.initialize(mpu=…)`."""

    def get_model_parallel_rank(self) -> int:
        """pp_rank · tp + tp_rank."""
        tp = parallel_state.get_tensor_model_parallel_world_size()
        pipeline_rank: int = parallel_state.get_pipeline_model_parallel_rank()
        return pipeline_rank * tp + int(parallel_state.get_tensor_model_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        """Ranks that share one copy of the model."""
        tp = int(parallel_state.get_tensor_model_parallel_world_size())
        return tp * int(parallel_state.get_pipeline_model_parallel_world_size())

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)
