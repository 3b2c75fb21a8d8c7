"""Whether a folder of shards still is what its index says: shard by shard, and what is lost where it is not."""

from __future__ import annotations

import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from hmar_mega.data.index import (
    INDEX_NAME,
    LABEL_FIELD,
    ShardEntry,
    ShardIndex,
    TokenFormat,
    file_sha256,
    offsets_path,
    read_index,
)
from hmar_mega.data.pixels import PILLOW_LIMIT, Storing, UnusableImage, store_image
from hmar_mega.data.processes import map_processes
from hmar_mega.data.tars import Member, read_comment, samples_of, walk_tar
from hmar_mega.errors import UserError
from hmar_mega.progress import track

#: Samples that are named of those with one and the same problem.
NAMED = 5

#: Fields that hold an image.
IMAGE_FIELDS = ("jpg", "png", "webp")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a folder, or with the shard that is named: what, in short and in words."""

    kind: str
    text: str
    shard: str = ""


@dataclass(frozen=True)
class ShardReport:
    """A shard: samples that its writer recorded, those that are there and whole, and what is wrong."""

    name: str
    recorded: int
    whole: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Report:
    """A folder: what the index says, what is there, and everything that is wrong."""

    folder: str
    kind: str
    deep: bool
    recorded: int
    whole: int
    shards: tuple[ShardReport, ...]
    problems: tuple[Problem, ...]

    def tree(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self) | {"lost": self.recorded - self.whole, "good": not self.problems}


@dataclass(frozen=True)
class _Task:
    folder: Path
    entry: ShardEntry
    classes: int
    tokens: TokenFormat | None
    deep: bool


def check_folders(root: Path, deep: bool = False, workers: int = 1, fingerprint: str | None = None) -> list[Report]:
    """Check a folder of shards, or each folder of shards in `root`.

    Args:
        deep: also decode every image, and look at every token.
        workers: processes.
        fingerprint: of the tokenizer that token shards should come from.

    Raises:
        UserError: when there is no index that can be read.
    """
    folders = [root] if (root / INDEX_NAME).exists() else sorted(path.parent for path in root.glob(f"*/{INDEX_NAME}"))
    if not folders:
        read_index(root)  # says what is missing
    return [check_folder(folder, deep, workers, fingerprint) for folder in folders]


def check_folder(
    folder: Path, deep: bool = False, workers: int = 1, fingerprint: str | None = None, progress: bool = True
) -> Report:
    """Check one folder of shards; see `check_folders`."""
    index = read_index(folder)
    tasks = [_Task(folder, entry, len(index.classes), index.tokens, deep) for entry in index.shards]
    reports: dict[str, ShardReport] = {}
    keys: dict[bytes, list[str]] = defaultdict(list)
    with track("check", index.samples, progress) as tally:
        for report, found in map_processes(_check_shard, tasks, workers):
            reports.setdefault(report.name, report)
            for key in found:
                keys[key].append(report.name)
            tally.advance(report.recorded)
    whole = sum(report.whole for report in reports.values())
    shards = tuple(reports[name] for name in dict.fromkeys(entry.name for entry in index.shards))
    problems = [problem for report in shards for problem in report.problems]
    problems += _folder_problems(folder, index, keys, fingerprint)
    recorded = sum(report.recorded for report in shards)  # not the index's own sum: a shard may stand in it twice
    return Report(str(folder), index.kind, deep, recorded, whole, shards, tuple(problems))


def _folder_problems(
    folder: Path, index: ShardIndex, keys: dict[bytes, list[str]], fingerprint: str | None
) -> Iterator[Problem]:
    names = Counter(entry.name for entry in index.shards)
    for name, count in names.items():
        if count > 1:
            yield Problem("twice", f"stands in the index {count} times: its samples would be read {count} times", name)
    by_hash: dict[str, list[str]] = defaultdict(list)
    for entry in {entry.name: entry for entry in index.shards}.values():
        by_hash[entry.sha256].append(entry.name)
    for same in by_hash.values():
        if len(same) > 1:
            yield Problem("twice", f"has the same bytes as {', '.join(same[1:])}", same[0])
    copied = {name for same in by_hash.values() if len(same) > 1 for name in same}
    repeated = [key for key, where in keys.items() if len(where) > names[where[0]] and not copied.issuperset(where)]
    if repeated:
        key = min(repeated)
        text = f"{len(repeated)} keys come more than once, such as {key.decode()} in {', '.join(keys[key])}"
        yield Problem("keys", text)
    for path in sorted(folder.glob("*.tar")):
        if path.name not in names:
            yield Problem("unknown", "is not in the index, and is never read", path.name)
    for path in sorted(folder.glob(".*.tar.*")):
        yield Problem("leftover", "is what a killed process left; remove it", path.name)
    if fingerprint is not None and index.tokens is not None and index.tokens.fingerprint != fingerprint:
        text = f"the tokens are those of tokenizer {index.tokens.fingerprint}, not of the one given, {fingerprint}"
        yield Problem("tokenizer", text)


def _check_shard(task: _Task) -> tuple[ShardReport, list[bytes]]:
    """A shard's report, and the keys in it."""
    entry, path = task.entry, task.folder / task.entry.name
    found: list[Problem] = []

    def tell(kind: str, text: str) -> None:
        found.append(Problem(kind, text, entry.name))

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size != entry.bytes:
                state = "empty" if size == 0 else "truncated" if size < entry.bytes else "too long"
                tell("size", f"{state}: {size:,} bytes, {entry.bytes:,} were written")
            elif file_sha256(path) != entry.sha256:
                tell("checksum", "its checksum is not the one in the index: its bytes have changed")
            walk = walk_tar(file, size)
            if walk.damage:
                tell("headers", f"after {len(walk.members)} files: {walk.damage}")
            samples = list(samples_of(walk))
            labels: list[int] = []
            whole = _check_samples(file.fileno(), samples, task, labels, tell)
    except OSError as err:
        tell("missing", f"cannot be read: {err.strerror}")
        return ShardReport(entry.name, entry.samples, 0, tuple(found)), []
    if len(samples) != entry.samples:
        tell("count", f"{len(samples):,} samples can be found in it, {entry.samples:,} were written")
    elif entry.samples == 0:
        tell("count", "it has no samples")
    if not found:  # and so every sample has its label
        _check_offsets(path, entry, samples, labels, tell)
    _check_comment(path, task.tokens, tell)
    return ShardReport(entry.name, entry.samples, whole, tuple(found)), [key.encode() for key, _ in samples]


