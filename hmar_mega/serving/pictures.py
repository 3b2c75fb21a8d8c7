"""Pictures between requests and arrays: PNG and base64 in and out, with limits on what is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from hmar_mega.data.pixels import DECODE_ERRORS, describe_damage, to_rgb
from hmar_mega.errors import UserError

#: Pictures of more pixels are refused before they are decoded.
MAX_PIXELS = 25_000_000

#: What browsers and cameras make; every further decoder of Pillow is one more that strangers could attack.
FORMATS = ("PNG", "JPEG", "WEBP")


def decode_picture(text: str, name: str, mode: str = "RGB") -> Image.Image:
    """A picture from base64, with or without `data:image/png;base64,` before it, as RGB or in another mode.

    Args:
        name: of the field, for messages.

    Raises:
        UserError: for what is no base64, no picture of `FORMATS`, damaged, or larger than `MAX_PIXELS`.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise UserError(f"{name} is not base64 ({err}); give the bytes of a picture, encoded as base64") from None
    try:
        with warnings.catch_warnings():  # Pillow's own limit is far above ours
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"{name} has {image.width}×{image.height} pixels; allowed are {MAX_PIXELS / 1e6:g} megapixels: "
                "make it smaller"
            )
        return to_rgb(image) if mode == "RGB" else ImageOps.exif_transpose(image).convert(mode)
    except UserError:
        raise
    except DECODE_ERRORS as err:
        raise UserError(
            f"{name} cannot be read as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}: {describe_damage(err)}"
        ) from None


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def encode_base64(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 as a PNG file in base64."""
    return base64.b64encode(encode_png(pixels)).decode()
