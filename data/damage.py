"""What training does about samples that cannot be read: kinds of damage, the policy, the account of what was lost."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hmar_mega.errors import UserError

if TYPE_CHECKING:
    from hmar_mega.data.samples import SampleSet

log = logging.getLogger(__name__)

#: Damages of one kind that are logged one by one; the rest are in the totals alone.
LOGGED = 5


class Damage(UserError):
    """A sample or a shard that cannot be used; the message names both.

    Attributes:
        kind: `missing`, `cut off`, `changed` (not what the index says), `content` (bytes that are no image or no
            tokens), `slow` (no answer in time) or `error` (what else the file system says).
        passing: whether another try may succeed.
    """

    def __init__(self, message: str, kind: str, passing: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.passing = passing

    def again(self) -> Damage:
        """The same, to be raised once more: an exception that is raised again drags its earlier tracebacks along."""
        return Damage(str(self), self.kind, self.passing)

    def __reduce__(self) -> tuple[type[Damage], tuple[str, str, bool]]:
        return Damage, (str(self), self.kind, self.passing)


@dataclass(frozen=True)
class DamagePolicy:
    """What to do about damage.

    Attributes:
        on_damage: `stop` raises; `skip` puts another sample in the place of one that cannot be read, and counts.
        max_damaged: share of the samples that may be damaged under `skip`.
        timeout: seconds after which a read is given up as hanging.
        retries: of reads that hang or fail, before the sample counts as damaged.
        pause: seconds before the first of them; it doubles.
    """

    on_damage: Literal["skip", "stop"] = "stop"
    max_damaged: float = 0.0
    timeout: float = 30.0
    retries: int = 2
    pause: float = 0.5


@dataclass(frozen=True)
class Lost:
    """A position of the stream that got another sample than its own: sample numbers, what was wrong and where."""

    position: int
    sample: int
    substitute: int
    kind: str
    message: str


class DamageAccount:
    """What this rank has lost so far, and whether that is too much.

    Args:
        num_samples: of the set, by which `policy.max_damaged` is meant.
        lost: shards that cannot be used from the start, by path: how many samples each has, and what is wrong.

    Raises:
        UserError: when those are too many already.
    """

    def __init__(self, policy: DamagePolicy, num_samples: int, lost: Mapping[str, tuple[int, str]]) -> None:
        self.policy = policy
        self.num_samples = num_samples
        self.substituted = 0  #: positions that got another sample
        self.kinds: Counter[str] = Counter()
        self._lost_shards = sum(count for count, _ in lost.values())
        self._lost_messages = {message for _, message in lost.values()}
        self._samples: set[int] = set()
        self._fresh: list[Lost] = []
        if lost:
            self.check(self.damaged, list(lost.values())[-1][1])

    @classmethod
    def of(cls, samples: SampleSet) -> DamageAccount:
        """The account of a set of samples as it was opened."""
        return cls(samples.policy, len(samples), samples.lost)

    @property
    def damaged(self) -> int:
        """Different samples that could not be read, and all those of lost shards."""
        return self._lost_shards + len(self._samples)

    def record(self, lost: Lost) -> None:
        """Count one position.

        Raises:
            UserError: when more samples are damaged than may be; names the last one and where.
        """
        self.substituted += 1
        if lost.message not in self._lost_messages:  # else counted with its shard
            self._samples.add(lost.sample)
        self._fresh.append(lost)
        self.kinds[lost.kind] += 1
        if self.kinds[lost.kind] <= LOGGED:
            last = "; further ones of this kind are counted only" if self.kinds[lost.kind] == LOGGED else ""
            log.warning("position %d gets another sample: %s%s", lost.position, lost.message, last)
        self.check(self.damaged, lost.message)

    def check(self, damaged: int, example: str) -> None:
        """Raise UserError when `damaged` of the samples are more than the policy allows."""
        if damaged > self.policy.max_damaged * self.num_samples:
            raise UserError(
                f"{damaged:,} of {self.num_samples:,} samples cannot be read, more than data.max_damaged="
                f"{self.policy.max_damaged:g} allows; the last: {example}. `hmar-mega data check` lists what is "
                "damaged; restore those shards, or raise data.max_damaged"
            )

    def take_fresh(self) -> list[Lost]:
        """What was recorded since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh
