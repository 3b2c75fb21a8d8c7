"""Images to measure, wherever they are: a folder of files, image shards, an .npz of ADM's layout, or a generation.

    FOLDER            image files at any depth, in the order of their names
    FOLDER            image shards, with their index.json
    FILE.npz          arr_0 (n, H, W, 3) uint8, read piece by piece: it need not fit into memory
    FOLDER            a generation of `hmar-mega sample --num`, in any of its formats

Images that differ in size, or are grayscale, would change a figure silently: they are refused unless asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from hmar_mega.data.images import DECODE_ERRORS, describe_damage, image_to_tensor, tensor_to_image, to_rgb
from hmar_mega.data.index import INDEX_NAME
from hmar_mega.data.reader import ShardReader
from hmar_mega.errors import UserError

#: Of files in a folder of images.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")

#: What reading a damaged .npz raises.
NPZ_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, SyntaxError)


@dataclass(frozen=True)
class Fit:
    """What may be done to images that are not RGB of one size.

    Attributes:
        size: resize the shorter side to it (Lanczos) and cut to the centre; None: all must have one size.
        grayscale: repeat a single channel three times.
    """

    size: int | None = None
    grayscale: bool = False


class ImageSource(Protocol):
    """A numbered set of images of one size."""

    path: Path
    fingerprint: str  #: differs when the images do, as far as names, sizes and times of files tell

    def __len__(self) -> int:
        """Images."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start … stop − 1, (n, H, W, 3) uint8; UserError naming the one that cannot be used."""


def open_images(path: Path, fit: Fit) -> ImageSource:
    """The images in a file or folder.

    Raises:
        UserError: when there is none of what the head of this file lists.
    """
    if path.is_file() and path.suffix == ".npz":
        return NpzImages(path, fit)
    if not path.is_dir():
        what = "is neither a folder nor an .npz file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a folder of images, image shards, or an .npz with arr_0")
    if (path / "plan.json").is_file():
        return _generation(path, fit)
    return ShardImages(path, fit) if (path / INDEX_NAME).is_file() else FolderImages(path, fit)


def _generation(path: Path, fit: Fit) -> ImageSource:
    if (path / "samples.npz").is_file():
        return NpzImages(path / "samples.npz", fit)
    if (path / "shards" / INDEX_NAME).is_file():
        return ShardImages(path / "shards", fit)
    if (path / "labels.csv").is_file():
        return FolderImages(path / "images", fit)
    raise UserError(f"{path} is a generation that is not complete; run its hmar-mega sample command again first")


class FolderImages:
    """Image files."""

    def __init__(self, path: Path, fit: Fit) -> None:
        self.path, self._fit = path, fit
        self._files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not self._files:
            raise UserError(f"{path} has no images ({', '.join(SUFFIXES)}) and no {INDEX_NAME} of image shards")
        self._size: tuple[int, int] | None = None
        about = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in self._files]
        self.fingerprint = _hash(about, fit)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `ImageSource`."""
        if self._size is None:
            self._size = _decode(self._files[0].read_bytes(), str(self._files[0]), self._fit).shape[:2]
        return _stack([(str(f), f.read_bytes()) for f in self._files[start:stop]], self._size, self._fit)


class ShardImages:
    """Image shards of `hmar_mega.data`."""

    def __init__(self, path: Path, fit: Fit) -> None:
        self.path, self._fit = path, fit
        self._reader = ShardReader(path, "images")
        self._size: tuple[int, int] | None = None
        self.fingerprint = _hash([shard.sha256 for shard in self._reader.index.shards], fit)

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `ImageSource`."""
        if self._size is None:
            first = self._reader.read_image(0)
            self._size = _decode(first.data, first.where, self._fit).shape[:2]
        samples = [self._reader.read_image(i) for i in range(start, stop)]
        return _stack([(sample.where, sample.data) for sample in samples], self._size, self._fit)


