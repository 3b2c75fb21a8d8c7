"""Signals are noted, the higher wish counts, and a second Ctrl-C interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hmar_mega.interrupts import SIGNALS, Interrupts, Stop


@pytest.mark.parametrize(
    ("signals", "stop"),
    [
        ([], Stop.NONE),
        ([signal.SIGTERM], Stop.EXIT),
        ([signal.SIGTERM, signal.SIGTERM], Stop.EXIT),
        ([signal.SIGINT], Stop.EXIT),
        ([signal.SIGUSR1, signal.SIGTERM], Stop.REQUEUE),
        ([signal.SIGTERM, signal.SIGUSR1], Stop.REQUEUE),
    ],
)
def test_signals_are_noted_and_the_higher_wish_counts(signals, stop):
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts() as interrupts:
        for number in signals:
            os.kill(os.getpid(), number)
        assert interrupts.requested is stop
        assert interrupts.status == 0, "nothing is agreed on yet"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_second_ctrl_c_interrupts_at_once():
    with Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("agreed", "status"), [(Stop.NONE, 0), (Stop.EXIT, 0), (Stop.REQUEUE, 75)])
def test_the_status_tells_a_launcher_whether_to_start_again(agreed, status):
    interrupts = Interrupts()
    interrupts.agreed = agreed
    assert interrupts.status == status


def test_once_all_agreed_to_stop_another_signal_ends_nothing():
    """Ignored, not handled: where Python ends it gives up handlers, and the job script sends USR1 again and again."""
    code = (
        "import signal\nfrom hmar_mega.interrupts import Interrupts, Stop\n"
        "with Interrupts() as interrupts:\n    interrupts.agreed = Stop.REQUEUE\n"
        "ignored = [signal.getsignal(n) is signal.SIG_IGN for n in (signal.SIGUSR1, signal.SIGTERM)]\n"
        "raise SystemExit(not all(ignored))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_handlers_can_stand_before_torch_is_imported():
    code = "import sys, hmar_mega.cli, hmar_mega.interrupts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
