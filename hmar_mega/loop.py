"""The training loop, top to bottom: read, step, log, evaluate, save."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hmar_mega.checkpoint.saver import CheckpointSaver, Outcome
from hmar_mega.config import Config
from hmar_mega.data.reader import StreamLoader
from hmar_mega.engine import Engine, TrainingError
from hmar_mega.flops import device_peak, train_flops_per_image
from hmar_mega.metrics import MetricsLog
from hmar_mega.objective import Objective, TokenBatch, per_scale_sums
from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.progress import track

log = logging.getLogger(__name__)

#: Of a run directory: the samples of every step that was skipped.
SKIPPED_FILE = "skipped_steps.jsonl"


class Sampler(Protocol):
    """Draws the sample grid of a step into a file."""

    def __call__(self, path: Path) -> None:
        """Sample with the run's fixed seeds and write a PNG."""


@dataclass
class Progress:
    """What the loop remembers besides weights: the best validation loss, the one before it, and the step last saved."""

    best_loss: float = float("inf")
    best_before: float = float("inf")
    saved_step: int = -1
    settled: Outcome | None = None  #: of the last save whose end was heard of


@dataclass
class Run:
    """Everything the loop works with."""

    config: Config
    folder: Path
    dims: ParallelDims
    engine: Engine
    objective: Objective
    loader: StreamLoader
    validation: Any  #: () → iterable of TokenBatch, or None
    validation_rounds: int  #: forwards that every rank makes in a validation, see `validation_losses`
    sampler: Sampler | None
    last_step: int
    state: dict[str, Any]  #: what every checkpoint's state.json records
    saver: CheckpointSaver
    metrics: MetricsLog | None = None
    progress: Progress = field(default_factory=Progress)


@dataclass
class Window:
    """Sums since the last log line, kept on the device."""

    loss: Tensor
    scales: Tensor
    started: float
    steps: int = 0
    images: int = 0
    waited: float = 0.0
    grad_norm: float = 0.0


def train(run: Run) -> None:
    """Train from `run.engine.step` to `run.last_step`.

    Raises:
        TrainingError: when too many steps in a row are not finite, or the last checkpoint cannot be written.
    """
    run.engine.model.train()
    with track("training", run.last_step, enabled=run.dims.is_main, start=run.engine.step) as bar:
        window = _open_window(run)
        while run.engine.step < run.last_step:
            window = _step(run, window)
            bar.advance()
    _finish(run)


def _step(run: Run, window: Window) -> Window:
    """One optimizer step and what is due after it; returns the window of the next log line."""
    config, engine = run.config, run.engine
    lr = engine.learning_rate
    batches = next(run.loader)
    window.waited += run.loader.wait_seconds

    losses: list[Tensor] = []
    scales: list[Tensor] = []

    def loss_of(batch: TokenBatch) -> Tensor:
        scores = run.objective.training(engine.deepspeed, batch)
        loss = scores.loss.mean()
        losses.append(loss.detach().double())
        scales.append(per_scale_sums(scores, run.objective))
        # a loss that is not finite must not pass for finite gradients: the engine skips by the gradients' norm
        return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))

    window.grad_norm = engine.train_step(batches, loss_of)
    if engine.skipped_in_a_row:
        _record_skipped(run, batches, torch.stack(losses))
    else:
        window.loss += torch.stack(losses).sum()
        window.scales += torch.stack(scales).sum(0)
        window.steps += 1
    window.images += config.data.global_batch_size
    step, done = engine.step, engine.step == run.last_step
    following = window
    if step % config.logging.interval == 0 or done:
        _log_line(run, window, lr)
        following = _open_window(run)
    paused = time.perf_counter()
    if step % config.eval.interval == 0 or done:
        _evaluate(run)
    if step % config.checkpoint.interval == 0 or done:
        _save(run)
    following.started += time.perf_counter() - paused  # rates speak of training alone
    return following


