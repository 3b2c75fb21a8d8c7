"""The commands `hmar-mega data check`, `data stats` and `data view`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from hmar_mega.errors import UserError, refuse_options
from hmar_mega.parsers import add_command


def add_inspection_parsers(commands: Any) -> None:
    """Add `check`, `stats` and `view`."""
    _add_check(commands)
    _add_stats(commands)
    _add_view(commands)


def _add_check(commands: Any) -> None:
    parser = add_command(
        commands,
        "check",
        "find out whether shards are whole",
        "Compare every shard with what its writer recorded: size, checksum, headers, number of samples, labels,\n"
        "offsets, and for tokens their size and tokenizer. Nothing is changed. Exit status 1 if something is wrong.",
        "  hmar-mega data check shards/train --deep\n  hmar-mega data check tokens --tokenizer vae --json",
    )
    parser.add_argument("shards", type=Path, metavar="DIR", help="folder of shards, or of such folders")
    parser.add_argument("--deep", action="store_true", help="also decode every image and look at every token")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer that token shards should come from")
    parser.add_argument("--workers", type=int, help="processes (default: as many as cores)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run_check)


def _add_stats(commands: Any) -> None:
    parser = add_command(
        commands,
        "stats",
        "count classes, sizes and codes, and plot them",
        "Count samples a class, sizes of images, and which codes each scale of the tokens uses; --out writes\n"
        "stats.json and plots (classes.png; resolutions.png or codebook.png).",
        "  hmar-mega data stats tokens/train --out stats/train",
    )
    parser.add_argument("shards", type=Path, metavar="DIR", help="folder of shards")
    parser.add_argument("--out", type=Path, help="folder for plots and stats.json")
    parser.add_argument(
        "--samples", type=int, default=50_000, help="read at most so many, evenly spaced (default: %(default)s)"
    )
    parser.set_defaults(run=_run_stats)


def _add_view(commands: Any) -> None:
    parser = add_command(
        commands,
        "view",
        "look at samples: a contact sheet or a page",
        "Write samples drawn at random as a contact sheet (.png) or as a page of HTML that needs nothing beside it.",
        "  hmar-mega data view shards/train --out sheet.png --count 100\n"
        "  hmar-mega data view tokens/train --tokenizer vae --out page.html --class 3 --class 5",
    )
    parser.add_argument("shards", type=Path, metavar="DIR", help="folder of shards")
    parser.add_argument("--out", type=Path, required=True, help="a .png or an .html file")
    parser.add_argument("--count", type=int, default=64, help="samples (default: %(default)s)")
    parser.add_argument("--class", dest="classes", action="append", default=[], help="only this class; repeatable")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="decodes token shards: the one that made them")
    parser.add_argument("--crop", type=int, help="of token shards, which stored crop (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="which samples are drawn (default: %(default)s)")
    parser.add_argument("--side", type=int, default=128, help="pixels of a picture on a sheet (default: %(default)s)")
    parser.set_defaults(run=_run_view)


def _run_check(args: argparse.Namespace) -> int:
    from hmar_mega.data.check import check_folders, report_lines

    fingerprint = None
    if args.tokenizer is not None:
        from hmar_mega.tokenizer.model import MultiScaleVQVAE

        fingerprint = MultiScaleVQVAE.load(args.tokenizer).fingerprint
    workers = args.workers or len(os.sched_getaffinity(0))
    reports = check_folders(args.shards, args.deep, workers, fingerprint)
    if args.json:
        print(json.dumps([report.tree() for report in reports], indent=1))
    else:
        print("\n".join(line for report in reports for line in report_lines(report)))
    return 1 if any(report.problems for report in reports) else 0


def _run_stats(args: argparse.Namespace) -> int:
    from hmar_mega.data.stats import count_folder, stats_lines, write_stats

    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: use at least 1")
    stats = count_folder(args.shards, args.samples)
    print("\n".join(stats_lines(stats)))
    if args.out is not None:
        print("wrote " + ", ".join(str(path) for path in write_stats(stats, args.out)))
    return 0


def _run_view(args: argparse.Namespace) -> int:
    from hmar_mega.data.index import read_index
    from hmar_mega.data.view import write_view

    tokenizer = None
    if read_index(args.shards).kind == "images":
        refuse_options("the shards hold images", tokenizer=args.tokenizer, crop=args.crop)
    elif args.tokenizer is not None:
        from hmar_mega.tokenizer.model import MultiScaleVQVAE

        tokenizer = MultiScaleVQVAE.load(args.tokenizer)
    count = write_view(args.shards, args.out, args.count, args.classes, tokenizer, args.crop or 0, args.seed, args.side)
    print(f"{count} samples in {args.out}")
    return 0
