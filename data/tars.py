"""Tars, written so that the same samples give the same bytes, and walked so that a lost tail is noticed."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hmar_mega.data.index import LABEL_FIELD, ShardEntry, check_count, file_sha256, scan_tar, write_offsets
from hmar_mega.files import open_atomic

#: What the comment of a tar begins with that says what its tokens are.
TOKENS_COMMENT = "hmar-mega tokens "

Sample = tuple[str, int, Mapping[str, bytes]]


def add_sample(tar: tarfile.TarFile, key: str, label: int, fields: Mapping[str, bytes]) -> None:
    """Append a WebDataset sample: `fields` and its label as `cls`, sorted, without time and with a fixed owner."""
    for field, data in sorted({LABEL_FIELD: str(label).encode(), **fields}.items()):
        member = tarfile.TarInfo(f"{key}.{field}")
        member.size, member.mode, member.uname, member.gname = len(data), 0o444, "root", "root"
        tar.addfile(member, io.BytesIO(data))


def write_shard(path: Path, samples: Iterable[Sample], tokens: Mapping[str, Any] | None = None) -> ShardEntry | None:
    """Write a tar of (key, label, fields) and its offsets, whole or not at all, and read it back.

    Args:
        tokens: what the tokens are, put into the tar itself as a comment (POSIX pax), where `read_comment` finds it.

    Returns:
        What the index records of it; None when there was no sample, and so no tar.

    Raises:
        UserError: when it cannot be written.
    """
    count = 0
    source = iter(samples)
    first = next(source, None)
    if first is None:
        return None
    comment = None if tokens is None else {"comment": TOKENS_COMMENT + json.dumps(tokens, sort_keys=True)}
    with (
        open_atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers=comment) as tar,
    ):
        sample: Sample | None = first
        while sample is not None:
            add_sample(tar, *sample)
            count += 1
            sample = next(source, None)
    return record_shard(path, count)


def record_shard(path: Path, count: int) -> ShardEntry:
    """Read a finished tar back and write its offsets: what is recorded is what can be found in it."""
    entry = ShardEntry(name=path.name, samples=count, bytes=path.stat().st_size, sha256=file_sha256(path))
    offsets = scan_tar(path)
    check_count(path, offsets, count)
    write_offsets(path, entry, offsets)
    return entry


def read_comment(path: Path) -> dict[str, Any] | None:
    """What `write_shard` put into a tar as `tokens`; None where there is nothing of the kind."""
    try:
        with tarfile.open(path, "r:") as archive:
            comment = archive.pax_headers.get("comment", "")
    except (OSError, tarfile.TarError, EOFError, ValueError):
        return None
    if not comment.startswith(TOKENS_COMMENT):
        return None
    found: dict[str, Any] = json.loads(comment.removeprefix(TOKENS_COMMENT))
    return found


class SeekableFile(Protocol):
    """What walking a tar needs of a file."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        ...

    def seek(self, position: int, whence: int = 0, /) -> int:
        """Go to a position."""
        ...

    def tell(self) -> int:
        """The position."""
        ...


@dataclass(frozen=True)
class Member:
    """A file in a tar: where its bytes lie, counted from the start of the tar."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Walk:
    """The files that a tar's headers lead to; `damage`, empty when all is well, says why there may be more."""

    members: tuple[Member, ...]
    damage: str = ""


def walk_tar(file: SeekableFile, length: int) -> Walk:
    """Follow the headers of a tar of `length` bytes to its end marker.

    Python's `tarfile` takes a header it does not understand, and a file that just stops, for the end: whether the end
    marker stands where it stopped is what tells a whole tar from one that lost its tail.
    """
    members: list[Member] = []
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115 the file is the caller's
        for member in archive:
            if not member.isfile():
                continue
            if member.offset_data + member.size > length:
                return Walk(tuple(members), f"{member.name} is cut off by the end of the file")
            members.append(Member(member.name, member.offset_data, member.size))
        end = archive.offset
    except (OSError, tarfile.TarError, EOFError, ValueError) as err:
        return Walk(tuple(members), str(err) or type(err).__name__)
    file.seek(end)
    marker = file.read(tarfile.BLOCKSIZE)
    if marker.count(0) != tarfile.BLOCKSIZE:
        what = "nothing" if not marker else "no header and no end marker"
        return Walk(tuple(members), f"at byte {end} there is {what}: what came after it is lost")
    return Walk(tuple(members))


def samples_of(walk: Walk) -> Iterator[tuple[str, dict[str, Member]]]:
    """Each sample's key and files by field, in stored order.

    A sample is a run of files with the same key: their name up to the first dot of its last part (WebDataset's rule).
    """
    key, fields = "", dict[str, Member]()
    for member in walk.members:
        folder, _, last = member.name.rpartition("/")
        stem, _, field = last.partition(".")
        here = f"{folder}/{stem}" if folder else stem
        if here != key and fields:
            yield key, fields
            fields = {}
        key = here
        fields[field.lower()] = member
    if fields:
        yield key, fields
