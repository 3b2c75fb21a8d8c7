"""The plugin: other people's loops over our model give the run of `hmar-mega train`, and mcore's own checkpoints of the
model and of its distributed optimizer go from any layout to any other."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from runs import Inputs, Outcome, tiny_config, train
from torch import Tensor

from hmar_mega.config import Config
from hmar_mega.config_io import config_to_yaml

pytestmark = pytest.mark.dist

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

#: In nats for losses, absolute for gradient norms; also after the first updates.
TOLERANCE = 1e-6

TENSOR2 = "parallel.tensor_parallel=2"
PIPELINE2 = "parallel.pipeline_parallel=2"
MICRO2 = "data.micro_batch_size=2"


@pytest.fixture(scope="module")
def reference(tmp_path_factory, uneven_inputs) -> Outcome:
    """The run of one process; classes and codes divide by no tensor-parallel size."""
    return train(uneven_inputs, tmp_path_factory.mktemp("reference") / "run", "single")


def write_config(inputs: Inputs, folder: Path, *overrides: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(config_to_yaml(tiny_config(inputs, folder / "run", *overrides)))
    return path


def example_rank(name: str, config: Path) -> str:
    """What an example prints on this rank."""
    sys.argv = [name, str(config)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return printed.getvalue()


def assert_same_losses(printed: str, expected: Outcome) -> None:
    rows = re.findall(r"^step (\d+) loss (\S+) grad (\S+)$", printed, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == [1, 2, 3], printed
    assert [float(loss) for _, loss, _ in rows] == pytest.approx(expected.losses, rel=0, abs=TOLERANCE)
    assert [float(norm) for *_, norm in rows] == pytest.approx(expected.norms, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["megatron_loop.py", "deepspeed_script.py"])
def test_an_example_run_as_a_program_gives_the_losses_of_train(tmp_path, uneven_inputs, reference, name):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(variable, None)
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, write_config(uneven_inputs, tmp_path, MICRO2)],
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_losses(done.stdout, reference)


@pytest.mark.parametrize(
    ("name", "world", "settings"),
    [
        ("megatron_loop.py", 2, (TENSOR2,)),
        ("megatron_loop.py", 2, (TENSOR2, "parallel.sequence_parallel=true")),
        ("megatron_loop.py", 2, ()),
        ("megatron_loop.py", 2, (PIPELINE2, MICRO2)),
        ("megatron_loop.py", 4, (PIPELINE2, TENSOR2, MICRO2)),
        ("deepspeed_script.py", 2, ()),
        ("deepspeed_script.py", 2, ("parallel.zero_stage=2", MICRO2)),
        ("deepspeed_script.py", 2, (TENSOR2,)),
    ],
)
def test_an_example_on_several_processes_gives_the_losses_of_train(
    tmp_path, uneven_inputs, reference, name, world, settings
):
    config = write_config(uneven_inputs, tmp_path, *settings)
    printed = run_ranks(world, example_rank, name, config)
    assert_same_losses("".join(printed), reference)
