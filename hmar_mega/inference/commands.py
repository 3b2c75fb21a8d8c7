"""What `hmar-mega sample` and `hmar-mega edit` do with files."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hmar_mega.checkpoint.export import DTYPES
from hmar_mega.data.images import image_grid, to_rgb
from hmar_mega.errors import UserError
from hmar_mega.inference.editing import edit_images
from hmar_mega.inference.pipeline import load_model

#: Images sampled at once.
BATCH = 64


def sample_grid(args: argparse.Namespace) -> None:
    """Draw `count` images of each class into one grid, a row a class."""
    try:
        classes = [int(c) for c in args.classes.split(",")]
    except ValueError:
        raise UserError(f"--classes {args.classes!r} is not a comma-separated list of numbers, such as 0,3,7") from None
    if args.count < 1:
        raise UserError(f"--count {args.count}: ask for at least 1 image a class")
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    labels = [c for c in classes for _ in range(args.count)]
    model.check_labels(labels)
    settings = {"cfg_scale": args.cfg, "top_k": args.top_k, "top_p": args.top_p}
    images = [
        model.generate(labels[i : i + BATCH], **settings, seed=args.seed + i) for i in range(0, len(labels), BATCH)
    ]
    image_grid(torch.cat(images).cpu(), args.count, args.out, value_range=(0.0, 1.0))
    print(f"{len(labels)} images of {len(classes)} classes in {args.out}")


def edit_file(args: argparse.Namespace) -> None:
    """Edit one image file."""
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    image = _read(args.image, "RGB")
    mask = _read(args.mask, "L")[:1] >= 0.5
    settings = model.sample_settings(args.cfg, args.top_k, args.top_p)
    edited = edit_images(
        model, image[None], mask[None], [args.label], seed=args.seed, settings=settings, paste=not args.no_paste
    )
    image_grid(edited.cpu(), 1, args.out, value_range=(0.0, 1.0))
    print(f"{int(mask.sum())} of {mask.numel()} pixels generated anew in {args.out}")


def _read(path: Path, mode: str) -> Tensor:
    """An image file as (channels, H, W) float32 in [0, 1]."""
    try:
        with Image.open(path) as image:
            converted = to_rgb(image) if mode == "RGB" else image.convert(mode)
            pixels = np.asarray(converted, dtype=np.float32) / 255
    except (OSError, UnidentifiedImageError) as err:
        raise UserError(f"cannot read {path} as an image: {err}") from None
    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)
