"""Which part of a global tensor a process holds: the arithmetic behind checkpoints that know no topology.

A `Box` is a rectangular block of a global tensor. A tensor-parallel parameter is one box, or several stacked along
dim 0 where stacked matrices are split alike (q, k and v of the packed projection). Padding rows belong to no box.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A block of a global tensor: `offset` of its first element and its `shape`, one number a dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the block."""
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The common block, or None."""
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        stop = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        if any(e <= s for s, e in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(e - s for s, e in zip(start, stop, strict=True)))

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """Index of this block inside a tensor that holds `outer`."""
        return tuple(slice(o - b, o - b + n) for o, b, n in zip(self.offset, outer.offset, self.shape, strict=True))

    def rows(self, first: int, last: int) -> tuple[Box, int]:
        """The smallest run of whole rows that holds the elements `first` … `last` − 1, and the element it begins with.

        A row is what follows the first dimension that is longer than 1.
        """
        dim = next((d for d, n in enumerate(self.shape) if n > 1), None)
        if dim is None:
            return self, 0
        row = math.prod(self.shape[dim + 1 :])
        top, bottom = first // row, -(-last // row)
        offset = tuple(o + top if d == dim else o for d, o in enumerate(self.offset))
        shape = tuple(bottom - top if d == dim else n for d, n in enumerate(self.shape))
        return Box(offset, shape), top * row

    def span_of(self, inner: Box) -> tuple[int, int]:
        """First element, and one past the last, of the rows of this block that hold the block `inner` of it."""
        dim = next((d for d, n in enumerate(self.shape) if n > 1), None)
        if dim is None:
            return 0, self.numel
        row, top = math.prod(self.shape[dim + 1 :]), inner.offset[dim] - self.offset[dim]
        return top * row, (top + inner.shape[dim]) * row

    def stripes(self, first: int, last: int, elements: int) -> Iterator[tuple[Box, int]]:
        """Cut the rows that hold `first` … `last` − 1 into runs of about `elements`; each with its first element."""
        dim = next((d for d, n in enumerate(self.shape) if n > 1), None)
        row = math.prod(self.shape[dim + 1 :]) if dim is not None else self.numel
        step = max(1, elements // row) * row
        for start in range(first, last, step):
            yield self.rows(start, min(last, start + step))


def whole(shape: tuple[int, ...]) -> Box:
    """The box of an unsharded tensor."""
    return Box((0,) * len(shape), tuple(shape))


@dataclass(frozen=True)
class Placement:
    """Where a local parameter lies in its global tensor.

    Attributes:
        global_shape: without padding.
        boxes: in the order of the local parameter's flattened elements; what follows them is padding.
        replicated: every tensor-parallel rank holds the same.
    """

    global_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    replicated: bool


def placement(parameter: Tensor, tp_rank: int, tp_size: int) -> Placement:
    """Read a parameter's place off mcore's attributes and our `unpadded_rows`."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # what ZeRO-3 has cut looks empty
    if not getattr(parameter, "tensor_model_parallel", False):
        rows = getattr(parameter, "unpadded_rows", shape[0] if shape else 0)
        real = (rows, *shape[1:]) if shape else shape
        return Placement(real, (whole(real),), replicated=True)
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    full = shape[dim] * tp_size
    rows = getattr(parameter, "unpadded_rows", full)
    global_shape = (*shape[:dim], rows, *shape[dim + 1 :])
    piece = shape[dim] // stride
    boxes = []
    for s in range(stride):
        start = s * full // stride + tp_rank * piece
        length = min(piece, rows - start)
        if length > 0:
            offset = tuple(start if d == dim else 0 for d in range(len(shape)))
            boxes.append(Box(offset, tuple(length if d == dim else n for d, n in enumerate(shape))))
    return Placement(global_shape, tuple(boxes), replicated=False)


def fragments(place: Placement, start: int, stop: int) -> list[tuple[Box, int, int, int]]:
    """Cut a flat range of a local parameter along its boxes.

    Returns:
        (box, first element within the box, one past the last, where in the range the piece starts) for each piece.
    """
    pieces, position = [], 0
    for box in place.boxes:
        first, last = max(start, position), min(stop, position + box.numel)
        if first < last:
            pieces.append((box, first - position, last - position, first - start))
        position += box.numel
    return pieces


def paste(target: Tensor, target_box: Box, source: Tensor, source_box: Box) -> int:
    """Copy what two boxes have in common from `source` into `target`; returns the number of elements copied."""
    common = target_box.intersect(source_box)
    if common is None:
        return 0
    with torch.no_grad():
        target[common.slices_in(target_box)] = source[common.slices_in(source_box)].to(target.dtype)
    return common.numel
