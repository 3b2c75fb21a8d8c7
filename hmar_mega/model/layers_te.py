"""Transformer Engine's linears, tensor-parallel through Megatron-core, with their products in FP8.

QKV, projection and both feed-forward linears are mcore's TE classes; AdaLN's linears and the heads stay mcore's own in
bf16. Parameters have the names, values and attributes that `McoreLayers` gives them: checkpoints are interchangeable.

TE's fused LayerNorm-linear has no place here: its norm multiplies by one learned (C,) weight, while AdaLN's
LN(x)·(1 + s) + b has an s and a b for every sample, and the fused module lets nothing come between norm and product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch  # noqa: F401  # it loads transformer_engine_torch
import transformer_engine_torch as tex
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from transformer_engine.pytorch.distributed import checkpoint as te_checkpoint
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from hmar_mega.config_precision import FP8_MULTIPLE, PrecisionConfig
from hmar_mega.model.fp8_scaling import Fp8Scaling, quiet
from hmar_mega.model.initialize import Fill
from hmar_mega.model.layers_mcore import McoreLayers, kept, sum_gradients


class _Measured:
    """Notes the largest values of a TE linear's input, weight and output gradient while it computes in bf16."""

    measuring = False
    fp8_meta: dict[str, Any]
    weight: Tensor

    def measure(self, x: Tensor, out: Tensor) -> None:
        """What delayed scaling takes its first scales from; see `Fp8Scaling`."""
        if not (self.measuring and torch.is_grad_enabled()):
            return
        forward = self.fp8_meta["scaling_fwd"].amax_history[0]
        backward = self.fp8_meta["scaling_bwd"].amax_history[0]
        _raise_to(forward[int(tex.FP8FwdTensors.GEMM1_INPUT)], x)
        _raise_to(forward[int(tex.FP8FwdTensors.GEMM1_WEIGHT)], self.weight)
        if out.requires_grad:  # not in frozen layers before the first trained one
            out.register_hook(lambda gradient: _raise_to(backward[int(tex.FP8BwdTensors.GRAD_OUTPUT1)], gradient))


class _Column(_Measured, TEColumnParallelLinear):
    """mcore's column-parallel TE linear, returning the output alone."""

    def forward(self, x: Tensor, bias: Tensor | None = None, *, apart: bool = False) -> Any:
        out: Tensor = TEColumnParallelLinear.forward(self, x)[0]
        self.measure(x, out)
        if apart:
            return out, None  # TE's product has added it
        return out if bias is None else out + bias


class _Row(_Measured, TERowParallelLinear):
    """mcore's row-parallel TE linear, returning the output alone; the bias is added as `layers_mcore` adds it."""

    def forward(self, x: Tensor, bias: Tensor | None = None, *, apart: bool = False) -> Any:
        out, own = TERowParallelLinear.forward(self, x)
        self.measure(x, out)
        own = sum_gradients(own) if self.sequence_parallel else kept(own)
        return (out, own) if apart else out + own


@torch.no_grad()
def _raise_to(place: Tensor, x: Tensor) -> None:
    place.copy_(torch.maximum(place, torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)))


class TELayers(McoreLayers):
    """`Layers` whose four large linears of a block run in FP8 while training; elsewhere they run in bf16.

    Args:
        precision: recipe of the FP8 scales.
        sequence_parallel: as `McoreLayers`.

    Raises:
        AssertionError: from TE, without CUDA.
    """

    def __init__(self, precision: PrecisionConfig, sequence_parallel: bool = False) -> None:
        super().__init__(sequence_parallel)
        self.fp8: Fp8Scaling = Fp8Scaling(precision)
        self._te_config = TransformerConfig(
            num_layers=1,
            hidden_size=self.tensor_parallel,
            num_attention_heads=self.tensor_parallel,
            tensor_model_parallel_size=self.tensor_parallel,
            sequence_parallel=self.sequence_parallel,
            use_cpu_initialization=True,
            perform_initialization=True,
            gradient_accumulation_fusion=False,
        )

    def column(
        self, in_features: int, out_features: int, fill: Fill, *, bias: bool, gather: bool = False, stride: int = 1,
        fp8: bool = False,
    ) -> nn.Module:  # fmt: skip
        """As `McoreLayers.column`; with `fp8`, mcore's `TEColumnParallelLinear`."""
        if not fp8:
            return super().column(in_features, out_features, fill, bias=bias, gather=gather, stride=stride)
        linear = _Column(
            in_features, out_features, config=self._te_config, init_method=fill, gather_output=False, bias=bias,
            skip_bias_add=False, is_expert=False, stride=stride,
        )  # fmt: skip
        self.fp8.add(linear)
        return linear

    def row(self, in_features: int, out_features: int, fill: Fill) -> nn.Module:
        """mcore's `TERowParallelLinear` on an already split input."""
        linear = _Row(
            in_features, out_features, config=self._te_config, init_method=fill, bias=True, input_is_parallel=True,
            skip_bias_add=True, is_expert=False,
        )  # fmt: skip
        self.fp8.add(linear)
        return linear

    def padded_length(self, length: int, batch: int) -> int:
        """Rows of all ranks' parts together: each part times the batch is a multiple of 16, as FP8 products need."""
        unit = self.sequence_parts * (FP8_MULTIPLE // math.gcd(FP8_MULTIPLE, batch))
        return -(-length // unit) * unit

    def pad_sequence(self, x: Tensor) -> Tensor:
        """(N, B, …) with zeros behind the sequence, `padded_length` rows."""
        missing = self.padded_length(*x.shape[:2]) - x.shape[0]
        return F.pad(x, [0, 0] * (x.ndim - 1) + [0, missing]) if missing else x

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """This rank's part of the padded sequence."""
        return super().scatter_sequence(x) if self.sequence_parallel else self.pad_sequence(x)

    @contextmanager
    def low_precision(self, training: bool) -> Iterator[None]:
        """FP8 products, where `training` and gradients are wanted."""
        with self.fp8.region() if training and torch.is_grad_enabled() else nullcontext():
            yield

    def recompute(self, function: Callable[..., Any], *given: Any) -> Any:
        """Recompute `function` in the backward pass with the FP8 scales of the forward pass."""
        if not FP8GlobalStateManager.is_fp8_enabled():
            return super().recompute(function, *given)
        return te_checkpoint(function, *given, use_reentrant=False, context_fn=lambda: (nullcontext(), quiet()))
