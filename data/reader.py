"""Random access to the samples of a folder of shards: `ShardReader` gives sample i, or says what is wrong with it.

Whatever a shard has become since its index was written, a read gives the bytes that were written or raises `Damage`:
the file must be the one that was opened, or have the checksum of the index, and before every sample its tar header is
compared with name and size in the index.
"""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from hmar_mega.data.cache import ShardCache
from hmar_mega.data.damage import Damage, DamagePolicy
from hmar_mega.data.index import (
    Kind,
    Offsets,
    ShardIndex,
    load_offsets,
    read_index,
    require_kind,
    stored_offsets,
)
from hmar_mega.data.patience import read_patiently
from hmar_mega.data.shard_files import ShardFiles
from hmar_mega.data.threads import map_ahead
from hmar_mega.data.tokens import TOKEN_FIELD, TokenCodec, npy_bytes
from hmar_mega.errors import UserError

__all__ = ["TOKEN_FIELD", "Sample", "ShardReader", "check_fingerprint", "npy_bytes"]

log = logging.getLogger(__name__)

#: Bytes of a tar header, which stands directly before the content of its file.
HEADER = 512

#: Threads that find the offsets of shards.
OPENERS = 8

#: Names of an image's field in a sample: the format of its bytes.
IMAGE_FIELDS = ("jpg", "png", "webp")


@dataclass(frozen=True)
class ImageSample:
    """One image: the bytes of its file. `where` names shard and key, for messages."""

    key: str
    label: int
    data: bytes
    where: str


@dataclass(frozen=True)
class TokenSample:
    """One image as tokens, (N,) int64, its K maps one after the other. `where` names shard and key, for messages."""

    key: str
    label: int
    tokens: np.ndarray
    where: str


Sample = ImageSample | TokenSample


