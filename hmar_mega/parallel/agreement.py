"""Ranks agree whether to stop, although a signal may reach only one of them, and each at another time."""

from __future__ import annotations

import torch
import torch.distributed as dist

from hmar_mega.interrupts import Interrupts, Stop, StopRequest
from hmar_mega.parallel.dims import TIMEOUT, ParallelDims


class Agreement:
    """The largest wish of all ranks, reduced on the CPU over a gloo group of its own.

    Every rank must call `begin` and `end`, or `check`, equally often and in the same order. Between `begin` and `end`
    the reduction runs beside the work, so that a step pays nothing for it.

    Args:
        interrupts: the signals of this process.
    """

    def __init__(self, interrupts: Interrupts, dims: ParallelDims) -> None:
        self.interrupts = interrupts
        self._device = dims.device
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dims.world_size > 1 else None
        self._wish = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def begin(self) -> None:
        """Send this rank's wish as it is now; what arrives later counts the next time."""
        if self._group is not None:
            self._wish = torch.tensor([self.interrupts.requested], dtype=torch.int32)
            self._work = dist.all_reduce(self._wish, dist.ReduceOp.MAX, self._group, async_op=True)

    def end(self) -> Stop:
        """What all ranks stop for now, the same on each."""
        if self._work is None:
            return self._decide(self.interrupts.requested)
        self._work.wait()
        self._work = None
        return self._decide(Stop(int(self._wish)))

    def check(self) -> None:
        """Between parts of a longer job.

        Raises:
            StopRequest: on all ranks, when one was asked to stop.
        """
        if self._device.type == "cuda":  # else the CPU would run ahead and ask long before the work is done
            torch.cuda.synchronize(self._device)
        self.begin()
        stop = self.end()
        if stop is not Stop.NONE:
            raise StopRequest(stop)

    def _decide(self, stop: Stop) -> Stop:
        self.interrupts.agreed = max(self.interrupts.agreed, stop)
        return stop
