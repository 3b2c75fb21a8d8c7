"""Image files as bytes: what is peculiar about them, and how they are stored. Needs Pillow and NumPy only.

Peculiarities, which `to_rgb` deals with whenever an image is read, and `peculiarities` counts when shards are made:

    turned    an EXIF orientation: turned upright          palette   looked up
    alpha     transparency: put on white                   grey      three equal channels
    CMYK      Pillow's conversion, without colour profile  16-bit    a grey image's upper 8 bits; colour comes from
    profile   an ICC profile: ignored                                Pillow as 8 bits already and is not counted
    bad EXIF  one that cannot be read: taken as upright
"""

from __future__ import annotations

import io
import json
import logging
import struct
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

Encoding = Literal["keep", "jpeg", "png", "webp"]
ENCODINGS: tuple[Encoding, ...] = ("keep", "jpeg", "png", "webp")

#: What Pillow calls a format → the sample's field. MPO is a JPEG with further pictures after it, as some cameras write.
FIELD_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
FIELD_OF_ENCODING = {"jpeg": "jpg", "png": "png", "webp": "webp"}

#: What Pillow's parsers raise for bytes that are not what they look like, besides what it means to raise.
_PARSE_ERRORS = (struct.error, IndexError, KeyError, TypeError)

#: What Pillow raises for bytes that are no image, or a damaged one.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, *_PARSE_ERRORS)

#: Pillow refuses to open what has more pixels than this: the reader could not read it.
PILLOW_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or 0)

_ORIENTATION = 0x0112

#: EXIF orientation → what turns the pixels upright; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: Where Pillow keeps what tells the orientation.
_ORIENTED_BY = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")

log = logging.getLogger(__name__)


class UnusableImage(Exception):
    """An image that is left out; the message says why."""


@dataclass(frozen=True)
class Storing:
    """How images are stored.

    Attributes:
        encoding: "keep" leaves the bytes of the file alone.
        quality: of jpeg and webp, 1 to 100.
        shorter_side: images whose shorter side is longer are made smaller (Lanczos) to this; None: as they are.
        max_pixels: images of more are left out, unread.
    """

    encoding: Encoding = "keep"
    quality: int = 95
    shorter_side: int | None = None
    max_pixels: int = 100_000_000


@dataclass(frozen=True)
class StoredImage:
    """An image ready to be stored: field, bytes, (width, height) in pixels, and its peculiarities."""

    field: str
    data: bytes
    size: tuple[int, int]
    notes: tuple[str, ...]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB, turned upright as its EXIF orientation says; what is transparent becomes white."""
    image = upright(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion would clip to 8
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """A copy turned as the EXIF orientation says, and without EXIF; taken as upright where that cannot be read.

    Unlike Pillow's `exif_transpose` it does not write the rest of the EXIF anew, which fails for a malformed field.
    """
    turn = _TURNS.get(_orientation(image)[0])
    turned = image.copy() if turn is None else image.transpose(turn)
    for key in _ORIENTED_BY:  # else it would be turned once more when it is read once more
        turned.info.pop(key, None)
    return turned


def _orientation(image: Image.Image) -> tuple[int, bool]:
    """The EXIF orientation, 1 to 8, and whether the EXIF could be read; it is 1 where not, which is told once."""
    image.load()  # some formats do so while EXIF is read: damaged pixels would be taken for damaged EXIF
    try:
        found = image.getexif().get(_ORIENTATION, 1)
        return (found if found in _TURNS else 1), True
    except DECODE_ERRORS:
        image.getexif().load(b"")  # what was read of it before the error would be there at the next call
        _tell_bad_exif()
        return 1, False


@lru_cache(1)
def _tell_bad_exif() -> None:
    log.warning("there are images whose EXIF cannot be read: they are taken as upright")


def describe_damage(err: Exception) -> str:
    """What is wrong with an image, from one of `DECODE_ERRORS`."""
    if isinstance(err, UnidentifiedImageError):
        return "not an image"  # Pillow's own message names a memory address
    if isinstance(err, _PARSE_ERRORS):  # of which the text alone says little: KeyError("7") is '7'
        return f"malformed ({type(err).__name__}: {err})"
    return str(err)


def peculiarities(image: Image.Image) -> tuple[str, ...]:
    """What is not plain about an image, see the top of the file."""
    orientation, readable = _orientation(image)
    found = {
        "turned": orientation != 1,
        "palette": image.mode in ("P", "PA"),
        "alpha": image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info,
        "CMYK": image.mode == "CMYK",
        "16-bit": image.mode.startswith("I"),
        "grey": image.mode in ("1", "L", "LA", "La"),
        "profile": bool(image.info.get("icc_profile")),
        "bad EXIF": not readable,
    }
    return tuple(name for name, is_so in found.items() if is_so)


def store_image(data: bytes, storing: Storing) -> StoredImage:
    """Decode an image completely, so that a truncated one is found now and not in training, and store it as wanted.

    Raises:
        UnusableImage: when it cannot be decoded, is too large, or is of a format that cannot be kept.
    """
    try:
        with _open(data) as image:
            width, height = image.size
            if width * height > storing.max_pixels:
                raise UnusableImage(
                    f"{width} × {height} pixels are more than the limit of {storing.max_pixels / 1e6:g} megapixels"
                )
            field = FIELD_OF_FORMAT.get(image.format or "")
            if storing.encoding == "keep" and field is None:
                raise UnusableImage(f"format {image.format} is not jpg, png or webp")
            notes = peculiarities(image)
            image.load()
            if field is not None and storing.encoding == "keep":
                return StoredImage(field, data, image.size, notes)
            if image.mode == "F":
                raise UnusableImage("its pixels are floating-point numbers, of which white and black are not known")
            return _encode(image, storing, notes)
    except DECODE_ERRORS as err:
        raise UnusableImage(describe_damage(err)) from None


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():  # Pillow's own limit, half as high as where it refuses: ours decides
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data))


def _encode(image: Image.Image, storing: Storing, notes: tuple[str, ...]) -> StoredImage:
    rgb = to_rgb(image)
    if storing.shorter_side is not None and min(rgb.size) > storing.shorter_side:
        width, height = (max(1, round(side * storing.shorter_side / min(rgb.size))) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
    rgb.info = {}  # no profile, no EXIF: the pixels are what is stored
    file = io.BytesIO()
    if storing.encoding == "png":
        rgb.save(file, format="PNG")
    elif storing.encoding == "jpeg":
        rgb.save(file, format="JPEG", quality=storing.quality, subsampling=0)
    else:
        rgb.save(file, format="WEBP", quality=storing.quality)
    return StoredImage(FIELD_OF_ENCODING[storing.encoding], file.getvalue(), rgb.size, notes)


def image_fields(field: str, data: bytes, source: str, size: tuple[int, int]) -> dict[str, bytes]:
    """The files of an image sample: the image under its format's field, and `json` with its origin and size."""
    facts = {"source": source, "width": size[0], "height": size[1]}
    return {field: data, "json": json.dumps(facts, sort_keys=True).encode()}
