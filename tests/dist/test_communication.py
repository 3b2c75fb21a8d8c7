"""What ranks send in a step, counted at torch's door to its backends, is what the planner's formulas say."""

from __future__ import annotations

from pathlib import Path

import pytest
from communication import SentBytes
from harness import run_ranks
from plan_memory import batches
from runs import LAYOUTS, Inputs, tiny_config
from tables import record

from hmar_mega.config import Config
from hmar_mega.planning.cluster import load_cluster
from hmar_mega.planning.cost import Cost, cost_of
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.workload import Workload, with_tokenizer

pytestmark = pytest.mark.dist

#: Enough tokens that activations outweigh conditions and table rows, which the formulas leave out.
LONG = ("model.depth=4", "schedule.resolution=64", "schedule.patch_nums=[1,2,4,8,16]")

#: Wide enough that the weights of linears are no small tensors to ZeRO 3.
WIDE = ("model.width=512", "model.heads=8")

#: Settings, the part of the plan, and by how much of it more may be sent. Adaptive norms and tables add to the
#: activations of tensor parallelism, and sequence parallelism pads 341 tokens to 342.
CASES: dict[str, tuple[tuple[str, ...], str, float]] = {
    "tensor2": (LONG, "tensor_bytes", 0.02),
    "sequence2": (LONG, "tensor_bytes", 0.07),
    "data2": (WIDE, "data_bytes", 1e-3),
    "data2_zero2": ((*WIDE, "data.micro_batch_size=2"), "data_bytes", 1e-3),
    "data2_zero3": ((*WIDE, "data.micro_batch_size=2"), "data_bytes", 1e-3),
    "pipeline4": (LONG, "pipeline_bytes", 1e-3),
    "pipeline2_virtual2": (LONG, "pipeline_bytes", 1e-3),
}


@pytest.mark.parametrize("layout", CASES)
def test_planned_traffic_of_a_step_is_what_the_busiest_rank_sends(tmp_path: Path, inputs: Inputs, layout: str) -> None:
    world, settings = LAYOUTS[layout]
    more, part, margin = CASES[layout]
    config = with_tokenizer(tiny_config(inputs, tmp_path, *settings, *more, "optim.impl=torch"))
    planned = getattr(plan(config, world), part)
    sent = max(run_ranks(world, sent_in_a_step, config))
    record("communication", layout=layout, part=part, sent=sent, planned=planned)
    assert planned <= sent * (1 + 1e-6)
    assert sent <= planned * (1 + margin)


def plan(config: Config, world: int) -> Cost:
    return cost_of(Workload.of(config, "cpu"), Layout.of(config, world), load_cluster("local-cpu").resized(world))


def sent_in_a_step(config: Config) -> int:
    """Bytes this rank sends to others in its second step; the first one sets things up."""
    from hmar_mega.engine import Engine
    from hmar_mega.objective import Objective
    from hmar_mega.parallel.dims import parallel_world
    from hmar_mega.schedules import Schedule
    from hmar_mega.tokenizer.model import MultiScaleVQVAE
    from hmar_mega.train import build_parallel_model

    with parallel_world(config) as dims:
        tokenizer = MultiScaleVQVAE(config.tokenizer, config.schedule.scales).eval()
        objective = Objective(config, tokenizer.quantizer, dims.device)
        engine = Engine(build_parallel_model(config, dims), config, dims, Schedule.of(config, 1000))
        layout = Layout.of(config, dims.world_size)
        engine.train_step(batches(config, layout, 0), objective)
        with SentBytes() as sent:
            engine.train_step(batches(config, layout, 1), objective)
        return sum(sent.by_group.values())