def _record_skipped(run: Run, batches: Sequence[TokenBatch], losses: Tensor) -> None:
    """Note whose gradients were not finite; collective over data-parallel ranks.

    Raises:
        TrainingError: after `optim.max_bad_steps` such steps in a row.
    """
    engine, limit = run.engine, run.config.optim.max_bad_steps
    own = [(int(p), key) for batch in batches for p, key in zip(batch.positions, batch.keys, strict=True)]
    finite = bool(losses.isfinite().all())
    parts: list[Any] = [None] * run.dims.world_size
    dist.all_gather_object(parts, (run.dims.tp_rank, own, finite))
    if run.dims.is_main:
        samples = sorted(pair for tp_rank, part, _ in parts if tp_rank == 0 for pair in part)
        cause = "gradient" if all(f for *_, f in parts) else "loss"
        positions, keys = zip(*samples, strict=True)
        row = {"step": engine.step, "cause": cause, "positions": positions, "keys": keys}
        try:
            with (run.folder / SKIPPED_FILE).open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as err:
            log.warning("%s cannot be written (%s): %s", run.folder / SKIPPED_FILE, err.strerror, json.dumps(row))
        log.warning(
            "step %d | %s not finite: step skipped (%d in all, %d in a row, at most %d), its samples are in %s",
            engine.step, cause, engine.skipped, engine.skipped_in_a_row, limit, SKIPPED_FILE,
        )  # fmt: skip
    if engine.skipped_in_a_row >= limit:
        raise TrainingError(
            f"{limit} steps in a row up to step {engine.step} had a loss or gradient that is not finite; training "
            f"stops and the last checkpoint is kept. The samples are in {run.folder / SKIPPED_FILE}. Lower "
            "optim.base_lr, look at those samples, or raise optim.max_bad_steps"
        )


def _open_window(run: Run) -> Window:
    device = run.dims.device
    return Window(
        torch.zeros((), dtype=torch.float64, device=device),
        torch.zeros(2, run.objective.schedule.num_scales, dtype=torch.float64, device=device),
        time.perf_counter(),
    )


def _log_line(run: Run, window: Window, lr: float) -> None:
    """One readable line and one row of figures; collective over data-parallel ranks."""
    config, engine = run.config, run.engine
    sums = torch.cat([window.loss.view(1), window.scales.flatten()])
    dist.all_reduce(sums)
    copies = run.dims.world_size * window.steps * engine.accumulation
    loss = float(sums[0]) / copies if copies else float("nan")
    totals, counts = sums[1:].view(2, -1).tolist()
    scales = [total / count if count else float("nan") for total, count in zip(totals, counts, strict=True)]
    seconds = time.perf_counter() - window.started
    batch = config.data.global_batch_size
    values: dict[str, Any] = {
        "images": engine.step * batch,
        "loss": loss,
        "scale_loss": [s if math.isfinite(s) else None for s in scales],
        "grad_norm": window.grad_norm,
        "lr": lr,
        "images_per_second": window.images / seconds,
        "data_wait": window.waited / seconds,
        "skipped_steps": engine.skipped,
        "failed_saves": run.saver.failed_saves,
    }
    if config.precision.compute == "fp16":
        values["loss_scale"] = engine.loss_scale
    peak = device_peak(run.dims.device)
    if peak is not None:
        flops = train_flops_per_image(config) * values["images_per_second"]
        values["mfu"] = flops / (peak * run.dims.world_size)
    if run.metrics is None:
        return
    run.metrics.write("train", engine.step, values)
    mfu = f" | mfu {values['mfu']:.1%}" if "mfu" in values else ""
    log.info(
        "step %*d/%d | images %s | loss %.4f | scales %s | grad %.2f | lr %.2e | %.0f img/s%s | wait %.0f%%",
        len(str(run.last_step)), engine.step, run.last_step, f"{values['images']:,}", loss,
        " ".join("-" if s != s else f"{s:.2f}" for s in scales), window.grad_norm, lr,
        values["images_per_second"], mfu, 100 * values["data_wait"],
    )  # fmt: skip


