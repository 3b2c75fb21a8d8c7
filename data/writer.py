"""Writing folders of shards, images and tokens alike: whole or not at all, and byte for byte reproducible."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hmar_mega.data.index import Kind, ShardEntry, ShardIndex, SkippedImage, TokenFormat, write_index
from hmar_mega.data.tars import add_sample, record_shard
from hmar_mega.errors import UserError
from hmar_mega.files import new_folder


@contextmanager
def open_shards(
    out: Path, kind: Kind, classes: Sequence[str], samples_per_shard: int, tokens: TokenFormat | None = None
) -> Iterator[ShardWriter]:
    """Give a `ShardWriter` for the new folder `out`, which appears under its name when the block ends well.

    After an error nothing of it is left.

    Args:
        out: must not exist, or be empty.
        classes: names of labels 0, 1, ….
        tokens: what the tokens are, for kind `tokens`.

    Raises:
        UserError: when `out` is taken or cannot be written, or no sample was written.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard={samples_per_shard}: a shard holds at least 1 sample; give a larger number")
    with new_folder(out) as folder:
        writer = ShardWriter(folder, out, kind, classes, samples_per_shard, tokens)
        try:
            yield writer
            writer.finish()
        finally:
            writer.abandon()


class ShardWriter:
    """Writes samples into tars of `samples_per_shard` in `folder`; made by `open_shards`.

    The same samples in the same order give the same bytes: members carry no time, a fixed owner, and sorted fields.
    """

    def __init__(
        self,
        folder: Path,
        out: Path,
        kind: Kind,
        classes: Sequence[str],
        samples_per_shard: int,
        tokens: TokenFormat | None,
    ) -> None:
        if (kind == "tokens") != (tokens is not None):
            raise ValueError(f"kind={kind!r} does not go with tokens={tokens!r}")
        self._folder = folder
        self._out = out
        self._kind: Kind = kind
        self._classes = tuple(classes)
        self._samples_per_shard = samples_per_shard
        self._tokens = tokens
        self._shards: list[ShardEntry] = []
        self._skipped: list[SkippedImage] = []
        self._file: BinaryIO | None = None
        self._count = 0
        self._index: ShardIndex | None = None

    @property
    def index(self) -> ShardIndex:
        """What was written; there only after the block of `open_shards`."""
        if self._index is None:
            raise RuntimeError("the shards are not finished")
        return self._index

    def write(self, key: str, label: int, fields: Mapping[str, bytes]) -> None:
        """Append a sample: its files by field name (`jpg`, `npy`, `json` …), to which the label is added as `cls`.

        Args:
            key: unique in the folder, without dots.
            label: index into `classes`.
        """
        if "." in key or not 0 <= label < len(self._classes):
            raise ValueError(f"key={key!r} must have no dot, label={label} must be below {len(self._classes)}")
        try:
            if self._file is None:
                self._file = open(self._folder / self._shard_name, "xb")  # noqa: SIM115 closed by _close_shard
                self._tar = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115
            add_sample(self._tar, key, label, fields)
            self._count += 1
            if self._count == self._samples_per_shard:
                self._close_shard()
        except OSError as err:
            raise _cannot_write(self._out, err) from None

    def skip(self, source: str, reason: str) -> None:
        """Record an image that is left out; it is listed in the index."""
        self._skipped.append(SkippedImage(source=source, reason=reason))

    @property
    def _shard_name(self) -> str:
        return f"shard-{len(self._shards):06d}.tar"

    def _close_shard(self) -> None:
        """Finish the open tar, and read it back: what is recorded is what can be found in it."""
        assert self._file is not None
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._shards.append(record_shard(self._folder / self._shard_name, self._count))
        self._count = 0

    def finish(self) -> None:
        """Close the last shard and write the index."""
        try:
            if self._file is not None:
                self._close_shard()
            if not self._shards:
                raise UserError(f"nothing to write into {self._out}: there is no usable sample{self._first_skipped()}")
            self._index = ShardIndex(
                kind=self._kind,
                samples=sum(shard.samples for shard in self._shards),
                classes=self._classes,
                tokens=self._tokens,
                shards=tuple(self._shards),
                skipped=tuple(self._skipped),
            )
            write_index(self._folder, self._index)
        except OSError as err:
            raise _cannot_write(self._out, err) from None

    def _first_skipped(self) -> str:
        if not self._skipped:
            return ""
        first = self._skipped[0]
        return f"; {len(self._skipped)} were skipped, the first is {first.source}: {first.reason}"

    def abandon(self) -> None:
        """Let go of a tar that is still open because of an error; the folder is about to be removed."""
        if self._file is not None:
            with suppress(OSError):  # a full disk fails again here, and must not hide the first error
                self._tar.close()
            with suppress(OSError):
                self._file.close()
            self._file = None


def _cannot_write(out: Path, err: OSError) -> UserError:
    return UserError(f"cannot write {out}: {err.strerror}; give a folder on a disk with room that you may write to")
