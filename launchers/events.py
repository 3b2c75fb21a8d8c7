"""What happened to a run's jobs: the lines of RUN/launch/events.jsonl, which the job scripts write too."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from hmar_mega.launchers.prepare import EVENTS_FILE, LAUNCH_FOLDER

#: The job of a run on this machine, outside SLURM.
LOCAL_JOB = "local"


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        time: seconds since 1970.
        kind: submitted, started, preempting, preempted, requeued, bad_node, readmitted, chained, completed, cancelled,
            failed.
        job: SLURM's number, or `local`.
        attempt: how many restarts came before.
        about: what else the line says (`reason`, `nodes`, `node`, `excluded`, `next`, `process`, …).
    """

    time: float
    kind: str
    job: str
    attempt: int
    about: dict[str, str] = field(default_factory=dict)


def read_events(run: Path) -> list[Event]:
    """All of them in order; a line that a kill cut short is left out."""
    path = run / LAUNCH_FOLDER / EVENTS_FILE
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            head = (float(row.pop("time")), str(row.pop("event")), str(row.pop("job")), int(row.pop("attempt")))
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        events.append(Event(*head, {key: str(value) for key, value in row.items()}))
    return events


def add_event(run: Path, kind: str, job: str, attempt: int = 0, **about: str) -> None:
    """Append one that happens now."""
    row = {"time": int(time.time()), "event": kind, "job": job, "attempt": attempt, **about}
    with (run / LAUNCH_FOLDER / EVENTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
