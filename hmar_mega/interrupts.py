"""Signals that ask a run to stop: noted at once, obeyed where all ranks can save and stop together.

SIGTERM and SIGINT: save and exit 0. SIGUSR1, which SLURM sends before the time limit (`--signal=USR1@300`): save and
exit 75, "requeue me". A second SIGINT interrupts at once. Nothing heavy is imported here, so that the handlers stand
before torch is imported, which takes longer than many a grace period.
"""

from __future__ import annotations

import os
import signal
from enum import IntEnum
from types import FrameType, TracebackType

#: Exit status of a run that saved itself and wants to be started again (EX_TEMPFAIL of sysexits.h).
REQUEUE_STATUS = 75


class Stop(IntEnum):
    """What was asked for; of two wishes the higher one counts."""

    NONE = 0
    EXIT = 1
    REQUEUE = 2


#: Which signal asks for what.
SIGNALS = {signal.SIGINT: Stop.EXIT, signal.SIGTERM: Stop.EXIT, signal.SIGUSR1: Stop.REQUEUE}


class StopRequest(Exception):
    """All ranks agreed to stop here.

    Attributes:
        stop: what for.
    """

    def __init__(self, stop: Stop) -> None:
        super().__init__(f"asked to stop ({stop.name})")
        self.stop = stop


class Interrupts:
    """The signals that this process got; a context in which they are noted instead of ending it.

    Attributes:
        requested: what this process was asked for so far.
        agreed: what all ranks stopped for; set by `parallel.agreement`.
    """

    def __init__(self) -> None:
        self.requested = Stop.NONE
        self.agreed = Stop.NONE
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if self.agreed is Stop.NONE:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            return
        # a signal sent twice must not kill what is about to end well: Python, where it ends, makes handlers that are
        # functions the default again, and leaves alone what is ignored
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    @property
    def status(self) -> int:
        """Exit status of the run."""
        return REQUEUE_STATUS if self.agreed is Stop.REQUEUE else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler: remembers, and on a terminal says that patience is needed."""
        if number == signal.SIGINT:
            if self.requested is not Stop.NONE:
                signal.default_int_handler(number, frame)
            if os.environ.get("RANK", "0") == "0":
                # not through logging: its streams must not be entered from a handler
                os.write(2, b"\nsaving and stopping after this step; Ctrl-C again stops at once, without saving\n")
        self.requested = max(self.requested, SIGNALS[signal.Signals(number)])
