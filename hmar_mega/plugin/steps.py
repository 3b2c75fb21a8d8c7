"""The forward step of a micro-batch in the form of mcore's schedules and Megatron-style loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from hmar_mega.config import Config
from hmar_mega.objective import Objective, TokenBatch
from hmar_mega.plugin.model import run_config, stage_model
from hmar_mega.tokenizer.model import MultiScaleVQVAE

#: Last stage: the model's output → (loss to go back from, figures to log, means over data-parallel ranks).
LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]

#: (data iterator, model) → (output, loss function).
ForwardStep = Callable[[Iterator[TokenBatch], nn.Module], tuple[Tensor, LossFunction]]


def forward_step(data_iterator: Iterator[TokenBatch], model: nn.Module) -> tuple[Tensor, LossFunction]:
    """Run a micro-batch through the model, or through this rank's stage of it.

    In training mode labels, masks and dropped paths are drawn from (seed, stream position); in evaluation mode no label
    and no path is dropped. On a pipeline every stage takes its micro-batches from the iterator: what is drawn for the
    middle ones depends on them too.

    Args:
        model: of `model_provider`, also inside mcore's `Float16Module` and `DistributedDataParallel`, torch's
            `DistributedDataParallel` or DeepSpeed's engine.

    Returns:
        Cross-entropy (b, N) float32, or packed activations where this is not the last stage; and the loss function,
        whose figures are {"lm loss": ()}.
    """
    return _step(data_iterator, model, stage_model(model).objective)


def make_forward_step(config: Config | str | Path, tokenizer: MultiScaleVQVAE) -> ForwardStep:
    """`forward_step` with a tokenizer of one's own in place of the one that the configuration names.

    Args:
        tokenizer: on any device; its quantizer is moved to where the model is.
    """
    config = run_config(config)
    objectives: dict[torch.device, Objective] = {}

    def step(data_iterator: Iterator[TokenBatch], model: nn.Module) -> tuple[Tensor, LossFunction]:
        device = next(stage_model(model).parameters()).device
        if device not in objectives:
            objectives[device] = Objective(config, tokenizer.quantizer.to(device), device)
        return _step(data_iterator, model, objectives[device])

    return step


def _step(data_iterator: Iterator[TokenBatch], model: nn.Module, objective: Objective) -> tuple[Tensor, LossFunction]:
    batch, stage = next(data_iterator), stage_model(model).stage
    inputs: dict[str, Any] = objective.inputs(batch, training=model.training, stage=stage)
    output: Tensor = model(**inputs)

    def loss_function(cross_entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = objective.scores(cross_entropy, batch).guarded_mean()
        return loss, {"lm loss": _data_parallel_mean(loss)}

    return output, loss_function


@torch.no_grad()
def _data_parallel_mean(value: Tensor) -> Tensor:
    """Mean over data-parallel ranks, float64: what is logged."""
    total = value.detach().double()
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(total, group=group)
    return total / group.size()
