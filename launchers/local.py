"""Training on this machine: torchrun, with the launch folder, notes and log that a job has."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

from hmar_mega.launchers.events import LOCAL_JOB, add_event
from hmar_mega.launchers.outcome import checkpoint_state
from hmar_mega.launchers.prepare import CONFIG_FILE, LAUNCH_FOLDER


def local_command(run: Path, processes: int, max_restarts: int) -> list[str]:
    """The command that trains `run` with so many processes here."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = ["-m", "hmar_mega", "train", str(run / LAUNCH_FOLDER / CONFIG_FILE)]
    return [*torchrun, f"--max-restarts={max_restarts}", *program]


def run_local(run: Path, processes: int, max_restarts: int) -> int:
    """Train, with the output on the terminal and in the log; the exit status, as torchrun gives it.

    SIGTERM and Ctrl-C are torchrun's to pass on, and the run saves itself; this process waits for it.
    """
    log = run / LAUNCH_FOLDER / "logs" / f"{LOCAL_JOB}-0-{socket.gethostname()}.log"
    add_event(run, "started", LOCAL_JOB, nodes=socket.gethostname(), process=str(os.getpid()))
    asked: list[int] = []
    with log.open("ab") as file:
        process = subprocess.Popen(
            local_command(run, processes, max_restarts), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None

        def note(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            if number == signal.SIGTERM:  # Ctrl-C reaches torchrun from the terminal
                process.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note)
        for line in process.stdout:
            file.write(line)
            file.flush()
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        status = process.wait()
    finished = status == 0 and checkpoint_state(run).get("finished") is True  # else perhaps an earlier, shorter run's
    kind = "completed" if finished else "cancelled" if asked else "failed"
    about = {} if finished else {"reason": "saved and stopped as asked" if asked else f"torchrun: status {status}"}
    add_event(run, kind, LOCAL_JOB, **about)
    return status
