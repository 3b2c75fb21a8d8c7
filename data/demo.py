"""Small sets of real images as ready-made image shards, for a first run and for tests.

`digits` comes with scikit-learn (1797 handwritten digits of 8×8), `fashion-mnist` with Debian's package
`dataset-fashion-mnist` (70 000 articles of clothing of 28×28), `emoji` with npm's packages emoji-datasource-google and
-twitter (64×64), `openclipart` with Debian's package `openclipart-png`. `demo_sets` reads them.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from hmar_mega.data.demo_sets import DemoName, ImageSet, load_set, square_on_white
from hmar_mega.data.order import permutation
from hmar_mega.data.shard import image_fields
from hmar_mega.data.split import stratified_split
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.files import new_folder
from hmar_mega.progress import Tally, track
from hmar_mega.rng import Purpose

log = logging.getLogger(__name__)


def write_demo(
    name: DemoName,
    out: Path,
    size: int | None = None,
    val_fraction: float | None = None,
    samples_per_shard: int = 1024,
    progress: bool = True,
    source: Path | None = None,
) -> Path:
    """Write a set as image shards to `out/train` and `out/val`, `size`² pixels in RGB; say its licence and labels.

    Digits and clothing are enlarged bicubically; pictures of another shape stand in the middle of a white square.

    Args:
        size: default 16 for digits, 32 for fashion-mnist, 64 for emoji, 128 for openclipart.
        val_fraction: the share of every class that goes to `val`, chosen deterministically; what looks alike (an emoji
            in all its skin tones and of both vendors) stays together. Default: the published split (the last 10 000
            images) for fashion-mnist, else 0.1.
        source: folder of the package, see `demo_sets`; default where package managers put it.

    Returns:
        `out`.

    Raises:
        UserError: for an unknown name, a size or fraction that cannot be, missing files, or an `out` that is taken.
    """
    images = load_set(name, source, size)
    size = images.default_size if size is None else size
    if not 4 <= size <= 1024:
        raise UserError(f"size={size}: use 4 to 1024 pixels")
    train, val = _split(images, val_fraction)
    out = Path(out)
    with track(name, len(train) + len(val), progress) as tally, new_folder(out) as folder:
        for part, chosen in (("train", train), ("val", val)):
            _write_part(images, chosen, folder / part, name, size, samples_per_shard, tally)
        log.info("%s: %s; labels: %s", name, images.licence, images.labelled)
        tally.summary = (
            f"{name}: {len(train)} training and {len(val)} validation images of {size} px "
            f"in {len(images.classes)} classes at {out}/train and {out}/val"
        )
    return out


def _write_part(
    images: ImageSet, chosen: np.ndarray, out: Path, name: str, size: int, samples_per_shard: int, tally: Tally
) -> None:
    with open_shards(out, "images", images.classes, samples_per_shard) as writer:
        for number, index in enumerate(chosen.tolist()):
            image = images.load(index)
            if images.bicubic:
                image = image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
            else:
                image = square_on_white(image, size)
            file = io.BytesIO()
            image.save(file, format="PNG")
            own = images.names[index] if images.names else str(index)
            fields = image_fields("png", file.getvalue(), f"{name}/{own}", (size, size))
            writer.write(f"{number:08d}", int(images.labels[index]), fields)
            tally.advance()


def _split(images: ImageSet, val_fraction: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The shuffled numbers of the training and of the validation images."""
    count = len(images.labels)
    if val_fraction is None and images.published_val:
        is_val = np.arange(count) >= count - images.published_val
    else:
        is_val = stratified_split(images.labels, 0.1 if val_fraction is None else val_fraction, groups=images.groups)
    shuffled = permutation(count, 0, 0, Purpose.SHARD_ORDER)
    return shuffled[~is_val[shuffled]], shuffled[is_val[shuffled]]
