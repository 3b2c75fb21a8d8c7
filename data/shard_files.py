"""The open tars of a folder: bytes at an offset, or `Damage` where the file is gone, cut off, replaced or silent."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hmar_mega.data.cache import ShardCache
from hmar_mega.data.damage import Damage, DamagePolicy
from hmar_mega.data.index import ShardEntry, file_sha256
from hmar_mega.errors import UserError

#: Shards open at once at most: below the usual `ulimit -n` of 1024.
MAX_OPEN = 512

#: How often a read begins anew because its shard changed meanwhile.
CHANGES = 3

#: A shard whose reads failed as often as they may is left alone for so many times `DamagePolicy.timeout`.
REST = 10.0

log = logging.getLogger(__name__)


class _Opened:
    """An open shard and the size and time of change it must keep; closed when nobody reads from it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.signature = signature_of(os.fstat(descriptor))

    def __del__(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True)
class _Failing:
    """A shard whose last reads failed: how often, with what, and until when it is left alone."""

    count: int
    damage: Damage
    until: float


def signature_of(stat: os.stat_result) -> tuple[int, int]:
    """Size and time of change of a file: another one means that its content may be another."""
    return stat.st_size, stat.st_mtime_ns


class ShardFiles:
    """The tars of a folder, opened when first read; any number of threads and forked processes may read at once.

    Args:
        shards: as the index has them.
        cache: keeps copies on a local disk, which are read as soon as they are there.

    Attributes:
        lost: what is wrong with shards that cannot be used any more, by number.
    """

    def __init__(
        self, folder: Path, shards: Sequence[ShardEntry], policy: DamagePolicy, cache: ShardCache | None
    ) -> None:
        self.lost: dict[int, Damage] = {}
        self._shards = shards
        self._paths = [folder / shard.name for shard in shards]
        self._names = [str(path) for path in self._paths]
        self._policy, self._cache = policy, cache
        self._failing: dict[int, _Failing] = {}
        self._signatures: dict[int, tuple[int, int]] = {}
        self._told: dict[int, tuple[int, int]] = {}  # of which changes the log says that they are looked into
        self._descriptors: dict[int, _Opened] = {}
        self._cached: set[int] = set()  # shards whose descriptor is that of a copy

    def path(self, shard: int) -> Path:
        """The tar with that number."""
        return self._paths[shard]

    def name(self, shard: int) -> str:
        """`path` as text, made once: it would be a third of the time of a read."""
        return self._names[shard]

    def remember(self, shard: int) -> None:
        """From now on the tar is known as it is; OSError where it cannot be looked at."""
        self._signatures[shard] = signature_of(self.path(shard).stat())

    def read(self, shard: int, size: int, start: int, where: str) -> bytes:
        """`size` bytes from `start` on.

        Args:
            where: names the sample in messages.

        Raises:
            Damage: when they cannot be had; passing while another try may help.
        """
        self._check_usable(shard)
        for _ in range(CHANGES):
            try:
                opened = self._opened(shard)
                data = os.pread(opened.descriptor, size, start)
                while data and len(data) < size:
                    more = os.pread(opened.descriptor, size - len(data), start + len(data))
                    data = data + more if more else b""
                unchanged = signature_of(os.fstat(opened.descriptor)) == opened.signature
                if not unchanged:
                    self._recheck(shard)
            except OSError as err:
                raise self._refused(shard, err, where) from None
            if unchanged:
                self._failing.pop(shard, None)
                if len(data) != size:
                    raise Damage(
                        f"{where} is cut off: the shard has been truncated; restore it or make it anew", "cut off"
                    )
                return data
        raise Damage(f"{where} cannot be read: its shard keeps changing", "changed", passing=True)

    def stalled(self, shard: int) -> Damage:
        """What a read that gave no answer is; further reads of the shard fail at once until `try_again`."""
        self._forget(shard)  # whoever hangs in it keeps it open
        return self._fail(shard, f"shard {self.path(shard)} gives no answer within {self._policy.timeout:g} s", "slow")

    def try_again(self) -> None:
        """Read again from shards that did not fail too often yet."""
        for shard, failing in list(self._failing.items()):
            if failing.count <= self._policy.retries:
                self._failing[shard] = _Failing(failing.count, failing.damage, 0.0)

    def close(self) -> None:
        """Close what is open; reading opens it again."""
        self._descriptors.clear()
        self._cached.clear()

    def _check_usable(self, shard: int) -> None:
        if shard in self.lost:
            raise self.lost[shard].again()
        failing = self._failing.get(shard)
        if failing is not None and time.monotonic() < failing.until:
            raise failing.damage.again()

    def _fail(self, shard: int, message: str, kind: str) -> Damage:
        """Note that a read failed, and leave the shard alone; one that rested and fails again rests at once."""
        known = self._failing.get(shard)
        count = 1 if known is None else known.count + 1
        damage = Damage(message, kind, passing=count <= self._policy.retries)
        self._failing[shard] = _Failing(count, damage, time.monotonic() + REST * self._policy.timeout)
        return damage

    def _refused(self, shard: int, err: OSError, where: str) -> UserError:
        """What to raise where the system refuses a read; the next try opens the file anew."""
        if err.errno == errno.EMFILE:
            return UserError(f"{where} cannot be read: {err.strerror}; raise the limit with `ulimit -n`")
        self._forget(shard)
        kind = "missing" if err.errno == errno.ENOENT else "error"
        return self._fail(shard, f"{where} cannot be read: {err.strerror}", kind)

    def _opened(self, shard: int) -> _Opened:
        entry = self._shards[shard]
        if self._cache is not None:
            if shard in self._cached:
                self._cache.used(entry)
            elif (descriptor := self._cache.open(self.path(shard), entry)) is not None:
                self._forget_removed()
                self._forget(shard)
                self._cached.add(shard)
                return self._keep(shard, _Opened(descriptor))
        found = self._descriptors.get(shard)
        if found is not None:
            return found
        opened = _Opened(os.open(self.path(shard), os.O_RDONLY))
        if self._signatures.setdefault(shard, opened.signature) != opened.signature:
            self._recheck(shard)
        return self._keep(shard, opened)

    def _keep(self, shard: int, opened: _Opened) -> _Opened:
        if len(self._descriptors) >= MAX_OPEN:
            with contextlib.suppress(RuntimeError, StopIteration):  # other threads open and close as well
                self._forget(next(iter(self._descriptors)))
        # No lock, which a fork could leave locked: setdefault is atomic, and the loser's is closed.
        return self._descriptors.setdefault(shard, opened)

    def _forget(self, shard: int) -> None:
        self._descriptors.pop(shard, None)
        self._cached.discard(shard)

    def _forget_removed(self) -> None:
        """Close copies that were removed from the cache: their room is free only then."""
        for shard in list(self._cached):
            opened = self._descriptors.get(shard)
            if opened is not None and os.fstat(opened.descriptor).st_nlink == 0:
                self._forget(shard)

    def _recheck(self, shard: int) -> None:
        """Look whether a shard that was touched is still the one of the index.

        One that is shorter may have been cut off: what is before its end is still good where tar headers are.

        Raises:
            Damage: when it is not; so do all further reads of it.
        """
        entry, tar = self._shards[shard], self.path(shard)
        signature = signature_of(tar.stat())
        if signature[0] >= entry.bytes and self._told.get(shard) != signature:
            self._told[shard] = signature
            log.warning("shard %s was touched: comparing its %.1f MB with the checksum", tar, signature[0] / 1e6)
        if signature[0] >= entry.bytes and file_sha256(tar) != entry.sha256:
            self.lost[shard] = Damage(
                f"shard {tar} was replaced while it was read: it is not the one of its index; restore it or make it "
                "anew",
                "changed",
            )
            raise self.lost[shard].again()
        self._signatures[shard] = signature
        self._forget(shard)
