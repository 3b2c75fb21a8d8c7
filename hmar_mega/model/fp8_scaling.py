"""When FP8 linears take new scales: once an optimizer step, from the largest values of the whole global batch.

Transformer Engine by itself updates scales at the end of every forward region and during every backward pass, of all
modules of the process together. Here it is kept from that, and both updates happen at the end of a step, after all its
micro-batches, of the linears that are counted here:

- scales are those of the step, whatever the number of micro-batches, pipeline schedule and recomputation;
- the FP8 copies of weights are made by the first micro-batch and serve all others of the step;
- two small all-reduces a step, over tensor- and data-parallel ranks (mcore's amax group), instead of two a micro-batch;
- between steps the state is the same on all those ranks: (scale, history) by layer, which any layout can resume.

With all scales 1, as TE starts, gradients of 1e-6 vanish and weights of 0.02 lose half their digits. So a run without
stored scales computes its first step in bf16 and measures what delayed scaling needs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from megatron.core import parallel_state
from torch import Tensor, nn
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from hmar_mega.checkpoint.sources import FP8, CheckpointReader
from hmar_mega.config_precision import PrecisionConfig

log = logging.getLogger(__name__)

#: Direction of a product → TE's key of its scaling state.
DIRECTIONS = {"fwd": "scaling_fwd", "bwd": "scaling_bwd"}

#: TE's key of its scaling state → FP8 format of what it scales.
FORMATS = {"scaling_fwd": tex.DType.kFloat8E4M3, "scaling_bwd": tex.DType.kFloat8E5M2}


class Fp8Scaling:
    """The FP8 linears of this process and their scales.

    Attributes:
        delayed: whether scales come from earlier steps, and are state.
    """

    def __init__(self, precision: PrecisionConfig) -> None:
        self.delayed = precision.fp8_recipe == "delayed"
        self._recipe = fp8_recipe(precision)
        self._linears: list[Any] = []
        self._measuring = self.delayed
        self._ready = False
        self._renewed: set[str] = set()  # runs of graphs whose FP8 weights are those of this step

    @property
    def measuring(self) -> bool:
        """Whether the linears run in bf16 and note their largest values."""
        return self._measuring

    def add(self, linear: nn.Module) -> None:
        """Count a TE linear among those that are computed in FP8."""
        self._linears.append(linear)

    @contextmanager
    def region(self) -> Iterator[None]:
        """Compute the linears in FP8; in bf16 and measuring, in the first step of a run without scales."""
        if self._measuring:
            self._prepare()
            yield
            return
        with self._autocast():
            yield

    def begin_step(self) -> None:
        """Weights have changed: the first micro-batch makes their FP8 copies anew."""
        for linear in self._linears:
            linear.is_first_microbatch = True
            linear.measuring = self._measuring
        self._renewed.clear()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Around the capture of CUDA graphs in which linears run: the passes before it leave no trace in the scales.

        TE captures the making of FP8 weights with a flag on the GPU that says whether to skip it, where there is one.
        """
        FP8GlobalStateManager.set_skip_fp8_weight_update_tensor(False)
        states = [s for linear in self._linears for s in map(linear.fp8_meta.get, DIRECTIONS.values()) if s is not None]
        # scaling by the current largest value keeps neither
        named = [getattr(s, name, None) for s in states for name in ("scale", "amax_history")]
        tensors = [t for t in named if t is not None]
        kept = [t.clone() for t in tensors]
        try:
            yield
        finally:
            for tensor, values in zip(tensors, kept, strict=True):
                tensor.copy_(values)

    def before_replay(self, run: str) -> None:
        """Let the first replay of `run` in a step make its FP8 weights anew, and the others take them as they are."""
        FP8GlobalStateManager.set_skip_fp8_weight_update_tensor(run in self._renewed)
        self._renewed.add(run)

    def end_step(self, applied: bool) -> None:
        """Take the step's largest values into the scales; collective over tensor- and data-parallel ranks.

        Args:
            applied: whether the update was made. If not, the values were not finite on some rank and are forgotten.
        """
        if not self.delayed:
            return
        if not applied:
            for linear in self._linears:
                for key in DIRECTIONS.values():
                    if key in linear.fp8_meta:
                        linear.fp8_meta[key].amax_history[0].zero_()
            return
        for key, dtype in FORMATS.items():
            self._update(key, dtype)
        if self._measuring:
            self._measuring = False
            log.info("FP8 linears: the first step was computed in bf16 and measured; from here on in FP8")

    def state(self, names: Mapping[int, str]) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) of every scale and history, once there are any; views.

        Args:
            names: id of a weight → its global name.
        """
        if not self.delayed or self._measuring:
            return
        for linear in self._linears:
            layer = names[id(linear.weight)].removesuffix(".weight")
            for direction, key in DIRECTIONS.items():
                scaling = linear.fp8_meta[key]
                yield f"{layer}.fp8_scale_{direction}", scaling.scale
                yield f"{layer}.fp8_amax_history_{direction}", scaling.amax_history

    def restore(self, names: Mapping[int, str], stored: CheckpointReader) -> None:
        """Go on with the scales of a checkpoint, or measure them anew where it has none that fit, which is logged."""
        if not self.delayed:
            return
        self._prepare()
        self._measuring = False
        wanted = dict(self.state(names))
        shapes = {name: shape for name, kind, shape in stored.tensors() if kind == FP8}
        if any(shapes.get(name) != tuple(tensor.shape) for name, tensor in wanted.items()):
            self._measuring = True
            log.info(
                "FP8 linears: %s has no scales for precision.fp8_recipe=delayed with fp8_amax_history=%d; the next "
                "step is computed in bf16 and measured", stored.folder, self._recipe.amax_history_len,
            )  # fmt: skip
            return
        for name, tensor in wanted.items():
            tensor.copy_(stored.read(name, kind=FP8))

    def _update(self, key: str, dtype: Any) -> None:
        """New scales of one direction from the largest values of all ranks, which move into the histories."""
        states = [linear.fp8_meta[key] for linear in self._linears]
        if not states:
            return
        largest = torch.cat([state.amax_history[0] for state in states])
        if dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=_amax_group())
        tex.fused_amax_and_scale_update_after_reduction(
            largest, [state.amax_history for state in states], [state.scale for state in states],
            self._recipe.amax_compute_algo, dtype, self._recipe.margin,
        )  # fmt: skip

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with quiet(), te.autocast(enabled=True, recipe=self._recipe, amax_reduction_group=_amax_group()):
            yield

    def _prepare(self) -> None:
        """Make the scaling state of every linear, which TE would make at its first FP8 forward."""
        if self._ready:
            return
        self._ready = True
        with torch.no_grad(), self._autocast():
            for linear in self._linears:
                linear.init_fp8_metadata(num_gemms=1)


def _amax_group() -> Any:
    """The tensor- and data-parallel ranks of this pipeline stage."""
    return parallel_state.get_amax_reduction_group(with_context_parallel=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Around `te.autocast`: TE updates scales neither when it ends nor in the backward pass of what runs in it.

    TE updates at the end of an outermost enabled region, and in the backward pass of the first linear that ran in it:
    with a disabled region outside there is no such region, and the flag "first" is taken here.
    """
    with te.autocast(enabled=False):
        FP8GlobalStateManager.is_first_fp8_module()
        yield


def fp8_recipe(precision: PrecisionConfig) -> Any:
    """TE's recipe: e4m3 forward, e5m2 for gradients."""
    if precision.fp8_recipe == "current":
        return Float8CurrentScaling(fp8_format=Format.HYBRID)
    return DelayedScaling(
        margin=precision.fp8_margin,
        fp8_format=Format.HYBRID,
        amax_history_len=precision.fp8_amax_history,
        amax_compute_algo="max",
        reduce_amax=True,
    )
