"""CUDA graphs of the blocks in training: a step launches a few graphs where it launched thousands of kernels.

The embeddings and the head stay outside. A graph covers a run of blocks, forward and backward; it is captured at the
first micro-batch of its shape and replayed for all others. The gradients it returns pass through autograd as any
others, so ZeRO's hooks see them, a run of blocks at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmar_mega.config import Config
from hmar_mega.model.attention import Attend

log = logging.getLogger(__name__)

#: Blocks of one graph where several data-parallel ranks share the gradients: the reduction of one run's overlaps the
#: backward pass of the runs before it.
BLOCKS_PER_GRAPH = 4

Run = Callable[..., Tensor]


def attach_graphs(model: Any, config: Config, device: str, data_parallel: int) -> None:
    """Let `model` replay its blocks where that is possible; says once what was chosen and why."""
    reason = why_not(config, device)
    if reason is None:
        model.graphs = BlockGraphs(BLOCKS_PER_GRAPH if data_parallel > 1 else None)
        reason = f"blocks run as CUDA graphs, {'all in one' if data_parallel == 1 else f'{BLOCKS_PER_GRAPH} in each'}"
    else:
        reason = f"blocks run kernel by kernel, not as CUDA graphs: {reason}"
    log.info("%s", reason)


def why_not(config: Config, device: str) -> str | None:
    """Why the blocks cannot be captured; None when they can."""
    parallel = config.parallel
    return why_not_model(config, device) or why_not_layout(
        parallel.pipeline_parallel, parallel.tensor_parallel, parallel.zero_stage
    )


def why_not_layout(pipeline_parallel: int, tensor_parallel: int, zero_stage: int) -> str | None:
    """Why blocks laid out so cannot be captured; None when they can."""
    if pipeline_parallel > 1:
        return "several micro-batches of a pipeline are under way at once, a graph holds one"
    if tensor_parallel > 1:
        return "with tensor_parallel > 1 blocks communicate"
    if zero_stage == 3:
        return "ZeRO-3 gathers weights between the blocks"
    return None


def why_not_model(config: Config, device: str) -> str | None:
    """Why the blocks cannot be captured in any layout; None when they can in some."""
    if device != "cuda":
        return f"they need a CUDA GPU, not {device}"
    if not config.parallel.cuda_graphs:
        return "parallel.cuda_graphs=false"
    if config.precision.fp8 != "none":
        return "Transformer Engine's FP8 scales change between micro-batches"
    if config.model.attention.backend not in ("auto", "triton", "sdpa"):
        return f"attention.backend={config.model.attention.backend} is not captured"
    return None


class _Blocks(nn.Module):
    """A run of blocks as a function of tensors alone: what is captured. Not registered in the model."""

    def __init__(self, blocks: Sequence[tuple[int, nn.Module]], run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.numbers = [number for number, _ in blocks]
        self.blocks = nn.ModuleList(block for _, block in blocks)
        self.run = run

    def forward(self, x: Tensor, cond: Tensor, *rest: Tensor) -> Tensor:
        """x (N, B, C), cond (B, C); then the drop-path factors (depth, 2, B), then the shared modulation (B, 6, C)."""
        return self.run(self.numbers, self.blocks, x, cond, *rest)


class BlockGraphs:
    """Replays the blocks of a model; see the file.

    Args:
        blocks_per_graph: None for one graph of all.
    """

    def __init__(self, blocks_per_graph: int | None) -> None:
        self.blocks_per_graph = blocks_per_graph
        self._captured: dict[tuple[object, ...], list[Run]] = {}

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
        given = [t for t in (drop_path, shared) if t is not None]
        key = (branch, x.shape, x.dtype, drop_path is None, x.requires_grad, cond.requires_grad)

        def eager(numbers: list[int], modules: Sequence[nn.Module], x: Tensor, cond: Tensor, *rest: Tensor) -> Tensor:
            factors = rest[0] if drop_path is not None else None
            modulation = rest[-1] if shared is not None else None
            for number, block in zip(numbers, modules, strict=True):
                inputs = (x, cond, modulation, attend, length, None if factors is None else factors[number])
                if recompute:
                    x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(*inputs)
            return x

        if key not in self._captured:
            if any(k[0] == branch for k in self._captured):
                return eager([n for n, _ in blocks], [b for _, b in blocks], x, cond, *given)
            self._captured[key] = self._capture(blocks, eager, x, cond, given)
        for replay in self._captured[key]:
            x = replay(x, cond, *given)
        return x

    def _capture(
        self,
        blocks: Sequence[tuple[int, nn.Module]],
        eager: Callable[..., Tensor],
        x: Tensor,
        cond: Tensor,
        given: list[Tensor],
    ) -> list[Run]:
        size = self.blocks_per_graph or len(blocks)
        runs = [_Blocks(blocks[i : i + size], eager) for i in range(0, len(blocks), size)]
        samples = []
        for number, _ in enumerate(runs):
            before = [p for earlier in runs[:number] for p in earlier.parameters()]
            trained = x.requires_grad or any(p.requires_grad for p in before)
            like = [t.detach().clone().requires_grad_(t.requires_grad) for t in (cond, *given)]
            samples.append((x.detach().clone().requires_grad_(trained), *like))
        log.info("CUDA graphs: %d blocks in runs of up to %d", len(blocks), size)
        captured = torch.cuda.make_graphed_callables(tuple(runs), tuple(samples), allow_unused_input=True)
        return list(captured)
