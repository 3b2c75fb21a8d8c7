"""What all ranks together could not read: counted, written to the run directory, and whether it is too much."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hmar_mega.data.damage import DamageAccount, Lost
from hmar_mega.engine import TrainingError
from hmar_mega.parallel.dims import ParallelDims

log = logging.getLogger(__name__)

#: Of a run directory: every position that got another sample than its own, and why.
DAMAGED_FILE = "damaged_samples.jsonl"


class DamageReport:
    """Brings the accounts of all ranks together at every line of the log.

    Args:
        account: of this rank; those of ranks that do not read stay empty.
    """

    def __init__(self, folder: Path, account: DamageAccount, dims: ParallelDims) -> None:
        self._folder, self._account, self._dims = folder, account, dims
        self._known = 0
        self._samples: set[int] = set()

    @property
    def own(self) -> int:
        """Positions of this rank that got another sample, since the run was started."""
        return self._account.substituted

    def collect(self, step: int, total: int | None = None) -> None:
        """Note what is new since the last call; collective over all ranks.

        Args:
            total: the sum of `own` over all ranks, where it is known already.

        Raises:
            TrainingError: on all ranks, when more samples are damaged than data.max_damaged allows.
        """
        if total is None:
            count = torch.tensor([self.own], device=self._dims.device)
            dist.all_reduce(count)
            total = int(count)
        if total == self._known:
            return
        self._known = total
        parts: list[Any] = [None] * self._dims.world_size
        dist.all_gather_object(parts, (self._account.take_fresh(), self._account.policy, self._account.damaged))
        fresh: list[Lost] = sorted((lost for part, _, _ in parts for lost in part), key=lambda lost: lost.position)
        self._samples |= {lost.sample for lost in fresh}
        if self._dims.is_main:
            self._write(step, fresh)
            log.warning(
                "step %d | %d positions so far got another sample than theirs, of %d damaged ones; see %s",
                step, total, len(self._samples), DAMAGED_FILE,
            )  # fmt: skip
        limit = max(policy.max_damaged for _, policy, _ in parts) * self._account.num_samples
        damaged = max(len(self._samples), *(count for _, _, count in parts))
        if damaged > limit:
            raise TrainingError(
                f"{damaged:,} of {self._account.num_samples:,} samples cannot be read, more than data.max_damaged "
                f"allows; the last: {fresh[-1].message}. They are in {self._folder / DAMAGED_FILE}. Restore those "
                "shards (`hmar-mega data check` lists what is damaged), or raise data.max_damaged"
            )

    def _write(self, step: int, fresh: list[Lost]) -> None:
        try:
            with (self._folder / DAMAGED_FILE).open("a") as file:
                file.writelines(json.dumps({"step": step, **asdict(lost)}) + "\n" for lost in fresh)
        except OSError as err:
            log.warning("%s cannot be written: %s", self._folder / DAMAGED_FILE, err.strerror)
