"""Initial weights: every parameter from its own seed, so that any tensor- or pipeline-parallel layout starts equal.

The rules are those of SPEC §3 (VAR's `init_weights`): std = sqrt(1/(3C)) for every linear and embedding, biases 0,
then named factors. `trunc_normal_` there cuts at ±2 absolute, which at these widths is a plain normal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Fills a whole (unsharded) weight in place; tensor-parallel layers call it and keep their part.
Fill = Callable[[Tensor], None]


@dataclass(frozen=True)
class Initializer:
    """Makes `Fill` functions keyed by (seed, global parameter name).

    Args:
        seed: run seed.
        std: standard deviation of every linear and embedding, sqrt(1/(3C)).
    """

    seed: int
    std: float

    def normal(self, name: str, factor: float | Sequence[float] = 1.0, rows: int | None = None) -> Fill:
        """Normal numbers of `std`, multiplied by `factor`.

        Args:
            name: global name of the parameter.
            factor: one number, or one for each of equally many rows in order (AdaLN's six chunks).
            rows: how many leading rows are real; the rest, padding for tensor parallelism, become 0.
        """

        def fill(weight: Tensor) -> None:
            if weight.is_meta:
                return
            with torch.no_grad():
                real = weight[:rows]
                real.normal_(0.0, self.std, generator=self.generator(name))
                if isinstance(factor, float | int):
                    real.mul_(factor)
                else:
                    for chunk, f in zip(real.chunk(len(factor)), factor, strict=True):
                        chunk.mul_(f)
                if rows is not None:
                    weight[rows:].zero_()

        return fill

    def generator(self, name: str) -> torch.Generator:
        """The random generator of the parameter `name`."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
