"""A folder of shards in the making: whole shards at a time, by any number of processes, again after a kill.

    OUT.partial/plan.json               what is being made; a second start with another plan is refused
    OUT.partial/[part/]shard-….tar      finished shards
    OUT.partial/spool/                  copies of sources that can only be read from front to back
    OUT.partial/.state/[part-]000000.json   what the index will say of a shard; written last: no record, no shard

When every shard has its record the index is written and the folder renamed to OUT. Until then OUT does not exist.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hmar_mega.data.index import INDEX_NAME, ShardEntry, ShardIndex, SkippedImage, offsets_path, write_index
from hmar_mega.errors import UserError
from hmar_mega.files import cannot_write, create_atomic, sync_path, write_atomic

STATE, LOCK, PLAN, SPOOL = ".state", ".lock", "plan.json", "spool"

#: The share of a process that does all of the work.
WHOLE = "all"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardJob:
    """One shard to make: number `number` of the part `part` ("" where there is only one), from `count` sources."""

    part: str
    number: int
    count: int

    @property
    def name(self) -> str:
        """File name of the tar."""
        return f"shard-{self.number:06d}.tar"


@dataclass(frozen=True)
class ShardRecord:
    """What came of a shard.

    Attributes:
        entry: None when none of its sources could be used.
        skipped: sources left out, (name, reason).
        notes: peculiarities met, with how many images had them.
        hashes: of every source the hash of its bytes, "" where unknown; empty where nobody asks for them.
    """

    entry: ShardEntry | None
    skipped: tuple[tuple[str, str], ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    hashes: tuple[str, ...] = ()


class Assembly:
    """The folder `OUT.partial`; made by `open_assembly`."""

    def __init__(self, out: Path, plan: str, jobs: list[ShardJob]) -> None:
        self.out, self.plan, self.jobs = out, plan, jobs
        self.folder = partial_folder(out)

    def path(self, job: ShardJob) -> Path:
        """Where the tar of a shard goes."""
        return self.folder / job.part / job.name

    def find(self, job: ShardJob) -> ShardRecord | None:
        """The record of a shard that is finished, and whose tar is as long as recorded."""
        try:
            tree = json.loads(self._record_path(job).read_bytes())
            entry = None if tree["entry"] is None else ShardEntry(**tree["entry"])
            skipped = tuple((source, reason) for source, reason in tree["skipped"])
            record = ShardRecord(entry, skipped, tree["notes"], tuple(tree["hashes"]))
            whole = entry is None or self.path(job).stat().st_size == entry.bytes
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if whole else None

    def record(self, job: ShardJob, record: ShardRecord) -> None:
        """Say that a shard is finished."""
        tree = asdict(record) | {"entry": None if record.entry is None else record.entry.model_dump()}
        write_atomic(self._record_path(job), json.dumps(tree))

    def finish(self, describe: Callable[[str, list[ShardRecord]], ShardIndex], extra: Mapping[str, str]) -> bool:
        """Write the indexes and give the folder its name, once every shard is there; whoever comes last does it.

        Args:
            describe: the index of a part from the records of its shards.
            extra: further files of the folder, text by name.

        Returns:
            Whether OUT is there: made now, or by another process a moment ago.

        Raises:
            UserError: when a part has no sample, or the folder cannot be written.
        """
        with _lock(self.folder, "finish", wait=True) if self.folder.exists() else contextlib.nullcontext():
            if is_complete(self.out, self.plan):
                return True
            records = [self.find(job) for job in self.jobs]
            if any(record is None for record in records):
                return False
            for part in dict.fromkeys(job.part for job in self.jobs):
                own = [r for job, r in zip(self.jobs, records, strict=True) if r is not None and job.part == part]
                write_index(self.folder / part, describe(part, own))
            for name, text in extra.items():
                write_atomic(self.folder / name, text)
            try:
                if self.out.exists():
                    self.out.rmdir()
                self.folder.rename(self.out)
                sync_path(self.out.parent)
            except OSError as err:
                raise cannot_write(self.out, err) from None
        clean(self.out)
        return True

    def _record_path(self, job: ShardJob) -> Path:
        return self.folder / STATE / f"{job.part + '-' if job.part else ''}{job.number:06d}.json"

    def remove_leftovers(self, job: ShardJob) -> None:
        """Remove what a killed process left of a shard of ours: temporaries, and a tar without its record."""
        path = self.path(job)
        for leftover in [path, offsets_path(path), *path.parent.glob(f".{path.stem}.*")]:
            leftover.unlink(missing_ok=True)


def partial_folder(out: Path) -> Path:
    """`OUT` → `OUT.partial`, beside it and so on the same disk."""
    return out.parent / f"{out.name}.partial"


def plan_hash(plan: Any) -> str:
    """16 hex digits that name what is being made, from its JSON."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_complete(out: Path, plan: str) -> bool:
    """Whether OUT, or each folder in it, is the finished result of `plan`."""
    for index in [out / INDEX_NAME, *sorted(out.glob(f"*/{INDEX_NAME}"))]:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(index.read_bytes()).get("plan") == plan:
                return True
    return False


