"""Pipeline parallelism: the stages of one process, Megatron-core's schedules over them, and plain forwards.

Training drives the stages through mcore's 1F1B or interleaved schedule. Evaluation and sampling, which need no
backward, go through the stages one after the other. Between stages travels one tensor (extra_rows + n, B, C), the
condition in front of the activations (see `HMAR.pack`), so that only the first stage has a class embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from hmar_mega.config import Config
from hmar_mega.model.attention import Attend
from hmar_mega.model.hmar import HMAR, Branch, Hidden, decays
from hmar_mega.model.stage import BALLAST
from hmar_mega.objective import Objective, Scores, TokenBatch
from hmar_mega.parallel.cpu import cpu_tensors


class _Weigh(torch.autograd.Function):
    """x, in whose graph the ballast is too, with a gradient of 0 whatever the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ballast: Tensor) -> Tensor:
        ctx.save_for_backward(ballast)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(ctx.saved_tensors[0])


class PipelineModel(nn.Module):
    """The runs of layers that this process holds, as one model.

    Parameters go by their global names, whichever run they belong to. For sampling it answers the calls of HMAR
    (`condition`, `embed`, `run`), in which all ranks of the pipeline take part.

    Args:
        chunks: the runs, `virtual_pipeline_parallel` of them, in order.
    """

    def __init__(self, chunks: Sequence[HMAR]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        model = chunks[0]
        self.config, self.schedule, self.codebook_size = model.config, model.schedule, model.codebook_size
        self.layers, self.has_mask_branch = model.layers, model.has_mask_branch
        self.group = parallel_state.get_pipeline_model_parallel_group()
        self.pp_rank, self.pp_size = self.group.rank(), self.group.size()

    def add_ballast(self) -> None:
        """Have something to train in each of the optimizer's groups, if need be numbers that are and stay 0.

        DeepSpeed sums the gradient norm over the stages group by group, so every stage must have the same groups; in
        training stage 2 some stages hold frozen layers alone.
        """
        trained = {decays(name, p) for name, p in self.named_parameters() if p.requires_grad}
        for name, shape in BALLAST.items():
            number = nn.Parameter(torch.zeros(shape))
            if decays(name, number) not in trained:
                self.register_parameter(name, number)

    def weigh(self, x: Tensor) -> Tensor:
        """x, with the ballast, if there is any, in its graph."""
        for ballast in self._parameters.values():
            if ballast is not None:
                x = _Weigh.apply(x, ballast)
        return x

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by global name, the ballast last."""
        dot = f"{prefix}." if prefix else ""
        for chunk in self.chunks if recurse else ():
            for name, parameter in chunk.named_parameters(remove_duplicate=remove_duplicate):
                yield dot + name, parameter
        for name, parameter in self._parameters.items():
            if parameter is not None:
                yield dot + name, parameter

    @property
    def num_runs(self) -> int:
        """Runs of layers in the whole model."""
        return self.pp_size * len(self.chunks)

    def forward(self, inputs_of: Callable[[HMAR], dict[str, Any]], batch_size: int) -> Tensor | None:
        """Cross-entropy (B, N), or with errors (2, B, N), of a batch on the last stage, None elsewhere; no gradients.

        Args:
            inputs_of: keyword arguments of `HMAR.forward` for a run of layers.
            batch_size: B.
        """
        rows = self.schedule.num_tokens

        def forward(chunk: HMAR, packed: Tensor | None) -> Tensor:
            chunk.input_tensor = packed
            return chunk(**inputs_of(chunk))

        return self._through(forward, rows, batch_size)

    def condition(self, labels_B: Tensor) -> Tensor:
        """Class embedding (B, C) on the first stage; a placeholder elsewhere."""
        first = self.chunks[0]
        if first.stage.first:
            return first.condition(labels_B)
        return torch.zeros(labels_B.shape[0], self.config.resolved_width, device=labels_B.device, dtype=self.dtype)

    def embed(self, positions: slice, cond_BC: Tensor, *given: Any) -> Tensor:
        """Input activations (n, B, C) on the first stage; a placeholder elsewhere."""
        first = self.chunks[0]
        if first.stage.first:
            return first.embed(positions, cond_BC, *given)
        return cond_BC.new_zeros(1).expand(positions.stop - positions.start, *cond_BC.shape)

    def run(self, x_NBC: Tensor, cond_BC: Tensor, branch: Branch, attend: Attend) -> Tensor:
        """Blocks and head of `branch` over the pipeline: (n, B, V/tp) float32 logits on every stage."""
        length, batch = x_NBC.shape[:2]

        def forward(chunk: HMAR, packed: Tensor | None) -> Tensor:
            hidden: Hidden = chunk.enter(x_NBC, cond_BC) if packed is None else chunk.unpack(packed)
            hidden = chunk.run_blocks(hidden, branch, attend, length)
            return chunk.leave(hidden, branch, length) if chunk.stage.last else chunk.pack(hidden)

        logits = self._through(forward, length, batch)
        if logits is None:
            columns = -(-self.codebook_size // self.layers.tensor_parallel)
            logits = torch.empty(length, batch, columns, device=x_NBC.device)
        logits = logits.contiguous()
        dist.broadcast(logits, dist.get_global_rank(self.group, self.pp_size - 1), group=self.group)
        return logits

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def _through(self, forward: Callable[[HMAR, Tensor | None], Tensor], length: int, batch: int) -> Tensor | None:
        """Run `forward` on every run of layers in order; the last one's result where it lies, None elsewhere."""
        local = self.layers.padded_length(length, batch) // self.layers.sequence_parts
        out = None
        for number in range(self.num_runs):
            if number % self.pp_size != self.pp_rank:
                continue
            chunk = self.chunks[number // self.pp_size]
            assert isinstance(chunk, HMAR)
            packed = None
            if number > 0:
                shape = (chunk.extra_rows + local, batch, self.config.resolved_width)
                packed = torch.empty(shape, device=chunk.level_ids.device, dtype=self.dtype)
                dist.recv(packed, group=self.group, group_src=(number - 1) % self.pp_size)
            out = forward(chunk, packed)
            if number + 1 < self.num_runs:
                dist.send(out.contiguous(), group=self.group, group_dst=(number + 1) % self.pp_size)
        return out if self.pp_rank == self.pp_size - 1 else None


def transformer_config(config: Config, dtype: torch.dtype) -> TransformerConfig:
    """What mcore's schedules ask about the model of `config`.

    Args:
        dtype: of the activations that travel between stages.
    """
    parallel = config.parallel
    virtual = parallel.virtual_pipeline_parallel if parallel.virtual_pipeline_parallel > 1 else None
    return TransformerConfig(
        num_layers=config.model.depth,
        hidden_size=config.model.resolved_width,
        ffn_hidden_size=config.model.ffn_width,
        num_attention_heads=config.model.resolved_heads,
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        batch_p2p_comm=False,
        # on gloo, overlapping gives wrong losses now and then
        overlap_p2p_comm=virtual is not None and dist.get_backend() != "gloo",
        gradient_accumulation_fusion=False,
    )


def packed_length(model: HMAR, batch: int) -> int:
    """Rows of what travels between stages, as mcore counts them: it divides by the sequence parts itself."""
    parts = model.layers.sequence_parts
    return model.layers.padded_length(model.schedule.num_tokens, batch) + model.extra_rows * parts


class _ScheduledChunk(nn.Module):
    """A run of layers as mcore's schedules want it: with their configuration and a place for the stage's input."""

    def __init__(self, chunk: HMAR, config: TransformerConfig) -> None:
        super().__init__()
        self.chunk, self.config, self.model_type = chunk, config, ModelType.encoder_or_decoder

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Take what the stage before sent."""
        self.chunk.input_tensor = tensors[0]


class PipelineSchedule:
    """Forward and backward of all micro-batches of a step through mcore's schedule.

    Args:
        loss_scale: by which float16 training multiplies the loss; asked for at every step.
    """

    def __init__(
        self, model: PipelineModel, config: Config, dtype: torch.dtype, loss_scale: Callable[[], float]
    ) -> None:
        settings = transformer_config(config, dtype)
        settings.grad_scale_func = lambda loss: loss * loss_scale()
        self._model = model
        self._chunks = [_ScheduledChunk(chunk, settings) for chunk in model.chunks]  # type: ignore[arg-type]

    def forward_backward(self, batches: Sequence[TokenBatch], objective: Objective) -> list[Scores]:
        """Accumulate the gradients of a step's micro-batches.

        Returns:
            The scores of every micro-batch on the last stage; nothing on the others.
        """
        scored: list[Scores] = []

        def forward_step(data: Iterator[TokenBatch], scheduled: _ScheduledChunk) -> tuple[Tensor, Any]:
            batch, chunk = next(data), scheduled.chunk
            out = self._model.weigh(chunk(**objective.inputs(batch, training=True, stage=chunk.stage)))

            def loss_of(cross_entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                scores = objective.scores(cross_entropy, batch)
                scored.append(scores)
                return scores.guarded_mean(), {}

            return out, loss_of

        micro_batch = len(batches[0].labels)
        with cpu_tensors():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(batches) for _ in self._chunks],
                model=list(self._chunks),
                num_microbatches=len(batches),
                seq_length=packed_length(self._model.chunks[0], micro_batch),  # type: ignore[arg-type]
                micro_batch_size=micro_batch,
            )
        return scored
