"""Plain torch layers: what one process, inference and tests use in place of the tensor-parallel ones.

`Layers` is what the model asks for; `layers_mcore.McoreLayers` answers the same calls with sharded layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmar_mega.model.initialize import Fill

#: Reduces a tensor in place over ranks.
Reduce = Callable[[Tensor], object]


class LinearLayer(Protocol):
    """A linear of a block, always called as a module: ZeRO-3 gathers its weight around the call."""

    def __call__(self, x: Tensor, bias: Tensor | None = None, *, apart: bool = False) -> Any:
        """x·Wᵀ plus the layer's bias, or the given one (of this rank's output features) where it has none.

        With `apart`: x·Wᵀ, and the bias that whoever comes next is to add in passing, or None where none is left.
        """


class Layers(Protocol):
    """The layers a model is made of. Outputs are plain tensors; biases start at 0."""

    tensor_parallel: int
    sequence_parts: int  #: that the sequence is cut into: `tensor_parallel` under sequence parallelism, else 1
    fp8: Any  #: `fp8_scaling.Fp8Scaling` of layers that compute in FP8, else None

    def column(
        self, in_features: int, out_features: int, fill: Fill, *, bias: bool, gather: bool = False, stride: int = 1,
        fp8: bool = False,
    ) -> nn.Module:  # fmt: skip
        """Linear whose output is split over ranks, or gathered again; `stride` stacked matrices are split alike.

        With `fp8` it may be computed in FP8, by layers that can; so may every `row`.
        """

    def row(self, in_features: int, out_features: int, fill: Fill) -> nn.Module:
        """Linear with bias whose split input features are summed over ranks."""

    def embedding(self, num_embeddings: int, width: int, fill: Fill) -> nn.Module:
        """Lookup table whose rows are split over ranks; `num_embeddings` divides by `tensor_parallel`."""

    def vector(self, size: int, value: float) -> nn.Parameter:
        """A constant-filled vector split over ranks (per-head scales, q and v biases)."""

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """−log p(target): logits (…, V/tp) float32, targets (…) int64 → (…) float32."""

    def top_one_error(self, logits: Tensor, targets: Tensor) -> Tensor:
        """How often the most likely token is not the target; see `top_one_error`, here over all ranks' columns."""

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """(…, V/tp) → (…, V) on every rank."""

    def vocabulary_start(self, size: int) -> int:
        """First global column of this rank's `size` columns."""

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """This rank's part of (N, …) along the sequence, padded so that it divides; x itself without SP."""

    def padded_length(self, length: int, batch: int) -> int:
        """Rows of all ranks' parts together of a sequence of `length` for `batch` samples."""

    def pad_sequence(self, x: Tensor) -> Tensor:
        """(N, …) padded with zeros as `scatter_sequence` pads; x itself without SP."""

    def for_sequence_part(self, x: Tensor) -> Tensor:
        """x, which every rank holds, for use on its own part of the sequence: gradients are summed over the parts."""

    def low_precision(self, training: bool) -> AbstractContextManager[None]:
        """Around the blocks: where layers that compute in FP8 do so."""

    def recompute(self, function: Callable[..., Any], *given: Any) -> Any:
        """`function(*given)`, computed again in the backward pass instead of kept."""


class TorchLayers:
    """`Layers` in one process with torch alone."""

    tensor_parallel = 1
    sequence_parts = 1
    fp8 = None

    def column(
        self, in_features: int, out_features: int, fill: Fill, *, bias: bool, gather: bool = False, stride: int = 1,
        fp8: bool = False,
    ) -> nn.Module:  # fmt: skip
        """A plain linear; `gather` and `stride` only mean something across ranks, `fp8` where there is FP8."""
        return _linear(in_features, out_features, fill, bias)

    def row(self, in_features: int, out_features: int, fill: Fill) -> nn.Module:
        """A plain linear with bias."""
        return _linear(in_features, out_features, fill, bias=True)

    def embedding(self, num_embeddings: int, width: int, fill: Fill) -> nn.Module:
        """A plain lookup table."""
        table = nn.utils.skip_init(nn.Embedding, num_embeddings, width, device=torch.get_default_device())
        fill(table.weight.data)
        return table

    def vector(self, size: int, value: float) -> nn.Parameter:
        """A constant-filled vector."""
        return nn.Parameter(torch.full((size,), float(value)))

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """−log p(target) at every position."""
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)

    def top_one_error(self, logits: Tensor, targets: Tensor) -> Tensor:
        """How often the most likely token is not the target."""
        return top_one_error(logits, targets)

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """Nothing to gather."""
        return logits

    def vocabulary_start(self, size: int) -> int:
        """All columns are here."""
        return 0

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """The whole sequence is here."""
        return x

    def padded_length(self, length: int, batch: int) -> int:
        """Nothing divides the sequence."""
        return length

    def pad_sequence(self, x: Tensor) -> Tensor:
        """Nothing divides the sequence."""
        return x

    def for_sequence_part(self, x: Tensor) -> Tensor:
        """Gradients are whole."""
        return x

    def low_precision(self, training: bool) -> AbstractContextManager[None]:
        """There is none."""
        return nullcontext()

    def recompute(self, function: Callable[..., Any], *given: Any) -> Any:
        """torch's non-reentrant checkpointing."""
        return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)


class _Linear(nn.Linear):
    """A plain `LinearLayer`."""

    def forward(self, x: Tensor, bias: Tensor | None = None, *, apart: bool = False) -> Any:
        if apart:
            return F.linear(x, self.weight), self.bias
        return F.linear(x, self.weight, self.bias if bias is None else bias)


def _linear(in_features: int, out_features: int, fill: Fill, bias: bool) -> nn.Linear:
    linear = nn.utils.skip_init(_Linear, in_features, out_features, bias=bias, device=torch.get_default_device())
    fill(linear.weight.data)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def top_one_error(
    logits: Tensor, targets: Tensor, start: int = 0, sum_over: Reduce | None = None, max_over: Reduce | None = None
) -> Tensor:
    """Chance that a token drawn among the most likely ones is not the target: 0 or 1 where no two are equally likely.

    In 16-bit formats many logits are equal, and taking the first of them would favour small token ids.

    Args:
        logits: (…, columns), a rank's part of the vocabulary, which begins at column `start`.
        targets: (…) int64.
        sum_over, max_over: in-place reductions over the ranks that hold the other columns; None: this one holds all.

    Returns:
        (…) float32; 1 where a logit is NaN.
    """
    best = logits.amax(-1)
    if max_over is not None:
        max_over(best)
    here = (targets >= start) & (targets < start + logits.shape[-1])
    own = logits.gather(-1, torch.where(here, targets - start, 0)[..., None])[..., 0]
    counts = torch.stack([((own == best) & here).float(), (logits == best[..., None]).sum(-1).float()])
    if sum_over is not None:
        sum_over(counts)
    return 1 - counts[0] / counts[1].clamp_min(1)
