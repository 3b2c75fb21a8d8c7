"""The command `hmar-mega tokenizer train`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from hmar_mega.errors import UserError
from hmar_mega.parsers import add_command, add_config_arguments

EXAMPLE = "example:\n  hmar-mega tokenizer train demo --out vae data.images=shards/train data.images_val=shards/val"

#: Held-out images that PSNR and the reconstruction sheet are made from.
VALIDATION_IMAGES = 512


def add_tokenizer_parser(subparsers: Any) -> None:
    """Add `tokenizer` and its commands to the sub-parsers of `hmar-mega`."""
    parser = add_command(subparsers, "tokenizer", "train the multi-scale VQ-VAE", "The multi-scale VQ-VAE.", EXAMPLE)
    commands = parser.add_subparsers(dest="tokenizer_command", metavar="COMMAND", required=True)
    train = add_command(
        commands,
        "train",
        "train a tokenizer on image shards",
        "Train the multi-scale VQ-VAE of a configuration on the image shards in data.images; the result goes to OUT.",
        EXAMPLE,
    )
    add_config_arguments(train)
    train.add_argument("--out", type=Path, required=True, help="folder of the trained tokenizer")
    train.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    train.set_defaults(run=_run_train)


def _run_train(args: argparse.Namespace) -> int:
    from hmar_mega.config_io import config_to_yaml, load_config

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(config_to_yaml(config), end="")
        return 0
    from hmar_mega.data.images import ImageStream
    from hmar_mega.data.order import SampleOrder
    from hmar_mega.data.reader import ShardReader
    from hmar_mega.tokenizer.train import train_tokenizer

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("tokenizer training is one process in this version; start it without torchrun")
    if args.out.is_dir() and any(args.out.iterdir()) and not args.overwrite:
        raise UserError(
            f"{args.out} exists and is not empty; choose another --out, or give --overwrite (token shards made with a "
            "tokenizer that is replaced are of no more use)"
        )
    if config.data.images is None:
        raise UserError("data.images is not set: give a folder of image shards (hmar-mega data shard)")
    data, seed = config.data, config.run.seed
    reader = ShardReader(Path(str(data.images)), "images")
    stream = ImageStream(
        reader, SampleOrder(len(reader), seed), config.schedule.resolution, data.augment, seed, data.workers
    )
    validation = None
    if data.images_val is not None:
        held_out = ShardReader(Path(data.images_val), "images")
        order = SampleOrder(len(held_out), seed, shuffle=False)
        fixed = ImageStream(held_out, order, config.schedule.resolution, "none", seed)
        validation = fixed.batch(0, min(VALIDATION_IMAGES, len(held_out)))
    size = config.tokenizer.train.batch_size
    metrics = train_tokenizer(config, lambda step: stream.batch(step * size, size), args.out, validation)
    psnr = f", validation PSNR {metrics['val_psnr']:.2f} dB" if metrics["val_psnr"] is not None else ""
    usage = " ".join(f"{u:.0%}" for u in metrics["usage"])
    print(
        f"tokenizer {metrics['fingerprint']} in {args.out}: {metrics['steps']} steps{psnr}, codes used a scale {usage}"
    )
    return 0
