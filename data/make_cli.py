"""The commands `hmar-mega data shard` and `hmar-mega data encode`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmar_mega.errors import UserError, refuse_options
from hmar_mega.parsers import add_command

if TYPE_CHECKING:
    from hmar_mega.data.shard import ShardSettings

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}

_SHARD_TEXT = """Write a collection of images as image shards: WebDataset tars with an index.

SRC is one of (found by itself, or said with --format)
  folder      SRC/<class>/**, or SRC/train/<class>/** and SRC/val/<class>/**
  imagenet    ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz in SRC, or unpacked
  webdataset  a folder of tars, 'shards/{000..099}.tar', or 'pipe:COMMAND' (the tar it prints is copied first)
  arrow       a Hugging Face data set on disk: what save_to_disk wrote, or parquet files (needs pyarrow)
  csv         a table of paths and labels

A source in parts (ImageNet; splits; train/ and val/) gives OUT/train, OUT/val …. Files keep their bytes unless
--encoding says otherwise. Whatever is read later is turned upright by its EXIF orientation, put on white where it is
transparent, and becomes 8-bit RGB (palettes, grey, CMYK, 16 bits); how many such images there are is told. Images that
cannot be used are left out and listed in OUT/index.json, files with the same bytes in OUT/duplicates.csv, classes in
OUT/classes.json. After a kill the same command goes on. The bytes of the result do not depend on the number of
processes."""


def add_making_parsers(commands: Any) -> None:
    """Add `shard` and `encode`."""
    _add_shard(commands)
    _add_encode(commands)


def _add_shard(commands: Any) -> None:
    from hmar_mega.data.sources.base import FORMATS

    parser = add_command(
        commands,
        "shard",
        "write a collection of images as image shards",
        _SHARD_TEXT,
        "  hmar-mega data shard photos shards --val-fraction 0.1 --workers 8\n"
        "  hmar-mega data shard imagenet shards/imagenet --shard-size 256M --encoding webp --shorter-side 320\n"
        "  hmar-mega data shard 'pipe:aws s3 cp s3://bucket/{000..031}.tar -' shards/train --dry-run",
    )
    parser.add_argument("src", metavar="SRC", help="the images")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--format", choices=FORMATS, help="what SRC is (default: found by itself)")
    parser.add_argument("--samples-per-shard", type=int, default=1024, help="images in a tar (default: %(default)s)")
    parser.add_argument("--shard-size", type=parse_size, metavar="BYTES", help="of images in a tar, about: 256M, 1G")
    parser.add_argument("--val-fraction", type=float, help="share of every class for OUT/val, the rest to OUT/train")
    parser.add_argument("--seed", type=int, default=0, help="decides order and split (default: %(default)s)")
    parser.add_argument("--encoding", choices=("keep", "jpeg", "png", "webp"), default="keep", help="(default: keep)")
    parser.add_argument("--quality", type=int, help="of jpeg and webp, 1 to 100 (default: 95)")
    parser.add_argument("--shorter-side", type=int, metavar="PIXELS", help="make larger images smaller to this")
    parser.add_argument(
        "--max-megapixels", type=float, default=100.0, help="leave larger images out, unread (default: %(default)s)"
    )
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes in order: lines, or JSON")
    parser.add_argument("--image-column", metavar="NAME", help="column or field that holds the image")
    parser.add_argument("--label-column", metavar="NAME", help="column or field that holds the label")
    parser.add_argument(
        "--damaged-tars",
        choices=("stop", "skip"),
        default="stop",
        help="at a source tar that lost its tail: stop, or go on without the tail and list it (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, help="processes (default: as many as cores)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, and write nothing")
    parser.set_defaults(run=_run_shard)


def _add_encode(commands: Any) -> None:
    parser = add_command(
        commands,
        "encode",
        "turn image shards into token shards",
        "Encode the image shards in SHARDS with a trained tokenizer; training reads the token shards.\n\n"
        "Several processes share the work by whole shards: torchrun's ranks, the tasks of a SLURM array, or --part\n"
        "I/N. Whoever is last puts the result together. After a kill the same command goes on.",
        "  hmar-mega data encode shards/train runs/tokenizer tokens/train --crops 10\n"
        "  hmar-mega data encode shards/val runs/tokenizer tokens/val\n"
        "  torchrun --nproc-per-node 8 -m hmar_mega data encode shards/train runs/tokenizer tokens/train --dtype bf16",
    )
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of image shards")
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help="folder of a trained tokenizer")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--batch-size", type=int, default=64, help="crops encoded at once (default: %(default)s)")
    parser.add_argument(
        "--augment",
        choices=("none", "crop"),
        default="crop",
        help="crop: shorter side to 1.125 times the resolution, then the centre, as HMAR's validation images, or with "
        "--crops random places; none: shorter side to the resolution, then the centre (default: %(default)s)",
    )
    parser.add_argument(
        "--crops", type=int, default=1, help="random crops stored of every image, of which each epoch reads another"
    )
    parser.add_argument("--crop-seed", type=int, default=0, help="decides the places of --crops (default: %(default)s)")
    parser.add_argument(
        "--storage",
        choices=("packed", "npy"),
        default="packed",
        help="packed: as few bits a token as the codebook needs; npy: uint16 arrays (default: %(default)s)",
    )
    parser.add_argument("--samples-per-shard", type=int, default=16384, help="images in a tar (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the convolutions (default: fp32)")
    parser.add_argument("--compile", action="store_true", help="compile the convolutions with torch.compile")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode images (default: %(default)s)")
    parser.add_argument("--part", metavar="I/N", help="share of the work, 1/N … N/N (default: rank and array task)")
    parser.add_argument(
        "--damaged", choices=("stop", "skip"), default="stop", help="at an image that cannot be decoded (default: stop)"
    )
    parser.set_defaults(run=_run_encode)


def parse_size(text: str) -> int:
    """Bytes from `300000`, `500K`, `256M` or `1.5G` (powers of 1000)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 256M or 1G")
    return size


def shard_settings(args: argparse.Namespace) -> ShardSettings:
    """The settings that the options of `data shard` say; UserError for those that cannot be."""
    from hmar_mega.data.pixels import PILLOW_LIMIT, Storing
    from hmar_mega.data.shard import ShardSettings

    if args.encoding == "keep":
        refuse_options("--encoding keep stores files as they are", quality=args.quality, shorter_side=args.shorter_side)
    if args.encoding == "png":
        refuse_options("png loses nothing", quality=args.quality)
    if args.quality is not None and not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality}: use 1 to 100")
    if args.shorter_side is not None and args.shorter_side < 1:
        raise UserError(f"--shorter-side {args.shorter_side}: use at least 1 pixel")
    if not 0 < args.max_megapixels <= PILLOW_LIMIT / 1e6:
        raise UserError(
            f"--max-megapixels {args.max_megapixels:g}: use at most {PILLOW_LIMIT / 1e6:.0f}, which is what Pillow "
            "opens when the shards are read"
        )
    storing = Storing(
        encoding=args.encoding,
        quality=args.quality or 95,
        shorter_side=args.shorter_side,
        max_pixels=int(args.max_megapixels * 1e6),
    )
    return ShardSettings(
        samples_per_shard=args.samples_per_shard,
        shard_bytes=args.shard_size,
        val_fraction=args.val_fraction,
        seed=args.seed,
        form=args.format,
        storing=storing,
        classes=args.classes,
        image_column=args.image_column,
        label_column=args.label_column,
        damaged_tars=args.damaged_tars,
    )


def _run_shard(args: argparse.Namespace) -> int:
    from hmar_mega.data.shard import plan_lines, plan_shards, shard_images

    settings = shard_settings(args)
    workers = args.workers or len(os.sched_getaffinity(0))
    if workers < 1:
        raise UserError(f"--workers {workers}: use at least 1")
    if args.dry_run:
        print("\n".join(plan_lines(plan_shards(args.src, settings, None), args.out)))
        return 0
    shard_images(args.src, args.out, settings, workers=workers)
    return 0


def _run_encode(args: argparse.Namespace) -> int:
    from hmar_mega.data.shares import share_of_work
    from hmar_mega.devices import pick_device
    from hmar_mega.tokenizer.encode import EncodeSettings, encode_shards
    from hmar_mega.tokenizer.model import MultiScaleVQVAE

    part, parts = share_of_work(args.part)
    rank = os.environ.get("LOCAL_RANK")
    device = pick_device(args.device)
    if rank is not None and args.device is None and device.type == "cuda":
        device = pick_device(f"cuda:{rank}")
    settings = EncodeSettings(
        batch_size=args.batch_size,
        augment=args.augment,
        crops=args.crops,
        crop_seed=args.crop_seed,
        storage=args.storage,
        compute=args.dtype,
        compile=args.compile,
        samples_per_shard=args.samples_per_shard,
        workers=args.workers,
        damaged=args.damaged,
    )
    tokenizer = MultiScaleVQVAE.load(args.tokenizer).to(device).eval()
    encode_shards(args.shards, tokenizer, args.out, settings, device=device, part=part, parts=parts)
    return 0
