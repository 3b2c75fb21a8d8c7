"""Making one shard of images, in this process or in one of several. Imports no torch: a process starts in a moment."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hmar_mega.data.assembly import Assembly, ShardJob, ShardRecord
from hmar_mega.data.pixels import Storing, UnusableImage, image_fields, store_image
from hmar_mega.data.processes import map_processes
from hmar_mega.data.sources.base import Item
from hmar_mega.data.tars import Sample, write_shard
from hmar_mega.errors import UserError

#: Files that stay open in a process: tars are read from again and again.
OPEN_FILES = 64


@dataclass(frozen=True)
class ShardTask:
    """A shard to make: where, of which images, the first of them number `first` of its part, and how to store them."""

    out: Path
    plan: str
    job: ShardJob
    first: int
    items: tuple[Item, ...]
    storing: Storing


def make_shard(task: ShardTask) -> ShardJob:
    """Read, check and write the images of a shard, and record it.

    Raises:
        UserError: when a file cannot be read, or the shard not be written.
    """
    assembly = Assembly(task.out, task.plan, [])
    notes: Counter[str] = Counter()
    skipped: list[tuple[str, str]] = []
    hashes: list[str] = []

    def samples() -> Iterator[Sample]:
        for number, item in enumerate(task.items, start=task.first):
            data = read_item(item)
            try:
                stored = store_image(data, task.storing)
            except UnusableImage as err:
                skipped.append((item.name, str(err)))
                hashes.append("")
                continue
            hashes.append(hashlib.blake2b(data, digest_size=16).hexdigest())
            notes.update(stored.notes)
            yield f"{number:08d}", item.label, image_fields(stored.field, stored.data, item.name, stored.size)

    entry = write_shard(assembly.path(task.job), samples())
    assembly.record(task.job, ShardRecord(entry, tuple(skipped), dict(notes), tuple(hashes)))
    return task.job


def read_item(item: Item) -> bytes:
    """The bytes of an image; UserError, naming the file, when they cannot be read."""
    try:
        if item.size < 0:
            data = Path(item.path).read_bytes()
        else:
            data = os.pread(_open(item.path).number, item.size, item.start)
    except OSError as err:
        raise UserError(f"{item.path} cannot be read: {err.strerror}; mend it, or take it away") from None
    if 0 <= item.size != len(data):
        raise UserError(f"{item.path}: {item.name} is cut off: the file has changed since it was listed; start again")
    return data


def run_tasks(tasks: Iterator[ShardTask], workers: int) -> Iterator[ShardJob]:
    """Make shards in `workers` processes; gives each that is finished, in any order. Errors: see `map_processes`."""
    try:
        yield from map_processes(make_shard, tasks, workers)
    finally:
        close_files()


def close_files() -> None:
    """Close the files that `read_item` keeps open, and which may change before this process reads again."""
    _open.cache_clear()


@lru_cache(OPEN_FILES)
def _open(path: str) -> _Descriptor:
    return _Descriptor(path)


class _Descriptor:
    """An open file that closes itself when it is forgotten."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