def _evaluate(run: Run) -> None:
    """Validation losses, the best checkpoint and the sample grid."""
    model, step = run.engine.model, run.engine.step
    model.eval()
    if run.validation is not None:
        losses = validation_losses(run.objective, model, run.validation(), run.dims, run.validation_rounds)
        if run.metrics is not None:
            run.metrics.write("val", step, losses)
            log.info(
                "step %d | validation: all scales %.4f, last scale %.4f",
                step,
                losses["all_scales"],
                losses["last_scale"],
            )
        _settle(run)
        if losses["all_scales"] < run.progress.best_loss:
            run.progress.best_before, run.progress.best_loss = run.progress.best_loss, losses["all_scales"]
            _save(run, best=True)
    # under ZeRO-3 every rank holds a part of each weight, so all of them sample
    if run.sampler is not None and (run.dims.dp_rank == 0 or run.engine.zero_stage == 3):
        with run.engine.tables():
            run.sampler(run.folder / "grids" / f"step-{step:08d}.png")
    model.train()


def validation_losses(
    objective: Objective,
    model: torch.nn.Module,
    batches: Iterable[TokenBatch],
    dims: ParallelDims,
    rounds: int = 0,
) -> dict[str, Any]:
    """Mean cross-entropy in nats per token over all scales, at the last scale and at each; collective.

    In stage 2 the tokens are those that the mask leaves to predict; a scale without any counts nothing.

    Args:
        rounds: forwards to make at least. ZeRO-3 gathers weights in every forward, so all ranks must make equally
            many: what is missing is made with the last batch and not counted.
    """
    sums = torch.zeros(2, objective.schedule.num_scales, dtype=torch.float64, device=dims.device)
    done = 0
    for batch in batches:
        sums += per_scale_sums(objective.evaluation(model, batch), objective)
        done += 1
    for _ in range(done, rounds):
        objective.evaluation(model, batch)
    dist.all_reduce(sums)
    totals, counts = sums.tolist()
    scales = [total / count if count else None for total, count in zip(totals, counts, strict=True)]
    return {
        "all_scales": sum(totals) / sum(counts),
        "last_scale": scales[-1],
        "scale_loss": scales,
    }


def _save(run: Run, best: bool = False) -> None:
    """Begin to write the checkpoint of this step, unless that was done a moment ago for being the best."""
    if run.progress.saved_step == run.engine.step:
        if best:
            run.saver.mark_best()
        return
    _settle(run)
    loss = run.progress.best_loss
    state = {
        **run.state,
        "images_seen": run.engine.step * run.config.data.global_batch_size,
        "finished": run.engine.step == run.last_step,
        "best_loss": loss if loss < float("inf") else None,
        "stream": run.loader.state(),
    }
    run.saver.save(state, best)
    run.progress.saved_step = run.engine.step


def _settle(run: Run) -> Outcome | None:
    """Wait for the save under way. Where the best checkpoint could not be written, the one before is still the best."""
    outcome = run.saver.wait()
    if outcome is not None and outcome is not run.progress.settled and outcome.error is not None and outcome.best:
        run.progress.best_loss = run.progress.best_before
    run.progress.settled = outcome
    return outcome


def _finish(run: Run) -> None:
    """Wait for the last checkpoint, without which a run is not finished; what failed is tried once more."""
    hoped = run.progress.best_loss
    outcome = _settle(run)
    if outcome is None or outcome.error is None:
        return
    run.progress.saved_step = -1
    run.progress.best_loss = hoped
    _save(run, outcome.best)
    outcome = _settle(run)
    if outcome is not None and outcome.error is not None:
        raise TrainingError(
            f"training reached step {run.engine.step}, but its checkpoint could not be written: {outcome.error}. Make "
            "room and start the run again: it goes on from the last good checkpoint"
        )
