"""The commands `hmar-mega tokenizer …`: training the multi-scale VQ-VAE, and judging it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from hmar_mega.errors import UserError
from hmar_mega.interrupts import Interrupts
from hmar_mega.parsers import add_command, add_config_arguments

EXAMPLE = "  hmar-mega tokenizer train demo --out vae data.images=shards/train data.images_val=shards/val"


def add_tokenizer_parser(subparsers: Any) -> None:
    """Add `tokenizer` and its commands to the sub-parsers of `hmar-mega`."""
    parser = add_command(subparsers, "tokenizer", "train and judge the multi-scale VQ-VAE", "", EXAMPLE)
    commands = parser.add_subparsers(dest="tokenizer_command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_eval(commands)


def _add_train(commands: Any) -> None:
    train = add_command(
        commands,
        "train",
        "train a tokenizer on image shards, alone or under torchrun",
        "Train the multi-scale VQ-VAE of a configuration on the image shards in data.images; the result goes to OUT.\n"
        "Started again, it goes on from the last checkpoint in OUT.",
        EXAMPLE + "\n  torchrun --nproc-per-node 8 -m hmar_mega tokenizer train tokenizer/published-256 --out vae "
        "data.images=shards/train",
    )
    add_config_arguments(train)
    train.add_argument("--out", type=Path, help="folder of the run and of the trained tokenizer (default: run.dir)")
    train.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    train.set_defaults(run=_run_train)


def _run_train(args: argparse.Namespace) -> int:
    from hmar_mega.config_io import config_to_yaml, load_config

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(config_to_yaml(config), end="")
        return 0
    out = args.out if args.out is not None else config.run.dir
    if out is None:
        raise UserError("no folder is given for the tokenizer: say where it goes, for example --out vae")
    with Interrupts() as interrupts:  # before the slow imports: a signal may come during them
        from hmar_mega.errors import TrainingError
        from hmar_mega.tokenizer.train import train_tokenizer

        try:
            metrics = train_tokenizer(config, Path(out), interrupts, args.overwrite)
        except TrainingError as err:  # the same in every process
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"hmar-mega: {err}", file=sys.stderr)
            return 1
    if metrics is not None:
        psnr = f", validation PSNR {metrics['val_psnr']:.2f} dB" if metrics["val_psnr"] is not None else ""
        usage = " ".join(f"{u:.0%}" for u in metrics["usage"])
        print(
            f"tokenizer {metrics['fingerprint']} in {out}: {metrics['steps']} steps{psnr}, codes used a scale {usage}"
        )
    return interrupts.status


def _add_eval(commands: Any) -> None:
    parser = add_command(
        commands,
        "eval",
        "measure a tokenizer on held-out images",
        "PSNR, SSIM, perceptual distance, rFID, bits per pixel, and per scale: PSNR of what the first scales give,\n"
        "codes used, perplexity. Prints the table; writes eval.md, eval.json and grids (originals, reconstructions,\n"
        "errors, first scales alone) into OUT.",
        "  hmar-mega tokenizer eval vae shards/val --out eval\n"
        "  hmar-mega tokenizer eval vae shards/val --against models/d16/tokenizer --out eval",
    )
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help="folder of a trained or imported tokenizer")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of image shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="another tokenizer, measured beside it")
    parser.add_argument("--num", type=int, help="images, in stored order (default: all)")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once (default: %(default)s)")
    parser.add_argument(
        "--augment", choices=("none", "crop"), default="none",
        help="crop: shorter side to 1.125 times the resolution, then the centre (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    parser.add_argument(
        "--perceptual", choices=("efficientnet", "none"), default="efficientnet",
        help="network of the perceptual distance, of the extra `perceptual` (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--features", default="efficientnet",
        help="of rFID: efficientnet, none, or package.module:function that gives a function from images in [−1, 1] to "
        "features (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--allow-upscaling", action="store_true", help="take images smaller than the resolution")
    parser.set_defaults(run=_run_eval)


def _run_eval(args: argparse.Namespace) -> int:
    from hmar_mega.devices import pick_device
    from hmar_mega.tokenizer.evaluate import evaluate_folder, table

    if args.batch_size < 1 or (args.num is not None and args.num < 2):
        raise UserError(f"--batch-size {args.batch_size} and --num {args.num}: use at least 1 and 2")
    names = {"ours": args.tokenizer} | ({"against": args.against} if args.against is not None else {})
    results = evaluate_folder(
        names, args.shards, args.out, args.num, args.batch_size, args.augment, pick_device(args.device),
        args.perceptual, args.features, allow_upscaling=args.allow_upscaling,
    )  # fmt: skip
    print(table(results))
    return 0
