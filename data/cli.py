"""The commands `hmar-mega data …`; here those for demo data and for what an index says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmar_mega.data.inspect_cli import add_inspection_parsers
from hmar_mega.data.make_cli import add_making_parsers
from hmar_mega.parsers import add_command

if TYPE_CHECKING:
    from hmar_mega.data.index import ShardIndex, TokenFormat

#: Shards `data info` lists before it only counts the rest.
LISTED_SHARDS = 10


def add_data_parser(subparsers: Any) -> None:
    """Add `data` and its commands to the sub-parsers of `hmar-mega`; each sets `run`, a function of the arguments."""
    parser = add_command(
        subparsers,
        "data",
        "make shards of images and tokens",
        "Demo data, sharding, encoding, checking, and what a folder of shards holds.",
        "  hmar-mega data shard photos/train shards/train\n  hmar-mega data check shards/train --deep",
    )
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    _add_demo(commands)
    add_making_parsers(commands)
    _add_info(commands)
    add_inspection_parsers(commands)


def _add_demo(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        "write a small set of real images as image shards",
        "Write a small set of real images as image shards to OUT/train and OUT/val.\n\n"
        "digits         1797 handwritten digits, from scikit-learn\n"
        "fashion-mnist  70 000 articles of clothing, from Debian's package dataset-fashion-mnist\n"
        "emoji          up to 7572 emoji, from npm's packages emoji-datasource-google and -twitter\n"
        "openclipart    about 5900 clip arts, from Debian's package openclipart-png\n\n"
        "Nothing is downloaded; where a package is missing, the error says how to get it.",
        "  hmar-mega data demo digits data/digits --size 16",
    )
    parser.add_argument("name", choices=("digits", "fashion-mnist", "emoji", "openclipart"), help="which set")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--size", type=int, help="side in pixels (default: 16, 32, 64, 128)")
    parser.add_argument(
        "--val-fraction", type=float, help="share that goes to OUT/val (default: the published split, else 0.1)"
    )
    parser.add_argument("--source", type=Path, help="folder of the package, where it is not installed as usual")
    parser.set_defaults(run=_run_demo)


def _add_info(commands: Any) -> None:
    parser = add_command(
        commands,
        "info",
        "show what a folder of shards holds",
        "Show the index of a folder of shards.",
        "  hmar-mega data info tokens/train",
    )
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of image or token shards")
    parser.set_defaults(run=_run_info)


def _run_demo(args: argparse.Namespace) -> int:
    from hmar_mega.data.demo import write_demo

    write_demo(args.name, args.out, size=args.size, val_fraction=args.val_fraction, source=args.source)
    return 0


def _run_info(args: argparse.Namespace) -> int:
    from hmar_mega.data.index import read_index

    print("\n".join(info_lines(read_index(args.shards))))
    return 0


def info_lines(index: ShardIndex) -> list[str]:
    """The index as lines of text: facts first, then the shards, of which only the first ten are listed."""
    facts = [
        ("kind", index.kind),
        ("samples", f"{index.samples:,}"),
        ("shards", f"{len(index.shards):,} ({sum(shard.bytes for shard in index.shards) / 1e6:,.1f} MB)"),
        ("classes", f"{len(index.classes)}: {_shorten(index.classes)}"),
        ("skipped", f"{len(index.skipped)} images" if index.skipped else "none"),
    ]
    if index.duplicates:
        facts.append(("duplicates", f"{index.duplicates:,} images"))
    if index.notes:
        facts.append(("notes", ", ".join(f"{count:,} {name}" for name, count in index.notes.items())))
    if index.tokens is not None:
        facts += [
            ("resolution", f"{index.tokens.resolution} px"),
            ("patch_nums", " ".join(map(str, index.tokens.patch_nums))),
            ("codebook", f"{index.tokens.codebook_size} codes"),
            ("tokenizer", index.tokens.fingerprint),
            ("stored", _describe_storage(index.tokens)),
        ]
    lines = [f"{name:<11}{value}" for name, value in facts]
    lines += ["", f"{'shard':<20}{'samples':>10}{'bytes':>16}  sha256"]
    for shard in index.shards[:LISTED_SHARDS]:
        lines.append(f"{shard.name:<20}{shard.samples:>10,}{shard.bytes:>16,}  {shard.sha256[:12]}")
    if len(index.shards) > LISTED_SHARDS:
        lines.append(f"… and {len(index.shards) - LISTED_SHARDS} more")
    return lines


def _describe_storage(tokens: TokenFormat) -> str:
    from hmar_mega.data.tokens import TokenCodec

    crops = f"{tokens.crops} crops" if tokens.crops > 1 else "1 crop"
    return (
        f"{crops} of {tokens.bits} bits a token ({tokens.storage}), {TokenCodec(tokens).sample_bytes:,} bytes an image"
    )


def _shorten(names: tuple[str, ...], shown: int = 10) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
