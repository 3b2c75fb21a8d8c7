"""Training of the tokenizer, from images to a folder that `MultiScaleVQVAE.load` reads: plain torch, one process.

    train_tokenizer(config, batches, Path("runs/tokenizer"), validation=images)

`out` then holds metrics.jsonl (a line every `tokenizer.train.log_interval` steps), reconstructions.png, the tokenizer
(config.json, tokenizer.safetensors) and, written last, metrics.json. A run is a function of the configuration, the
batches and `run.seed`. Axes: B batch, R image side, K scales, N tokens a sample.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from hmar_mega.config import Config, TokenizerTrainConfig
from hmar_mega.errors import UserError
from hmar_mega.files import write_atomic
from hmar_mega.tokenizer.losses import CodebookUsage, psnr, reconstruction_loss, renew_codes, seed_codebook
from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.tokenizer.quantizer import QuantizerOutput

log = logging.getLogger(__name__)

#: The learning rate at the end, as a share of the highest.
FINAL_LR = 0.01

#: Steps over which "the share of codes used" is counted.
USAGE_WINDOW = 100

#: Images in reconstructions.png, and the side in pixels to which smaller ones are enlarged.
SHOWN_IMAGES, SHOWN_SIDE = 12, 64


def learning_rate(step: int, train: TokenizerTrainConfig) -> float:
    """The rate of 0-based `step`: linear warm-up to `lr`, then half a cosine down to 1 % of it at the last step."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - 1 - train.warmup_steps)
    return train.lr * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def train_tokenizer(
    config: Config,
    batches: Callable[[int], Tensor],
    out: Path,
    validation: Tensor | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Train a tokenizer and save it in `out`.

    Args:
        config: `tokenizer`, `schedule` and `run.seed` are what is read.
        batches: step → images (B, 3, R, R) float in [−1, 1]; called once for each step 0 … steps − 1, and step 0 once
            more, to start the codebook from.
        out: the folder to write, made when missing; an earlier tokenizer in it is replaced.
        validation: images held out, (M, 3, R, R) in [−1, 1]; None: no `val_psnr`.
        progress: draw a progress bar on stderr.
        device: default CUDA where there is any.

    Returns:
        What metrics.json holds: val_psnr (dB or None), usage and perplexity (one number a scale), collapsed_scales
        (1-based), steps, num_images_seen, seconds, parameters, fingerprint.

    Raises:
        UserError: when the images do not fit, `out` cannot be written, or training diverges.
    """
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    first = _checked(batches(0)).to(device)
    model = _new_model(config).to(device)
    with torch.no_grad():
        seed_codebook(model.quantizer, model.latent(first), config.run.seed)
    usage = CodebookUsage(model.quantizer.ema_vocab_hit, model.schedule)
    started = time.perf_counter()
    with _Journal(out, config.tokenizer.train.steps, progress) as journal:
        num_images_seen = _run_steps(config, model, usage, batches, journal)
    model.eval().requires_grad_(False)
    metrics = {
        "val_psnr": None if validation is None else _validation_psnr(model, validation, len(first)),
        **_usage_figures(usage, config.tokenizer.train.steps - 1),
        "collapsed_scales": [k + 1 for k in usage.collapsed()],
        "steps": config.tokenizer.train.steps,
        "num_images_seen": num_images_seen,
        "seconds": round(time.perf_counter() - started, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": model.fingerprint,
    }
    shown = first if validation is None else validation
    write_atomic(out / "reconstructions.png", _png(reconstruction_sheet(model, shown[:SHOWN_IMAGES]), model.resolution))
    model.save(out)
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _run_steps(
    config: Config,
    model: MultiScaleVQVAE,
    usage: CodebookUsage,
    batches: Callable[[int], Tensor],
    journal: _Journal,
) -> int:
    """All optimizer steps; gives the number of images seen."""
    train, device = config.tokenizer.train, usage.hits.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    last_renewal = train.restart_until * train.steps if train.dead_code_steps else 0
    renewed, num_images_seen = 0, 0
    warned: set[int] = set()
    for step in range(train.steps):
        images = batches(step).to(device)
        rate = learning_rate(step, train)
        parts, quantized = _step(model, optimizer, images, rate, train)
        num_images_seen += len(images)
        usage.update(quantized.tokens, step)
        if step < last_renewal:
            embedding = model.quantizer.embedding
            renewed += renew_codes(
                embedding, optimizer, usage, quantized.rows, train.dead_code_steps, config.run.seed, step
            )
        if (step + 1) % train.log_interval == 0 or step + 1 == train.steps:
            entry: dict[str, Any] = {
                "step": step + 1,
                "num_images_seen": num_images_seen,
                "lr": rate,
                "renewed_codes": renewed,
            }
            entry |= {name: float(value) for name, value in parts.items()} | _usage_figures(usage, step)
            journal.write(entry)
            renewed = 0
            if step >= train.warmup_steps + USAGE_WINDOW:
                warned = _warn_of_collapse(usage, entry, warned)
    return num_images_seen


@torch.no_grad()
def reconstruction_sheet(model: MultiScaleVQVAE, images: Tensor) -> Tensor:
    """Pictures for the eye: a row of originals, one of reconstructions, then those of scales 1, 1–2, … K−1 alone.

    Args:
        images: (B, 3, R, R) in [−1, 1].

    Returns:
        ((K + 1)·R, B·R, 3) uint8 on the CPU.
    """
    images = images.to(model.quantizer.embedding.weight.device)
    tokens = model.encode(images)
    scales = range(model.schedule.num_scales)
    features = torch.stack([model.quantizer.scale_features(k, tokens[:, model.schedule.span(k)]) for k in scales])
    partial = [model.decode(f_hat) for f_hat in features.cumsum(0)]
    rows = torch.stack([images, partial[-1], *partial[:-1]])
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return ((sheet + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def _new_model(config: Config) -> MultiScaleVQVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return MultiScaleVQVAE(config.tokenizer, config.schedule.scales).train()


def _checked(images: Tensor) -> Tensor:
    low, high = float(images.min()), float(images.max())
    if not images.is_floating_point() or max(-low, high) > 1.001:
        raise UserError(
            f"images of {images.dtype} between {low:g} and {high:g} cannot train a tokenizer: it takes floats in "
            "[−1, 1]; scale 8-bit images by x / 127.5 − 1"
        )
    return images


def _step(
    model: MultiScaleVQVAE,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    rate: float,
    train: TokenizerTrainConfig,
) -> tuple[dict[str, Tensor], QuantizerOutput]:
    """One optimizer step; gives the loss with its parts, and what the quantizer did."""
    reconstruction, quantized = model(images)
    pixels, parts = reconstruction_loss(reconstruction, images, train.l1_weight, train.l2_weight)
    loss = pixels + train.vq_weight * quantized.loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return {"loss": loss.detach(), **parts, "vq": quantized.loss.detach(), "grad_norm": norm}, quantized


def _usage_figures(usage: CodebookUsage, step: int) -> dict[str, list[float]]:
    return {
        "usage": [round(u, 4) for u in usage.fraction_used(step, USAGE_WINDOW).tolist()],
        "perplexity": [round(p, 2) for p in usage.perplexity().tolist()],
    }


def _warn_of_collapse(usage: CodebookUsage, entry: dict[str, Any], warned: set[int]) -> set[int]:
    """Log each newly collapsed scale; gives those collapsed now, which are not logged again until they recover."""
    collapsed = set(usage.collapsed())
    for k in sorted(collapsed - warned):
        log.warning(
            "step %d: scale %d (%d×%d tokens) uses few of the codes (perplexity %.1f of %d, %.1f %% used lately); "
            "if it does not recover, lower tokenizer.train.lr or tokenizer.train.dead_code_steps",
            entry["step"],
            k + 1,
            usage.schedule.patch_nums[k],
            usage.schedule.patch_nums[k],
            entry["perplexity"][k],
            usage.hits.shape[1],
            100 * entry["usage"][k],
        )
    return collapsed


@torch.no_grad()
def _validation_psnr(model: MultiScaleVQVAE, images: Tensor, batch_size: int) -> float:
    device = model.quantizer.embedding.weight.device
    pieces = [model.decode_tokens(model.encode(piece.to(device))).cpu() for piece in images.split(batch_size)]
    return round(psnr(torch.cat(pieces), images.cpu()), 3)


class _Journal:
    """metrics.jsonl in `out`, and the progress bar that shows its last line."""

    def __init__(self, out: Path, steps: int, progress: bool) -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "metrics.json").unlink(missing_ok=True)  # an earlier run's would pass for this one's
            self._file = (out / "metrics.jsonl").open("w")
        except OSError as err:
            raise UserError(f"cannot write to {out}: {err}; give a folder that can be written") from err
        self._bar = Progress(
            TextColumn("tokenizer"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not progress,
        )
        self._task: TaskID = self._bar.add_task("", total=steps, figures="")
        self._started = time.perf_counter()
        self._steps, self._tenths = steps, 0  # without a terminal, a line every tenth of the way

    def __enter__(self) -> _Journal:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
        self._file.close()

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line, with PSNR and rate; UserError when the loss is no longer finite."""
        if not math.isfinite(entry["loss"]):
            raise UserError(
                f"tokenizer training diverged: loss {entry['loss']} at step {entry['step']}; "
                "lower tokenizer.train.lr or lengthen tokenizer.train.warmup_steps"
            )
        rate = entry["num_images_seen"] / (time.perf_counter() - self._started)
        entry |= {"psnr": round(10 * math.log10(4 / max(entry["l2"], 1e-12)), 3), "images_per_second": round(rate, 1)}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        figures = f"loss {entry['loss']:.4f}  psnr {entry['psnr']:.1f} dB  {entry['images_per_second']:.0f} images/s"
        self._bar.update(self._task, completed=entry["step"], figures=figures)
        if not self._bar.console.is_terminal and entry["step"] * 10 // self._steps > self._tenths:
            self._tenths = entry["step"] * 10 // self._steps
            log.info("tokenizer step %d/%d | %s", entry["step"], self._steps, figures)


def _png(sheet: Tensor, side: int) -> bytes:
    picture = Image.fromarray(np.asarray(sheet))
    zoom = max(1, SHOWN_SIDE // side)
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
