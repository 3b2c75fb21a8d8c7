"""DeepSpeed's bf16 optimizer with its passes over gradients made one: ZeRO 1 as `optim.impl=triton` runs it.

DeepSpeed casts each gradient, adds it to a float32 sum, later reads the sums for their norm, scales them, updates,
rounds the masters into the weights and fills the sums with zeros. Here a gradient is added, or copied where it is the
first, in one kernel, and the update does the rest. Where one process has one micro-batch a step there is nothing to
add up: the update reads the bf16 gradients as they are and the float32 sums, four bytes a parameter, are given back.

Masters, moments, their cut over ranks and everything that checkpoints read stay DeepSpeed's.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import (
    all_gather_dp_groups,
    bwc_tensor_model_parallel_rank,
    is_model_parallel_parameter,
)
from torch import Tensor

from hmar_mega.kernels.adamw import Chunks, Update, accumulate_, adamw_, total_norm

log = logging.getLogger(__name__)


class SinglePassBF16Optimizer(BF16_Optimizer):  # type: ignore[misc]
    """See the file. Made of a finished BF16_Optimizer by `single_pass`."""

    direct: bool  #: whether updates read the gradients of the one micro-batch there is
    chunks: list[Chunks]

    def prepare(self, direct: bool) -> None:
        """Lay out the updates; free the float32 sums where they are not needed."""
        self.direct = direct
        self.chunks = []
        for i, flat in enumerate(self.fp32_groups_flat_partition):
            lengths = [p.numel() for p in self.bf16_groups[i]] if direct else [flat.numel()]
            self.chunks.append(Chunks(lengths, flat.device))
        if direct:
            for flat in self.fp32_groups_gradients_flat:
                flat.untyped_storage().resize_(0)

    @torch.no_grad()
    def _update_hp_grad(self, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        if lp.grad is None:
            return
        seen = self.fp32_groups_has_gradients[group_idx]
        if self.direct and seen[param_idx]:
            raise RuntimeError("a second micro-batch in a step that was set up for one")
        if not self.direct:
            accumulate_(self.fp32_groups_gradients[group_idx][param_idx], lp.grad.contiguous(), add=seen[param_idx])
        seen[param_idx] = True

    def accumulate_hp_grads_and_remove_lp(self, lp_param: Any, group_idx: int, param_idx: int) -> None:
        """DeepSpeed's hook: a parameter has its gradient."""
        self._update_hp_grad(lp_param, group_idx, param_idx, clear_lp_grads=False)
        if not self.direct:
            lp_param.grad = None

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, Any]]:
        """What DeepSpeed averages over data-parallel ranks; nothing where there is one."""
        if dist.get_world_size(self.dp_process_group) == 1:
            return [], {}
        self._fill_missing()
        found: tuple[list[Tensor], dict[str, Any]] = super().get_grads_for_reduction()
        return found

    def clear_hp_grads(self) -> None:
        """Forget the sums: the next gradient of a parameter is copied over its old one."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.bf16_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clip and update; skipped where the norm is not finite, of which the host hears when all is launched."""
        if closure is not None:
            raise NotImplementedError("closures are not supported")
        self._fill_missing()
        norm = self._norm()
        groups = self.optimizer.param_groups
        steps = 1 + groups[0].get("step", 0)
        for i, group in enumerate(groups):
            flat = self.fp32_groups_flat_partition[i]
            state = self.optimizer.state[flat]
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(flat.data)
            rank = dist.get_rank(self.real_dp_process_group[i])
            weights = self.bf16_partitioned_groups[i][rank]
            decay = group["weight_decay"]
            update = Update(group["lr"], decay, group["betas"], group["eps"], steps, self.clip_grad)
            adamw_(
                flat.data, state["exp_avg"], state["exp_avg_sq"], weights.data, self._gradients(i), self.chunks[i],
                norm, update,
            )  # fmt: skip
        if dist.get_world_size(self.dp_process_group) > 1:
            all_gather_dp_groups(
                self.bf16_groups_flat, self.bf16_partitioned_groups, self.real_dp_process_group,
                self.nccl_start_alignment_factor, self.allgather_bucket_size,
            )  # fmt: skip
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            self._global_grad_norm = math.inf
            self.clear_lp_grads(set_to_none=True)
        else:
            for group in groups:
                group["step"] = steps
            self._lazy_init_hp_params_optimizer_state()
        self.clear_hp_grads()

    def _gradients(self, group: int) -> list[Tensor]:
        if self.direct:
            return [p.grad.contiguous() for p in self.bf16_groups[group]]
        return [self.fp32_groups_gradient_flat_partition[group]]

    def _norm(self) -> Tensor:
        """Over the whole model, () float32 on the device."""
        if self.direct:
            first = bwc_tensor_model_parallel_rank(mpu=self.mpu) == 0  # replicas count once
            counted = [p for group in self.bf16_groups for p in group if first or is_model_parallel_parameter(p)]
            mine = [p.grad for p in counted]
        else:
            mine, _ = self.get_grads_for_norm()
        device = self.fp32_groups_flat_partition[0].device
        norm = total_norm(mine) if mine else torch.zeros((), device=device)
        if self.mpu is not None and self.mpu.get_model_parallel_world_size() > 1:
            square = norm.square()
            dist.all_reduce(square, group=self.mpu.get_model_parallel_group())
            norm = square.sqrt()
        return norm

    def _fill_missing(self) -> None:
        """Zero gradients of parameters that had none in this step."""
        for i, seen in enumerate(self.fp32_groups_has_gradients):
            for j, there in enumerate(seen):
                if there:
                    continue
                if self.direct:
                    self.bf16_groups[i][j].grad = torch.zeros_like(self.bf16_groups[i][j])
                else:
                    self.fp32_groups_gradients[i][j].zero_()
                seen[j] = True


def single_pass(zero: Any, direct: bool) -> None:
    """Let a BF16_Optimizer of DeepSpeed, fresh from `deepspeed.initialize`, run as `SinglePassBF16Optimizer`.

    Args:
        direct: every step has one micro-batch, and there is one data-parallel process.

    Raises:
        TypeError: for another optimizer.
    """
    if type(zero) is not BF16_Optimizer:
        raise TypeError(f"{type(zero).__name__} is not DeepSpeed's bf16 optimizer")
    zero.__class__ = SinglePassBF16Optimizer
    zero.prepare(direct)
    how = "from bf16 gradients, which no float32 sums repeat" if direct else "from float32 sums of gradients"
    log.info("optimizer: own AdamW in one pass %s", how)
