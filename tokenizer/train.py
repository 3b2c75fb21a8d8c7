"""Training of the tokenizer, from image shards to a folder that `MultiScaleVQVAE.load` reads: set-up and finish.

    hmar-mega tokenizer train tokenizer/emoji-64 --out vae data.images=shards/train data.images_val=shards/val
    torchrun --nproc-per-node 8 -m hmar_mega tokenizer train tokenizer/published-256 --out vae data.images=…

The folder is a run directory (config.yaml, metrics.jsonl, checkpoints/, grids/) and holds, once training has ended,
the tokenizer itself (config.json, tokenizer.safetensors), reconstructions.png and, written last, metrics.json. A run is
a function of the configuration, the shards and `run.seed`. Axes: B batch, R image side, K scales.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hmar_mega.checkpoint.canonical import load_optimizer, load_weights
from hmar_mega.checkpoint.resume import found_together, last_checkpoint_name, verify_together
from hmar_mega.checkpoint.saver import CheckpointSaver
from hmar_mega.checkpoint.sources import CheckpointReader, find_checkpoint
from hmar_mega.config import Config
from hmar_mega.config_io import config_to_yaml
from hmar_mega.data.image_loader import ImageBatch, ImageLoader
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader
from hmar_mega.errors import UserError
from hmar_mega.files import check_writable, write_atomic
from hmar_mega.interrupts import Interrupts
from hmar_mega.metrics import MetricsLog, drop_rows_after, require_wandb
from hmar_mega.micro_batches import micro_batch_size
from hmar_mega.parallel.agreement import Agreement
from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.parallel.hang import StepWatch
from hmar_mega.parallel.liveness import watch_peers
from hmar_mega.run_lock import run_lock
from hmar_mega.tokenizer.adversary import Adversary
from hmar_mega.tokenizer.codebook import USAGE_WINDOW, CodebookUsage, seed_codebook
from hmar_mega.tokenizer.engine import build_engine, engine_config, tokenizer_world
from hmar_mega.tokenizer.loop import SKIPPED_FILE, TokenizerRun, train
from hmar_mega.tokenizer.losses import psnr
from hmar_mega.tokenizer.model import CONFIG_FILE, WEIGHTS_FILE, MultiScaleVQVAE
from hmar_mega.tokenizer.objective import TokenizerObjective, autocast_dtype, to_device
from hmar_mega.tokenizer.perceptual import build_perceptual
from hmar_mega.tokenizer.resume import KIND, finished_tokenizer, restore, resumable_tokenizer
from hmar_mega.tokenizer.sheet import SHOWN_IMAGES, png, reconstruction_sheet
from hmar_mega.versions import git_revision, installed_versions

log = logging.getLogger(__name__)

#: Held-out images that PSNR is taken from where `eval.num_samples` does not say.
VALIDATION_IMAGES = 512

#: What a run leaves at its end, and what it writes meanwhile: all that --overwrite removes.
RESULTS = (CONFIG_FILE, WEIGHTS_FILE, "metrics.json", "reconstructions.png")
RECORDS = ("config.yaml", "versions.json", "metrics.jsonl", SKIPPED_FILE, "checkpoints", "grids", "tensorboard")


def train_tokenizer(
    config: Config, folder: Path, interrupts: Interrupts | None = None, overwrite: bool = False
) -> dict[str, Any] | None:
    """Train a tokenizer in `folder`, in every process that torchrun started, going on from its last checkpoint.

    Args:
        config: `tokenizer`, `schedule`, `data.images…`, `data.augment`, `data.workers`, `precision.compute`,
            `parallel.zero_stage`, `checkpoint`, `eval`, `logging` and `run` are what is read.
        interrupts: signals that ask the run to save and stop; default none.
        overwrite: remove an earlier run and tokenizer in `folder` first.

    Returns:
        What metrics.json holds: val_psnr (dB or None), usage and perplexity (one number a scale), usage_any,
        collapsed_scales (1-based), steps, num_images_seen, seconds, parameters, fingerprint. None when the run was
        asked to stop before its end.

    Raises:
        UserError: for input that cannot be used, before anything is written; for images that cannot, when they come.
        TrainingError: when training cannot go on.
    """
    folder = Path(folder)
    check_writable(folder)
    data, validation = open_images(config)
    inner = engine_config(config)
    autocast_dtype(config)
    started = time.perf_counter()
    with (
        tokenizer_world(inner) as dims,
        watch_peers(dims, config.run.peer_timeout, lambda: last_checkpoint_name(folder)) as report_hang,
        run_lock(folder, dims),
        StepWatch(config.run.hang_factor, config.run.hang_floor, report_hang) as watch,
    ):
        if dims.is_main:
            _tell_layout(config)
            if overwrite:
                _remove_run(folder)
        reader = found_together(lambda: resumable_tokenizer(config, folder), dims)
        if reader is None:
            _check_empty(folder, dims)
        elif config.checkpoint.verify:
            verify_together(reader.folder, dims)
        run = _assemble(config, inner, folder, dims, data, validation, reader, interrupts or Interrupts(), watch)
        if dims.is_main:
            _write_run_files(config, folder, run)
        dist.barrier()
        with contextlib.closing(run.metrics) if run.metrics is not None else contextlib.nullcontext():
            try:
                finished = train(run)
            finally:
                run.saver.close()
                run.loader.close()
        metrics = _finish(run, time.perf_counter() - started) if finished and dims.is_main else None
        dist.barrier()
    return metrics


def open_images(config: Config) -> tuple[ShardReader, ShardReader | None]:
    """The image shards to train on and those held out; UserError when they are missing or too few for the codebook."""
    if config.data.images is None:
        raise UserError("data.images is not set: give a folder of image shards (hmar-mega data shard)")
    adversarial, side = config.tokenizer.train.adversarial, config.schedule.resolution
    if adversarial.weight and side < 3 << adversarial.layers:  # two convolutions follow that take a pixel each
        raise UserError(
            f"tokenizer.train.adversarial.layers={adversarial.layers} needs images of at least "
            f"{3 << adversarial.layers} px, and schedule.resolution={side}; use fewer layers, or "
            "tokenizer.train.adversarial.weight=0"
        )
    if config.logging.wandb != "off":
        require_wandb(config.logging.wandb)
    reader = ShardReader(Path(config.data.images), "images")
    codes, tokens = config.tokenizer.codebook_size, config.schedule.scales.num_tokens
    if len(reader) * tokens < codes:
        raise UserError(
            f"tokenizer.codebook_size={codes} is more than the {len(reader)} images of {config.data.images} have "
            f"tokens ({len(reader)} × {tokens}): most codes could never be learned; use at most "
            f"{len(reader) * tokens} codes, or more images"
        )
    held_out = config.data.images_val
    return reader, None if held_out is None else ShardReader(Path(held_out), "images")


def _tell_layout(config: Config) -> None:
    """A tokenizer's configuration is often a transformer's too: say what of it means nothing here."""
    parallel = config.parallel
    unused = [
        f"parallel.{axis}_parallel" for axis in ("tensor", "pipeline") if getattr(parallel, f"{axis}_parallel") > 1
    ]
    if unused:
        log.info(
            "tokenizers are trained data-parallel: %s is for transformers and does nothing here", " and ".join(unused)
        )


def _assemble(
    config: Config, inner: Config, folder: Path, dims: ParallelDims, data: ShardReader, validation: ShardReader | None,
    reader: CheckpointReader | None, interrupts: Interrupts, watch: StepWatch,
) -> TokenizerRun:  # fmt: skip
    """Data, model, engine and what is restored of a checkpoint."""
    train, device = config.tokenizer.train, dims.device
    micro = micro_batch_size(inner, dims.data_parallel)
    model = _new_model(config)
    if reader is not None:
        load_weights(model, reader, dims, folder)
    model = model.to(device)
    order = SampleOrder(len(data), config.run.seed)
    position = int(reader.state["images_seen"]) if reader is not None else 0
    loader = _loader(config, data, order, micro, dims, position)
    if reader is None:
        _start_codebook(config, model, loader, micro, device)
    adversary = None
    if train.adversarial.weight:
        adversary = Adversary(train, config.run.seed, device, autocast_dtype(config))
    perceptual = build_perceptual(train.perceptual, device)
    usage = CodebookUsage(model.quantizer.ema_vocab_hit, model.schedule)
    objective = TokenizerObjective(config, model.quantizer, device, perceptual, adversary)
    engine = build_engine(model, inner, dims)
    beside = {**usage.state(), **(adversary.state() if adversary is not None else {})}
    if reader is not None:
        load_optimizer(engine, reader)
        restore(reader, beside, folder)
        if dims.is_main:
            log.info("resumed %s at step %d", folder, engine.step)
    if train.compile:
        model.encoder.compile()
        model.decoder.compile()
    shown = validation if validation is not None else data
    run = TokenizerRun(
        config=config, folder=folder, dims=dims, engine=engine, model=model, objective=objective, usage=usage,
        loader=loader, validation=_held_out(config, validation, dims) if validation is not None else [],
        shown=_first_images(config, shown, SHOWN_IMAGES).to(device), agreement=Agreement(interrupts, dims),
        watch=watch, saver=CheckpointSaver(folder, engine, config.checkpoint, lambda: beside),
        state={
            "kind": KIND, "last_step": train.steps, "config": config.model_dump(mode="json"),
            "patch_nums": list(model.schedule.patch_nums), "classes": list(data.index.classes),
            "versions": installed_versions(), "revision": git_revision(),
            "layout": {"processes": dims.world_size, **inner.parallel.model_dump(mode="json")},
        },
    )  # fmt: skip
    best = reader.state.get("best_psnr") if reader is not None else None
    run.best_psnr = -math.inf if best is None else float(best)
    run.saver.failed_saves = int(reader.state.get("failed_saves", 0)) if reader is not None else 0
    if reader is not None:
        run.saved_step = engine.step
    return run


def _loader(
    config: Config, data: ShardReader, order: SampleOrder, micro: int, dims: ParallelDims, position: int
) -> ImageLoader:
    train = config.tokenizer.train
    return ImageLoader(
        data, order, config.schedule.resolution, config.data.augment, config.run.seed, train.batch_size, micro,
        dims.dp_rank, dims.data_parallel, position, config.data.workers, train.cache_mib << 20, train.allow_upscaling,
    )  # fmt: skip


def _new_model(config: Config) -> MultiScaleVQVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return MultiScaleVQVAE(config.tokenizer, config.schedule.scales).train()


@torch.no_grad()
def _start_codebook(
    config: Config, model: MultiScaleVQVAE, loader: ImageLoader, micro: int, device: torch.device
) -> None:
    """Codes from the first images of the stream, which all processes read alike."""
    train = config.tokenizer.train
    count = train.init_images or train.batch_size
    latents = [
        model.latent(to_device(loader.read(at, min(micro, count - at)), device)).float()
        for at in range(0, count, micro)
    ]
    seed_codebook(model.quantizer, torch.cat(latents), config.run.seed, train.codebook_init == "kmeans")


def _held_out(config: Config, data: ShardReader, dims: ParallelDims) -> list[ImageBatch]:
    """This process's part of the validation images, decoded, in batches."""
    count = min(config.eval.num_samples or VALIDATION_IMAGES, len(data))
    first, last = (count * (dims.dp_rank + n) // dims.data_parallel for n in (0, 1))
    size = config.eval.batch_size
    loader = _plain_loader(config, data)
    return [loader.read(at, min(size, last - at)) for at in range(first, last, size)]


def _first_images(config: Config, data: ShardReader, count: int) -> Tensor:
    return to_device(_plain_loader(config, data).read(0, min(count, len(data))), torch.device("cpu"))


def _plain_loader(config: Config, data: ShardReader) -> ImageLoader:
    """Images in stored order, centred: for looking at, not for training."""
    return ImageLoader(
        data, SampleOrder(len(data), 0, shuffle=False), config.schedule.resolution, "none", 0, 1, 1, workers=0,
        allow_upscaling=config.tokenizer.train.allow_upscaling,
    )  # fmt: skip


def _finish(run: TokenizerRun, seconds: float) -> dict[str, Any]:
    """Write the tokenizer, its pictures and its figures; of what was averaged, the average."""
    checkpoint = find_checkpoint(run.folder)
    assert checkpoint is not None, "a run that reached its end has saved"
    model = finished_tokenizer(checkpoint).to(run.dims.device)
    step, held_out = run.last_step - 1, _validation_psnr(run, model)
    metrics: dict[str, Any] = {
        "val_psnr": held_out,
        **run.usage.figures(step),
        "usage_any": round(run.usage.fraction_used_by_any(step, USAGE_WINDOW), 4),
        "collapsed_scales": [k + 1 for k in run.usage.collapsed()],
        "steps": run.last_step,
        "num_images_seen": run.engine.images_seen,
        "skipped_steps": run.engine.skipped,
        "seconds": round(seconds, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": model.fingerprint,
    }
    sheet = reconstruction_sheet(model, run.shown[:SHOWN_IMAGES])
    write_atomic(run.folder / "reconstructions.png", png(sheet, model.resolution))
    model.save(run.folder)
    write_atomic(run.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


@torch.no_grad()
def _validation_psnr(run: TokenizerRun, model: MultiScaleVQVAE) -> float | None:
    if not run.validation:
        return None
    pairs = []
    for batch in run.validation:
        images = to_device(batch, run.dims.device)
        pairs.append((model.decode_tokens(model.encode(images)).cpu(), images.cpu()))
    rebuilt, originals = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return round(psnr(rebuilt, originals), 3)


def _check_empty(folder: Path, dims: ParallelDims) -> None:
    """Refuse a folder that holds anything but what a run that stopped before its first checkpoint left; collective."""
    known = {*RECORDS, ".lock"}
    strange = [p.name for p in folder.iterdir() if p.name not in known] if dims.is_main and folder.is_dir() else []
    said = [sorted(strange)]
    dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise UserError(
            f"{folder} exists and is not empty ({said[0][0]}); choose another --out, or give --overwrite (token shards "
            "made with a tokenizer that is replaced are of no more use)"
        )


def _remove_run(folder: Path) -> None:
    for name in (*RESULTS, *RECORDS):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write_run_files(config: Config, folder: Path, run: TokenizerRun) -> None:
    write_atomic(folder / "config.yaml", config_to_yaml(config))
    about: dict[str, Any] = {"versions": run.state["versions"], "revision": run.state["revision"]}
    about["world_size"] = run.dims.world_size
    about["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    write_atomic(folder / "versions.json", json.dumps(about, indent=1))
    run.metrics = MetricsLog(folder, config, run.engine.step)
    drop_rows_after(folder / SKIPPED_FILE, run.engine.step)
