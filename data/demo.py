"""Small sets of real images as ready-made image shards, for a first run and for tests.

`digits` comes with scikit-learn (1797 handwritten digits of 8×8), `fashion-mnist` with Debian's package
`dataset-fashion-mnist` (70 000 articles of clothing of 28×28).
"""

from __future__ import annotations

import gzip
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from hmar_mega.data.order import permutation
from hmar_mega.data.shard import image_fields
from hmar_mega.data.split import stratified_split
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.files import new_folder
from hmar_mega.progress import Tally, track
from hmar_mega.rng import Purpose

DemoName = Literal["digits", "fashion-mnist"]

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class _ImageSet:
    """pixels (n, h, w) uint8, labels (n,), and how many of the last images are the published validation split."""

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    default_size: int
    published_val: int = 0


def write_demo(
    name: DemoName,
    out: Path,
    size: int | None = None,
    val_fraction: float | None = None,
    samples_per_shard: int = 1024,
    progress: bool = True,
    source: Path | None = None,
) -> Path:
    """Write a set as image shards to `out/train` and `out/val`, enlarged bicubically to `size`² pixels in RGB.

    Args:
        size: default 16 for digits, 32 for fashion-mnist.
        val_fraction: the share of every class that goes to `val`, chosen deterministically. Default: the published
            split (the last 10 000 images) for fashion-mnist, 0.1 for digits.
        source: for fashion-mnist, a folder with its four idx files; default that of Debian's package.

    Returns:
        `out`.

    Raises:
        UserError: for an unknown name, a size or fraction that cannot be, missing files, or an `out` that is taken.
    """
    images = _load(name, source)
    size = images.default_size if size is None else size
    if not 4 <= size <= 1024:
        raise UserError(f"size={size}: use 4 to 1024 pixels")
    train, val = _split(images, val_fraction)
    out = Path(out)
    with track(name, len(train) + len(val), progress) as tally, new_folder(out) as folder:
        for part, chosen in (("train", train), ("val", val)):
            _write_part(images, chosen, folder / part, name, size, samples_per_shard, tally)
        tally.summary = (
            f"{name}: {len(train)} training and {len(val)} validation images of {size} px "
            f"in {len(images.classes)} classes at {out}/train and {out}/val"
        )
    return out


def _write_part(
    images: _ImageSet, chosen: np.ndarray, out: Path, name: str, size: int, samples_per_shard: int, tally: Tally
) -> None:
    with open_shards(out, "images", images.classes, samples_per_shard) as writer:
        for number, index in enumerate(chosen.tolist()):
            image = Image.fromarray(images.pixels[index])
            file = io.BytesIO()
            image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(file, format="PNG")
            fields = image_fields("png", file.getvalue(), f"{name}/{index}", (size, size))
            writer.write(f"{number:08d}", int(images.labels[index]), fields)
            tally.advance()


def _split(images: _ImageSet, val_fraction: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The shuffled numbers of the training and of the validation images."""
    count = len(images.labels)
    if val_fraction is None and images.published_val:
        is_val = np.arange(count) >= count - images.published_val
    else:
        is_val = stratified_split(images.labels, 0.1 if val_fraction is None else val_fraction)
    shuffled = permutation(count, 0, 0, Purpose.SHARD_ORDER)
    return shuffled[~is_val[shuffled]], shuffled[is_val[shuffled]]


def _load(name: str, source: Path | None) -> _ImageSet:
    if name == "digits":
        return _load_digits()
    if name == "fashion-mnist":
        return _load_fashion(source or FASHION_FOLDER)
    raise UserError(f"no demo data {name!r}; there are {' and '.join(get_args(DemoName))}")


def _load_digits() -> _ImageSet:
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 … 16
    return _ImageSet(pixels, digits.target, tuple(str(digit) for digit in digits.target_names), default_size=16)


def _load_fashion(folder: Path) -> _ImageSet:
    parts = [
        (_read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3), _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1))
        for part in ("train", "t10k")
    ]
    if any(len(pixels) != len(labels) for pixels, labels in parts):
        raise UserError(f"{folder} is damaged: it has not as many labels as images; install the package anew")
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _ImageSet(pixels, labels, FASHION_CLASSES, default_size=32, published_val=len(parts[1][0]))


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """An array of bytes in MNIST's idx format: magic 0x0000 08 dims, big-endian sizes, content."""
    try:
        data = gzip.decompress(path.read_bytes())
        magic, *shape = struct.unpack_from(f">{1 + dims}I", data)
        if magic != 0x0800 + dims:
            raise ValueError(f"magic number {magic:#x}")
        return np.frombuffer(data, np.uint8, offset=4 * (1 + dims)).reshape(shape)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; install Debian's package with `apt-get install dataset-fashion-mnist`, "
            "or unpack it anywhere with `dpkg -x` and give the folder of its four .gz files as source (--source)"
        ) from None
    except (OSError, EOFError, ValueError, struct.error) as err:
        raise UserError(f"{path} is not an idx file ({err}); install dataset-fashion-mnist anew") from None
