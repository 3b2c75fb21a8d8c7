"""What `hmar-mega sample`, `edit` and `quantize` do with files."""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
from torch import Tensor

from hmar_mega.checkpoint.export import DTYPES
from hmar_mega.config_io import load_config
from hmar_mega.data.images import image_grid
from hmar_mega.errors import UserError, refuse_options
from hmar_mega.inference.canvas import (
    Canvas,
    boxed_canvas,
    masked_canvas,
    outpaint_canvas,
    parse_box,
    parse_room,
    read_image,
)
from hmar_mega.inference.editing import check_feather, edit
from hmar_mega.inference.frames import write_gif, write_scales
from hmar_mega.inference.generation import Generation, Request
from hmar_mega.inference.opening import open_model
from hmar_mega.inference.options import ClassNames, class_names, parse_cfg, parse_mask_schedule, read_requests
from hmar_mega.inference.pipeline import ImageModel, image_seeds
from hmar_mega.inference.quantize import CALIBRATION_IMAGES, quantize_folder
from hmar_mega.inference.sampler import SampleSettings

#: Images of a grid, or versions of an edit, sampled at once.
BATCH = 64

#: Most versions of an edit side by side.
COLUMNS = 8

#: Images a class, unless --count says otherwise.
COUNT = 4


def sample(args: argparse.Namespace) -> None:
    """Draw images into a grid, or into a folder."""
    into_folder = args.num is not None or (args.csv is not None and args.out.suffix.lower() != ".png")
    _check_sample(args, into_folder)
    part, parts = _share(args.part) if into_folder else (0, 1)
    if args.preset is not None:
        use_preset(args)
    model, names, settings = open_from(args)
    if into_folder:
        if args.csv is not None:
            request = Request(*(np.asarray(column, dtype=np.int64) for column in _requests(args, model, names)))
        else:
            classes = names.numbers(args.classes) if args.classes else list(range(model.num_classes))
            seed = args.seed or 0
            image_seeds([seed + args.num - 1, seed], 2)
            request = Request.balanced(args.num, model.check_labels(classes).tolist(), seed)
        own = {"form": args.format, "chunk_size": args.chunk_size, "batch_size": args.batch_size}
        generation = Generation(
            model, settings, request, args.out, part=part, parts=parts, class_names=names.names,
            **{name: value for name, value in own.items() if value is not None},
        )  # fmt: skip
        print(generation.run(show_progress=int(os.environ.get("RANK", 0)) == 0))
        return
    if args.csv is not None:
        labels, seeds = _requests(args, model, names)
    else:
        labels = [c for c in names.numbers(args.classes) for _ in range(args.count or COUNT)]
        seeds = image_seeds(args.seed or 0, len(labels)).tolist()
    model.check_labels(labels)
    _draw_grid(args, model, settings, labels, seeds)
    print(f"{len(labels)} images of {len(dict.fromkeys(labels))} classes in {args.out}")


def _check_sample(args: argparse.Namespace, into_folder: bool) -> None:
    """Refuse what does not go together before anything is loaded."""
    if args.classes is None and args.csv is None and args.num is None:
        raise UserError("which images? required: --classes, --csv or --num")
    if args.csv is not None and (args.classes is not None or args.num is not None or (args.count and into_folder)):
        raise UserError("--csv says which images: leave out --classes, --num and, into a folder, --count")
    if args.count is not None and args.count < 1:
        raise UserError(f"--count {args.count}: ask for at least 1 image a class")
    if args.num is not None and (args.num < 1 or args.count):
        raise UserError(
            f"--num {args.num}: ask for at least 1 image, and leave out --count: it is the number of images"
        )
    if into_folder and (args.gif or args.scales_out):
        raise UserError("--gif and --scales-out show a grid: leave out --num, or with --csv let --out end in .png")
    if not into_folder and args.part:
        raise UserError("--part is for images into a folder: give --num N, or --csv with a folder as --out")
    if into_folder and args.out.suffix.lower() in (".png", ".npz"):
        raise UserError(f"--out {args.out}: with --num it is a folder; --format chooses how the images are written")
    if args.csv is not None:
        refuse_options("--csv gives every image its own seed", seed=args.seed)
    if not into_folder:
        why = f"{args.out} is to be a grid in one PNG; images go into a folder with --num N, or with --csv"
        refuse_options(why, format=args.format, chunk_size=args.chunk_size)
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: sample at least 1 image at once")