class ShardReader:
    """Random access to the samples of a folder of shards, numbered in stored order.

    Samples are read with `pread`, which shares no file position, so threads and forked processes may read at once. A
    reader can be sent to another process, which then opens the folder anew.

    Args:
        kind: what the folder must hold.
        policy: under `skip`, a shard that cannot be used as a whole is kept with its samples as damaged, those before
            the end of one that was cut off still readable; under `stop` it is refused.
        cache: keeps copies of the shards on a local disk.

    Raises:
        UserError: when the folder is not what `kind` says; Damage when a shard no longer agrees with the index.
    """

    def __init__(
        self, folder: Path, kind: Kind, policy: DamagePolicy | None = None, cache: ShardCache | None = None
    ) -> None:
        self.folder = Path(folder)
        self.kind: Kind = kind
        self.policy = policy or DamagePolicy()
        self.index: ShardIndex = read_index(self.folder)
        require_kind(self.folder, self.index, kind)
        self._cache = cache
        self._codec = None if self.index.tokens is None else TokenCodec(self.index.tokens)
        self._files = ShardFiles(self.folder, self.index.shards, self.policy, cache)
        self._shards = self._open_shards()
        self._starts = [0, *itertools.accumulate(self.shard_sizes)]
        self._columns = [self._find_columns(shard) for shard in range(len(self._shards))]

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path, Kind, DamagePolicy, ShardCache | None]]:
        return ShardReader, (self.folder, self.kind, self.policy, self._cache)

    def __len__(self) -> int:
        return self.index.samples

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of every shard, in stored order."""
        return [shard.samples for shard in self.index.shards]

    @property
    def lost(self) -> dict[str, tuple[int, str]]:
        """Shards that cannot be used: how many samples each has, and what is wrong with it."""
        shards = self.index.shards
        return {shards[n].name: (shards[n].samples, str(damage)) for n, damage in self._files.lost.items()}

    def read(self, index: int) -> Sample:
        """Sample `index`, an image or tokens as the folder holds.

        Raises:
            IndexError: when `index` is not in [0, len).
            Damage: when its bytes cannot be read or are not tokens; names the shard and the key.
        """
        return self.read_image(index) if self.index.kind == "images" else self.read_tokens(index)

    def read_image(self, index: int) -> ImageSample:
        """Sample `index` of image shards; see `read`."""
        return ImageSample(*self._read(index))

    def read_tokens(self, index: int, crop: int = 0) -> TokenSample:
        """Sample `index` of token shards, of its stored crops the one with number `crop`; see `read`."""
        key, label, data, where = self._read(index)
        assert self._codec is not None
        try:
            return TokenSample(key, label, self._codec.decode(data, where, crop), where)
        except UserError as err:
            raise Damage(str(err), "content") from None

    def stalled(self, index: int) -> Damage:
        """The damage of a sample whose read gave no answer; its shard's further reads fail at once for a while."""
        return self._files.stalled(self._shard_of(index))

    def try_again(self) -> None:
        """Read again from shards whose reads failed a moment ago."""
        self._files.try_again()

    def close(self) -> None:
        """Close the files, which also happens when the reader is forgotten; reading opens them again."""
        self._files.close()

    def _open_shards(self) -> list[Offsets | None]:
        """The offsets of every shard, None for one that is lost; found by a few threads, and not for ever."""
        numbers = range(len(self.index.shards))
        parts = [numbers[first::OPENERS] for first in range(min(OPENERS, len(numbers)))]

        def open_part(part: range) -> list[Offsets | Damage]:
            return read_patiently(self._open_shard, part, self.policy, self._silent_shard)

        found: dict[int, Offsets | Damage] = {}
        for part, offsets in zip(parts, map_ahead(open_part, parts, len(parts)), strict=True):
            found.update(zip(part, offsets, strict=True))
        for number in numbers:
            damage = found[number]
            if isinstance(damage, Damage):
                if self.policy.on_damage == "stop":
                    raise damage
                log.warning("%s; its %d samples count as damaged", damage, self.index.shards[number].samples)
                self._files.lost[number] = damage
        return [None if isinstance(found[n], Damage) else found[n] for n in numbers]  # type: ignore[misc]

    def _open_shard(self, number: int) -> Offsets:
        shard = self.index.shards[number]
        tar = self._files.path(number)
        try:
            self._files.remember(number)
            if self.policy.on_damage == "skip" and tar.stat().st_size < shard.bytes:
                offsets = stored_offsets(tar, shard)
                log.warning("shard %s is truncated: what lies behind its end counts as damaged, when it is read", tar)
                return offsets
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            pass  # without stored offsets nothing of such a shard can be used; the next line says why
        try:
            return load_offsets(self.folder, shard)
        except UserError as err:
            raise Damage(str(err), "changed" if tar.exists() else "missing") from None

    def _silent_shard(self, number: int) -> Damage:
        path, seconds = self._files.path(number), self.policy.timeout
        return Damage(f"shard {path} gives no answer within {seconds:g} s", "slow", passing=True)

    def _shard_of(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def _read(self, index: int) -> tuple[str, int, bytes, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = self._shard_of(index)
        row = index - self._starts[shard]
        offsets, columns = self._shards[shard], self._columns[shard]
        if offsets is None or columns is None:
            raise self._files.lost[shard].again()
        column = columns[row]
        key = offsets.keys[row].decode()
        where = f"{self._files.name(shard)}: sample {key}"
        size, start = int(offsets.sizes[row, column]), int(offsets.starts[row, column])
        data = self._files.read(shard, HEADER + size, start - HEADER, where)
        _check_header(data[:HEADER], f"{key}.{offsets.fields[column]}", size, where)
        return key, int(offsets.labels[row]), data[HEADER:], where

    def _find_columns(self, shard: int) -> np.ndarray | None:
        """For each sample of a shard the column of `Offsets` that holds its content, (n,) int64."""
        offsets = self._shards[shard]
        if offsets is None:
            return None
        wanted = IMAGE_FIELDS if self._codec is None else (self._codec.field,)
        present = (offsets.sizes >= 0) & np.isin(offsets.fields, wanted)[None, :]
        where = self._files.path(shard)
        if not (present.sum(axis=1) == 1).all():
            row = int(np.argmax(present.sum(axis=1) != 1))
            raise UserError(
                f"shard {where}: sample {offsets.keys[row].decode()} must have exactly one field of "
                f"{', '.join(wanted)}; make the shards anew"
            )
        classes = len(self.index.classes)
        if len(offsets) and not (offsets.labels.min() >= 0 and offsets.labels.max() < classes):
            raise UserError(f"shard {where} has labels outside 0 … {classes - 1}; make the shards anew")
        columns: np.ndarray = present.argmax(axis=1)
        return columns


def _check_header(header: bytes, name: str, size: int, where: str) -> None:
    """Raise Damage unless a tar header is that of file `name` with `size` bytes."""
    stored = header[:100].rstrip(b"\0").decode(errors="replace").removeprefix("./")
    try:
        named = stored == name or len(name) >= 100 or name.endswith(f"/{stored}")  # long names are kept elsewhere
        right = named and int(header[124:135], 8) == size
    except ValueError:
        right = False
    if not right:
        raise Damage(
            f"{where} is not where the index says: the header before it names {stored[:40]!r}; restore the shard or "
            "make it anew", "content",
        )  # fmt: skip


def check_fingerprint(index: ShardIndex, tokenizer_fingerprint: str, patch_nums: Sequence[int] | None = None) -> None:
    """Make sure that token shards go with a tokenizer, and with a model's scales where `patch_nums` is given.

    Raises:
        UserError: when the shards were made by another tokenizer or for other scales.
    """
    if index.tokens is None:
        raise UserError("the shards hold images, not tokens; turn them into token shards with `hmar-mega data encode`")
    if index.tokens.fingerprint != tokenizer_fingerprint:
        raise UserError(
            f"the token shards were made by tokenizer {index.tokens.fingerprint}, but the one given is "
            f"{tokenizer_fingerprint}; give that tokenizer, or encode the images anew with `hmar-mega data encode`"
        )
    if patch_nums is not None and tuple(patch_nums) != index.tokens.patch_nums:
        raise UserError(
            f"the token shards have patch_nums {list(index.tokens.patch_nums)}, but {list(patch_nums)} are asked for; "
            "set schedule.patch_nums to those of the shards, or encode the images anew with `hmar-mega data encode`"
        )
