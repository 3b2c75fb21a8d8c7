"""The images of the demo sets, from packages that package managers brought: nothing is downloaded here.

`digits` is scikit-learn's, `fashion-mnist` and `openclipart` are Debian's packages, `emoji` npm's. Each set says its
licence and what its labels are; where a package is missing, the error has the commands that bring it.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from hmar_mega.data.images import DECODE_ERRORS, to_rgb
from hmar_mega.errors import UserError

DemoName = Literal["digits", "fashion-mnist", "emoji", "openclipart"]

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

#: npm's packages and the licence of their images; those of other vendors are not free.
EMOJI_PACKAGES = {
    "emoji-datasource-google": "Google's Noto emoji, Apache-2.0",
    "emoji-datasource-twitter": "Twitter's Twemoji, CC-BY-4.0",
}
EMOJI_VERSION = "16.0.0"
EMOJI_SIDE = 64

CLIPART_FOLDER = Path("/usr/share/openclipart/png")  # where Debian's package puts it
CLIPART_SIDE = 128

#: Larger pictures are left out: a few of them take longer than all the others.
CLIPART_MOST_PIXELS = 64_000_000


@dataclass(frozen=True)
class ImageSet:
    """A set of labelled images.

    Attributes:
        labels: (n,) int64, indices into `classes`.
        load: the picture of an index, RGB.
        licence: of the images, to be printed.
        labelled: what the labels are.
        published_val: how many of the last images are the published validation split.
        groups: (n,) int64; images of the same group, which look alike, go to the same part. Default each its own.
        names: where each image comes from; default its number.
        bicubic: enlarge bicubically to any size; else pictures stand whole in a white square.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    default_size: int
    load: Callable[[int], Image.Image]
    licence: str
    labelled: str
    published_val: int = 0
    groups: np.ndarray | None = None
    names: Sequence[str] = field(default_factory=tuple)
    bicubic: bool = False


def load_set(name: str, source: Path | None, size: int | None) -> ImageSet:
    """The set `name`.

    Args:
        source: folder of its package, where that is not installed in the usual place.
        size: of the shards that are made, in pixels; `openclipart` leaves smaller pictures out.

    Raises:
        UserError: for an unknown name, and where the package is missing or damaged.
    """
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _fashion(source or FASHION_FOLDER)
    if name == "emoji":
        return _emoji(source or Path("node_modules"))
    if name == "openclipart":
        return _openclipart(source or CLIPART_FOLDER, size or CLIPART_SIDE)
    names = get_args(DemoName)
    raise UserError(f"no demo data {name!r}; there are {', '.join(names[:-1])} and {names[-1]}")


def square_on_white(image: Image.Image, size: int) -> Image.Image:
    """A picture of any mode and shape, whole, in the middle of a white square of `size`² pixels, RGB."""
    image = to_rgb(image)
    if image.size == (size, size):
        return image
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), "white")
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return square


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 … 16
    return ImageSet(
        digits.target, tuple(str(digit) for digit in digits.target_names), 16, lambda i: Image.fromarray(pixels[i]),
        licence="scikit-learn's copy of UCI's optical recognition of handwritten digits, CC-BY-4.0",
        labelled="the digit", bicubic=True,
    )  # fmt: skip


def _fashion(folder: Path) -> ImageSet:
    parts = [
        (_read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3), _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1))
        for part in ("train", "t10k")
    ]
    if any(len(pixels) != len(labels) for pixels, labels in parts):
        raise UserError(f"{folder} is damaged: it has not as many labels as images; install the package anew")
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ImageSet(
        labels, FASHION_CLASSES, 32, lambda i: Image.fromarray(pixels[i]), published_val=len(parts[1][0]),
        licence="Zalando's Fashion-MNIST, MIT", labelled="the kind of clothing", bicubic=True,
    )  # fmt: skip


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
            f"{path} is missing; install Debian's package with `apt-get install dataset-fashion-mnist`, or fetch it "
            "with `apt-get download dataset-fashion-mnist`, unpack it anywhere with `dpkg -x` and give the folder of "
            "its four .gz files as source (--source)"
        ) from None
    except (OSError, EOFError, ValueError, struct.error) as err:
        raise UserError(f"{path} is not an idx file ({err}); install dataset-fashion-mnist anew") from None


