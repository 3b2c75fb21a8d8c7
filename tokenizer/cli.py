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


def _add_train(commands: Any) -> None:
    train = add_command(
        commands,
        "train",
        "train a tokenizer on image shards, alone or under torchrun",
        "Train the multi-scale VQ-VAE of a configuration on the image shards in data.images; the result goes to OUT.\n"
        "Started again, it goes on from the last checkpoint in OUT.",
        EXAMPLE + "\n  torchrun --nproc-per-node 8 -m hmar_mega tokenizer train tokenizer/published-256 --out vae \\\n"
        "      data.images=shards/train data.images_val=shards/val",
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
