"""The training loop, top to bottom: read, step, log, evaluate, save."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hmar_mega.checkpoint.saver import CheckpointSaver, Outcome
from hmar_mega.config import Config
from hmar_mega.damage_report import DamageReport
from hmar_mega.data.stream import Loader
from hmar_mega.devices import peak_memory
from hmar_mega.engine import Engine, TrainingError
from hmar_mega.flops import device_peak, train_flops_per_image
from hmar_mega.fp8_attention import choose_fp8_attention
from hmar_mega.interrupts import Stop, StopRequest
from hmar_mega.metrics import MetricsLog
from hmar_mega.model.hmar import HMAR
from hmar_mega.objective import Objective, TokenBatch, per_scale_sums
from hmar_mega.parallel.agreement import Agreement
from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.parallel.hang import StepWatch
from hmar_mega.parallel.pipeline import PipelineModel
from hmar_mega.progress import track

log = logging.getLogger(__name__)

#: Of a run directory: the samples of every step that was skipped.
SKIPPED_FILE = "skipped_steps.jsonl"


class Sampler(Protocol):
    """Draws the sample grid of a step into a file."""

    def __call__(self, path: Path, after_scale: Callable[[], None]) -> None:
        """Sample with the run's fixed seeds and write a PNG; `after_scale` is called after each scale and may raise."""


@dataclass
class Progress:
    """What the loop remembers besides weights: the best validation losses, the step last saved, what is due."""

    best_loss: float = float("inf")
    best_before: float = float("inf")
    saved_step: int = -1
    evaluation_due: bool = False  #: put off when the run was asked to stop
    settled: Outcome | None = None  #: of the last save whose end was heard of


@dataclass
class Run:
    """Everything the loop works with."""

    config: Config
    folder: Path
    dims: ParallelDims
    engine: Engine
    objective: Objective
    loader: Loader
    damage: DamageReport
    validation: Any  #: () → iterable of TokenBatch, or None
    validation_rounds: int  #: batches of the rank that has most of them in a validation
    agreement: Agreement  #: whether the ranks stop
    watch: StepWatch  #: whether a step hangs
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
    micro_batches: int = 0  #: of a data-parallel rank
    images: int = 0
    waited: float = 0.0
    grad_norm: float = 0.0


def train(run: Run) -> None:
    """Train from `run.engine.step` to `run.last_step`, or until the ranks agree to stop: then save what was done.

    Raises:
        TrainingError: when too many steps in a row are not finite, or the last checkpoint cannot be written.
    """
    run.engine.model.train()
    try:
        run.agreement.check()  # asked while the run was set up: nothing is new, so nothing need be saved
        if run.progress.evaluation_due:
            _evaluate(run)
        with track("training", run.last_step, enabled=run.dims.is_main, start=run.engine.step) as bar:
            window = _open_window(run)
            while run.engine.step < run.last_step:
                window = _step(run, window)
                bar.advance()
    except StopRequest:
        if run.dims.is_main:
            log.info("stopped at step %d as asked; start the same command again to go on", run.engine.step)
    _finish(run)


def _step(run: Run, window: Window) -> Window:
    """One optimizer step and what is due after it; returns the window of the next log line."""
    config, engine = run.config, run.engine
    run.watch.begin()
    run.agreement.begin()
    lr = engine.learning_rate
    batches = next(run.loader)
    window.waited += run.loader.wait_seconds

    window.grad_norm, scored = engine.train_step(batches, run.objective)
    losses = torch.stack([s.loss.detach().mean().double() for s in scored]) if scored else window.loss.new_zeros(0)
    stop = run.agreement.end()
    run.watch.end()
    if engine.skipped_in_a_row:
        _record_skipped(run, batches, losses)
    else:
        window.loss += losses.sum()
        window.scales += sum(per_scale_sums(s, run.objective) for s in scored)
        window.micro_batches += len(batches)
    window.images += sum(len(batch.labels) for batch in batches) * run.dims.data_parallel
    step, done = engine.step, engine.step == run.last_step
    following = window
    if step % config.logging.interval == 0 or done:
        _log_line(run, window, lr)
        following = _open_window(run)
    paused = time.perf_counter()
    if step % config.eval.interval == 0 or done:
        stop = _evaluate_unless(stop, run)
    if step % config.checkpoint.interval == 0 or done or stop is not Stop.NONE:
        _save(run)
    if stop is not Stop.NONE:
        raise StopRequest(stop)
    following.started += time.perf_counter() - paused  # rates speak of training alone
    return following


