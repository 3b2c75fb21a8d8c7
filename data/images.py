"""From image files to tensors and back, with Pillow and torch alone.

Axes: B batch, R resolution in pixels. Pixels are float32 in [−1, 1], −1 black.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hmar_mega.data.damage import Damage
from hmar_mega.data.index import require_kind
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.pixels import DECODE_ERRORS, describe_damage, to_rgb
from hmar_mega.data.reader import ImageSample, ShardReader
from hmar_mega.data.threads import map_ahead
from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic
from hmar_mega.rng import Purpose, uniform

Augment = Literal["crop", "none"]

#: VAR's and HMAR's: the shorter side becomes 1.125 × resolution before the crop.
CROP_SCALE = 1.125

#: Images that would be resized to more pixels than this are resized crop by crop: a file of some kB may be so thin that
#: it would take gigabytes. Ordinary ones stay below, and keep the very bytes they always had.
WHOLE_PIXELS = 1 << 24

#: Pixels to either side of its place that Lanczos looks at, in those of the smaller image.
_LANCZOS_REACH = 3


def image_to_tensor(
    image: Image.Image, resolution: int, augment: Augment, place: tuple[float, float] = (0.5, 0.5)
) -> Tensor:
    """Resize (Lanczos) and crop to a square, (3, R, R) float32 in [−1, 1].

    The shorter side becomes round(1.125 · R) with `augment="crop"`, R with "none"; the longer keeps the proportion,
    rounded down. No flip.

    Args:
        image: any mode.
        place: where the crop lies between left and right, and between top and bottom: uniform numbers in [0, 1) for a
            random crop, each of the possible offsets equally likely; (0.5, 0.5) is the centre.
    """
    return image_crops(image, resolution, augment, [place])[0]


def image_crops(image: Image.Image, resolution: int, augment: Augment, places: Sequence[tuple[float, float]]) -> Tensor:
    """Several crops of an image that is resized once, (len(places), 3, R, R); each as `image_to_tensor` makes it."""
    return scale_pixels(torch.from_numpy(crop_pixels(image, resolution, augment, places)))


def scale_pixels(pixels: Tensor) -> Tensor:
    """Pixels (…, 3, R, R) uint8 as float32 in [−1, 1]."""
    return pixels.float() / 127.5 - 1


def crop_pixels(
    image: Image.Image, resolution: int, augment: Augment, places: Sequence[tuple[float, float]]
) -> np.ndarray:
    """As `image_crops`, but uint8: a quarter of the bytes to keep and to send."""
    image = to_rgb(image)
    shorter = round(CROP_SCALE * resolution) if augment == "crop" else resolution
    width, height = (side * shorter // min(image.size) for side in image.size)
    corners = [(int(u * (width - resolution + 1)), int(v * (height - resolution + 1))) for u, v in places]
    if width * height > WHOLE_PIXELS:
        crops = [_resized_part(image, (width, height), corner, resolution) for corner in corners]
    else:
        pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS))
        crops = [pixels[top : top + resolution, left : left + resolution] for left, top in corners]
    return np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2))


def _resized_part(image: Image.Image, size: tuple[int, int], corner: tuple[int, int], resolution: int) -> np.ndarray:
    """The square at `corner` of an image resized to `size`, (R, R, 3) uint8, without resizing the rest of it.

    Its pixels are close to those of the whole, but not always the same: places are rounded otherwise, and Pillow, which
    clips after either side, may take the sides in another order.
    """
    window, box = [], []
    for side, resized, start in zip(image.size, size, corner, strict=True):
        scale = side / resized
        reach = math.ceil(_LANCZOS_REACH * max(scale, 1.0)) + 1
        first, last = start * scale, min(side, (start + resolution) * scale)
        begin, end = max(0, math.floor(first) - reach), min(side, math.ceil(last) + reach)
        window.append((begin, end))
        box.append((first - begin, last - begin))  # from the window on: Pillow has 24 bits for it
    (left, right), (top, bottom) = window
    part = image.crop((left, top, right, bottom))
    inside = (box[0][0], box[1][0], box[0][1], box[1][1])
    return np.array(part.resize((resolution, resolution), Image.Resampling.LANCZOS, box=inside))


def decode_sample(sample: ImageSample, look: Callable[[Image.Image], None] | None = None) -> Image.Image:
    """The image of a sample as `to_rgb` makes it.

    Args:
        look: is shown the decoded image as it is stored, of any mode and not turned.

    Raises:
        Damage: when it is damaged; names shard and key.
    """
    try:
        image = Image.open(io.BytesIO(sample.data))
        image.load()
        rgb = to_rgb(image)
    except DECODE_ERRORS as err:
        raise Damage(
            f"{sample.where} cannot be decoded: {describe_damage(err)}; restore the shard or make it anew", "content"
        ) from None
    if look is not None:
        look(image)
    return rgb


class ImageStream:
    """Training images by stream position: the same position always gives the same crop of the same image.

    Args:
        reader: image shards.
        order: which sample stands at which position.
        augment: "crop" crops at a place that is a pure function of (seed, position); "none" at the centre.
        workers: threads that decode; 0 decodes in the calling thread.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: SampleOrder,
        resolution: int,
        augment: Augment,
        seed: int,
        workers: int = 0,
    ) -> None:
        require_kind(reader.folder, reader.index, "images")
        if order.num_samples != len(reader):
            raise ValueError(f"the order has {order.num_samples} samples, the reader {len(reader)}")
        self._reader = reader
        self._order = order
        self._resolution = resolution
        self._augment: Augment = augment
        self._seed = seed
        self._workers = workers

    def batch(self, start_position: int, count: int) -> Tensor:
        """The images at positions `start_position` … `start_position + count − 1`, (count, 3, R, R) in [−1, 1]."""
        samples = self._order.sample_indices(start_position, count).tolist()
        places = [(0.5, 0.5)] * count
        if self._augment == "crop":
            positions = torch.arange(start_position, start_position + count)
            places = [(u, v) for u, v in uniform(torch.tensor(self._seed), positions, Purpose.CROP, 2).tolist()]
        return torch.stack(list(map_ahead(self._load, zip(samples, places, strict=True), self._workers)))

    def _load(self, item: tuple[int, tuple[float, float]]) -> Tensor:
        sample, place = item
        image = decode_sample(self._reader.read_image(sample))
        return image_to_tensor(image, self._resolution, self._augment, place)


def tensor_to_image(image: Tensor, value_range: tuple[float, float]) -> Image.Image:
    """A (3, H, W) tensor as an 8-bit image; values beyond `value_range`, (−1, 1) or (0, 1), are clipped."""
    low, high = value_range
    pixels = ((image.detach().float() - low) / (high - low)).clamp(0, 1).mul(255).round()
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy())


def image_grid(images: Tensor | Sequence[Tensor], columns: int, path: Path, value_range: tuple[float, float]) -> None:
    """Write images (B, 3, H, W) as one PNG, row by row in a grid with two white pixels between them, atomically.

    Args:
        value_range: (−1, 1) or (0, 1).

    Raises:
        UserError: when there is no image or the file cannot be written.
    """
    if len(images) == 0 or columns < 1:
        raise UserError(f"a grid needs images and columns; given are {len(images)} images and {columns} columns")
    file = io.BytesIO()
    tile_images([tensor_to_image(image, value_range) for image in images], columns).save(file, format="PNG")
    write_atomic(path, file.getvalue())


def tile_images(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size, row by row in a grid with two white pixels between them."""
    columns, gap = min(columns, len(tiles)), 2
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        grid.paste(tile, (column * (width + gap), row * (height + gap)))
    return grid
