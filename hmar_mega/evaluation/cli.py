"""The command `hmar-mega evaluate`: its options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hmar_mega.inference.cli import add_model_options, add_sampling
from hmar_mega.parsers import add_command


def add_evaluate_parser(commands: Any) -> None:
    """Add `evaluate` to the sub-parsers of `hmar-mega`; it sets `run`, a function of the arguments."""
    parser = add_command(
        commands,
        "evaluate",
        "FID, sFID, IS, KID, precision, recall, and validation loss by scale",
        "Measure images, or a model whose images are sampled first, beside a reference; every figure has a 95 %\n"
        "interval (bootstrap) and the feature network it belongs to. The work is cut into chunks in OUT: the same\n"
        "command started again goes on where it was, and the processes of torchrun share it.",
        "  hmar-mega evaluate samples --reference real_images --out evaluation\n"
        "  hmar-mega evaluate models/d16 --num 10000 --reference shards/val --validation tokens/val --out evaluation\n"
        "  torchrun --nproc-per-node 8 -m hmar_mega evaluate models/d16 --preset eval/d16-256 --network inception "
        "--weights inception.pth --reference adm.npz --out evaluation",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL|SAMPLES",
        help="exported model or run directory; or a folder of images, image shards, an .npz, a folder of `sample`",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the result, evaluation.json, and of features"
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--reference", type=Path, metavar="REF",
        help="folder of images, image shards, ADM's .npz, or a file of --save-stats",
    )  # fmt: skip
    what.add_argument("--network", default="efficientnet-lite0", help="efficientnet-lite0 (default), inception, pixels")
    what.add_argument("--weights", type=Path, metavar="FILE", help="of inception, in torch-fidelity's layout")
    what.add_argument("--resize", type=int, metavar="N", help="resize and cut all images to N × N pixels")
    what.add_argument("--grayscale", action="store_true", help="allow grayscale images: repeat their channel")
    what.add_argument(
        "--bootstrap", type=int, default=20, metavar="R", help="replicates; 0: no intervals (default: 20)"
    )
    what.add_argument("--save-stats", type=Path, metavar="FILE", help="also write the images' statistics, a later REF")
    what.add_argument("--validation", type=Path, metavar="TOKENS", help="of MODEL: loss by scale on these token shards")
    what.add_argument("--validation-samples", type=int, metavar="N", help="the first N of them (default: all)")
    what.add_argument("--batch-size", type=int, default=50, help="images at once (default: 50)")
    what.add_argument("--chunk-size", type=int, default=500, help="images whose features are a file (default: 500)")
    what.add_argument("--json", action="store_true", help="print JSON instead of a table")
    own = parser.add_argument_group("the images of MODEL")
    own.add_argument(
        "--preset", metavar="NAME", help="settings of the paper: eval/d16-256 … eval/d30-256, 50 000 images"
    )
    own.add_argument(  # see `sample`
        "--num", "--num-images", type=int, metavar="N", help="images, classes in turn (under torchrun: --num-images)"
    )  # fmt: skip
    add_model_options(own)
    add_sampling(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from hmar_mega.evaluation.commands import evaluate

    evaluate(args)
    return 0
