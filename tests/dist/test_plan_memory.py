"""What the planner counts is what the engine holds after a step: weights, gradients, masters and moments, byte for
byte, on every rank of each layout and in each number format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import run_ranks
from runs import Inputs, tiny_config
from torch import Tensor

from hmar_mega.config import Config
from hmar_mega.planning.activations import LOGITS_COPIES, block_bytes, head_bytes
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.memory import memory_of
from hmar_mega.planning.workload import Workload, with_tokenizer

pytestmark = pytest.mark.dist

TENSOR = "parallel.tensor_parallel=2"
PIPELINE = ("parallel.pipeline_parallel=2", "model.depth=4", "data.micro_batch_size=2")

#: Processes and settings.
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "tensor": (2, (TENSOR,)),
    "sequence": (2, (TENSOR, "parallel.sequence_parallel=true", "precision.compute=bf16")),
    "zero1": (2, ()),
    "zero1_bf16": (2, ("precision.compute=bf16", "model.shared_aln=true")),
    "zero2": (2, ("parallel.zero_stage=2",)),
    "zero2_bf16": (2, ("parallel.zero_stage=2", "precision.compute=bf16")),
    "zero3": (2, ("parallel.zero_stage=3",)),
    "zero3_bf16": (2, ("parallel.zero_stage=3", "precision.compute=bf16")),
    "tensor_zero2_bf16": (4, (TENSOR, "parallel.zero_stage=2", "precision.compute=bf16", "data.micro_batch_size=2")),
    "masked_zero1_bf16": (2, ("stage.name=masked", "precision.compute=bf16")),
    "masked_zero3": (2, ("stage.name=masked", "parallel.zero_stage=3")),
    "average": (2, ("optim.ema_decay=0.9", "precision.compute=bf16")),
    "pipeline": (4, (*PIPELINE, "precision.compute=bf16")),
    "virtual": (2, (*PIPELINE, "parallel.virtual_pipeline_parallel=2", "model.shared_aln=true")),
    "masked_pipeline": (2, (*PIPELINE, "stage.name=masked", "model.mask_layers=2")),
}


@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_those_of_the_engine_after_a_step(tmp_path: Path, uneven_inputs: Inputs, case: str) -> None:
    world, settings = CASES[case]
    config = with_tokenizer(tiny_config(uneven_inputs, tmp_path, *settings, "optim.impl=torch"))
    work, layout = Workload.of(config), Layout.of(config, world)
    for measured in run_ranks(world, held_after_a_step, config):
        planned = memory_of(work, layout, measured["pp_rank"])
        assert measured["ema"] == planned.ema
        assert measured["weights"] == planned.weights
        assert measured["optimizer"] == planned.optimizer
        if measured["gradients"]:  # other optimizers hold none between steps
            assert measured["gradients"] == planned.gradients


@pytest.mark.parametrize("settings", [(), ("parallel.sequence_parallel=true",)], ids=["tensor", "sequence"])
def test_planned_activations_are_what_a_tensor_parallel_rank_saves(
    tmp_path: Path, inputs: Inputs, settings: tuple[str, ...]
) -> None:
    """Within 10 %, with Megatron-core's layers and enough tokens that biases and conditions do not count."""
    sizes = ("schedule.resolution=64", "schedule.patch_nums=[1,2,4,8,16]", "model.width=64", TENSOR)
    config = with_tokenizer(tiny_config(inputs, tmp_path, *sizes, *settings, "precision.compute=bf16"))
    work, layout = Workload.of(config, "cpu"), Layout.of(config, 2)
    head, logits = head_bytes(work, layout, chunk=None)
    planned = work.depth * block_bytes(work, layout).kept("none") + head + logits / LOGITS_COPIES
    for measured in run_ranks(2, saved_in_a_forward, config, layout.micro_batch):
        assert measured == pytest.approx(planned, rel=0.1)


def saved_in_a_forward(config: Config, batch: int) -> int:
    """Bytes that autograd saves on this rank in a forward pass, parameters apart."""
    from hmar_mega.model.layers_mcore import McoreLayers
    from hmar_mega.parallel.dims import parallel_world
    from hmar_mega.train import build_model

    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with parallel_world(config):
        model = build_model(config, McoreLayers(config.parallel.sequence_parallel)).bfloat16()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        tokens = config.schedule.scales.num_tokens
        labels, given = torch.zeros(batch, dtype=torch.long), torch.randn(batch, tokens - 1, 8)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(labels, given, drop_path=torch.ones(config.model.depth, 2, batch))
            model.layers.cross_entropy(logits, torch.zeros(tokens, batch, dtype=torch.long))
        return storage_bytes([t for t in saved if t.untyped_storage().data_ptr() not in own])


def held_after_a_step(config: Config) -> dict[str, int]:
    """Bytes that this rank's engine holds, from the storages of its tensors."""
    from hmar_mega.data.order import SampleOrder
    from hmar_mega.data.reader import ShardReader
    from hmar_mega.data.stream import StreamLoader
    from hmar_mega.engine import micro_batch_size
    from hmar_mega.objective import Objective
    from hmar_mega.parallel.dims import parallel_world
    from hmar_mega.parallel.zero import MOMENTS, flat_masters
    from hmar_mega.schedules import Schedule
    from hmar_mega.tokenizer.model import MultiScaleVQVAE
    from hmar_mega.train import _build_engine

    tokenizer = MultiScaleVQVAE.load(Path(str(config.tokenizer.path)))
    data = ShardReader(Path(str(config.data.train)), "tokens")
    with parallel_world(config) as dims:
        engine, _, _ = _build_engine(config, Path("unused"), dims, Schedule.of(config, len(data)), None)
        objective = Objective(config, tokenizer.quantizer, dims.device)
        micro = micro_batch_size(config, dims.data_parallel)
        loader = StreamLoader(
            data, SampleOrder(len(data), 0), config.data.global_batch_size, micro, dims.dp_rank, dims.data_parallel,
            workers=0,
        )  # fmt: skip
        engine.train_step(next(loader), objective)
        loader.close()
        zero = engine.zero
        masters = flat_masters(zero)
        moments = [zero.optimizer.state[flat][key] for flat in masters for key in MOMENTS]
        gradients = getattr(zero, "fp32_groups_gradients_flat", None)
        if gradients is None:
            flat = getattr(zero, "grad_partitions_flat_buffer", None)
            gradients = [] if flat is None else [flat]
        return {
            "weights": storage_bytes(weights_of(engine.model)),
            "optimizer": storage_bytes([*masters, *moments]),
            "gradients": storage_bytes(gradients),
            "ema": storage_bytes(engine._ema),
            "pp_rank": dims.pp_rank,
        }


def weights_of(model: torch.nn.Module) -> list[Tensor]:
    """Parameters; under ZeRO 3 this rank's parts, and those that stay whole besides."""
    found = []
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):
            found.append(parameter.ds_tensor)
            if not parameter.ds_persist:
                continue
        found.append(parameter.data)
    return found


def storage_bytes(tensors: list[Tensor]) -> int:
    """Of the storages behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