def clean(out: Path) -> None:
    """Remove what only the making of a finished folder needs."""
    for folder in (STATE, SPOOL):
        shutil.rmtree(out / folder, ignore_errors=True)
    for file in [out / PLAN, *out.glob(f"{LOCK}*")]:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def open_assembly(out: Path, plan: str, jobs: list[ShardJob], part: str = WHOLE) -> Iterator[Assembly]:
    """Begin or go on with `OUT.partial`, held so that no second process makes the same part of it.

    Leaves finished shards after an error, so that the same command goes on; a folder without any is removed.

    Args:
        plan: names what is made, `plan_hash`.
        part: the share of the work that this process does, as text.

    Raises:
        UserError: when OUT is taken, OUT.partial is of another plan or in use, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another output or remove it first")
    assembly = Assembly(out, plan, jobs)
    folder = assembly.folder
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(out, err) from None
    try:
        with _lock(folder, part, wait=False):
            if is_complete(out, plan):  # another process ended a moment ago, and this folder came after it
                shutil.rmtree(folder, ignore_errors=True)
                raise UserError(f"{out} is complete already")
            create_atomic(folder / PLAN, json.dumps({"plan": plan}))
            found = json.loads((folder / PLAN).read_text()).get("plan")
            if found != plan:
                raise UserError(
                    f"{folder} holds part of other shards: source or options have changed since it was begun; "
                    "run the command as it was then, or remove that folder"
                )
            yield assembly
    except BaseException:
        if part == WHOLE and not any(folder.rglob("*.tar")):
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.exists():
            log.warning("finished shards stay in %s; the same command goes on with them", folder)
        raise


@contextlib.contextmanager
def _lock(folder: Path, name: str, wait: bool) -> Iterator[None]:
    """Hold the lock `name` of a folder, which the kernel takes back when its holder dies."""
    try:
        handle = os.open(folder / f"{LOCK}-{name.replace('/', '-of-')}", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as err:
        raise cannot_write(folder, err) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process is at work in {folder}; wait until it has ended, or stop it") from None
    except OSError as err:
        log.warning("%s: no locks there (%s); a second process in it would not be noticed", folder, err.strerror)
    try:
        yield
    finally:
        os.close(handle)


def gather(
    records: list[ShardRecord], lost: Iterable[tuple[str, str]] = ()
) -> tuple[tuple[ShardEntry, ...], tuple[SkippedImage, ...], dict[str, int]]:
    """The shards, the skipped images and the notes of all records; `lost` are further things left out."""
    shards = tuple(record.entry for record in records if record.entry is not None)
    left_out = [*lost, *(pair for record in records for pair in record.skipped)]
    skipped = tuple(SkippedImage(source=source, reason=reason) for source, reason in left_out)
    notes: dict[str, int] = {}
    for record in records:
        for name, count in record.notes.items():
            notes[name] = notes.get(name, 0) + count
    return shards, skipped, dict(sorted(notes.items()))