def _record_skipped(run: Run, batches: Sequence[TokenBatch], losses: Tensor) -> None:
    """Note whose gradients were not finite; collective over all ranks.

    Raises:
        TrainingError: after `optim.max_bad_steps` such steps in a row.
    """
    engine, limit = run.engine, run.config.optim.max_bad_steps
    own = [(int(p), key) for batch in batches for p, key in zip(batch.positions, batch.keys, strict=True)]
    finite = bool(losses.isfinite().all())
    parts: list[Any] = [None] * run.dims.world_size
    dist.all_gather_object(parts, ((run.dims.tp_rank, run.dims.pp_rank), own, finite))
    if run.dims.is_main:
        samples = sorted(pair for place, part, _ in parts if place == (0, 0) for pair in part)
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
    """One readable line and one row of figures; collective over all ranks."""
    config, engine = run.config, run.engine
    sums = torch.cat([window.loss.view(1), window.loss.new_tensor([run.damage.own]), window.scales.flatten()])
    dist.all_reduce(sums)
    run.damage.collect(engine.step, int(sums[1]))
    # every tensor rank of the last stages has counted
    copies = run.dims.tensor_parallel * run.dims.data_parallel * window.micro_batches
    loss = float(sums[0]) / copies if copies else float("nan")
    totals, counts = sums[2:].view(2, -1).tolist()
    scales = [total / count if count else float("nan") for total, count in zip(totals, counts, strict=True)]
    seconds = time.perf_counter() - window.started
    values: dict[str, Any] = {
        "images": engine.images_seen,
        "loss": loss,
        "scale_loss": [s if math.isfinite(s) else None for s in scales],
        "grad_norm": window.grad_norm,
        "lr": lr,
        "images_per_second": window.images / seconds,
        "data_wait": window.waited / seconds,
        "peak_memory_bytes": peak_memory(run.dims.device),  # of this rank
        "skipped_steps": engine.skipped,
        "failed_saves": run.saver.failed_saves,
        "substituted_samples": int(sums[1]),
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


def _evaluate_unless(stop: Stop, run: Run) -> Stop:
    """Evaluate, unless the ranks stop before or meanwhile: then it is due when the run goes on. Gives why they stop."""
    run.progress.evaluation_due = True
    if stop is Stop.NONE:
        try:
            _evaluate(run)
        except StopRequest as request:
            return request.stop
    return stop


def _evaluate(run: Run) -> None:
    """Validation losses, the sample grid and the best checkpoint; nothing is recorded where the ranks stop meanwhile.

    Raises:
        StopRequest: between validation batches and between scales.
    """
    model, check = run.engine.model, run.agreement.check
    model.eval()
    losses = None
    if run.validation is not None:
        padded = run.engine.zero_stage == 3
        losses = validation_losses(
            run.objective, model, run.validation(), run.dims.device, run.validation_rounds, padded, check
        )
    if run.sampler is not None:
        # under ZeRO-3 every rank holds a part of each weight, so all of them sample
        if run.dims.dp_rank == 0 or run.engine.zero_stage == 3:
            with run.engine.tables():
                run.sampler(grid_path(run), check)
        else:
            for _ in range(run.objective.schedule.num_scales):
                check()
    if run.metrics is not None and grid_path(run).exists():
        run.metrics.picture("samples", run.engine.step, grid_path(run))
    if losses is not None:
        _record_validation(run, losses)
    run.progress.evaluation_due = False
    choose_fp8_attention(run.engine)
    model.train()


def grid_path(run: Run) -> Path:
    """The file of this step's sample grid."""
    return run.folder / "grids" / f"step-{run.engine.step:08d}.png"


def _record_validation(run: Run, losses: dict[str, Any]) -> None:
    """A line, a row of figures, and the checkpoint when it is the best so far."""
    step = run.engine.step
    if run.metrics is not None:
        run.metrics.write("val", step, losses)
        log.info(
            "step %d | validation: all scales %.4f, last scale %.4f", step, losses["all_scales"], losses["last_scale"]
        )
    _settle(run)
    if losses["all_scales"] < run.progress.best_loss:
        run.progress.best_before, run.progress.best_loss = run.progress.best_loss, losses["all_scales"]
        run.progress.evaluation_due = False
        _save(run, best=True)


def validation_losses(
    objective: Objective,
    model: torch.nn.Module,
    batches: Iterable[TokenBatch],
    device: torch.device,
    rounds: int,
    padded: bool,
    after_batch: Callable[[], None],
) -> dict[str, Any]:
    """Mean cross-entropy in nats per token and top-1 error over all scales, at the last scale and at each; collective.

    In stage 2 the tokens are those that the mask leaves to predict; a scale without any counts nothing.

    Args:
        device: of the sums, which all processes add up.
        rounds: batches of the rank that has most of them.
        padded: whether all ranks make equally many forwards, as ZeRO-3 needs, which gathers weights in each: what is
            missing is made with the last batch and not counted.
        after_batch: called equally often on every rank; what it raises ends the validation.
    """
    sums = torch.zeros(3, objective.schedule.num_scales, dtype=torch.float64, device=device)
    own = iter(batches)
    for _ in range(rounds):
        following = next(own, None)
        if following is not None:
            batch = following
            sums += _batch_sums(objective, model, batch)
        elif padded:
            _batch_sums(objective, model, batch)
        after_batch()
    dist.all_reduce(sums)
    totals, counts, wrong = sums.tolist()
    scales, errors = (
        [total / count if count else None for total, count in zip(row, counts, strict=True)] for row in (totals, wrong)
    )
    return {
        "all_scales": sum(totals) / sum(counts),
        "last_scale": scales[-1],
        "scale_loss": scales,
        "all_scales_error": sum(wrong) / sum(counts),
        "last_scale_error": errors[-1],
        "scale_error": errors,
    }


def _batch_sums(objective: Objective, model: torch.nn.Module, batch: TokenBatch) -> Tensor | float:
    """`per_scale_sums` of a batch; on a pipeline 0 except on its last stage."""
    if not isinstance(model, PipelineModel):
        return per_scale_sums(objective.evaluation(model, batch), objective)

    def inputs_of(chunk: HMAR) -> dict[str, Any]:
        return {**objective.inputs(batch, training=False, stage=chunk.stage), "errors": True}

    given = model(inputs_of, len(batch.labels))
    return 0.0 if given is None else per_scale_sums(objective.evaluated(given, batch), objective)


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
        "images_seen": run.engine.images_seen,
        "finished": run.engine.step == run.last_step,
        "best_loss": loss if loss < float("inf") else None,
        "stream": run.loader.state(),
        "evaluation_due": run.progress.evaluation_due,
    }
    run.saver.save(state, best)
    run.progress.saved_step = run.engine.step
    run.damage.collect(run.engine.step)


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
