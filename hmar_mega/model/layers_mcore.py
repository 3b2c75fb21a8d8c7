"""Tensor-parallel layers: Megatron-core's column- and row-parallel linears and vocabulary-parallel embedding.

Every layer is filled from its whole weight on the CPU and keeps its part, so any tensor-parallel size starts from the
same model. Parameters carry mcore's attributes (`tensor_model_parallel`, `partition_dim`, `partition_stride`), by
which DeepSpeed counts gradient norms and checkpoints know which part of the global tensor a rank holds.
"""

from __future__ import annotations

import torch
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from hmar_mega.model.initialize import Fill


class _Column(tensor_parallel.ColumnParallelLinear):
    """mcore's column-parallel linear, returning the output alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _Row(tensor_parallel.RowParallelLinear):
    """mcore's row-parallel linear, returning the output alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class McoreLayers:
    """`Layers` over the current tensor-parallel group of mcore's `parallel_state`."""

    def __init__(self) -> None:
        self.tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=self.tensor_parallel,
            use_cpu_initialization=True,
            perform_initialization=True,  # also what marks parameters as tensor-parallel
            gradient_accumulation_fusion=False,
        )

    def column(
        self, in_features: int, out_features: int, fill: Fill, *, bias: bool, gather: bool = False, stride: int = 1
    ) -> nn.Module:
        """`ColumnParallelLinear`; with `stride` 3 each rank holds its heads' rows of q, of k and of v."""
        return _Column(
            in_features,
            out_features,
            config=self.config,
            init_method=fill,
            bias=bias,
            gather_output=gather,
            stride=stride,
        )

    def row(self, in_features: int, out_features: int, fill: Fill) -> nn.Module:
        """`RowParallelLinear` on an already split input."""
        return _Row(
            in_features,
            out_features,
            config=self.config,
            init_method=fill,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
        )

    def embedding(self, num_embeddings: int, width: int, fill: Fill) -> nn.Module:
        """`VocabParallelEmbedding`."""
        return tensor_parallel.VocabParallelEmbedding(num_embeddings, width, init_method=fill, config=self.config)

    def vector(self, size: int, value: float) -> nn.Parameter:
        """A constant-filled vector split over ranks."""
        parameter = nn.Parameter(torch.full((size // self.tensor_parallel,), float(value)))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Vocabulary-parallel cross-entropy: no rank ever holds all logits."""
        # mcore overwrites its input, which autograd still owns here
        return tensor_parallel.vocab_parallel_cross_entropy(logits.clone(), targets)

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """All-gather along the vocabulary."""
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)

    def vocabulary_start(self, size: int) -> int:
        """First global column of this rank."""
        return parallel_state.get_tensor_model_parallel_rank() * size
