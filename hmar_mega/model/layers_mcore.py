"""Tensor-parallel layers: Megatron-core's column- and row-parallel linears and vocabulary-parallel embedding.

Every layer is filled from its whole weight on the CPU and keeps its part, so any tensor-parallel size starts from the
same model. Parameters carry mcore's attributes (`tensor_model_parallel`, `partition_dim`, `partition_stride`), by
which DeepSpeed counts gradient norms and checkpoints know which part of the global tensor a rank holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmar_mega.model.initialize import Fill
from hmar_mega.model.layers_torch import top_one_error


class _Column(tensor_parallel.ColumnParallelLinear):
    """mcore's column-parallel linear as a `LinearLayer`; alone in its group, one product with the bias in it."""

    def forward(self, x: Tensor, bias: Tensor | None = None, *, apart: bool = False) -> Any:
        own = self.bias if bias is None else bias
        if self.tp_group.size() == 1:
            return (F.linear(x, self.weight), kept(own)) if apart else F.linear(x, self.weight, own)
        if self.gather_output:  # the bias is gathered with the product
            return super().forward(x)[0]
        out = super().forward(x)[0]
        if apart:
            return out, kept(own)
        return out if own is None else out + own


class _Row(tensor_parallel.RowParallelLinear):
    """mcore's row-parallel linear as a `LinearLayer`.

    The bias is added outside: under sequence parallelism each rank adds it to its part of the sequence, and its
    gradient must be summed over the parts inside autograd, where DeepSpeed sees it complete.
    """

    def forward(self, x: Tensor, bias: Tensor | None = None, *, apart: bool = False) -> Any:
        if self.tp_group.size() == 1 and not apart:
            return F.linear(x, self.weight, self.bias)
        if self.tp_group.size() == 1:
            return F.linear(x, self.weight), kept(self.bias)
        output, own = super().forward(x)
        own = sum_gradients(own) if self.sequence_parallel else kept(own)
        return (output, own) if apart else output + own


def kept(parameter: Tensor | None) -> Tensor | None:
    """A view that outlives the layer's call: ZeRO-3 takes the parameter itself away after it."""
    return None if parameter is None else parameter.view_as(parameter)


class _SumGradients(torch.autograd.Function):
    """Identity forward, all-reduce over tensor-parallel ranks backward.

    mcore 0.16.1 has the same, but silently leaves the all-reduce out when the gradient is not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=parallel_state.get_tensor_model_parallel_group())
        return summed


def sum_gradients(x: Tensor) -> Tensor:
    """x, whose gradient is summed over tensor-parallel ranks."""
    summed: Tensor = _SumGradients.apply(x)
    return summed


class McoreLayers:
    """`Layers` over the current tensor-parallel group of mcore's `parallel_state`.

    Args:
        sequence_parallel: keep norms, residuals and dropped paths split along the sequence over the group. AdaLN
            linears, which have no sequence, stay outside it.
    """

    fp8: Any = None

    def __init__(self, sequence_parallel: bool = False) -> None:
        self.tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
        self.sequence_parallel = sequence_parallel and self.tensor_parallel > 1
        self.sequence_parts = self.tensor_parallel if self.sequence_parallel else 1
        self._without_sequence = ModelParallelConfig(
            tensor_model_parallel_size=self.tensor_parallel,
            use_cpu_initialization=True,
            perform_initialization=True,  # also what marks parameters as tensor-parallel
            gradient_accumulation_fusion=False,
        )
        self.config = dataclasses.replace(self._without_sequence, sequence_parallel=self.sequence_parallel)

    def column(
        self, in_features: int, out_features: int, fill: Fill, *, bias: bool, gather: bool = False, stride: int = 1,
        fp8: bool = False,
    ) -> nn.Module:  # fmt: skip
        """`ColumnParallelLinear`; with `stride` 3 each rank holds its heads' rows of q, of k and of v."""
        return _Column(
            in_features,
            out_features,
            config=self._without_sequence if gather else self.config,
            init_method=fill,
            bias=bias,
            gather_output=gather,
            skip_bias_add=not gather,
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
            skip_bias_add=True,
        )

    def embedding(self, num_embeddings: int, width: int, fill: Fill) -> nn.Module:
        """`VocabParallelEmbedding`."""
        return tensor_parallel.VocabParallelEmbedding(
            num_embeddings, width, init_method=fill, config=self._without_sequence
        )

    def vector(self, size: int, value: float) -> nn.Parameter:
        """A constant-filled vector split over ranks."""
        parameter = nn.Parameter(torch.full((size // self.tensor_parallel,), float(value)))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Vocabulary-parallel cross-entropy: no rank ever holds all logits."""
        # mcore overwrites its input, which autograd still owns here
        return tensor_parallel.vocab_parallel_cross_entropy(logits.clone(), targets)

    def top_one_error(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Vocabulary-parallel: two small reductions instead of gathered logits."""
        group = parallel_state.get_tensor_model_parallel_group()
        return top_one_error(
            logits, targets, self.vocabulary_start(logits.shape[-1]),
            sum_over=lambda x: dist.all_reduce(x, group=group),
            max_over=lambda x: dist.all_reduce(x, dist.ReduceOp.MAX, group=group),
        )  # fmt: skip

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """All-gather along the vocabulary."""
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)

    def vocabulary_start(self, size: int) -> int:
        """First global column of this rank."""
        return parallel_state.get_tensor_model_parallel_rank() * size

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """This rank's part of the padded sequence."""
        if not self.sequence_parallel:
            return x
        return tensor_parallel.scatter_to_sequence_parallel_region(self.pad_sequence(x))

    def padded_length(self, length: int, batch: int) -> int:
        """The next multiple of the group's size under sequence parallelism."""
        return -(-length // self.sequence_parts) * self.sequence_parts

    def pad_sequence(self, x: Tensor) -> Tensor:
        """Zeros behind the sequence up to a multiple of the group's size."""
        missing = -x.shape[0] % self.tensor_parallel if self.sequence_parallel else 0
        return F.pad(x, [0, 0] * (x.ndim - 1) + [0, missing]) if missing else x

    def for_sequence_part(self, x: Tensor) -> Tensor:
        """x, with gradients summed over the ranks' parts of the sequence."""
        return sum_gradients(x) if self.sequence_parallel else x

    def low_precision(self, training: bool) -> AbstractContextManager[None]:
        """There is none; `TELayers` has it."""
        return nullcontext()

    def recompute(self, function: Callable[..., Any], *given: Any) -> Any:
        """torch's non-reentrant checkpointing; mcore's own needs CUDA."""
        return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)