def _check_samples(
    descriptor: int, samples: Sequence[tuple[str, dict[str, Member]]], task: _Task, labels: list[int], tell: Any
) -> int:
    """How many samples are whole; tells of those that are not, and puts the labels of the others into `labels`."""
    bad: dict[str, list[str]] = defaultdict(list)
    content = _content_check(task)
    for key, fields in samples:
        label = _label(descriptor, fields, task.classes)
        if isinstance(label, int):
            labels.append(label)
        problem = content(descriptor, fields) if isinstance(label, int) else ("label", label)
        if problem:
            bad[problem[0]].append(f"{key} ({problem[1]})")
    for kind, where in bad.items():
        more = f" and {len(where) - NAMED} more" if len(where) > NAMED else ""
        tell(kind, f"{len(where)} samples: {', '.join(where[:NAMED])}{more}")
    return len(samples) - sum(len(where) for where in bad.values())


def _label(descriptor: int, fields: dict[str, Member], classes: int) -> int | str:
    """The label of a sample, or what is wrong with it."""
    if LABEL_FIELD not in fields:
        return "no label"
    text = _read(descriptor, fields[LABEL_FIELD])
    try:
        label = int(text)
    except ValueError:
        return f"label {text[:20]!r}"
    return label if 0 <= label < classes else f"label {label} of {classes} classes"


