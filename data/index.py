"""What a folder of shards holds: `index.json`, and beside each tar where in it every sample lies.

    folder/index.json                   kind, classes, shards with their counts and checksums
    folder/shard-000000.tar             WebDataset tar; a sample is a run of members `key.field`
    folder/shard-000000.offsets.npz     offset and size of every field, keys and labels: reading needs no tar scan

The index is what the writer recorded; a tar that no longer agrees with it is an error that names the shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hmar_mega.data.patience import still_reading
from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic

Kind = Literal["images", "tokens"]

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
LABEL_FIELD = "cls"

#: Bytes of a file that are hashed at once: what a disk gives in seconds, however slow.
_BLOCK = 1 << 20

log = logging.getLogger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardEntry(_Record):
    """One tar as its writer recorded it; `sha256` is that of the whole file."""

    name: str
    samples: int
    bytes: int
    sha256: str


class SkippedImage(_Record):
    """An image left out when the shards were made, and why."""

    source: str
    reason: str


class TokenFormat(_Record):
    """What the tokens of a folder are: `patch_nums` splits a sample's N integers into its K maps.

    Attributes:
        crops: k, the encodings of every image, of crops drawn with `crop_seed`; 1: of its centre.
        storage, bits: how a sample is stored, see `hmar_mega.data.tokens`.
        augment: "crop" when the shorter side was 1.125 × resolution before the crop, "none" when it was the resolution.
        compute: the precision of the tokenizer's convolutions.
    """

    patch_nums: tuple[int, ...]
    codebook_size: int
    fingerprint: str
    resolution: int
    crops: int = Field(1, ge=1)
    crop_seed: int | None = None
    storage: Literal["npy", "packed"] = "npy"
    bits: int = Field(16, ge=1, le=16)
    augment: Literal["crop", "none"] | None = None
    compute: Literal["fp32", "bf16"] = "fp32"


class ImageFormat(_Record):
    """How images were stored: as they came (`keep`), or encoded anew with a quality, and perhaps made smaller."""

    encoding: Literal["keep", "jpeg", "png", "webp"]
    quality: int | None = None
    shorter_side: int | None = None


class ShardIndex(_Record):
    """The content of `index.json`.

    Attributes:
        classes: the names of labels 0, 1, ….
        tokens: None for images.
        images: how images were stored; None for tokens, and where it is not known.
        notes: peculiarities met and dealt with, such as "palette", with the number of images.
        duplicates: images whose file has the bytes of an earlier one; `duplicates.csv` names them.
        plan: names source and options that it was made from, see `hmar_mega.data.assembly`.
    """

    format: int = FORMAT_VERSION
    kind: Kind
    samples: int
    classes: tuple[str, ...]
    tokens: TokenFormat | None = None
    images: ImageFormat | None = None
    shards: tuple[ShardEntry, ...]
    skipped: tuple[SkippedImage, ...] = ()
    notes: dict[str, int] = {}
    duplicates: int = 0
    plan: str | None = None


@dataclass(frozen=True)
class Offsets:
    """Where the samples of one tar lie: n samples with fields of F different names.

    Attributes:
        fields: the F names, sorted.
        keys: (n,) bytes.
        labels: (n,) int64.
        starts, sizes: (n, F) int64, in bytes from the start of the tar; size −1 where a sample lacks the field.
    """

    fields: tuple[str, ...]
    keys: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write `index.json` into `folder`, atomically and always with the same bytes for the same index."""
    write_atomic(folder / INDEX_NAME, index.model_dump_json(indent=1) + "\n")


def read_index(folder: Path) -> ShardIndex:
    """Read `index.json` of a folder of shards.

    Raises:
        UserError: when there is none, or it is not an index of this version.
    """
    path = folder / INDEX_NAME
    try:
        tree = json.loads(path.read_bytes())
    except OSError as err:
        raise UserError(_no_index(folder, err)) from None
    except ValueError as err:
        raise UserError(f"{path} is not an index of shards: {err}; make the shards anew") from None
    version = tree.get("format") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:  # looked at first: another version may have other keys
        raise UserError(
            f"{path} has format {version}, this version reads format {FORMAT_VERSION}; "
            "make the shards anew, or use the version of hmar-mega that made them"
        )
    try:
        index = ShardIndex.model_validate(tree)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is not an index of shards: {where}: {first['msg']}; make the shards anew") from None
    if index.samples != sum(shard.samples for shard in index.shards) or (index.kind == "tokens") != bool(index.tokens):
        raise UserError(f"{path} contradicts itself (samples, kind or tokens); make the shards anew")
    return index


def require_kind(folder: Path, index: ShardIndex, wanted: Kind) -> None:
    """Raise UserError, with the way to get the wanted kind, when `folder` holds the other kind of shards."""
    if index.kind == wanted:
        return
    if wanted == "images":
        mend = "give the folder of image shards it was encoded from, or make one with `hmar-mega data shard`"
    else:
        mend = "turn it into token shards with `hmar-mega data encode`"
    raise UserError(f"{folder} holds {index.kind}, but {wanted} are needed here; {mend}")


