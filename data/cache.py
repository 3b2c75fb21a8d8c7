"""Copies of shards on a local disk, for data on a network file system that many processes read at random.

    cache/<sha256>.tar                a copy, whole and with the checksum of the index
    cache/.<sha256>.<random>.partial  one being made, locked by its maker

A copy is made behind the reader's back, which reads the original meanwhile. All processes of a host share the folder:
one of them copies a shard, and whoever needs room removes the copies that nobody has used for longest. Copies used a
moment ago stay, so a set larger than the cache is read partly from its original instead of being copied for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from hmar_mega.data.index import ShardEntry
from hmar_mega.files import FULL, check_writable

log = logging.getLogger(__name__)

#: A copy used within so many seconds is not removed for another.
KEEP_SECONDS = 600.0

#: How often at most the use of a copy is noted on the disk.
NOTE_SECONDS = 60.0

_BLOCK = 1 << 22


class ShardCache:
    """A folder of copies with a size limit.

    Args:
        folder: made where it is missing.
        limit: bytes of all copies together, also of those being made.
        keep_seconds: how long a copy stays after its last use, whoever needs room.

    Raises:
        UserError: when the folder cannot be written.
    """

    def __init__(self, folder: Path, limit: int, keep_seconds: float = KEEP_SECONDS) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self.keep_seconds = keep_seconds
        self.copied = 0  #: shards this process copied
        check_writable(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._wanted: queue.SimpleQueue[tuple[Path, ShardEntry]] = queue.SimpleQueue()
        self._asked: dict[str, float] = {}
        self._noted: dict[str, float] = {}
        self._copier: threading.Thread | None = None
        self._told = False
        self._sweep()

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Path, int, float]]:
        return ShardCache, (self.folder, self.limit, self.keep_seconds)

    def open(self, source: Path, shard: ShardEntry) -> int | None:
        """A descriptor of the copy of `source`; None, and copying begins, while there is none."""
        path = self._path(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            self._ask(source, shard)
            return None
        if os.fstat(descriptor).st_size != shard.bytes:  # as after a power failure
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        self.used(shard)
        return descriptor

    def used(self, shard: ShardEntry) -> None:
        """Note that a copy is in use, so that it is not removed."""
        now = time.monotonic()
        if now - self._noted.get(shard.sha256, -NOTE_SECONDS) >= NOTE_SECONDS:
            self._noted[shard.sha256] = now
            with contextlib.suppress(OSError):  # removed meanwhile
                # the time of change stays: by it readers see that a file is still the one they opened
                os.utime(self._path(shard), ns=(time.time_ns(), self._path(shard).stat().st_mtime_ns))

    def _path(self, shard: ShardEntry) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _ask(self, source: Path, shard: ShardEntry) -> None:
        """Let the thread copy a shard; one that could not be copied is asked for again only after a while."""
        now = time.monotonic()
        if now < self._asked.get(shard.sha256, 0.0):
            return
        self._asked[shard.sha256] = now + self.keep_seconds
        self._wanted.put((source, shard))
        if self._copier is None:
            self._copier = threading.Thread(target=self._copy_wanted, name="hmar-cache", daemon=True)
            self._copier.start()

    def _copy_wanted(self) -> None:
        while True:
            source, shard = self._wanted.get()
            try:
                self._copy(source, shard)
            except OSError as err:
                why = "the disk is full" if err.errno in FULL else err.strerror
                self._tell(f"{source.name} is not copied to {self.folder} ({why}): it is read where it is")

    def _copy(self, source: Path, shard: ShardEntry) -> None:
        """Copy one shard unless another process does or there is no room; OSError where the disks refuse."""
        with self._locked():
            # partial copies first: one that is finished between the two looks is then seen as a copy
            if any(self.folder.glob(f".{shard.sha256}.*")) or self._path(shard).exists():
                return
            if not self._make_room(shard.bytes):
                self._tell(
                    f"the cache {self.folder} of {self.limit / 1e9:g} GB is full of shards in use: the others are read "
                    "where they are; raise data.cache_gb, or use data.shuffle=groups, which needs few shards at a time"
                )
                return
            path, handle = self._reserve(shard)
        try:
            with os.fdopen(handle, "r+b") as target:
                digest = hashlib.sha256()
                with open(source, "rb", buffering=0) as file:
                    while block := file.read(_BLOCK):
                        digest.update(block)
                        target.write(block)
                target.truncate()
                target.flush()
                os.fsync(target.fileno())
                if digest.hexdigest() != shard.sha256:
                    self._tell(f"{source} is not the shard of its index and is not copied to {self.folder}")
                    return
                path.chmod(0o644)
                path.replace(self._path(shard))
            self._asked.pop(shard.sha256, None)
            self.copied += 1
        finally:
            path.unlink(missing_ok=True)

    def _reserve(self, shard: ShardEntry) -> tuple[Path, int]:
        """A partial copy of the size it will have, which counts from now on, and its descriptor, locked."""
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=f".{shard.sha256}.", suffix=".partial")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # shows that its maker lives
            os.posix_fallocate(handle, 0, max(1, shard.bytes))
        except OSError:
            os.close(handle)
            Path(name).unlink()
            raise
        return Path(name), handle

    def _make_room(self, size: int) -> bool:
        """Remove the copies used longest ago until `size` bytes fit; whether they do. Holds the lock of the folder."""
        self._remove_dead()
        stats = sorted((self._stats()), key=lambda found: found[1].st_atime)
        total = sum(stat.st_size for _, stat in stats)
        now = time.time()
        removable = [
            found for found in stats if found[0].suffix == ".tar" and now - found[1].st_atime >= self.keep_seconds
        ]
        if total - sum(stat.st_size for _, stat in removable) + size > self.limit:
            return False
        for path, stat in removable:
            if total + size <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= stat.st_size
        return True

    def _stats(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in [*self.folder.glob("*.tar"), *self.folder.glob(".*.partial")]:
            with contextlib.suppress(FileNotFoundError):  # finished or removed at this moment
                yield path, path.stat()

    def _remove_dead(self) -> None:
        """Remove partial copies whose maker was killed: nobody holds their lock."""
        for partial in self.folder.glob(".*.partial"):
            with contextlib.suppress(OSError):
                handle = os.open(partial, os.O_RDWR)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    partial.unlink(missing_ok=True)
                finally:
                    os.close(handle)

    def _sweep(self) -> None:
        with self._locked():
            self._remove_dead()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all processes of this host, for the moment it takes to look and decide."""
        with open(self.folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _tell(self, message: str) -> None:
        """Log a reason why not everything is cached, the first time."""
        if not self._told:
            self._told = True
            log.warning("%s", message)
