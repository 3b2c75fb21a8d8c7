"""What `hmar-mega evaluate` does: images, features, figures, result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hmar_mega.devices import pick_device
from hmar_mega.errors import UserError, refuse_options
from hmar_mega.evaluation.extraction import Extraction
from hmar_mega.evaluation.images import Fit, ImageSource, open_images
from hmar_mega.evaluation.measures import check_count, measure, warnings_for
from hmar_mega.evaluation.networks import FeatureNetwork, open_network
from hmar_mega.evaluation.result import as_table
from hmar_mega.evaluation.statistics import Statistics, gather, holds_statistics, load_statistics, save_statistics
from hmar_mega.files import check_writable, write_atomic

RESULT_FILE = "evaluation.json"

#: Images of a preset, as in the papers.
PAPER_IMAGES = 50_000


def evaluate(args: argparse.Namespace) -> None:
    """Run one evaluation; every process of torchrun calls it, and the first one writes and prints."""
    of_model = _is_model(args.model)
    _check(args, of_model)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with _process_group(world):
        result: dict[str, Any] = {"evaluated": str(args.model)}
        try:
            images = _sample(args, result, rank, world) if of_model else args.model
            if images is not None:
                _measure(args, images, result, rank, world)
        except UserError as err:
            err.rank = rank if world > 1 else None
            raise
        if rank == 0:
            write_atomic(args.out / RESULT_FILE, json.dumps(result, indent=1) + "\n")
            print(json.dumps(result, indent=1) if args.json else as_table(result))


def _is_model(path: Path) -> bool:
    return (path / "checkpoints").is_dir() or (path / "model.safetensors").is_file()


def _check(args: argparse.Namespace, of_model: bool) -> None:
    """Refuse what does not go together before anything is loaded."""
    if not of_model:
        why = f"{args.model} is not a model: its images are there already"
        names = (
            "preset", "num", "validation", "validation_samples", "ema", "tokenizer", "class_names", "cfg", "mask_cfg",
            "top_k", "top_p", "mask_schedule", "negative_class", "more_smooth", "seed",
        )  # fmt: skip
        refuse_options(why, **{name: getattr(args, name) for name in names})
    elif args.num is None and args.preset is None and args.validation is None:
        raise UserError("how many images of the model? give --num N, or --preset; or --validation alone for its loss")
    wanted = not of_model or args.num is not None or args.preset is not None
    if wanted and args.reference is None and args.save_stats is None:
        raise UserError("measured beside what? give --reference REF, or --save-stats FILE for statistics alone")
    if not wanted:
        why = "no images are measured without --num or --preset"
        refuse_options(why, reference=args.reference, save_stats=args.save_stats, weights=args.weights)
    for name, least in (
        ("num", 1),
        ("batch_size", 1),
        ("chunk_size", 1),
        ("bootstrap", 0),
        ("resize", 8),
        ("validation_samples", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.bootstrap == 1:
        raise UserError("--bootstrap 1: a spread needs at least 2 replicates; 0 gives no intervals")
    if args.save_stats is not None:
        if args.save_stats.suffix != ".npz":
            raise UserError(f"--save-stats {args.save_stats}: the file of statistics is an .npz")
        check_writable(args.save_stats.parent)
    check_writable(args.out)


def _sample(args: argparse.Namespace, result: dict[str, Any], rank: int, world: int) -> Path | None:
    """Validate the model and draw its images, as asked; gives their folder, or None."""
    from hmar_mega.evaluation.validation import validate
    from hmar_mega.inference.commands import open_from, use_preset
    from hmar_mega.inference.generation import Generation, Request

    if args.preset is not None:
        use_preset(args)
        args.num = PAPER_IMAGES if args.num is None else args.num
    model, names, settings = open_from(args)
    if args.num is not None:
        check_count(args.num, f"--num {args.num}: the evaluation")
    if args.validation is not None:
        result["validation"] = validate(model, args.validation, args.batch_size, args.validation_samples, rank, world)
    if args.num is None:
        return None
    request = Request.balanced(args.num, list(range(model.num_classes)), args.seed or 0)
    folder: Path = args.out / "samples"
    generation = Generation(
        model, settings, request, folder, part=rank, parts=world, class_names=names.names, batch_size=args.batch_size
    )
    generation.run(show_progress=rank == 0)
    dist.barrier()
    result["sampling"] = {
        "num": args.num, "classes": model.num_classes, "seed": args.seed or 0, "preset": args.preset,
        **dataclasses.asdict(settings),
    }  # fmt: skip
    return folder


def _measure(args: argparse.Namespace, images: Path, result: dict[str, Any], rank: int, world: int) -> None:
    """Extract what is missing, on every process, and put the figures into `result` on the first."""
    device = _device(args.device)
    network = open_network(args.network, args.weights, device)
    fit = Fit(args.resize, args.grayscale)
    source = open_images(images, fit)
    check_count(len(source), str(images))
    real: Statistics | None = None
    reference: ImageSource | None = None
    if args.reference is not None:
        if holds_statistics(args.reference):
            real = load_statistics(args.reference, network)
        else:
            reference = open_images(args.reference, fit)
            check_count(len(reference), str(args.reference))
            _check_sizes(source, reference)
    own = Extraction(source, network, args.out / "features", args.batch_size, args.chunk_size)
    own.run(rank, world)
    theirs = None
    if reference is not None:
        theirs = Extraction(reference, network, args.out / "features", args.batch_size, args.chunk_size)
        theirs.run(rank, world)
    dist.barrier()
    if rank != 0:
        return
    fake = gather(own.read(), len(source))
    if theirs is not None:
        real = gather(theirs.read(), len(theirs.source))
    measures = measure(own.read, fake, real, args.bootstrap, device)
    result.update(_summary(network, args, fake, real), measures=[dataclasses.asdict(m) for m in measures])
    if args.save_stats is not None:
        save_statistics(args.save_stats, fake, network)
        result["saved_statistics"] = str(args.save_stats)


def _summary(
    network: FeatureNetwork, args: argparse.Namespace, fake: Statistics, real: Statistics | None
) -> dict[str, Any]:
    return {
        "network": network.name,
        "network_digest": network.digest,
        "reference": None if args.reference is None else str(args.reference),
        "images": fake.count,
        "reference_images": None if real is None else real.count,
        "resize": args.resize,
        "bootstrap": args.bootstrap,
        "warnings": warnings_for(fake, real),
    }


def _check_sizes(source: ImageSource, reference: ImageSource) -> None:
    ours, theirs = (images.read(0, 1).shape[1:3] for images in (source, reference))
    if ours != theirs:
        raise UserError(
            f"{source.path} has images of {ours[1]} × {ours[0]} pixels, {reference.path} of {theirs[1]} × {theirs[0]}: "
            "the difference would be measured too; give --resize N"
        )


def _device(wanted: str | None) -> torch.device:
    if wanted in (None, "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        wanted = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return pick_device(wanted)


@contextmanager
def _process_group(world: int) -> Iterator[None]:
    """torchrun's processes, or this one alone; they only wait for each other and add up losses, hence gloo."""
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # one may have much more to do than another
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
