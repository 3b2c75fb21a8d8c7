"""The loop of tokenizer training, top to bottom: read, step, mend the codebook, log, evaluate, save.

Axes: B batch, K scales, V codes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hmar_mega.checkpoint.saver import CheckpointSaver
from hmar_mega.config import Config
from hmar_mega.data.image_loader import ImageBatch, ImageLoader
from hmar_mega.errors import TrainingError
from hmar_mega.files import write_atomic
from hmar_mega.interrupts import Stop, StopRequest
from hmar_mega.metrics import MetricsLog
from hmar_mega.parallel.agreement import Agreement
from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.parallel.hang import StepWatch
from hmar_mega.progress import Tally, track
from hmar_mega.tokenizer.codebook import USAGE_WINDOW, CodebookUsage, renew_codes
from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.tokenizer.objective import TokenizerObjective, TokenizerScores, to_device
from hmar_mega.tokenizer.sheet import SHOWN_IMAGES, png, reconstruction_sheet

log = logging.getLogger(__name__)

#: Of a run directory: the samples of every step that was skipped.
SKIPPED_FILE = "skipped_steps.jsonl"

#: Dead codes are looked for so many times within the steps that make a code dead: looking waits for the GPU.
LOOKS = 10

CODEBOOK = "quantizer.embedding.weight"


@dataclass
class TokenizerRun:
    """Everything the loop works with."""

    config: Config
    folder: Path
    dims: ParallelDims
    engine: Any  #: `PlainEngine` or `hmar_mega.engine.Engine`
    model: MultiScaleVQVAE
    objective: TokenizerObjective
    usage: CodebookUsage
    loader: ImageLoader
    validation: Sequence[ImageBatch]  #: this process's part
    shown: Tensor  #: images of the grids, (n, 3, R, R)
    agreement: Agreement
    watch: StepWatch
    saver: CheckpointSaver
    state: dict[str, Any]  #: what every checkpoint's state.json records
    metrics: MetricsLog | None = None
    best_psnr: float = -math.inf
    saved_step: int = -1
    renewed: int = 0  #: codes since the last line
    warned: set[int] = field(default_factory=set)

    @property
    def last_step(self) -> int:
        """When training ends."""
        return self.config.tokenizer.train.steps


@dataclass
class Window:
    """Sums since the last log line, kept on the device."""

    started: float
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    images: int = 0
    waited: float = 0.0
    grad_norm: float = 0.0
    adversary: dict[str, float] = field(default_factory=dict)

    def add(self, scores: TokenizerScores) -> None:
        """Count a micro-batch."""
        for name, value in scores.parts.items():
            value = value.double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] += 1


def train(run: TokenizerRun) -> bool:
    """Train up to the last step, or until the processes agree to stop; whether the last step was reached.

    Raises:
        TrainingError: when too many steps in a row are not finite, or the last checkpoint cannot be written.
    """
    run.model.train()
    finished = True
    try:
        run.agreement.check()
        with track("tokenizer", run.last_step, enabled=run.dims.is_main, start=run.engine.step) as bar:
            window = Window(time.perf_counter())
            while run.engine.step < run.last_step:
                window = _step(run, window, bar)
                bar.advance()
    except StopRequest:
        finished = False
        if run.dims.is_main:
            log.info("stopped at step %d as asked; start the same command again to go on", run.engine.step)
    outcome = run.saver.wait()
    if outcome is not None and outcome.error is not None:
        raise TrainingError(
            f"training reached step {run.engine.step}, but its checkpoint could not be written: {outcome.error}. Make "
            "room and start the run again: it goes on from the last good checkpoint"
        )
    return finished


def _step(run: TokenizerRun, window: Window, bar: Tally) -> Window:
    """One optimizer step and what is due after it; returns the window of the next log line."""
    config, engine, train = run.config, run.engine, run.config.tokenizer.train
    run.watch.begin()
    run.agreement.begin()
    step, lr = engine.step, engine.learning_rate
    batches = next(run.loader)
    window.waited += run.loader.wait_seconds
    run.objective.step = step
    window.grad_norm, scored = engine.train_step(batches, run.objective)
    adversary = run.objective.adversary
    if engine.skipped_in_a_row:
        _record_skipped(run, batches)
    else:
        for scores in scored:
            window.add(scores)
        run.usage.update([scores.quantized.tokens for scores in scored], step)
        _renew(run, scored, step)
        if adversary is not None and adversary.learns(step):
            window.adversary = adversary.train_step([(s.images, s.reconstruction) for s in scored], lr)
    window.images += train.batch_size
    stop = run.agreement.end()
    run.watch.end()
    done, following = engine.step == run.last_step, window
    if engine.step % train.log_interval == 0 or done:
        _log_line(run, window, lr, bar)
        following = Window(time.perf_counter())
    paused = time.perf_counter()
    if stop is Stop.NONE and (engine.step % config.eval.interval == 0 or done):
        _evaluate(run)
    if engine.step % config.checkpoint.interval == 0 or done or stop is not Stop.NONE:
        save(run)
    if stop is not Stop.NONE:
        raise StopRequest(stop)
    following.started += time.perf_counter() - paused  # rates speak of training alone
    return following


def _renew(run: TokenizerRun, scored: Sequence[TokenizerScores], step: int) -> None:
    """Give dead codes another life, now and then, until training nears its end."""
    train = run.config.tokenizer.train
    patience = train.dead_code_steps
    if not patience or step >= train.restart_until * train.steps or step % max(1, patience // LOOKS):
        return
    owned = run.engine.partitions().get(CODEBOOK)
    rows = scored[-1].quantized.rows
    run.renewed += renew_codes(run.model.quantizer, owned, run.usage, rows, patience, run.config.run.seed, step)


def _record_skipped(run: TokenizerRun, batches: Sequence[ImageBatch]) -> None:
    """Note whose gradients were not finite; collective.

    Raises:
        TrainingError: after `optim.max_bad_steps` such steps in a row.
    """
    engine, limit = run.engine, run.config.optim.max_bad_steps
    parts: list[Any] = [None] * run.dims.world_size
    dist.all_gather_object(parts, [(int(p), k) for b in batches for p, k in zip(b.positions, b.keys, strict=True)])
    if run.dims.is_main:
        positions, keys = zip(*sorted(pair for part in parts for pair in part), strict=True)
        row = {"step": engine.step, "positions": positions, "keys": keys}
        try:
            with (run.folder / SKIPPED_FILE).open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as err:
            log.warning("%s cannot be written (%s): %s", run.folder / SKIPPED_FILE, err.strerror, json.dumps(row))
        log.warning(
            "step %d | loss or gradient not finite: step skipped (%d in all, %d in a row, at most %d), its samples are "
            "in %s", engine.step, engine.skipped, engine.skipped_in_a_row, limit, SKIPPED_FILE,
        )  # fmt: skip
    if engine.skipped_in_a_row >= limit:
        raise TrainingError(
            f"{limit} steps in a row up to step {engine.step} had a loss or gradient that is not finite; training "
            f"stops and the last checkpoint is kept. The samples are in {run.folder / SKIPPED_FILE}. Lower "
            "tokenizer.train.lr, lengthen tokenizer.train.warmup_steps, or look at those samples"
        )


def _log_line(run: TokenizerRun, window: Window, lr: float, bar: Tally) -> None:
    """One readable line and one row of figures; collective."""
    names = sorted(window.sums)
    means = {}
    if names:
        values = torch.stack([window.sums[name] / window.counts[name] for name in names])
        if run.dims.world_size > 1:
            dist.all_reduce(values)
            values /= run.dims.world_size
        means = dict(zip(names, values.tolist(), strict=True))
    if run.metrics is None:
        run.renewed = 0
        return
    engine, seconds = run.engine, time.perf_counter() - window.started
    adversary = run.objective.adversary
    row: dict[str, Any] = {
        "images": engine.images_seen, "loss": means.get("loss", math.nan), **means, **window.adversary,
        "psnr": 10 * math.log10(4 / max(means["l2"], 1e-12)) if names else None, "grad_norm": window.grad_norm,
        "lr": lr, **run.usage.figures(engine.step - 1),
        "usage_any": run.usage.fraction_used_by_any(engine.step - 1, USAGE_WINDOW), "renewed_codes": run.renewed,
        "images_per_second": window.images / seconds, "data_wait": window.waited / seconds,
        "skipped_steps": engine.skipped + (adversary.skipped if adversary is not None else 0),
        "failed_saves": run.saver.failed_saves,
    }  # fmt: skip
    run.renewed = 0
    row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    run.metrics.write("train", engine.step, row)
    figures = f"loss {means.get('loss', math.nan):.4f} psnr {row['psnr'] or math.nan:.1f} dB"
    bar.show(figures)
    log.info(
        "step %*d/%d | images %s | %s | grad %.2f | lr %.2e | codes %.0f%% | a scale %s %% | %.0f img/s | wait %.0f%%",
        len(str(run.last_step)), engine.step, run.last_step, f"{engine.images_seen:,}", figures, window.grad_norm, lr,
        100 * row["usage_any"], " ".join(f"{100 * u:.0f}" for u in row["usage"]), row["images_per_second"],
        100 * row["data_wait"],
    )  # fmt: skip
    if engine.step > run.config.tokenizer.train.warmup_steps + USAGE_WINDOW:
        _warn_of_collapse(run, row)


def _warn_of_collapse(run: TokenizerRun, row: dict[str, Any]) -> None:
    """Log each newly collapsed scale; one that recovers is logged again when it collapses again."""
    collapsed = set(run.usage.collapsed())
    for k in sorted(collapsed - run.warned):
        side = run.usage.schedule.patch_nums[k]
        log.warning(
            "step %d: scale %d (%d×%d tokens) uses few of the codes (perplexity %.1f of %d, %.1f %% used lately); if "
            "it does not recover, lower tokenizer.train.lr or tokenizer.train.dead_code_steps, or start with "
            "tokenizer.train.codebook_init=kmeans", run.engine.step, k + 1, side, side, row["perplexity"][k],
            run.usage.hits.shape[1], 100 * row["usage"][k],
        )  # fmt: skip
    run.warned = collapsed


@torch.no_grad()
def _evaluate(run: TokenizerRun) -> None:
    """PSNR of held-out images with the present weights, and the grid; collective."""
    run.model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=run.dims.device)
    for batch in run.validation:
        images = to_device(batch, run.dims.device)
        rebuilt = run.model.decode_tokens(run.model.encode(images))
        sums += torch.stack([(rebuilt - images).square().double().sum(), sums.new_tensor(images.numel())])
    if run.dims.world_size > 1:
        dist.all_reduce(sums)
    if run.dims.is_main and run.config.eval.grid_count:
        sheet = reconstruction_sheet(run.model, run.shown[:SHOWN_IMAGES])
        write_atomic(run.folder / "grids" / f"step-{run.engine.step:08d}.png", png(sheet, run.model.resolution))
    run.model.train()
    if not sums[1]:
        return
    psnr = float(10 * torch.log10(4 * sums[1] / sums[0]))
    if run.metrics is not None:
        run.metrics.write("val", run.engine.step, {"psnr": psnr})
        log.info("step %d | validation: PSNR %.2f dB", run.engine.step, psnr)
    if psnr > run.best_psnr:
        run.best_psnr = psnr
        save(run, best=True)


def save(run: TokenizerRun, best: bool = False) -> None:
    """Begin to write the checkpoint of this step, unless that was done a moment ago for being the best."""
    if run.saved_step == run.engine.step:
        if best:
            run.saver.mark_best()
        return
    state = {
        **run.state,
        "images_seen": run.engine.images_seen,
        "finished": run.engine.step == run.last_step,
        "best_psnr": run.best_psnr if math.isfinite(run.best_psnr) else None,
        "stream": run.loader.state(),
    }
    run.saver.save(state, best)
    run.saved_step = run.engine.step
