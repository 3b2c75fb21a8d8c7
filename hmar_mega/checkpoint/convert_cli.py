"""The command `hmar-mega convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hmar_mega.errors import UserError
from hmar_mega.parsers import add_command

LAYOUTS = ("ours", "nvlabs-hmar", "nvlabs-next-scale", "nvlabs-masked", "var")


def add_convert_parser(subparsers: Any) -> None:
    """Add `convert` to the sub-parsers of `hmar-mega`; it sets `run`, a function of the arguments."""
    parser = add_command(
        subparsers,
        "convert",
        "published HMAR, VAR and VQ-VAE files into model folders, and back",
        "Turn a published file (.pth or safetensors; also a training checkpoint) into a model folder for sample, edit\n"
        "and run.init_from, or a model folder, run or tokenizer into a published file. What SRC is follows from its\n"
        "keys. Both ways are exact inverses; SRC is never changed.",
        "  hmar-mega convert hmar-d16.pth models/d16 --tokenizer vae_ch160v4096z32.pth\n"
        "  hmar-mega convert var_d36.pth models/d36 --tokenizer vae_ch160v4096z32.pth\n"
        "  hmar-mega convert next-scale.pth models/mine --masked masked.pth --tokenizer vae_ch160v4096z32.pth\n"
        "  hmar-mega convert models/d16 models/d16-512 --patch-nums 1,2,3,4,6,9,13,18,24,32\n"
        "  hmar-mega convert runs/stage2 mine.pth --to nvlabs-hmar --ema\n"
        "  hmar-mega convert models/d16/tokenizer vae.pth",
    )
    parser.add_argument(
        "src", type=Path, metavar="SRC", help="published file, model folder, tokenizer, run, checkpoint"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder, or new file where its name ends in .pth")
    parser.add_argument(
        "--to", choices=LAYOUTS, help="default: ours, or for a .pth the published layout that holds all of the model"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="VQ-VAE of the model, for ours: published file, training checkpoint or folder (default: what SRC names)",
    )
    parser.add_argument(
        "--masked",
        type=Path,
        help="nvlabs-masked file to merge into SRC, the nvlabs-next-scale one it was trained from",
    )
    parser.add_argument(
        "--patch-nums", help="other scales to resize positions and levels to, such as 1,2,3,4,6,9,13,18,24,32"
    )
    parser.add_argument(
        "--kind", choices=LAYOUTS[1:], help="what a file is, where its attention mask would say otherwise"
    )
    parser.add_argument("--checkpoint", help="of a run: latest (default), best, or a name")
    parser.add_argument("--ema", action="store_true", help="of a run or checkpoint: the moving average of the weights")
    parser.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> int:
    from hmar_mega.checkpoint.convert import convert

    done = convert(
        args.src,
        args.out,
        to=args.to,
        tokenizer=args.tokenizer,
        masked=args.masked,
        patch_nums=_numbers(args.patch_nums),
        kind=args.kind,
        checkpoint=args.checkpoint,
        ema=args.ema,
    )
    print(
        f"{args.src} ({done.source}) → {args.out} ({done.target}): {done.keys} tensors, "
        f"{done.parameters / 1e6:,.2f} M parameters\n{done.about}"
    )
    return 0


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise UserError(f"--patch-nums {text!r} is not a list of numbers, such as 1,2,3,4,6,9") from None
