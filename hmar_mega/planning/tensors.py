"""The parameters that each rank of a layout holds, by name and size, without building the model.

Axes: C width, F feed-forward width, H heads, V codebook, Z latents, N tokens, K scales; t tensor-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from hmar_mega.model.hmar import decays, pad_to_multiple
from hmar_mega.planning.workload import Workload


@dataclass(frozen=True)
class ParameterShape:
    """One parameter as a tensor-parallel rank holds it.

    Attributes:
        shape: local.
        decays: it is in the optimizer's group with weight decay.
        trained: it has gradients and optimizer states.
    """

    name: str
    shape: tuple[int, ...]
    decays: bool
    trained: bool

    @property
    def numel(self) -> int:
        """Elements on this rank."""
        return math.prod(self.shape)


def layer_runs(depth: int, runs: int) -> list[range]:
    """Layers of each run: sizes differ by at most one, larger runs first."""
    size, larger = divmod(depth, runs)
    starts = [s * size + min(s, larger) for s in range(runs + 1)]
    return [range(starts[s], starts[s + 1]) for s in range(runs)]


def rank_runs(pipeline_rank: int, pipeline: int, virtual: int) -> list[int]:
    """Runs on a pipeline rank: run s is on rank s mod pp, as its chunk s div pp."""
    return [chunk * pipeline + pipeline_rank for chunk in range(virtual)]


@cache
def rank_parameters(
    work: Workload, tensor: int = 1, pipeline: int = 1, virtual: int = 1, pipeline_rank: int = 0
) -> tuple[ParameterShape, ...]:
    """The parameters of one rank; tensor-parallel ranks of a stage hold equally shaped ones."""
    runs = layer_runs(work.depth, pipeline * virtual)
    mine = rank_runs(pipeline_rank, pipeline, virtual)
    found: list[tuple[str, tuple[int, ...]]] = []
    if 0 in mine:
        found += _embeddings(work, tensor)
    numbers = [number for run in mine for number in runs[run]]
    mask_layers = range(work.depth - work.mask_layers, work.depth)
    for number in numbers:
        found += _prefixed(f"blocks.{number}", _block(work, tensor))
    if len(runs) - 1 in mine:
        found += _prefixed("head", _head(work, tensor))
    if work.masked:
        for number in numbers:
            if number in mask_layers:
                found += _prefixed(f"mask_blocks.{number}", _block(work, tensor))
        if len(runs) - 1 in mine:
            found += _prefixed("mask_head", _head(work, tensor))
    return tuple(
        ParameterShape(
            name, shape, decays(name, torch.empty(shape, device="meta")), not work.masked or name.startswith("mask_")
        )
        for name, shape in found
    )


def parameter_count(work: Workload) -> int:
    """Parameters of the whole model, without padding."""
    return sum(p.numel for p in rank_parameters(work))


def _prefixed(prefix: str, named: Iterator[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{prefix}.{name}", shape) for name, shape in named]


def _embeddings(work: Workload, t: int) -> list[tuple[str, tuple[int, ...]]]:
    width = work.width
    found: list[tuple[str, tuple[int, ...]]] = [
        ("class_embed.weight", (pad_to_multiple(work.rows, t) // t, width)),
        ("word_embed.weight", (width, work.latents)),
        ("word_embed.bias", (width,)),
        ("pos_start", (1, 1, width)),
        ("pos_embed", (1, work.tokens, width)),
        ("level_embed", (work.scales, width)),
    ]
    if work.shared_aln:
        found += [("shared_ada_lin.weight", (6 * width // t, width)), ("shared_ada_lin.bias", (6 * width // t,))]
    if work.masked:
        found += [("mask_embed", (1, width))]
    return found


def _block(work: Workload, t: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, hidden, heads = work.width, work.hidden, work.heads
    yield "attn.log_scale", (heads // t,)
    yield "attn.q_bias", (width // t,)
    yield "attn.v_bias", (width // t,)
    yield "attn.qkv.weight", (3 * width // t, width)
    yield "attn.proj.weight", (width, width // t)
    yield "attn.proj.bias", (width,)
    yield "ffn.fc1.weight", (hidden // t, width)
    yield "ffn.fc1.bias", (hidden // t,)
    yield "ffn.fc2.weight", (width, hidden // t)
    yield "ffn.fc2.bias", (width,)
    if work.shared_aln:
        yield "ada_gss", (1, 1, 6, width)
    else:
        yield "ada_lin.weight", (6 * width // t, width)
        yield "ada_lin.bias", (6 * width // t,)


def _head(work: Workload, t: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, rows = work.width, pad_to_multiple(work.vocabulary, t) // t
    yield "ada_lin.weight", (2 * width // t, width)
    yield "ada_lin.bias", (2 * width // t,)
    yield "linear.weight", (rows, width)
    yield "linear.bias", (rows,)