def load_offsets(folder: Path, shard: ShardEntry) -> Offsets:
    """The offsets of one tar, from its file; that file is rebuilt from the tar when missing or made for another tar.

    Raises:
        UserError: when the tar is missing, or its size, checksum (looked at only when rebuilding) or number of samples
            is not what the index says.
    """
    tar = folder / shard.name
    try:
        size = tar.stat().st_size
    except OSError as err:
        raise UserError(f"shard {tar} cannot be read ({err.strerror}); restore it, or make the shards anew") from None
    if size != shard.bytes:
        state = "truncated" if size < shard.bytes else "changed"
        raise UserError(
            f"shard {tar} is {state}: it has {size} bytes, its index says {shard.bytes}; restore it or make it anew"
        )
    path = offsets_path(tar)
    try:
        return stored_offsets(tar, shard)
    except FileNotFoundError:
        why = "is missing"
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as err:
        why = f"does not fit {shard.name} ({err})"
    log.warning("%s %s: rebuilding it from %s, all of whose %.1f MB are read", path, why, shard.name, size / 1e6)
    return _rebuild(tar, shard)


def stored_offsets(tar: Path, shard: ShardEntry) -> Offsets:
    """The offsets of a tar from the file beside it, whatever became of the tar.

    Raises:
        OSError, ValueError, KeyError, EOFError, BadZipFile: when that file is missing, damaged or for another tar.
    """
    return _unpack(offsets_path(tar).read_bytes(), shard)


def write_offsets(tar: Path, shard: ShardEntry, offsets: Offsets) -> None:
    """Write the offsets of `tar` beside it, bound to the tar's checksum."""
    packed = io.BytesIO()
    np.savez_compressed(
        packed,
        sha256=np.array(shard.sha256),
        fields=np.array(offsets.fields),
        keys=offsets.keys,
        labels=offsets.labels,
        starts=offsets.starts,
        sizes=offsets.sizes,
    )
    write_atomic(offsets_path(tar), packed.getvalue())


def offsets_path(tar: Path) -> Path:
    """`shard-000000.tar` → `shard-000000.offsets.npz`."""
    return tar.with_suffix(".offsets.npz")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            still_reading()
    return digest.hexdigest()


def scan_tar(tar: Path) -> Offsets:
    """Find the samples of a tar by walking its headers, samples in stored order.

    A sample is a run of files with the same key: their name up to the first dot of its last part (WebDataset's rule).

    Raises:
        UserError: when the tar is damaged, or a sample has a field twice or no whole number in `cls`.
    """
    keys: list[str] = []
    labels: list[int | None] = []
    members: list[dict[str, tuple[int, int]]] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                still_reading()
                stem, _, field = Path(member.name).name.partition(".")
                key = str(Path(member.name).with_name(stem))
                if not keys or key != keys[-1]:
                    keys.append(key)
                    labels.append(None)
                    members.append({})
                if field in members[-1]:
                    raise ValueError(f"sample {key} has field {field} twice")
                members[-1][field] = (member.offset_data, member.size)
                if field == LABEL_FIELD:
                    labels[-1] = int(_content(archive, member))
    except (OSError, tarfile.TarError, EOFError, ValueError) as err:
        raise UserError(f"shard {tar} is damaged: {err}; restore it or make it anew") from None
    unlabelled = [key for key, label in zip(keys, labels, strict=True) if label is None]
    if unlabelled:
        raise UserError(f"shard {tar}: sample {unlabelled[0]} has no field {LABEL_FIELD}; make the shards anew")
    fields = tuple(sorted({field for sample in members for field in sample}))
    places = np.array([[sample.get(field, (-1, -1)) for field in fields] for sample in members], dtype=np.int64)
    places = places.reshape(len(members), len(fields), 2)
    encoded = np.array([key.encode() for key in keys], dtype=bytes)
    return Offsets(fields, encoded, np.array(labels, dtype=np.int64), places[..., 0], places[..., 1])


def check_count(tar: Path, offsets: Offsets, expected: int) -> None:
    """Raise UserError unless the tar holds as many samples as its writer recorded."""
    if len(offsets) != expected:
        raise UserError(
            f"shard {tar} is damaged: {len(offsets)} samples can be read in it, {expected} were written; "
            "restore it or make it anew"
        )


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is not a file")
    return file.read()


def _unpack(packed: bytes, shard: ShardEntry) -> Offsets:
    with np.load(io.BytesIO(packed), allow_pickle=False) as stored:
        if str(stored["sha256"]) != shard.sha256:
            raise ValueError("made for a tar with another checksum")
        fields = tuple(str(field) for field in stored["fields"])
        offsets = Offsets(fields, stored["keys"], stored["labels"], stored["starts"], stored["sizes"])
    count, places = (shard.samples,), (shard.samples, len(fields))
    shapes = (offsets.keys.shape, offsets.labels.shape, offsets.starts.shape, offsets.sizes.shape)
    if shapes != (count, count, places, places):
        raise ValueError(f"it is not for {shard.samples} samples")
    return offsets


def _rebuild(tar: Path, shard: ShardEntry) -> Offsets:
    offsets = scan_tar(tar)
    check_count(tar, offsets, shard.samples)
    if file_sha256(tar) != shard.sha256:
        raise UserError(f"shard {tar} has changed since it was written: its checksum is not the one in the index")
    try:
        write_offsets(tar, shard, offsets)
    except UserError as err:  # as in a folder that may only be read
        log.warning("the offsets of %s are kept in memory only: %s", tar, err)
    return offsets


def _no_index(folder: Path, err: OSError) -> str:
    inside = sorted(sub.name for sub in folder.iterdir() if (sub / INDEX_NAME).is_file()) if folder.is_dir() else []
    if inside:
        found = " or ".join(str(folder / sub) for sub in inside)
        return f"{folder} is not a folder of shards itself, but has such folders in it; use {found}"
    return (
        f"{folder} is not a folder of shards: {INDEX_NAME} cannot be read ({err.strerror}); "
        "make one with `hmar-mega data demo`, `data shard` or `data encode`"
    )