def _emoji(folder: Path) -> ImageSet:
    """All emoji of one or both packages; an emoji of both, and all its skin tones, are one group."""
    found = [path for path in (folder, *(folder / name for name in EMOJI_PACKAGES)) if (path / "emoji.json").is_file()]
    if not found:
        packages = " ".join(f"{name}@{EMOJI_VERSION}" for name in EMOJI_PACKAGES)
        raise UserError(
            f"{folder} holds none of npm's packages {' and '.join(EMOJI_PACKAGES)}; fetch them with `npm install "
            f"--no-save {packages}` (one of them is enough) and give the folder node_modules as source (--source; "
            "default: node_modules here)"
        )
    files: list[tuple[Path, str, int]] = []
    licences = []
    numbers: dict[str, int] = {}  # the same emoji has the same number in both packages
    for package in found:
        name, entries = _emoji_entries(package)
        licences.append(EMOJI_PACKAGES[f"emoji-datasource-{name}"])
        for entry in entries:
            group = numbers.setdefault(entry["unified"], len(numbers))
            for shown in (entry, *entry.get("skin_variations", {}).values()):
                path = package / "img" / name / str(EMOJI_SIDE) / shown["image"]
                if shown[f"has_img_{name}"] and path.is_file():
                    files.append((path, entry["category"], group))
    if not files:
        raise UserError(f"{found[0]} has no pictures in img/*/{EMOJI_SIDE}; install the package anew")
    classes = sorted({category for _, category, _ in files})
    return ImageSet(
        np.array([classes.index(category) for _, category, _ in files]), tuple(classes), EMOJI_SIDE,
        lambda i: _open(files[i][0]), licence="; ".join(licences), labelled="the category of Unicode's emoji list",
        groups=np.array([group for *_, group in files]),
        names=[f"{path.parent.parent.name}/{path.name}" for path, *_ in files],
    )  # fmt: skip


def _emoji_entries(package: Path) -> tuple[str, list[dict[str, Any]]]:
    """`google` or `twitter`, and the entries of emoji.json."""
    try:
        name = str(json.loads((package / "package.json").read_text())["name"])
        entries: list[dict[str, Any]] = json.loads((package / "emoji.json").read_text())
    except (OSError, ValueError, KeyError) as err:
        raise UserError(f"{package} is no whole package of npm ({err}); install it anew") from None
    if name not in EMOJI_PACKAGES:
        raise UserError(f"{package} is the package {name}; only {' and '.join(EMOJI_PACKAGES)} have free pictures")
    return name.removeprefix("emoji-datasource-"), entries


def _openclipart(folder: Path, size: int) -> ImageSet:
    files = sorted(folder.glob("*/**/*.png")) if folder.is_dir() else []
    if not files:
        raise UserError(
            f"{folder} has no pictures; install Debian's package with `apt-get install openclipart-png` (130 MB), or "
            "fetch it with `apt-get download openclipart-png`, unpack it anywhere with `dpkg -x` and give its folder "
            "usr/share/openclipart/png as source (--source)"
        )
    usable = [path for path in files if _fits(path, size)]
    if not usable:
        raise UserError(f"none of the {len(files)} pictures in {folder} has {size} pixels; use a smaller size")
    topics = [path.relative_to(folder).parts[0] for path in usable]
    classes = sorted(set(topics))
    return ImageSet(
        np.array([classes.index(topic) for topic in topics]), tuple(classes), CLIPART_SIDE, lambda i: _open(usable[i]),
        licence="Open Clip Art Library, public domain", labelled="the folder of the library, its topic",
        names=[str(path.relative_to(folder)) for path in usable],
    )  # fmt: skip


def _fits(path: Path, size: int) -> bool:
    """Whether a picture is large enough, not gigantic, and readable as far as its header goes."""
    try:
        with Image.open(path) as image:
            return max(image.size) >= size and image.width * image.height <= CLIPART_MOST_PIXELS
    except DECODE_ERRORS:
        return False


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except DECODE_ERRORS as err:
        raise UserError(f"{path} cannot be decoded: {err}; install its package anew") from None
