"""From any collection of images to image shards: planned as a whole, made shard by shard in processes.

Which image goes into which shard, and under which key, follows from the list of images alone, before any is read: so
every shard can be made by itself, by any process, and has the same bytes whoever makes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from hmar_mega.data.assembly import (
    SPOOL,
    Assembly,
    ShardJob,
    ShardRecord,
    gather,
    is_complete,
    open_assembly,
    partial_folder,
    plan_hash,
)
from hmar_mega.data.duplicates import duplicate_rows, duplicates_csv
from hmar_mega.data.index import INDEX_NAME, ImageFormat, ShardIndex, read_index
from hmar_mega.data.order import permutation
from hmar_mega.data.pixels import Storing, UnusableImage, image_fields, store_image
from hmar_mega.data.shard_worker import ShardTask, close_files, read_item, run_tasks
from hmar_mega.data.sources.base import Format, Item, Source, SourceOptions
from hmar_mega.data.sources.detect import read_source
from hmar_mega.data.split import stratified_split
from hmar_mega.errors import UserError
from hmar_mega.progress import track
from hmar_mega.rng import Purpose

__all__ = ["ShardPlan", "ShardSettings", "image_fields", "plan_lines", "plan_shards", "shard_images"]

#: Images that are encoded beforehand to learn how much smaller or larger they become.
TRIAL_IMAGES = 32

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardSettings:
    """How a collection is cut into shards.

    Attributes:
        samples_per_shard: images of a shard at most.
        shard_bytes: bytes of images of a shard at most, about: of files, times what encoding makes of the first few.
        val_fraction: share of every class that goes to `val`, the rest to `train`; None: the source's own parts.
        seed: decides order and split.
        form: what the source is; None: found by itself.
        storing: how images are stored.
        classes, image_column, label_column, damaged_tars: see `SourceOptions`.
    """

    samples_per_shard: int = 1024
    shard_bytes: int | None = None
    val_fraction: float | None = None
    seed: int = 0
    form: Format | None = None
    storing: Storing = field(default_factory=Storing)
    classes: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    damaged_tars: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class ShardPlan:
    """What is going to be made: the source, its images in the order in which they are stored, and the shards.

    Attributes:
        parts: images by part, shuffled.
        jobs: every shard, and with it the number of its first image in its part.
        fingerprint: names all of it.
    """

    source: Source
    parts: Mapping[str, Sequence[Item]]
    jobs: Sequence[tuple[ShardJob, int]]
    fingerprint: str

    def items(self, job: ShardJob, first: int) -> Sequence[Item]:
        """The images of a shard."""
        return self.parts[job.part][first : first + job.count]


def shard_images(
    src: Path | str, out: Path, settings: ShardSettings | None = None, progress: bool = True, workers: int = 1
) -> dict[str, ShardIndex]:
    """Write the images of a collection into image shards in the folder `out`, or `out/train` and `out/val`.

    Samples are shuffled, always in the same way for the same images and seed, so that each shard holds all classes. An
    image that cannot be used is left out and listed, with the reason, in the index. Started again after a kill it
    goes on after the finished shards; a result that is there already is left alone.

    Args:
        src: see `hmar_mega.data.sources.detect.read_source`.
        progress: show a bar on a terminal and a closing line.
        workers: processes.

    Returns:
        The index of each part, "" where the source is not divided.

    Raises:
        UserError: when there are no classes or no images, a file cannot be read, or `out` is taken, inside `src` or
            cannot be written.
    """
    settings, out = settings or ShardSettings(), Path(out)
    if os.path.isdir(src) and out.resolve().is_relative_to(Path(src).resolve()):
        raise UserError(f"{out} is inside {src}, the folder to read; give an output folder outside of it")
    plan = plan_shards(src, settings, partial_folder(out) / SPOOL)
    if is_complete(out, plan.fingerprint):
        log.info("%s is complete already", out)
        return {part: read_index(out / part) for part in plan.parts}
    jobs = [job for job, _ in plan.jobs]
    total = sum(job.count for job in jobs)
    with track("shard", total, progress) as tally:
        with open_assembly(out, plan.fingerprint, jobs) as assembly:
            tasks, done = _missing(assembly, plan, settings)
            tally.already(done)
            for job in run_tasks(tasks, workers):
                tally.advance(job.count)
            indexes = _finish(assembly, plan, settings)
        tally.summary = _summary(indexes, out, done)
    return indexes


def plan_shards(src: Path | str, settings: ShardSettings, spool: Path | None) -> ShardPlan:
    """List the images of a source, divide, shuffle and cut them.

    Args:
        spool: folder for copies of what cannot be read otherwise; None: make none, for looking only.

    Raises:
        UserError: as `shard_images`.
    """
    if settings.samples_per_shard < 1:
        raise UserError(
            f"samples_per_shard={settings.samples_per_shard}: a shard holds at least 1 sample; give a larger number"
        )
    options = SourceOptions(
        spool=spool or Path(tempfile.gettempdir()),
        look_only=spool is None,
        classes=settings.classes,
        image_column=settings.image_column,
        label_column=settings.label_column,
        all_formats=settings.storing.encoding != "keep",
        sizes=settings.shard_bytes is not None or spool is None,
        damaged_tars=settings.damaged_tars,
    )
    source = read_source(str(src), settings.form, options)
    parts = _divide(source, settings)
    jobs: list[tuple[ShardJob, int]] = []
    for part, items in parts.items():
        first = 0
        for number, count in enumerate(_cut(items, settings)):
            jobs.append((ShardJob(part, number, count), first))
            first += count
    return ShardPlan(source, parts, jobs, _fingerprint(source, parts, settings))


def _divide(source: Source, settings: ShardSettings) -> dict[str, list[Item]]:
    """Images by part, each part shuffled."""
    parts = source.parts
    if settings.val_fraction is not None:
        if set(parts) - {"", "train"}:
            raise UserError(
                f"the source has the parts {', '.join(parts)} already; leave --val-fraction out, or give one of them"
            )
        items = next(iter(parts.values()))
        is_val = stratified_split(np.array([item.label for item in items]), settings.val_fraction, settings.seed)
        parts = {
            name: [item for item, chosen in zip(items, is_val.tolist(), strict=True) if chosen == (name == "val")]
            for name in ("train", "val")
        }
        if not parts["val"]:
            raise UserError("no class has two images, so none can go to val; leave --val-fraction out")
    return {
        part: [items[i] for i in permutation(len(items), settings.seed, 0, Purpose.SHARD_ORDER).tolist()]
        for part, items in parts.items()
    }


def _cut(items: Sequence[Item], settings: ShardSettings) -> Iterator[int]:
    """Images of each shard in turn."""
    if settings.shard_bytes is None:
        for first in range(0, len(items), settings.samples_per_shard):
            yield min(settings.samples_per_shard, len(items) - first)
        return
    budget = settings.shard_bytes / _growth(items, settings.storing)
    count, size = 0, 0
    for item in items:
        if count and (count == settings.samples_per_shard or size + item.size > budget):
            yield count
            count, size = 0, 0
        count, size = count + 1, size + item.size
    if count:
        yield count


def _growth(items: Sequence[Item], storing: Storing) -> float:
    """Stored bytes a byte of source, from the first images that can be used."""
    if storing.encoding == "keep":
        return 1.0
    before, after = 0, 0
    for item in items[:TRIAL_IMAGES]:
        data = read_item(item)
        try:
            after += len(store_image(data, storing).data)
        except UnusableImage:  # found, counted and listed when its shard is made
            continue
        before += len(data)
    close_files()
    return after / before if before else 1.0


def _fingerprint(source: Source, parts: Mapping[str, Sequence[Item]], settings: ShardSettings) -> str:
    digest = hashlib.sha256()
    for part, items in parts.items():
        digest.update(f"{part}\0{len(items)}\0".encode())
        for item in items:
            digest.update(f"{item.name}\0{item.label}\0{item.size}\n".encode(errors="surrogateescape"))
    said = asdict(settings) | {"classes": source.classes, "form": source.kind, "images": digest.hexdigest()}
    return plan_hash(said)


def _missing(assembly: Assembly, plan: ShardPlan, settings: ShardSettings) -> tuple[Iterator[ShardTask], int]:
    """The shards still to be made, and how many images are in those that are there."""
    missing = [(job, first) for job, first in plan.jobs if assembly.find(job) is None]
    for job, _ in missing:
        assembly.remove_leftovers(job)
    done = sum(job.count for job, _ in plan.jobs) - sum(job.count for job, _ in missing)
    if done:
        log.info("going on: %d of %d shards are there", len(plan.jobs) - len(missing), len(plan.jobs))
    tasks = (
        ShardTask(assembly.out, assembly.plan, job, first, tuple(plan.items(job, first)), settings.storing)
        for job, first in missing
    )
    return tasks, done


def _finish(assembly: Assembly, plan: ShardPlan, settings: ShardSettings) -> dict[str, ShardIndex]:
    records = [(job, first, assembly.find(job)) for job, first in plan.jobs]
    named = [
        (job.part, item, digest)
        for job, first, record in records
        if record is not None
        for item, digest in zip(plan.items(job, first), record.hashes, strict=True)
    ]
    rows = duplicate_rows(named)
    repeated = Counter(row.part for row in rows)
    storing, source = settings.storing, plan.source
    images = ImageFormat(
        encoding=storing.encoding,
        quality=storing.quality if storing.encoding in ("jpeg", "webp") else None,
        shorter_side=storing.shorter_side,
    )

    def describe(part: str, own: list[ShardRecord]) -> ShardIndex:
        shards, skipped, notes = gather(own, source.lost if part == next(iter(plan.parts)) else ())
        if not shards:
            first = f"; {len(skipped)} were skipped, the first is {skipped[0].source}: {skipped[0].reason}"
            raise UserError(
                f"nothing to write into {assembly.out / part}: there is no usable sample{first if skipped else ''}"
            )
        return ShardIndex(
            kind="images",
            samples=sum(shard.samples for shard in shards),
            classes=source.classes,
            images=images,
            shards=shards,
            skipped=skipped,
            notes=notes,
            duplicates=repeated[part],
            plan=plan.fingerprint,
        )

    extra = {os.path.join(part, "classes.json"): class_map(source.classes, source.names) for part in plan.parts}
    if rows:
        extra["duplicates.csv"] = duplicates_csv(rows, source.classes)
    assembly.finish(describe, extra)
    return {part: read_index(assembly.out / part) for part in plan.parts}


def class_map(classes: Sequence[str], names: Sequence[str]) -> str:
    """`classes.json`, which `sample --class-names` takes: number → name, or → [identity, name] where they differ."""
    pairs = [[identity, name] for identity, name in zip(classes, names, strict=True)] if names else list(classes)
    return json.dumps(dict(enumerate(pairs)), indent=1, ensure_ascii=False) + "\n"


def plan_lines(plan: ShardPlan, out: Path) -> list[str]:
    """What `shard_images` would make, as lines of text."""
    source = plan.source
    lines = [f"{source.kind}, {len(source.classes)} classes: {', '.join(source.classes[:10])}"]
    lines[0] += ", …" if len(source.classes) > 10 else ""
    for part, items in plan.parts.items():
        shards = [job for job, _ in plan.jobs if job.part == part]
        size = sum(max(0, item.size) for item in items)
        known = f", {size / 1e6:,.1f} MB as they are" if all(item.size >= 0 for item in items) else ""
        used = len({item.label for item in items})
        lines.append(
            f"{out / part}: {len(items):,} images of {used} classes in {len(shards)} shards, the first of "
            f"{shards[0].count if shards else 0:,} images{known}"
        )
    lines += [f"lost: {name}: {reason}" for name, reason in source.lost]
    return [*lines, "nothing was written (--dry-run)"]


def _summary(indexes: Mapping[str, ShardIndex], out: Path, done: int) -> str:
    lines = []
    for part, index in indexes.items():
        line = f"{index.samples} images of {len(index.classes)} classes in {len(index.shards)} shards at {out / part}"
        if index.skipped:
            line += f"; {len(index.skipped)} skipped, listed in {out / part / INDEX_NAME}"
        if index.duplicates:
            line += f"; {index.duplicates} duplicates, listed in {out / 'duplicates.csv'}"
        if index.notes:
            line += "; " + ", ".join(f"{count} {name}" for name, count in index.notes.items())
        lines.append(line)
    return "\n".join(lines) + (f"; {done} images were there from before" if done else "")
