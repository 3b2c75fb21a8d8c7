"""CUDA graphs of the blocks in training: a step launches a few graphs where it launched thousands of kernels.

The embeddings and the head stay outside. A graph covers a run of blocks, forward and backward; it is captured at the
first micro-batch of its shape and replayed for all others. The gradients it returns pass through autograd as any
others, so ZeRO's hooks see them, a run of blocks at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hmar_mega.config import Config
from hmar_mega.model.attention import Attend

log = logging.getLogger(__name__)

#: Blocks of one graph where several data-parallel ranks share the gradients: the reduction of one run's overlaps the
#: backward pass of the runs before it.
BLOCKS_PER_GRAPH = 4

HELD_GRADIENTS = "with {} gradients may stay where the next replay writes; bf16 with ZeRO 1 takes them away before"


def attach_graphs(model: Any, config: Config, device: str, data_parallel: int) -> None:
    """Let `model` replay its blocks where that is possible; says once what was chosen and why."""
    reason = why_not(config, device)
    if reason is None:
        model.graphs = BlockGraphs(BLOCKS_PER_GRAPH if data_parallel > 1 else None, model.layers.fp8)
        reason = f"blocks run as CUDA graphs, {'all in one' if data_parallel == 1 else f'{BLOCKS_PER_GRAPH} in each'}"
    else:
        reason = f"blocks run kernel by kernel, not as CUDA graphs: {reason}"
    log.info("%s", reason)


def why_not(config: Config, device: str) -> str | None:
    """Why the blocks cannot be captured; None when they can."""
    parallel = config.parallel
    return why_not_model(config, device) or why_not_layout(
        parallel.pipeline_parallel, parallel.tensor_parallel, parallel.zero_stage, parallel.recompute,
        config.precision.fp8 != "none",
    )  # fmt: skip


def why_not_layout(
    pipeline_parallel: int, tensor_parallel: int, zero_stage: int, recompute: str, fp8: bool
) -> str | None:
    """Why blocks laid out and recomputed so cannot be captured; None when they can."""
    if pipeline_parallel > 1:
        return "several micro-batches of a pipeline are under way at once, a graph holds one"
    if tensor_parallel > 1:
        return "with tensor_parallel > 1 blocks communicate"
    if zero_stage == 3:
        return "ZeRO-3 gathers weights between the blocks"
    if fp8 and recompute == "full":
        return "Transformer Engine's recomputation in FP8 is not captured"
    return HELD_GRADIENTS.format("parallel.zero_stage=2") if zero_stage == 2 else None


def why_not_model(config: Config, device: str) -> str | None:
    """Why the blocks cannot be captured in any layout; None when they can in some."""
    if device != "cuda":
        return f"they need a CUDA GPU, not {device}"
    if not config.parallel.cuda_graphs:
        return "parallel.cuda_graphs=false"
    if config.precision.compute != "bf16":
        return HELD_GRADIENTS.format(f"precision.compute={config.precision.compute}")
    if config.precision.fp8 == "linears_and_attention":
        return "which heads attend in FP8 changes while training"
    if config.model.attention.backend not in ("auto", "triton", "sdpa"):
        return f"attention.backend={config.model.attention.backend} is not captured"
    return None


class Fp8State(Protocol):
    """What graphs need of `fp8_scaling.Fp8Scaling`."""

    @property
    def measuring(self) -> bool:
        """Whether FP8 linears still run in bf16."""

    def capturing(self) -> AbstractContextManager[None]:
        """Around captures."""

    def before_replay(self, run: str) -> None:
        """Before the replays of a micro-batch."""


class _Blocks(nn.Module):
    """A run of blocks as a function of tensors alone. Not registered in the model."""

    def __init__(self, blocks: Sequence[tuple[int, nn.Module]], recompute: bool, attend: Attend, length: int) -> None:
        super().__init__()
        self.numbers = [number for number, _ in blocks]
        self.blocks = nn.ModuleList(block for _, block in blocks)
        self.recompute, self.attend, self.length = recompute, attend, length

    def forward(self, x: Tensor, cond: Tensor, drop_path: Tensor | None, shared: Tensor | None) -> Tensor:
        """x (N, B, C), cond (B, C), drop-path factors (depth, 2, B), shared modulation (B, 6, C) → (N, B, C)."""
        for number, block in zip(self.numbers, self.blocks, strict=True):
            factors = None if drop_path is None else drop_path[number]
            given = (x, cond, shared, self.attend, self.length, factors)
            if self.recompute:
                x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*given)
        return x


class _Captured:
    """A captured run of blocks.

    Parameters are inputs of the graph under other names for the same memory: ZeRO's hooks keep the parameters' own
    gradient nodes on the stream where they were registered, which a capture must not wait for.
    """

    def __init__(self, run: _Blocks, x: Tensor, cond: Tensor, drop_path: Tensor | None, shared: Tensor | None) -> None:
        names, self.parameters = zip(*run.named_parameters(), strict=True)
        optional = [t is not None for t in (drop_path, shared)]

        def function(x: Tensor, cond: Tensor, *rest: Tensor) -> Tensor:
            waiting = list(rest)
            given = [waiting.pop(0) if there else None for there in optional]
            return functional_call(run, dict(zip(names, waiting, strict=True)), (x, cond, *given))

        inputs = [x, cond, *(t for t in (drop_path, shared) if t is not None)]
        samples = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        aliases = [p.detach().requires_grad_(p.requires_grad) for p in self.parameters]
        self.function = function
        self.samples = (*samples, *aliases)
        self.replay: Callable[..., Tensor] = function

    def __call__(self, x: Tensor, cond: Tensor, drop_path: Tensor | None, shared: Tensor | None) -> Tensor:
        given = [t for t in (drop_path, shared) if t is not None]
        return self.replay(x, cond, *given, *self.parameters)


class BlockGraphs:
    """Replays the blocks of a model; see the file.

    Args:
        blocks_per_graph: None for one graph of all.
        fp8: scales of FP8 linears, whose first step is measured and not replayed.
    """

    def __init__(self, blocks_per_graph: int | None, fp8: Fp8State | None = None) -> None:
        self.blocks_per_graph, self.fp8 = blocks_per_graph, fp8
        self._captured: dict[tuple[object, ...], list[_Captured]] = {}
        self._eager: set[tuple[object, ...]] = set()

    def run(
        self,
        branch: str,
        blocks: Sequence[tuple[int, nn.Module]],
        recompute: bool,
        attend: Attend,
        length: int,
        x: Tensor,
        cond: Tensor,
        shared: Tensor | None,
        drop_path: Tensor | None,
    ) -> Tensor:
        """The blocks' output. The first shape of a branch is captured; others run eagerly.

        Args:
            recompute: whole blocks in the backward pass.
        """
        if self.fp8 is not None and self.fp8.measuring:
            return _Blocks(blocks, recompute, attend, length)(x, cond, drop_path, shared)
        key = (branch, x.shape, x.dtype, drop_path is None, x.requires_grad, cond.requires_grad)
        if key not in self._captured:
            if any(known[0] == branch for known in self._captured):
                if key not in self._eager:
                    self._eager.add(key)
                    log.info("blocks run kernel by kernel for activations %s: the graphs are of another shape", x.shape)
                return _Blocks(blocks, recompute, attend, length)(x, cond, drop_path, shared)
            size = self.blocks_per_graph or len(blocks)
            parts = [_Blocks(blocks[i : i + size], recompute, attend, length) for i in range(0, len(blocks), size)]
            with nullcontext() if self.fp8 is None else self.fp8.capturing():
                self._captured[key] = capture(parts, x, cond, drop_path, shared)
        if self.fp8 is not None:
            self.fp8.before_replay(branch)
        for part in self._captured[key]:
            x = part(x, cond, drop_path, shared)
        return x


def capture(
    parts: Sequence[_Blocks], x: Tensor, cond: Tensor, drop_path: Tensor | None, shared: Tensor | None
) -> list[_Captured]:
    """Graphs of consecutive runs of blocks, forward and backward, over one memory pool."""
    captured = []
    for part in parts:
        captured.append(_Captured(part, x, cond, drop_path, shared))
        x = x.detach().requires_grad_(x.requires_grad or any(p.requires_grad for p in part.parameters()))
    graphs = torch.cuda.make_graphed_callables(
        tuple(c.function for c in captured), tuple(c.samples for c in captured), allow_unused_input=True
    )
    for one, replay in zip(captured, graphs, strict=True):
        one.replay = replay
    log.info("captured %d runs of blocks", len(captured))
    return captured