def _requests(args: argparse.Namespace, model: ImageModel, names: ClassNames) -> tuple[list[int], list[int]]:
    labels, seeds = read_requests(args.csv, names)
    model.check_labels(labels)
    image_seeds(seeds, len(seeds))
    return labels, seeds


def _share(text: str | None) -> tuple[int, int]:
    """(part, parts) of `--part I/N`, else of torchrun's rank."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if text is None:
        return rank, world
    number, slash, count = text.partition("/")
    fits = slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)
    if not fits or world > 1:
        why = "under torchrun the ranks share the work" if world > 1 else "give 1/4, 2/4, 3/4 and 4/4 to four processes"
        raise UserError(f"--part {text!r} cannot be used: {why}")
    return int(number) - 1, int(count)


def use_preset(args: argparse.Namespace) -> None:
    """Fill the sampling options that were not given from the `eval` section of the configuration `args.preset`.

    The mask schedule and mask_cfg stay the model's own.

    Raises:
        UserError: when there is no such configuration.
    """
    chosen = load_config(args.preset).eval
    if args.cfg is None:
        args.cfg = str(chosen.cfg_scale)
    args.top_k = chosen.top_k if args.top_k is None else args.top_k
    args.top_p = chosen.top_p if args.top_p is None else args.top_p


def open_named(args: argparse.Namespace) -> tuple[ImageModel, ClassNames]:
    """The model and its class names, as `cli.add_model_options` and `cli.add_device_options` say."""
    device = args.device
    if device in (None, "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    if args.precision is not None and args.dtype is not None:
        raise UserError(
            f"--precision {args.precision} is that of transformer and decoder, --dtype {args.dtype} of the transformer "
            "alone: give one of the two"
        )
    dtype, decoder_dtype = DTYPES[args.precision or args.dtype or "fp32"], DTYPES[args.precision or "fp32"]
    model = open_model(args.model, device, dtype, args.ema, args.checkpoint, args.tokenizer, decoder_dtype)
    return model, class_names(args.class_names, model.settings.get("classes"), model.num_classes)


def open_from(args: argparse.Namespace) -> tuple[ImageModel, ClassNames, SampleSettings]:
    """The model, its class names and how to sample, checked."""
    cfg = None if args.cfg is None else parse_cfg(args.cfg)
    mask_cfg = None if args.mask_cfg is None else parse_cfg(args.mask_cfg, "--mask-cfg")
    passes = None if args.mask_schedule is None else parse_mask_schedule(args.mask_schedule)
    model, names = open_named(args)
    negative = None if args.negative_class is None else names.number(args.negative_class)
    settings = model.sample_settings(
        cfg, args.top_k, args.top_p, passes, mask_cfg, negative_class=negative, more_smooth=args.more_smooth
    )
    return model, names, settings


def _draw_grid(
    args: argparse.Namespace, model: ImageModel, settings: SampleSettings, labels: list[int], seeds: list[int]
) -> None:
    """The PNG, and the scales where they are asked for."""
    columns, batches = args.count or COUNT, _batches(len(labels), args.batch_size or BATCH)
    if args.gif or args.scales_out:
        scales = torch.cat([model.generate_scales(labels[b], seeds[b], settings).cpu() for b in batches], dim=1)
        if args.scales_out:
            write_scales(args.scales_out, scales, model.schedule.patch_nums, columns)
        if args.gif:
            write_gif(args.gif, scales, columns)
        images = scales[-1]
    else:
        images = torch.cat([_images(model, settings, labels[b], seeds[b]) for b in batches])
    image_grid(images, columns, args.out, value_range=(0.0, 1.0))


def _images(model: ImageModel, settings: SampleSettings, labels: list[int], seeds: list[int]) -> Tensor:
    """(B, 3, H, W) in main memory."""
    own_seeds = torch.tensor(seeds, device=model.device)
    return model.sampler(model.check_labels(labels), own_seeds, settings)[1].cpu()


def _batches(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def edit_file(args: argparse.Namespace) -> None:
    """Edit one image file."""
    if args.count < 1:
        raise UserError(f"--count {args.count}: ask for at least 1 version")
    if args.outpaint and args.fit == "exact":
        raise UserError("--fit exact goes with --mask and --box: outpainting always moves the picture")
    check_feather(not args.no_paste, args.feather)
    model, names, settings = open_from(args)
    canvas = _canvas(args, model)
    label, seeds = names.number(args.label), image_seeds(args.seed or 0, args.count)
    images, psnr, error = [], [], []
    for batch in _batches(args.count, BATCH):
        own = seeds[batch]
        done = edit(
            model, canvas.image.expand(len(own), -1, -1, -1), canvas.mask[None], [label] * len(own), own, settings,
            paste=not args.no_paste, feather=args.feather,
        )  # fmt: skip
        images.append(done.images.cpu())
        psnr.append(float(done.kept_psnr.min()))
        error.append(float(done.kept_error.max()))
    image_grid(torch.cat(images), min(args.count, COLUMNS), args.out, value_range=(0.0, 1.0))
    for change in canvas.changes:
        print(change)
    print(f"{int(canvas.mask.sum())} of {canvas.mask.numel()} pixels generated anew in {args.out}")
    if not canvas.mask.all():
        print(kept_line(min(psnr), max(error), pasted=not args.no_paste, feather=args.feather))


def kept_line(psnr: float, error: float, pasted: bool, feather: int) -> str:
    """What the kept pixels lost at worst, in dB and as a share of the full range."""
    then = "put back as they were" if pasted and not feather else f"fading over {feather} px" if pasted else "left so"
    return f"kept pixels as they were decoded: PSNR {psnr:.1f} dB, largest error {error:.3f} of 1; {then}"


def _canvas(args: argparse.Namespace, model: ImageModel) -> Canvas:
    resolution, exact = model.schedule.grid * model.tokenizer.config.downsample, args.fit == "exact"
    image = read_image(args.image)
    if args.mask is not None:
        return masked_canvas(image, read_image(args.mask, "L"), resolution, exact)
    if args.box is not None:
        return boxed_canvas(image, parse_box(args.box), resolution, exact)
    return outpaint_canvas(image, parse_room(args.outpaint, resolution), resolution)


def quantize(args: argparse.Namespace) -> None:
    """Quantize a model, and say what it came to."""
    parts = tuple(part.strip() for part in args.parts.split(","))
    if args.to == "int8":
        why = "int8 quantizes weights alone, which need no calibration"
        refuse_options(
            why, calibrate=args.calibrate, classes=args.classes, seed=args.seed, class_names=args.class_names
        )
    sizes = quantize_folder(
        args.model, args.out, args.to, parts,
        CALIBRATION_IMAGES if args.calibrate is None else args.calibrate, args.classes, args.seed or 0,
        args.class_names, args.dtype, args.device, args.ema, args.checkpoint, args.tokenizer,
    )  # fmt: skip
    print(
        f"{args.to} of {', '.join(parts)}, the rest {sizes.rest}: {sizes.before / 1e6:,.1f} MB → "
        f"{sizes.after / 1e6:,.1f} MB of weights in {args.out}"
    )


def export_programs(args: argparse.Namespace) -> None:
    """Write a model's programs for another runtime, and say how far off they are."""
    from hmar_mega.inference.deploy import deploy  # imports torch's exporters

    refuse_options(
        f"programs are float32, and those of unfinished runs are exported too (--format {args.format})",
        dtype=args.dtype, allow_unfinished=args.allow_unfinished,
    )  # fmt: skip
    if args.format != "torch-export":
        refuse_options("generate.pt2, whose batch it is, is part of torch-export alone", batch=args.batch)
    if args.format != "aoti":
        refuse_options(f"{args.format} programs are made on the CPU and bound to no device", device=args.device)
    device = args.device if args.format == "aoti" else "cpu"
    model = open_model(args.run_dir, device, torch.float32, args.ema, args.checkpoint, args.tokenizer)
    for name, done in deploy(model, args.out, args.format, 1 if args.batch is None else args.batch).items():
        given, made = (", ".join(f"{k} {v}" for k, v in io.items()) for io in (done.inputs, done.outputs))
        print(
            f"{name}: {args.out / done.file} ({model.device.type}), {given} → {made}; loaded back, images are at most "
            f"{done.max_error:.1e} off"
        )