def _content_check(task: _Task) -> Any:
    """A function that tells what is wrong with the image, or the tokens, of a sample; None: nothing."""
    if task.tokens is None:
        return _image_check(task.deep)
    from hmar_mega.data.tokens import TokenCodec  # needs torch, which images do not

    codec, crops, deep = TokenCodec(task.tokens), task.tokens.crops, task.deep

    def check(descriptor: int, fields: dict[str, Member]) -> tuple[str, str] | None:
        if codec.field not in fields:
            return "content", f"no field {codec.field}"
        if fields[codec.field].size != codec.sample_bytes:
            return "content", f"{fields[codec.field].size} bytes of tokens, not {codec.sample_bytes}"
        if not deep:
            return None
        data = _read(descriptor, fields[codec.field])
        try:
            for crop in range(crops):
                codec.decode(data, "it", crop)
        except UserError as err:
            return "content", str(err).split(";")[0]
        return None

    return check


def _image_check(deep: bool) -> Any:
    def check(descriptor: int, fields: dict[str, Member]) -> tuple[str, str] | None:
        images = [field for field in IMAGE_FIELDS if field in fields]
        if len(images) != 1:
            return "content", f"{len(images)} images"
        if not deep:
            return None
        try:
            store_image(_read(descriptor, fields[images[0]]), Storing(max_pixels=PILLOW_LIMIT))  # as training reads
        except UnusableImage as err:
            return "content", str(err)
        return None

    return check


def _check_offsets(
    tar: Path, entry: ShardEntry, samples: list[tuple[str, dict[str, Member]]], labels: list[int], tell: Any
) -> None:
    """The file of offsets against the tar: reading trusts it."""
    try:
        with np.load(io.BytesIO(offsets_path(tar).read_bytes()), allow_pickle=False) as stored:
            same = str(stored["sha256"]) == entry.sha256
            fields, starts, sizes = stored["fields"].tolist(), stored["starts"], stored["sizes"]
            same = same and stored["keys"].tolist() == [key.encode() for key, _ in samples]
            same = same and stored["labels"].tolist() == labels
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as err:
        why = "is missing" if isinstance(err, FileNotFoundError) else f"cannot be read ({err})"
        tell("offsets", f"{offsets_path(tar).name} {why}; it is made anew when the shard is read")
        return
    places = [[(f[field].start, f[field].size) if field in f else (-1, -1) for field in fields] for _, f in samples]
    expected = np.array(places, np.int64).reshape(len(samples), len(fields), 2)
    if not same or not np.array_equal(expected[..., 0], starts) or not np.array_equal(expected[..., 1], sizes):
        tell("offsets", f"{offsets_path(tar).name} does not fit the tar; remove it, and it is made anew")


def _check_comment(tar: Path, tokens: TokenFormat | None, tell: Any) -> None:
    """The tokenizer that the tar itself names; tars of earlier versions name none."""
    comment = None if tokens is None else read_comment(tar)
    if tokens is not None and comment is not None and comment.get("fingerprint") != tokens.fingerprint:
        tell(
            "tokenizer",
            f"it was made by tokenizer {comment.get('fingerprint')}, the index says {tokens.fingerprint}",
        )


def _read(descriptor: int, member: Member) -> bytes:
    return os.pread(descriptor, member.size, member.start)


def report_lines(report: Report) -> list[str]:
    """A report as lines of text: a verdict, then every shard that has problems."""
    lost = report.recorded - report.whole
    how = "every sample decoded" if report.deep else "contents not decoded (--deep does)"
    state = "good" if not report.problems else f"{len(report.problems)} problems"
    lines = [
        f"{report.folder}: {state}; {report.whole:,} of {report.recorded:,} samples whole, {lost:,} lost, "
        f"{len(report.shards):,} shards, {how}"
    ]
    if not report.problems:
        return lines
    width = max(len(problem.shard or "the folder") for problem in report.problems)
    recorded = {shard.name: shard for shard in report.shards}
    lines.append(f"  {'shard':<{width}} {'whole':>17}  {'problem':<9}  what")
    for problem in report.problems:
        shard = recorded.get(problem.shard)
        counts = f"{shard.whole:,}/{shard.recorded:,}" if shard else ""
        lines.append(f"  {problem.shard or 'the folder':<{width}} {counts:>17}  {problem.kind:<9}  {problem.text}")
    return lines