class NpzImages:
    """`arr_0` of an .npz, streamed: pieces are cheap in ascending order."""

    def __init__(self, path: Path, fit: Fit) -> None:
        self.path, self._fit = path, fit
        self._next = 0
        try:
            self._archive = zipfile.ZipFile(path)
            self._shape = self._open()
        except NPZ_ERRORS as err:
            raise UserError(f"{path} cannot be read as an .npz with arr_0: {err}; make it anew") from None
        stat = path.stat()
        self.fingerprint = _hash([str(self._shape), stat.st_size, stat.st_mtime_ns], fit)

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `ImageSource`."""
        row = int(np.prod(self._shape[1:]))
        try:
            if start != self._next:
                if start < self._next:
                    self._open()
                while self._next < start:
                    step = min(start - self._next, 1024)
                    self._bytes(step * row)
                    self._next += step
            data = self._bytes((stop - start) * row)
        except NPZ_ERRORS as err:
            raise UserError(f"{self.path} is damaged at images {start} to {stop - 1}: {err}; make it anew") from None
        self._next = stop
        images = np.frombuffer(data, np.uint8).reshape(stop - start, *self._shape[1:])
        if images.ndim == 3 or images.shape[-1] == 1:
            images = np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=3)
        if self._fit.size is not None and images.shape[1:3] != (self._fit.size, self._fit.size):
            images = np.stack([_resized(Image.fromarray(image), self._fit.size) for image in images])
        return images

    def _open(self) -> tuple[int, ...]:
        """Go to the first image; gives the array's shape."""
        self._member: BinaryIO = self._archive.open("arr_0.npy")  # type: ignore[assignment]
        major, _ = np.lib.format.read_magic(self._member)
        header: Any = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(self._member)
        if dtype != np.uint8 or fortran:
            raise ValueError(f"arr_0 is {dtype}{' in Fortran order' if fortran else ''}, not uint8 in C order")
        if len(shape) == 3 or (len(shape) == 4 and shape[-1] == 1):
            if not self._fit.grayscale:
                raise ValueError(f"arr_0 has shape {shape}, which is grayscale; allow that with --grayscale")
        elif len(shape) != 4 or shape[-1] != 3:
            raise ValueError(f"arr_0 has shape {shape}, not (n, H, W, 3)")
        self._next = 0
        return tuple(shape)

    def _bytes(self, count: int) -> bytes:
        data = self._member.read(count)
        if len(data) != count:
            raise EOFError("the array is cut off")
        return data


def _stack(files: list[tuple[str, bytes]], size: tuple[int, int] | None, fit: Fit) -> np.ndarray:
    images = []
    for where, data in files:
        image = _decode(data, where, fit)
        if image.shape[:2] != size:
            assert size is not None
            raise UserError(
                f"{where} has {image.shape[1]} × {image.shape[0]} pixels, the first image {size[1]} × {size[0]}: "
                "features of mixed sizes cannot be compared; resize them with --resize N, or remove what differs"
            )
        images.append(image)
    return np.stack(images)


def _decode(data: bytes, where: str, fit: Fit) -> np.ndarray:
    """(H, W, 3) uint8."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        rgb = to_rgb(image)
    except (UnidentifiedImageError, *DECODE_ERRORS) as err:
        raise UserError(f"{where} cannot be decoded: {describe_damage(err)}; remove it or make it anew") from None
    if (image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")) and not fit.grayscale:
        raise UserError(
            f"{where} is grayscale (mode {image.mode}) and feature networks see RGB; convert it, or repeat its "
            "channel with --grayscale"
        )
    if fit.size is not None and image.size != (fit.size, fit.size):
        return _resized(rgb, fit.size)
    return np.asarray(rgb)


def _resized(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(tensor_to_image(image_to_tensor(image, size, "none"), (-1.0, 1.0)))


def _hash(about: Any, fit: Fit) -> str:
    return hashlib.sha256(json.dumps([about, fit.size, fit.grayscale]).encode()).hexdigest()[:16]
