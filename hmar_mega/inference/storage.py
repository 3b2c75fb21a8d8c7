"""Chunks of generated images on disk: as .npz, PNG files or image shards, each chunk whole or absent.

    npz     OUT/chunks/000000.npz …      → OUT/samples.npz: arr_0 (n, H, W, 3) uint8 as in ADM, labels and seeds (n,)
    png     OUT/images/000000.png …      → OUT/labels.csv: file, class, seed
    shards  OUT/shards/shard-000000.tar … → OUT/shards/index.json: image shards, as `hmar-mega data shard` makes them

A chunk is written through a temporary and a rename, and its bytes depend on its images alone, so that processes need
not talk to each other: two that finish at once write the same files.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from PIL import Image

from hmar_mega.data.index import ShardIndex, write_index
from hmar_mega.data.tars import add_sample, record_shard
from hmar_mega.errors import UserError
from hmar_mega.files import open_atomic, write_atomic

Format = Literal["npz", "png", "shards"]
FORMATS: tuple[Format, ...] = ("npz", "png", "shards")


@dataclass(frozen=True)
class Chunk:
    """The images `start` … `start + len(labels) − 1` of a generation.

    Attributes:
        number: 0-based.
        labels, seeds: (n,) int64.
    """

    number: int
    start: int
    labels: np.ndarray
    seeds: np.ndarray


class Store(Protocol):
    """A format of generated images."""

    result: Path  #: file or folder that `finish` leaves

    def complete(self, chunk: Chunk) -> bool:
        """Whether the chunk is on disk."""

    def write(self, chunk: Chunk, images: np.ndarray) -> None:
        """Write a chunk, images (n, H, W, 3) uint8."""

    def finished(self) -> bool:
        """Whether `finish` has been done."""

    def finish(self, chunks: Sequence[Chunk]) -> None:
        """Put all chunks, which are complete, together."""


def open_store(out: Path, form: Format, classes: Sequence[str], width: int) -> Store:
    """The store of `form` in the folder `out`.

    Args:
        classes: names of the model's classes.
        width: side of the images in pixels.
    """
    if form == "npz":
        return NpzStore(out, width)
    return PngStore(out) if form == "png" else ShardStore(out, classes)


class NpzStore:
    """One .npz, in the layout of ADM's (`arr_0`)."""

    def __init__(self, out: Path, width: int) -> None:
        self.result, self._chunks, self._width = out / "samples.npz", out / "chunks", width

    def complete(self, chunk: Chunk) -> bool:
        """Whether the chunk's file is there."""
        return self._path(chunk).exists()

    def write(self, chunk: Chunk, images: np.ndarray) -> None:
        """Write `chunks/000000.npz`."""
        with open_atomic(self._path(chunk)) as file:
            write_npz(file, {"arr_0": images, "labels": chunk.labels, "seeds": chunk.seeds})

    def finished(self) -> bool:
        """Whether `samples.npz` is there."""
        return self.result.exists()

    def finish(self, chunks: Sequence[Chunk]) -> None:
        """Write `samples.npz`, holding one chunk at a time in memory."""
        count = sum(len(chunk.labels) for chunk in chunks)

        def pieces() -> Iterable[np.ndarray]:
            return (self._read(chunk) for chunk in chunks)

        images = _Pieces((count, self._width, self._width, 3), np.dtype(np.uint8), pieces)
        labels, seeds = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("labels", "seeds"))
        with open_atomic(self.result) as file:
            write_npz(file, {"arr_0": images, "labels": labels, "seeds": seeds})

    def _path(self, chunk: Chunk) -> Path:
        return self._chunks / f"{chunk.number:06d}.npz"

    def _read(self, chunk: Chunk) -> np.ndarray:
        path = self._path(chunk)
        try:
            with np.load(path, allow_pickle=False) as stored:
                images: np.ndarray = stored["arr_0"]
                fits = np.array_equal(stored["labels"], chunk.labels) and np.array_equal(stored["seeds"], chunk.seeds)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as err:
            raise UserError(f"{path} is damaged ({err}); remove it and run the command again") from None
        if not fits or images.shape != (len(chunk.labels), self._width, self._width, 3):
            raise UserError(f"{path} is of another generation; remove it and run the command again")
        return images


class PngStore:
    """A PNG file an image."""

    def __init__(self, out: Path) -> None:
        self.result, self._images = out / "labels.csv", out / "images"

    def complete(self, chunk: Chunk) -> bool:
        """Whether every file of the chunk is there."""
        return all(self._path(chunk.start + i).exists() for i in range(len(chunk.labels)))

    def write(self, chunk: Chunk, images: np.ndarray) -> None:
        """Write `images/000000.png` …."""
        for i, image in enumerate(images):
            write_atomic(self._path(chunk.start + i), _png(image))

    def finished(self) -> bool:
        """Whether `labels.csv` is there."""
        return self.result.exists()

    def finish(self, chunks: Sequence[Chunk]) -> None:
        """Write `labels.csv`."""
        rows = [
            f"{self._path(chunk.start + i).name},{label},{seed}\n"
            for chunk in chunks
            for i, (label, seed) in enumerate(zip(chunk.labels, chunk.seeds, strict=True))
        ]
        write_atomic(self.result, "file,class,seed\n" + "".join(rows))

    def _path(self, index: int) -> Path:
        return self._images / f"{index:06d}.png"


class ShardStore:
    """WebDataset tars of PNG images with the index that `hmar_mega.data` reads."""

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        self.result, self._classes = out / "shards", tuple(classes)

    def complete(self, chunk: Chunk) -> bool:
        """Whether the chunk's tar is there."""
        return self._path(chunk).exists()

    def write(self, chunk: Chunk, images: np.ndarray) -> None:
        """Write `shards/shard-000000.tar`."""
        with open_atomic(self._path(chunk)) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for i, image in enumerate(images):
                add_sample(tar, f"{chunk.start + i:06d}", int(chunk.labels[i]), {"png": _png(image)})

    def finished(self) -> bool:
        """Whether the index is there."""
        return (self.result / "index.json").exists()

    def finish(self, chunks: Sequence[Chunk]) -> None:
        """Write the offsets of every tar and `index.json`."""
        entries = [record_shard(self._path(chunk), len(chunk.labels)) for chunk in chunks]
        samples = sum(entry.samples for entry in entries)
        write_index(
            self.result, ShardIndex(kind="images", samples=samples, classes=self._classes, shards=tuple(entries))
        )

    def _path(self, chunk: Chunk) -> Path:
        return self.result / f"shard-{chunk.number:06d}.tar"


@dataclass(frozen=True)
class _Pieces:
    """A large array by its shape and dtype, and the pieces along its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: Callable[[], Iterable[np.ndarray]]


def write_npz(file: BinaryIO, arrays: dict[str, np.ndarray | _Pieces]) -> None:
    """Write an uncompressed .npz whose bytes depend on the arrays alone, piece by piece."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            pieces = array.pieces() if isinstance(array, _Pieces) else [array]
            header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
            with archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for piece in pieces:
                    member.write(np.ascontiguousarray(piece).tobytes())


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()
