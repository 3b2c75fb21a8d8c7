"""One optimizer step over DeepSpeed ZeRO: accumulate micro-batches, clip over the whole model, skip the not finite."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hmar_mega.checkpoint.sources import EMA
from hmar_mega.config import Config
from hmar_mega.errors import TrainingError, UserError
from hmar_mega.micro_batches import micro_batch_size
from hmar_mega.model.graphs import attach_graphs
from hmar_mega.objective import Objective, Scores, TokenBatch
from hmar_mega.optimizer import SinglePassAdamW, build_adamw, set_steps
from hmar_mega.parallel import zero
from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.parallel.pipeline import PipelineModel, PipelineSchedule
from hmar_mega.parallel.slim_import import slim_import
from hmar_mega.schedules import Schedule

__all__ = ["COMPUTE_DTYPES", "Engine", "TrainingError", "quiet_deepspeed"]

log = logging.getLogger(__name__)

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Attributes of DeepSpeed's dynamic loss scaler that change while training.
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """The model, its optimizer and DeepSpeed's ZeRO engine around them.

    Args:
        model: HMAR, or a tokenizer; parameters with `requires_grad=False` are frozen and get no optimizer state.
        config: whole configuration.
        dims: grid of ranks.
        schedule: learning rate and weight decay by step.
    """

    def __init__(self, model: nn.Module, config: Config, dims: ParallelDims, schedule: Schedule) -> None:
        quiet_deepspeed()
        import deepspeed

        from hmar_mega.parallel.mpu import MpuAdapter

        if config.precision.compute == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
            raise UserError(
                f"precision.compute=fp16 is not trained on {dims.device.type}: DeepSpeed has it on GPUs alone; "
                "use precision.compute=bf16 or fp32"
            )
        self.model, self.dims, self.schedule = model, dims, schedule
        layers: Any = getattr(model, "layers", None)  # a tokenizer has convolutions of torch's alone
        self.fp8 = layers.fp8 if layers is not None else None  #: scales of FP8 linears, None without any
        micro = micro_batch_size(config, dims.data_parallel)
        self.batches = config.data.batch_plan
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._images_at_once = micro * dims.data_parallel
        optimizer = build_adamw(model, config, dims.device)
        rounded = config.precision.compute != "fp32"  # DeepSpeed then rounds weights before it copies its masters
        exact = {
            n: p.detach().to("cpu", torch.float32, copy=True).flatten()
            for n, p in model.named_parameters()
            if rounded or not p.requires_grad
        }
        chatter = io.StringIO()  # its bf16 optimizer prints memory figures whatever its log level
        with contextlib.redirect_stdout(chatter):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=_deepspeed_config(config, micro, self.accumulation),
                mpu=MpuAdapter(),
                dist_init_required=False,
            )
        log.debug("DeepSpeed said:\n%s", chatter.getvalue())
        self.zero = self.deepspeed.optimizer
        if isinstance(optimizer, SinglePassAdamW):
            from hmar_mega.parallel.bf16_optimizer import single_pass

            one = dims.data_parallel == 1 and config.parallel.pipeline_parallel == 1 and self.batches.full == micro
            single_pass(self.zero, direct=one)
        self.zero_stage = config.parallel.zero_stage
        self._ema: list[Tensor] = []
        #: This process's part of every parameter that is not trained, float32 on the CPU, and where it starts.
        self.frozen = self._restore_exact(exact)
        self.ema_decay = config.optim.ema_decay
        if self.ema_decay:  # of the float32 masters this process owns, one tensor for each of DeepSpeed's flat ones
            self._ema = [flat.detach().clone() for flat in zero.flat_masters(self.zero)]
        if layers is not None:
            attach_graphs(model, config, dims.device.type, dims.data_parallel)
        self._pipeline = None
        if isinstance(model, PipelineModel):
            dtype = COMPUTE_DTYPES[config.precision.compute]
            self._pipeline = PipelineSchedule(model, config, dtype, lambda: self.loss_scale)

    def train_step(self, micro_batches: Sequence[TokenBatch], objective: Objective) -> tuple[float, list[Scores]]:
        """Forward, backward and one optimizer update, or none where the gradients are not finite.

        Args:
            micro_batches: `accumulation` equally large ones.

        Returns:
            Gradient norm over the whole model before clipping, infinite when the update was skipped; and the scores of
            every micro-batch, on a pipeline those of its last stage alone.
        """
        self._apply_schedule()
        if self.fp8 is not None:
            self.fp8.begin_step()
        if self._pipeline is not None:
            scored = self._pipeline.forward_backward(micro_batches, objective)
            self.deepspeed.step()
        else:
            self.deepspeed.set_train_batch_size(len(micro_batches) * self._images_at_once)
            self.deepspeed.micro_steps = 0  # it ends a step where this counter meets the accumulation
            scored = []
            for batch in micro_batches:
                scores = objective.training(self.deepspeed, batch)
                self.deepspeed.backward(scores.guarded_mean())
                self.deepspeed.step()  # updates at the last micro-batch; skips by itself what is not finite
                scored.append(scores)
        norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
        if self.fp8 is not None:
            self.fp8.end_step(applied=math.isfinite(norm))
        self.step += 1
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self._average_weights()
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        return norm, scored

    @property
    def accumulation(self) -> int:
        """Micro-batches of the step that is next."""
        return self.batches.size(self.step) // self._images_at_once

    @property
    def images_seen(self) -> int:
        """Before the step that is next: its first image's position in the stream."""
        return self.batches.position(self.step)

    @property
    def full_batches_seen(self) -> float:
        """Steps of the full batch that `images_seen` would be: what the schedule goes by."""
        return self.images_seen / self.batches.full

    @property
    def learning_rate(self) -> float:
        """Of the step that is next."""
        return self.schedule.lr(self.full_batches_seen)

    def partitions(self) -> dict[str, zero.Partition]:
        """What this process owns of every trained parameter, by global name."""
        return zero.partitions(self.zero, self.model, {EMA: self._ema} if self._ema else {})

    def resume_at(self, step: int, skipped: int) -> None:
        """Stand where `step` steps were made, `skipped` of them without an update; moments are zeros."""
        self.step, self.skipped = step, skipped
        zero.lay_moments(self.zero, step - skipped)
        set_steps(self.zero.optimizer, step - skipped)

    @torch.no_grad()
    def _average_weights(self) -> None:
        """ema ← d·ema + (1 − d)·weights; d grows to `ema_decay` over the first updates, (1 + n)/(10 + n)."""
        if not self._ema or self.ema_decay is None:
            return
        updates = self.step - self.skipped
        decay = min(self.ema_decay, (1 + updates) / (10 + updates))
        for average, flat in zip(self._ema, zero.flat_masters(self.zero), strict=True):
            average.lerp_(flat.detach(), 1 - decay)

    @property
    def loss_scale(self) -> float:
        """By which float16 training multiplies the loss; 1 in other formats."""
        return float(getattr(self.zero, "loss_scale", 1.0))

    def loss_scaler_state(self) -> dict[str, float] | None:
        """Where float16's dynamic loss scaling stands; None in other formats."""
        scaler = getattr(self.zero, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return None
        return {key: getattr(scaler, key) for key in LOSS_SCALER_STATE}

    def restore_loss_scaler(self, state: dict[str, float] | None) -> None:
        """Go on with the loss scaling of a checkpoint; from the beginning where it has none."""
        scaler = getattr(self.zero, "loss_scaler", None)
        if state is not None and getattr(scaler, "dynamic", False):
            for key in LOSS_SCALER_STATE:
                setattr(scaler, key, state[key])

    def tables(self) -> contextlib.AbstractContextManager[None]:
        """Make parameters that the model reads outside its forward (positions, levels) whole; collective in ZeRO-3."""
        return self.whole(list(self.model.parameters(recurse=False)))

    @contextlib.contextmanager
    def whole(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Make parameters readable outside their modules' forward; collective in ZeRO-3."""
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def _restore_exact(self, exact: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        """Undo DeepSpeed's rounding of the masters to the compute format, and keep frozen weights as they were."""
        for name, owned in self.partitions().items():
            if name in exact:
                owned.weight.copy_(exact.pop(name)[owned.start : owned.stop])
        frozen = {}
        for name, parameter in self.model.named_parameters():
            span = None if parameter.requires_grad else zero.frozen_span(parameter)
            if span is not None:
                frozen[name] = (exact[name][span].clone(), span.start)
        return frozen

    def _apply_schedule(self) -> None:
        at = self.full_batches_seen
        lr, decay = self.schedule.lr(at), self.schedule.decay(at)
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = decay if group["decays"] else 0.0


def _deepspeed_config(config: Config, micro: int, accumulation: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.parallel.pipeline_parallel > 1:  # the pipeline's schedule accumulates; a step is DeepSpeed's to end
        settings["managed_gradient_accumulation"] = False
    if config.precision.compute == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1}
    if config.precision.compute == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def quiet_deepspeed() -> None:
    """Keep DeepSpeed's log to warnings; on CPUs, its shared-memory op (compiled, 66 MB of /dev/shm a process) off."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    with slim_import():  # every engine imports this optimizer, which compiles functions meanwhile
        import deepspeed.runtime.zero.muon.original_muon
    if not torch.cuda.is_available():
        import deepspeed.ops

        # A table that is not there yet would be made by trying every op that DeepSpeed has with a C compiler.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
