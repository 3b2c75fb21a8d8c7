"""How many images each optimizer step takes: constant, or ramped up at the start of a run. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class BatchPlan:
    """Global batch sizes by position in the stream of images.

    The first step takes `start` images. The ramp of `images` is cut into equally long parts, in each of which a step
    takes `increment` images more than in the part before, until it takes `full` (Megatron-LM's `rampup-batch-size`).
    A step's size depends on its first image's position alone, so a run can stop and go on anywhere.

    Attributes:
        full: images of a step after the ramp.
        start: of the first step; `full` without a ramp.
        increment: by which sizes grow; divides full − start.
        images: length of the ramp.
    """

    full: int
    start: int
    increment: int
    images: int

    @classmethod
    def constant(cls, size: int) -> BatchPlan:
        """Every step takes `size` images."""
        return cls(size, size, 1, 0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that a step can have, ascending."""
        return (*range(self.start, self.full, self.increment), self.full)

    @cached_property
    def _phases(self) -> list[tuple[int, int, int]]:
        """(first step, its position, size) of every part of the ramp, and of what follows it."""
        phases, step, position = [], 0, 0
        growing = self.sizes[:-1]
        for number, size in enumerate(growing, 1):
            end = -(-number * self.images // len(growing))
            phases.append((step, position, size))
            steps = max(0, -(-(end - position) // size))
            step, position = step + steps, position + steps * size
        return [*phases, (step, position, self.full)]

    def position(self, step: int) -> int:
        """Images seen before `step` (0-based)."""
        first, position, size = self._phases[bisect_right(self._phases, step, key=lambda p: p[0]) - 1]
        return position + (step - first) * size

    def size(self, step: int) -> int:
        """Images of `step` (0-based)."""
        return self.size_at(self.position(step))

    def size_at(self, position: int) -> int:
        """Images of the step whose first image is at `position`."""
        return self._phases[bisect_right(self._phases, position, key=lambda p: p[1]) - 1][2]

    def positions(self, start: int) -> Iterator[int]:
        """First positions of the steps from the one at `start` on, without end."""
        while True:
            yield start
            start += self.size_at(start)

    def steps_for(self, images: int) -> int:
        """Steps after which at least `images` images were seen."""
        first, position, size = self._phases[bisect_right(self._phases, images - 1, key=lambda p: p[1]) - 1]
        return first + -(-(images - position) // size)
