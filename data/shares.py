"""Which share of a job a process does that shares it with others without talking to them."""

from __future__ import annotations

import logging
import os

from hmar_mega.errors import UserError

log = logging.getLogger(__name__)


def share_of_work(text: str | None) -> tuple[int, int]:
    """(part, parts) of this process: `--part I/N`, else its place in a SLURM array and among torchrun's ranks.

    Raises:
        UserError: when `text` is not I/N, or an array's numbers have no regular step.
    """
    if text is not None:
        number, slash, count = text.partition("/")
        if not slash or not number.isdigit() or not count.isdigit() or not 1 <= int(number) <= int(count):
            raise UserError(f"--part {text!r} is no share of work; give 1/4, 2/4, 3/4 and 4/4 to four processes")
        return int(number) - 1, int(count)
    task, tasks = _array_task()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    part, parts = task * world + rank, tasks * world
    if parts > 1:
        log.info("this is process %d of %d (SLURM array task %d of %d, rank %d of %d)",
                 part + 1, parts, task + 1, tasks, rank, world)  # fmt: skip
    return part, parts


def _array_task() -> tuple[int, int]:
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    number, count, low, high = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "COUNT", "MIN", "MAX"))
    if count == 1:
        return 0, 1
    step, rest = divmod(high - low, count - 1)
    if rest or (number - low) % step:
        raise UserError(
            f"the SLURM array from {low} to {high} has {count} tasks at no regular step; use --array=0-{count - 1}, or "
            "say with --part I/N which share each makes"
        )
    return (number - low) // step, count
