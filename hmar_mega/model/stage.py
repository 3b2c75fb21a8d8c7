"""How a model's layers are cut into runs for a pipeline: pure arithmetic.

A pipeline of `pipeline_parallel` ranks with `virtual_pipeline_parallel` runs each has S = pp·vpp runs of consecutive
layers; run s lies on pipeline rank s mod pp as its chunk s div pp. One run is the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

#: Parameters that stand in where a stage trains none with, or none without weight decay: numbers that stay 0.
BALLAST = {"ballast_matrix": (1, 1), "ballast_vector": (1,)}


@dataclass(frozen=True)
class Stage:
    """One run of layers.

    Attributes:
        layers: global numbers of its layers.
        first: it holds the embeddings.
        last: it holds the heads.
    """

    layers: range
    first: bool = True
    last: bool = True


def split_layers(depth: int, runs: int) -> list[Stage]:
    """Cut `depth` layers into `runs` runs whose sizes differ by at most one, the larger ones first.

    The last run, which also has the head, is never larger than the others.

    Raises:
        ValueError: when there are fewer layers than runs.
    """
    if not 1 <= runs <= depth:
        raise ValueError(f"{depth} layers cannot be cut into {runs} runs; use 1 to {depth}")
    size, larger = divmod(depth, runs)
    starts = [s * size + min(s, larger) for s in range(runs + 1)]
    return [
        Stage(range(start, stop), first=s == 0, last=s == runs - 1) for s, (start, stop) in enumerate(pairwise(starts))
    ]
