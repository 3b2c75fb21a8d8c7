"""The commands `hmar-mega sample`, `edit` and `quantize`: their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hmar_mega.parsers import add_command

DTYPES = ("fp32", "bf16", "fp16")


def add_inference_parsers(commands: Any) -> None:
    """Add the commands to the sub-parsers of `hmar-mega`; each sets `run`, a function of the arguments."""
    _add_sample(commands)
    _add_edit(commands)
    _add_quantize(commands)


def _add_sample(commands: Any) -> None:
    parser = add_command(
        commands,
        "sample",
        "draw images: a PNG grid, or thousands into a folder",
        "Draw images of given classes into one PNG grid, with --num or --csv also into a folder.\n\n"
        "Into a folder, the work is cut into chunks that are written whole; the same command started again goes on\n"
        "where it was, and several processes (torchrun, or --part 1/4 … --part 4/4) share it. The bytes are always\n"
        "the same.",
        "  hmar-mega sample models/d16 --classes 0,3,7 --count 4 --seed 0 --out grid.png\n"
        "  hmar-mega sample runs/d16-masked --ema --classes tench --gif tench.gif --out grid.png\n"
        "  torchrun --nproc-per-node 8 -m hmar_mega sample models/d16 --num-images 50000 --out samples",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="exported model, or run directory")
    add_model_options(parser)
    which = parser.add_argument_group("which images")
    which.add_argument("--classes", help="comma-separated numbers or names; in a grid, a row each (with --num: all)")
    which.add_argument("--count", type=int, help="images a class, columns of the grid (default: 4)")
    which.add_argument("--csv", type=Path, metavar="FILE", help="a line class,seed for each image")
    which.add_argument(  # torchrun takes --num, also behind the module's name, for a shortened option of its own
        "--num",
        "--num-images",
        type=int,
        metavar="N",
        help="this many images, the classes in turn, into the folder OUT (under torchrun: --num-images)",
    )
    out = parser.add_argument_group("what to write")
    out.add_argument("--out", type=Path, required=True, help="PNG of the grid; with --num or --csv also a folder")
    out.add_argument("--scales-out", type=Path, metavar="FOLDER", help="also the grid after each scale, as PNGs")
    out.add_argument("--gif", type=Path, metavar="FILE", help="also the grid after each scale, as one animation")
    out.add_argument("--format", choices=("npz", "png", "shards"), help="of images in a folder (default: npz)")
    out.add_argument("--chunk-size", type=int, help="images written at once into a folder (default: 500)")
    out.add_argument("--batch-size", type=int, help="images sampled at once (default: 50 into a folder, 64 of a grid)")
    out.add_argument("--part", metavar="I/N", help="share of the chunks to make, 1/N … N/N (default: torchrun's rank)")
    add_sampling(parser)
    parser.add_argument(
        "--preset", metavar="NAME", help="sampling settings of a configuration: eval/d16-256 … are the paper's"
    )
    parser.set_defaults(run=_run_sample)


def _add_edit(commands: Any) -> None:
    parser = add_command(
        commands,
        "edit",
        "generate part of an image anew, keeping the rest",
        "Inpainting (--mask), class-conditional edits of a box (--box) and outpainting (--outpaint).\n"
        "At every scale the tokens of the kept region are those of the image. What is done to its pixels to fit the\n"
        "model, and how far the kept ones are off before they are put back, is printed.",
        "  hmar-mega edit models/d16 photo.png --mask mask.png --class 207 --out edited.png\n"
        "  hmar-mega edit models/d16 photo.png --box 64,64,192,192 --class 207 --feather 8 --out edited.png\n"
        "  hmar-mega edit models/d16 photo.png --outpaint right:96 --class 207 --count 4 --out wider.png",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="exported model, or run directory")
    add_model_options(parser)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="image file, resized and cut to the model's size")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mask", type=Path, help="image of the same size: white is generated, black is kept")
    where.add_argument("--box", metavar="L,T,R,B", help="generate this box, in pixels of the model's size")
    where.add_argument(
        "--outpaint",
        action="append",
        metavar="SIDE[:PX]",
        help="generate a strip at the left, right, top or bottom (default: a quarter); may be repeated",
    )
    parser.add_argument("--class", dest="label", required=True, help="class of the result, a number or name")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--count", type=int, default=1, help="versions, 8 to a row of a grid (default: 1)")
    parser.add_argument("--feather", type=int, default=0, metavar="PX", help="fade into the kept region over PX pixels")
    parser.add_argument("--no-paste", action="store_true", help="show the decoder's pixels in the kept region too")
    parser.add_argument("--fit", choices=("crop", "exact"), default="crop", help="exact: refuse other sizes")
    add_sampling(parser)
    parser.set_defaults(run=_run_edit)


def _add_quantize(commands: Any) -> None:
    parser = add_command(
        commands,
        "quantize",
        "write a model with weights of 8 bits: int8, or fp8 with activations in fp8 too",
        "Write a model whose weights take 8 bits, for sample, edit and evaluate.\n"
        "int8: weights alone. fp8: weights and activations in e4m3; the range of every linear's inputs is measured on\n"
        "images that the model draws. Without a GPU that multiplies in FP8 the same numbers are computed in float32.",
        "  hmar-mega quantize models/d16 models/d16-int8 --to int8\n"
        "  hmar-mega quantize runs/d16-masked models/d16-fp8 --to fp8 --calibrate 64 --classes 0,207,281 --seed 1",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="exported model, or run directory")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--to", choices=("int8", "fp8"), required=True, help="number format of the weights")
    parser.add_argument(
        "--parts", default="blocks,adaln", metavar="PART,…",
        help="what is quantized, of blocks, adaln (modulation) and head (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--calibrate", type=int, metavar="N", help="fp8: images to measure on (default: 32)")
    parser.add_argument("--classes", help="fp8: their classes, numbers or names (default: all, evenly)")
    parser.add_argument("--seed", type=int, help="fp8: of the first of them (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is not quantized (default: as it is stored)")
    parser.add_argument("--device", help="to calibrate on (default: the first GPU, else the CPU)")
    add_model_options(parser)
    parser.set_defaults(run=_run_quantize)


def add_model_options(parser: Any) -> None:
    """How a model is opened, for a parser or a group of options."""
    parser.add_argument("--ema", action="store_true", help="of a run: the moving average of the weights")
    parser.add_argument("--checkpoint", default="latest", help="of a run: latest (default), best, or a name")
    parser.add_argument("--tokenizer", type=Path, help="of a run: folder of its tokenizer, if it has moved")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="a name a line, or JSON (default: its own)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How images are drawn, on what device."""
    group = parser.add_argument_group("how to sample")
    group.add_argument(
        "--cfg", help="guidance: one number, reached at the last scale, or one for every scale (default: its own)"
    )
    group.add_argument(
        "--mask-cfg",
        metavar="CFG",
        help="guidance of the mask passes, as --cfg (default: the model's own share of --cfg; 0 is fastest)",
    )
    group.add_argument("--top-k", type=int, help="keep the k most likely tokens, 0 all (default: the model's own)")
    group.add_argument("--top-p", type=float, help="then keep tokens up to this probability (default: the model's own)")
    group.add_argument(
        "--mask-schedule", metavar="1;1,3;…", help="tokens each pass keeps, scales by semicolons (default: its own)"
    )
    group.add_argument(
        "--negative-class", metavar="CLASS", help="guide away from this class, not from none in particular"
    )
    group.add_argument("--more-smooth", action="store_true", help="mix codes: prettier, not for measuring")
    group.add_argument("--seed", type=int, help="image i uses seed + i (default: 0)")
    add_device_options(group)


def add_device_options(parser: Any) -> None:
    """Where a model computes, in what numbers, for a parser or a group of options."""
    parser.add_argument("--device", help="default: the first GPU (of torchrun's local rank), else the CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="of the transformer alone (default: fp32)")
    parser.add_argument("--precision", choices=DTYPES, help="of transformer and decoder; f̂ and draws stay fp32")


def _run_sample(args: argparse.Namespace) -> int:
    from hmar_mega.inference.commands import sample

    sample(args)
    return 0


def _run_edit(args: argparse.Namespace) -> int:
    from hmar_mega.inference.commands import edit_file

    edit_file(args)
    return 0


def _run_quantize(args: argparse.Namespace) -> int:
    from hmar_mega.inference.commands import quantize

    quantize(args)
    return 0
