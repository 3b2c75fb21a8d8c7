"""One optimizer step over DeepSpeed ZeRO: accumulate micro-batches, clip over the whole model, guard against NaN."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.model.hmar import decays
from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.schedules import Schedule

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is good."""


@dataclass(frozen=True)
class Partition:
    """The part of one parameter whose float32 master and Adam moments this process owns.

    Attributes:
        start, stop: range in the flattened local parameter.
        weight: float32 master values of that range, a view.
        moments: `exp_avg` and `exp_avg_sq` of that range, views; empty before the first step.
    """

    start: int
    stop: int
    weight: Tensor
    moments: dict[str, Tensor]


class Engine:
    """The model, its optimizer and DeepSpeed's ZeRO engine around them.

    Args:
        model: HMAR; parameters with `requires_grad=False` are frozen and get no optimizer state.
        config: whole configuration.
        dims: grid of ranks.
        schedule: learning rate and weight decay by step.
    """

    def __init__(self, model: nn.Module, config: Config, dims: ParallelDims, schedule: Schedule) -> None:
        _quiet_deepspeed()
        import deepspeed

        from hmar_mega.parallel.mpu import MpuAdapter

        self.model, self.dims, self.schedule = model, dims, schedule
        micro = micro_batch_size(config, dims.data_parallel)
        self.accumulation = config.data.global_batch_size // (micro * dims.data_parallel)
        optimizer = _adamw(model, config, dims)
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
        self.step = 0

    def train_step(self, micro_batches: Iterable[Any], loss_of: Callable[[Any], Tensor]) -> float:
        """Forward, backward and one optimizer update.

        Args:
            micro_batches: `accumulation` equally large ones.
            loss_of: micro-batch → scalar mean loss.

        Returns:
            Gradient norm over the whole model before clipping.

        Raises:
            TrainingError: when the norm is not finite.
        """
        self._apply_schedule()
        for batch in micro_batches:
            self.deepspeed.backward(loss_of(batch))
            self.deepspeed.step()
        norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            raise TrainingError(
                f"gradient norm is {norm} at step {self.step}; training stops and the last checkpoint is kept. "
                "Lower optim.base_lr, or restart from that checkpoint with another run.seed"
            )
        self.step += 1
        return norm

    @property
    def learning_rate(self) -> float:
        """Of the step that is next."""
        return self.schedule.lr(self.step)

    def partitions(self) -> dict[str, Partition]:
        """What this process owns of every trained parameter, by global name."""
        flats = getattr(self.zero, "single_partition_of_fp32_groups", None)
        if flats is None:
            flats = self.zero.fp32_groups_flat_partition
        owned = {}
        for name, parameter in self.model.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:
                continue
            flat = flats[mapping.param_group_index]
            high, low = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            state = self.zero.optimizer.state.get(flat, {})
            moments = {
                key: state[key].view(-1)[high.start : high.start + high.numel]
                for key in ("exp_avg", "exp_avg_sq")
                if key in state
            }
            weight = flat.data.view(-1)[high.start : high.start + high.numel]
            owned[name] = Partition(low.start, low.start + low.numel, weight, moments)
        return owned

    def prepare_moments(self, step: int) -> None:
        """Lay out Adam's state as after `step` steps, zeros, for a checkpoint to be read into."""
        self.step = step
        flats = getattr(self.zero, "single_partition_of_fp32_groups", None)
        for flat in flats if flats is not None else self.zero.fp32_groups_flat_partition:
            self.zero.optimizer.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device if flat.is_cuda else None),
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }

    def _apply_schedule(self) -> None:
        lr, decay = self.schedule.lr(self.step), self.schedule.decay(self.step)
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = decay if group["decays"] else 0.0


def micro_batch_size(config: Config, data_parallel: int) -> int:
    """Samples a data-parallel rank runs at once: as configured, else the largest divisor of its share up to 32.

    Raises:
        UserError: when the global batch cannot be divided evenly; the sizes that can are named.
    """
    total, micro = config.data.global_batch_size, config.data.micro_batch_size
    if total % data_parallel == 0:
        share = total // data_parallel
        if micro is None:
            return max(m for m in range(1, min(share, 32) + 1) if share % m == 0)
        if share % micro == 0:
            return micro
    unit = data_parallel * (micro or 1)
    below = total // unit * unit
    raise UserError(
        f"global_batch_size={total} is not a multiple of {data_parallel} data-parallel processes × micro_batch_size "
        f"{micro or 1}; use {f'{below} or ' if below else ''}{below + unit}"
    )


def _adamw(model: nn.Module, config: Config, dims: ParallelDims) -> torch.optim.Optimizer:
    optim = config.optim
    if optim.impl not in ("auto", "torch"):
        raise UserError(f"optim.impl={optim.impl} is not available in this version; use optim.impl=torch")
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if decays(n, p)], "decays": True},
        {"params": [p for n, p in trained if not decays(n, p)], "decays": False},
    ]
    fused = dims.device.type == "cuda"
    if dims.is_main:
        log.info("optimizer: torch AdamW%s, %d trained tensors", " (fused)" if fused else "", len(trained))
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=1.0, betas=optim.betas, eps=optim.eps, fused=fused or None
    )


def _deepspeed_config(config: Config, micro: int, accumulation: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_batch_size": config.data.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.precision.compute == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _quiet_deepspeed() -> None:
    """Keep DeepSpeed's log to warnings; on CPUs, its shared-memory op (compiled, 66 MB of /dev/shm a process) off."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    if not torch.cuda.is_available():
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
