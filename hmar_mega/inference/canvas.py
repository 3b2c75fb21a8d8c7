"""Pictures of any size on the model's square: fitting, boxes, room for outpainting. Every change is said in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hmar_mega.data.pixels import DECODE_ERRORS, describe_damage, to_rgb, upright
from hmar_mega.errors import UserError

Side = Literal["left", "right", "top", "bottom"]
SIDES: tuple[Side, ...] = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Canvas:
    """What `edit` takes: an image and what to generate of it.

    Attributes:
        image: (3, R, R) float32 in [0, 1].
        mask: (1, R, R) bool, True where to generate.
        changes: sentences on what was done to the files' pixels.
    """

    image: Tensor
    mask: Tensor
    changes: tuple[str, ...]


def read_image(path: Path, mode: str = "RGB") -> Image.Image:
    """An image file as RGB (upright, transparency on white), or converted to another mode; UserError if it is none."""
    try:
        with Image.open(path) as image:
            turned: Image.Image = to_rgb(image) if mode == "RGB" else upright(image).convert(mode)
            return turned
    except DECODE_ERRORS as err:
        raise UserError(f"cannot read {path} as an image: {describe_damage(err)}") from None


def masked_canvas(image: Image.Image, mask: Image.Image, resolution: int, exact: bool = False) -> Canvas:
    """Inpainting: white in the mask is generated.

    An image that is not resolution × resolution is resized so that its shorter side fits, and cut to the centre. The
    mask is taken as it is where it has the model's size; where it has the image's, it goes the same way, and a pixel
    any part of which is white is generated.

    Args:
        exact: refuse what has another size.

    Raises:
        UserError: for a mask of any other size.
    """
    fitted, changes = _fit_square(image, resolution, exact)
    white = mask.convert("L").point(lambda shade: 255 if shade >= 128 else 0)
    if white.size != (resolution, resolution):
        if exact or white.size != image.size:
            raise _wrong_size("mask", white.size, resolution)
        white, _ = _cover(white, (resolution, resolution), (0.5, 0.5), Image.Resampling.BOX)
    return Canvas(_pixels(fitted), torch.from_numpy(np.asarray(white) > 0)[None], changes)


def boxed_canvas(image: Image.Image, box: tuple[int, int, int, int], resolution: int, exact: bool = False) -> Canvas:
    """A class-conditional edit: the box (left, top, right, bottom), in pixels of the model's square, is generated.

    Raises:
        UserError: for a box that is empty or leaves the square.
    """
    fitted, changes = _fit_square(image, resolution, exact)
    left, top, right, bottom = box
    if not (0 <= left < right <= resolution and 0 <= top < bottom <= resolution):
        raise UserError(
            f"box {','.join(map(str, box))} is not within the {resolution}×{resolution} px of the model: give "
            f"left,top,right,bottom with 0 ≤ left < right ≤ {resolution} and 0 ≤ top < bottom ≤ {resolution}"
        )
    mask = torch.zeros(1, resolution, resolution, dtype=torch.bool)
    mask[:, top:bottom, left:right] = True
    return Canvas(_pixels(fitted), mask, changes)


def outpaint_canvas(image: Image.Image, room: dict[Side, int], resolution: int) -> Canvas:
    """Outpainting: the image lies in the rectangle that `room` leaves, and the rest is generated.

    The image is resized, keeping its proportions, so that it covers that rectangle, and what sticks out is cut off: on
    the side away from the generated strip where there is one strip, so that the picture goes on from its own edge; on
    both where there are two or none. Until they are generated, the strips repeat the image's border.

    Args:
        room: pixels to generate at each side.

    Raises:
        UserError: when nothing is left for the image, or no side has room.
    """
    left, right, top, bottom = (room.get(side, 0) for side in SIDES)
    width, height = resolution - left - right, resolution - top - bottom
    if min(left, right, top, bottom) < 0 or max(left, right, top, bottom) == 0 or min(width, height) < 1:
        raise UserError(
            f"outpainting {', '.join(f'{side} {size}' for side, size in room.items())} px of {resolution} px: give at "
            f"least one side, and leave at least 1 px of width and height to the image"
        )
    at = (_edge(left, right), _edge(top, bottom))
    placed, change = _cover(image, (width, height), at, Image.Resampling.LANCZOS)
    pixels = F.pad(_pixels(placed)[None], (left, right, top, bottom), mode="replicate")[0]
    mask = torch.ones(1, resolution, resolution, dtype=torch.bool)
    mask[:, top : top + height, left : left + width] = False
    where = f"the image lies at x {left}…{left + width - 1}, y {top}…{top + height - 1} of {resolution}×{resolution} px"
    return Canvas(pixels, mask, (change, where) if change else (where,))


def parse_room(texts: list[str], resolution: int) -> dict[Side, int]:
    """`["right:64", "top"]` → {"right": 64, "top": resolution // 4}.

    Raises:
        UserError: for other words, numbers below 1 and sides named twice.
    """
    room: dict[Side, int] = {}
    for text in (part for given in texts for part in given.split(",")):
        name, _, size = text.strip().partition(":")
        sides = [side for side in SIDES if side == name]
        pixels = int(size) if size.isdecimal() else 0 if size else resolution // 4
        if not sides or pixels < 1 or sides[0] in room:
            raise UserError(
                f"--outpaint {text!r} is not SIDE or SIDE:PIXELS with SIDE one of {', '.join(SIDES)}, each at most once"
            )
        room[sides[0]] = pixels
    return room


def parse_box(text: str) -> tuple[int, int, int, int]:
    """`4,4,12,12` → (4, 4, 12, 12)."""
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box {text!r} is not left,top,right,bottom in pixels, such as 64,64,192,192") from None
    return left, top, right, bottom


def _fit_square(image: Image.Image, resolution: int, exact: bool) -> tuple[Image.Image, tuple[str, ...]]:
    if exact and image.size != (resolution, resolution):
        raise _wrong_size("image", image.size, resolution)
    fitted, change = _cover(image, (resolution, resolution), (0.5, 0.5), Image.Resampling.LANCZOS)
    return fitted, (change,) if change else ()


def _cover(
    image: Image.Image, size: tuple[int, int], at: tuple[float, float], resampling: Image.Resampling
) -> tuple[Image.Image, str]:
    """Resize to cover `size`, keeping proportions, and cut at `at` (0 the left or top, 1 the other end)."""
    if image.size == size:
        return image, ""
    scale = max(new / old for new, old in zip(size, image.size, strict=True))
    width, height = (max(new, round(old * scale)) for new, old in zip(size, image.size, strict=True))
    resized = image.resize((width, height), resampling)
    left, top = round(at[0] * (width - size[0])), round(at[1] * (height - size[1]))
    cuts = (left, width - size[0] - left, top, height - size[1] - top)
    cut = ", ".join(f"{pixels} px {side}" for side, pixels in zip(SIDES, cuts, strict=True) if pixels)
    steps = [] if (width, height) == image.size else [f"resized to {width}×{height} px"]
    steps += [f"cut off {cut}"] if cut else []
    change = f"the image of {image.width}×{image.height} px was {' and '.join(steps)}"
    return resized.crop((left, top, left + size[0], top + size[1])), change


def _edge(before: int, after: int) -> float:
    """Which end of the image stays: that next to the only strip, else the middle."""
    return 0.5 if bool(before) == bool(after) else 0.0 if before else 1.0


def _wrong_size(name: str, size: tuple[int, int], resolution: int) -> UserError:
    return UserError(
        f"the {name} is {size[0]}×{size[1]} px, the model makes {resolution}×{resolution} px; resize the {name}"
    )


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
