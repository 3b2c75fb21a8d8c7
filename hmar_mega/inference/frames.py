"""The scales of a generation to look at: a PNG a scale, one overview, and a progressive GIF."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from hmar_mega.data.images import image_grid, tensor_to_image, tile_images
from hmar_mega.files import write_atomic

#: Milliseconds that a GIF shows a scale, and its last one.
FRAME_MS, LAST_MS = 300, 1500


def write_scales(folder: Path, images: Tensor, patch_nums: Sequence[int], columns: int) -> None:
    """Write `scale-01-1x1.png` … (grids of all images at a scale) and `scales.png` (a row an image, a column a scale).

    Args:
        images: (K, B, 3, H, W) in [0, 1], as `ImageModel.generate_scales` gives.
        columns: of the grids.

    Raises:
        UserError: when the folder cannot be written.
    """
    for number, (side, grid) in enumerate(zip(patch_nums, images, strict=True), 1):
        image_grid(grid, columns, folder / f"scale-{number:02d}-{side}x{side}.png", value_range=(0.0, 1.0))
    rows = images.transpose(0, 1).flatten(0, 1)
    image_grid(rows, len(patch_nums), folder / "scales.png", value_range=(0.0, 1.0))


def write_gif(path: Path, images: Tensor, columns: int) -> None:
    """Write an endless GIF of the grid after each scale.

    Args:
        images: (K, B, 3, H, W) in [0, 1].

    Raises:
        UserError: when the file cannot be written.
    """
    frames: list[Image.Image] = [
        tile_images([tensor_to_image(image, (0.0, 1.0)) for image in grid], columns) for grid in images
    ]
    times = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    file = io.BytesIO()
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    write_atomic(path, file.getvalue())
