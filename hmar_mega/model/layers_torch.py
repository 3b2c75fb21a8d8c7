"""Plain torch layers: what one process, inference and tests use in place of the tensor-parallel ones.

`Layers` is what the model asks for; `layers_mcore.McoreLayers` answers the same calls with sharded layers.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmar_mega.model.initialize import Fill


class Layers(Protocol):
    """The layers a model is made of. Outputs are plain tensors; biases start at 0."""

    tensor_parallel: int
    sequence_parts: int  #: that the sequence is cut into: `tensor_parallel` under sequence parallelism, else 1

    def column(
        self, in_features: int, out_features: int, fill: Fill, *, bias: bool, gather: bool = False, stride: int = 1
    ) -> nn.Module:
        """Linear whose output is split over ranks, or gathered again; `stride` stacked matrices are split alike."""

    def row(self, in_features: int, out_features: int, fill: Fill) -> nn.Module:
        """Linear with bias whose split input features are summed over ranks."""

    def embedding(self, num_embeddings: int, width: int, fill: Fill) -> nn.Module:
        """Lookup table whose rows are split over ranks; `num_embeddings` divides by `tensor_parallel`."""

    def vector(self, size: int, value: float) -> nn.Parameter:
        """A constant-filled vector split over ranks (per-head scales, q and v biases)."""

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """−log p(target): logits (…, V/tp) float32, targets (…) int64 → (…) float32."""

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """(…, V/tp) → (…, V) on every rank."""

    def vocabulary_start(self, size: int) -> int:
        """First global column of this rank's `size` columns."""

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """This rank's part of (N, …) along the sequence, padded so that it divides; x itself without SP."""

    def pad_sequence(self, x: Tensor) -> Tensor:
        """(N, …) padded with zeros as `scatter_sequence` pads; x itself without SP."""

    def for_sequence_part(self, x: Tensor) -> Tensor:
        """x, which every rank holds, for use on its own part of the sequence: gradients are summed over the parts."""


class TorchLayers:
    """`Layers` in one process with torch alone."""

    tensor_parallel = 1
    sequence_parts = 1

    def column(
        self, in_features: int, out_features: int, fill: Fill, *, bias: bool, gather: bool = False, stride: int = 1
    ) -> nn.Module:
        """A plain linear; `gather` and `stride` only mean something across ranks."""
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

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """Nothing to gather."""
        return logits

    def vocabulary_start(self, size: int) -> int:
        """All columns are here."""
        return 0

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """The whole sequence is here."""
        return x

    def pad_sequence(self, x: Tensor) -> Tensor:
        """Nothing divides the sequence."""
        return x

    def for_sequence_part(self, x: Tensor) -> Tensor:
        """Gradients are whole."""
        return x


def _linear(in_features: int, out_features: int, fill: Fill, bias: bool) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, device=torch.get_default_device())
    fill(linear.weight.data)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
