"""Several GPUs of one host: every layout gives over NCCL the run of one GPU, and a killed rank is survived.

A parity run takes about 15 s, most of it imports. Layouts that need more GPUs than there are are skipped. With
HMAR_TABLES=FOLDER the differences are written there as parity_nccl.jsonl.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import free_port
from runs import LAYOUTS, Inputs, Outcome, config_file, largest_difference, make_inputs, tiny_config
from tables import record

from hmar_mega.config import Config

pytestmark = pytest.mark.gpu

GPUS = torch.cuda.device_count()

#: Absolute, of weights of order 1 after 3 large steps; and relative, of bf16 losses.
FLOAT32, BF16 = 2e-5, 5e-3

DEEP = ("model.depth=4", "model.mask_layers=2", "model.drop_path_rate=0.4", "stage.label_drop=0.5")

CHOSEN = [
    "tensor2", "sequence2", "sequence2_selective", "data2", "data2_zero2", "data2_zero3", "pipeline2",
    "pipeline2_virtual2", "tensor2_data2", "sequence2_data2_zero3", "pipeline2_tensor2",
    "pipeline2_sequence2_recompute", "pipeline2_data2", "pipeline4", "pipeline2_virtual2_sequence2_data2",
]  # fmt: skip


class Ranks:
    """Processes of one run, a GPU each, started without an agent as `srun` starts them."""

    def __init__(self, world: int, config: Config) -> None:
        port, file = free_port(), config_file(config)
        self.processes = []
        for rank in range(world):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "hmar_mega", "train", file], env=environment, text=True,
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                )
            )  # fmt: skip

    def end(self, within: float) -> tuple[list[int], list[str]]:
        """Exit statuses and what was printed; everything still running after so many seconds is killed."""
        deadline, errors = time.monotonic() + within, []
        try:
            for process in self.processes:
                errors.append(process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1])
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], errors


def run(world: int, config: Config) -> Outcome:
    statuses, errors = Ranks(world, config).end(within=120)
    assert statuses == [0] * world, "\n".join(errors)
    return Outcome.of(Path(str(config.run.dir)))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), codebook=61, classes=4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> dict[str, Outcome]:
    """The run of one GPU in each format."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        compute: run(1, tiny_config(inputs, folder / compute, *DEEP, f"precision.compute={compute}"))
        for compute in ("fp32", "bf16")
    }


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", CHOSEN)
def test_a_layout_gives_over_nccl_the_run_of_one_gpu(inputs, alone, tmp_path, layout, compute):
    world, settings = LAYOUTS[layout]
    if world > GPUS:
        pytest.skip(f"{layout} needs {world} GPUs, here are {GPUS}")
    ours = run(world, tiny_config(inputs, tmp_path / "run", *settings, *DEEP, f"precision.compute={compute}"))
    theirs = alone[compute]
    weights = largest_difference(ours.weights, theirs.weights)
    losses = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    norms = max(abs(a - b) for a, b in zip(ours.norms, theirs.norms, strict=True))
    record("parity_nccl", layout=layout, compute=compute, loss=losses, norm=norms, weights=weights)
    if compute == "fp32":
        assert max(weights, losses, norms) <= FLOAT32
    else:
        assert ours.losses == pytest.approx(theirs.losses, rel=BF16)
        assert ours.norms == pytest.approx(theirs.norms, rel=4 * BF16)


@pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")
def test_a_killed_rank_is_named_and_the_run_goes_on_with_one_gpu_less(inputs, tmp_path):
    settings = ("optim.max_steps=400", "optim.epochs=100", "checkpoint.interval=20", "optim.base_lr=1e-3")
    whole = run(1, tiny_config(inputs, tmp_path / "whole", *settings))
    config = tiny_config(inputs, tmp_path / "run", *settings, "run.peer_timeout=5")
    ranks, checkpoint = Ranks(2, config), tmp_path / "run" / "checkpoints" / "latest"
    deadline = time.monotonic() + 90
    while not checkpoint.exists():
        assert time.monotonic() < deadline, "no checkpoint in 90 s"
        time.sleep(0.05)
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    began = time.monotonic()
    (survivor, killed), (printed, _) = ranks.end(within=60)
    seconds = time.monotonic() - began
    assert (survivor, killed) == (76, -signal.SIGKILL), printed
    assert "lost rank 1" in printed
    record("nccl_lost_rank", seconds_until_the_survivor_left=seconds)
    outcome = run(1, tiny_config(inputs, tmp_path / "run", *settings))
    assert largest_difference(outcome.weights, whole.weights) <= 1e-3
