"""Why a run failed, found in its logs, and where its newest checkpoint stands."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmar_mega.launchers.prepare import LAUNCH_FOLDER

#: How much of the end of each log is read.
TAIL_BYTES = 200_000

#: What failures say in logs, the cause before its consequences: the first that is found is the reason.
REASONS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "bad node",
        re.compile(r"uncorrectable ECC|fallen off the bus|CUDA driver initialization failed|\bXid\b.*\d", re.I),
    ),
    ("disk", re.compile(r"No space left on device|Disk quota exceeded|could not be written: .*|Read-only file system")),
    (
        "out of memory",
        re.compile(r"CUDA out of memory|OutOfMemoryError|oom[-_]kill|Out Of Memory|Cannot allocate memory|MemoryError"),
    ),
    ("NaN", re.compile(r"steps in a row up to step \d+ had a loss or gradient that is not finite")),
    ("hang", re.compile(r"no step for \d+ s")),
    ("lost rank", re.compile(r"lost rank \d+ \(host [^)]*\)|the others have given up this rank")),
    (
        "NCCL timeout",
        re.compile(
            r"Watchdog caught collective operation timeout|ncclRemoteError|NCCL timeout|Timed out waiting \d+ms"
        ),
    ),
    ("bad input", re.compile(r"hmar-mega: (?!\{).+")),
    ("error", re.compile(r"^(?:\[rank\d+\]: *)?[\w.]*(?:Error|Exception): .+", re.M)),
)


def checkpoint_state(run: Path) -> dict[str, Any]:
    """`state.json` of the newest checkpoint; empty where there is none."""
    folder = run / "checkpoints"
    try:
        name = (folder / "latest").read_text().strip()
        state: dict[str, Any] = json.loads((folder / name / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state


def logs_of(run: Path, job: str, attempt: int) -> list[Path]:
    """The logs of one attempt of a job, those of the nodes before the script's own."""
    folder = run / LAUNCH_FOLDER / "logs"
    return [*sorted(folder.glob(f"{job}-{attempt}-*.log")), *sorted(folder.glob(f"job-{job}.log"))]


def find_reason(logs: Sequence[Path]) -> str:
    """`kind: the line that says so`; empty where no log says why."""
    texts = [tail(path) for path in logs]
    for kind, pattern in REASONS:
        for text in texts:
            if (match := pattern.search(text)) is not None:
                start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
                line = text[start : end if end >= 0 else None].strip()
                return f"{kind}: {line[:200]}"
    return ""


def tail(path: Path, most: int = TAIL_BYTES) -> str:
    """The last bytes of a file as text; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
