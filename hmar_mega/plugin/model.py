"""The model of a pipeline stage as Megatron-style loops want it: `model_provider`."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.errors import UserError
from hmar_mega.model.hmar import HMAR
from hmar_mega.model.layers_mcore import McoreLayers
from hmar_mega.model.stage import Stage, split_layers
from hmar_mega.objective import Objective
from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.parallel.pipeline import packed_length, transformer_config
from hmar_mega.plugin.sharding import Offsets, sharded_parameters
from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.train import build_model, check_resolution, initialise, with_resolved


class StageModel(MegatronModule):
    """HMAR, or this rank's run of its layers, as mcore's schedules, optimizers and checkpoints take a model.

    Called with the arguments of `HMAR.forward`, which `forward_step` makes from a micro-batch.

    Attributes:
        model: the HMAR inside.
        run_config: our whole configuration; `config` is mcore's `TransformerConfig`.
        sequence_length: the `seq_length` to give mcore's schedules, the rows that travel between stages.
    """

    def __init__(self, model: HMAR, run_config: Config, vp_stage: int | None = None) -> None:
        # the number format is the loop's own: who converts the weights sets config.pipeline_dtype too
        super().__init__(transformer_config(run_config, next(model.parameters()).dtype))
        self.model, self.run_config, self.vp_stage = model, run_config, vp_stage
        self.pre_process, self.post_process = model.stage.first, model.stage.last
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.sequence_length = packed_length(model, 1)  # mcore's layers pad alike for any batch
        for parameter in self.parameters():
            # what is split by sequence parallelism sums its gradients in autograd; mcore must not do so once more
            parameter.sequence_parallel = False  # type: ignore[attr-defined]

    @property
    def stage(self) -> Stage:
        """The run of layers in it."""
        return self.model.stage

    @functools.cached_property
    def objective(self) -> Objective:
        """What is trained, with the tokenizer that the configuration names."""
        path, device = self.run_config.tokenizer.path, next(self.model.parameters()).device
        if path is None:
            raise UserError(
                "tokenizer.path is not set: give the folder of a trained tokenizer, or a quantizer to make_forward_step"
            )
        return Objective(self.run_config, load_tokenizer(path).to(device).quantizer, device)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take what the stage before sent."""
        self.model.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Cross-entropy (B, N) on the last stage, packed activations on the others; see `HMAR.forward`."""
        return self.model(*args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every parameter as mcore's `ShardedTensor`, keyed by `prefix` and its global name.

        Args:
            sharded_offsets: axes in front of the tensors' own, of a module around this one.
            metadata: taken for mcore's sake; every way of sharding the optimizer's state can build on the result.
        """
        return sharded_parameters(self.model, f"{prefix}model.", sharded_offsets, key_prefix=prefix)


def model_provider(
    config: Config | str | Path, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
) -> StageModel:
    """The model of this rank's pipeline stage, on the CPU, in float32, with its starting weights.

    Weights are those that `hmar-mega train` starts from: of `run.seed`, or of the run in `run.init_from`.

    Args:
        config: ours, or a file or packaged name that `load_config` reads.
        pre_process, post_process: whether the stage has the embeddings and the heads; checked against `parallel_state`.
        vp_stage: number of the chunk of layers under virtual pipeline parallelism.

    Raises:
        UserError: for sizes that are not those of `parallel_state`.
        ValueError: when `pre_process` or `post_process` is not what this rank's stage has.
    """
    config = run_config(config)
    parallel = config.parallel
    rank, size = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    given = (parallel_state.get_tensor_model_parallel_world_size(), size)
    if given != (parallel.tensor_parallel, parallel.pipeline_parallel):
        raise UserError(
            f"parallel_state was set up with tensor- and pipeline-parallel sizes {given}, but the configuration says "
            f"{(parallel.tensor_parallel, parallel.pipeline_parallel)}; give initialize_model_parallel the sizes of "
            "config.parallel"
        )
    if (vp_stage is None) != (parallel.virtual_pipeline_parallel == 1):
        raise UserError(
            f"vp_stage={vp_stage} with virtual_pipeline_parallel={parallel.virtual_pipeline_parallel}; give each chunk "
            "of layers its number from 0, or None where there is one chunk"
        )
    stages = split_layers(config.model.depth, size * parallel.virtual_pipeline_parallel)
    stage = stages[(vp_stage or 0) * size + rank]
    if (pre_process, post_process) != (stage.first, stage.last):
        raise ValueError(
            f"pre_process={pre_process}, post_process={post_process}: the stage of pipeline rank {rank} of {size}"
            f"{'' if vp_stage is None else f', chunk {vp_stage},'} has pre_process={stage.first}, "
            f"post_process={stage.last}; pass what parallel_state.is_pipeline_first_stage and …_last_stage say"
        )
    model = build_model(config, McoreLayers(parallel.sequence_parallel), stage)
    if config.run.init_from is not None:
        initialise(model, config, parallel_dims())
    return StageModel(model, config, vp_stage)


def run_config(config: Config | str | Path) -> Config:
    """The configuration with its tokenizer section as the tokenizer of `tokenizer.path` has it.

    Raises:
        UserError: for settings that only `hmar-mega train` carries out.
    """
    config = config if isinstance(config, Config) else load_config(config)
    if config.data.batch_ramp is not None:
        raise UserError(
            "data.batch_ramp is not for loops of your own, which decide how many micro-batches a step has; leave it out"
        )
    if config.precision.fp8 != "none":
        raise UserError(
            f"precision.fp8={config.precision.fp8} needs to know where a step begins and ends, which loops of your own "
            "decide; use precision.fp8=none, or train with hmar-mega train"
        )
    if config.tokenizer.path is None:
        return config
    tokenizer = load_tokenizer(config.tokenizer.path)
    check_resolution(config, tokenizer)
    return with_resolved(config, tokenizer)


def stage_model(model: nn.Module) -> StageModel:
    """The `StageModel` inside the wrappers of mcore, torch or DeepSpeed."""
    while not isinstance(model, StageModel):
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(f"{type(model).__name__} holds no model of hmar_mega.plugin.model_provider")
        model = inner
    return model


@functools.cache
def load_tokenizer(path: str) -> MultiScaleVQVAE:
    """The tokenizer in a folder, read once."""
    return MultiScaleVQVAE.load(Path(path))


def parallel_dims() -> ParallelDims:
    """This rank's place, as the person's own set-up of `parallel_state` has it."""
    return ParallelDims(
        tensor_parallel=parallel_state.get_tensor_model_parallel_world_size(),
        data_parallel=parallel_state.get_data_parallel_world_size(),
        rank=torch.distributed.get_rank(),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        pipeline_parallel=parallel_state.get_pipeline_model_parallel_world_size(),
    )
