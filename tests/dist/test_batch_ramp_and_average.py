"""Two things a run may do on any layout: raise its batch size step by step, and keep a moving average of its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from runs import Inputs, Outcome, checkpoint_state, largest_difference, train

from hmar_mega.checkpoint.export import export_run
from hmar_mega.checkpoint.sources import CheckpointReader
from hmar_mega.inference import load_model, open_model
from hmar_mega.metrics import read_metrics

pytestmark = pytest.mark.dist

TOLERANCE = 1e-6

#: 4, 4, 8, 8 images a step, and again.
RAMP = ("data.batch_ramp={start: 4, increment: 4, images: 8}", "optim.max_steps=4", "data.micro_batch_size=2")
AVERAGE = ("optim.ema_decay=0.6", "optim.max_steps=4", "checkpoint.interval=1", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    folder = tmp_path_factory.mktemp("ramp") / "run"
    train(inputs, folder, "single", *RAMP)
    return folder


@pytest.fixture(scope="module")
def average(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    folder = tmp_path_factory.mktemp("average") / "run"
    train(inputs, folder, "single", *AVERAGE)
    return folder


def test_a_ramp_takes_the_images_it_says(ramp):
    rows = [row for row in read_metrics(ramp) if row["kind"] == "train"]
    assert [row["images"] for row in rows] == [4, 8, 16, 24]
    state = checkpoint_state(ramp, "step-00000004")
    assert (state["images_seen"], state["stream"]["position"]) == (24, 24)


@pytest.mark.parametrize("layout", ["data2", "data2_zero3", "tensor2", "pipeline2_data2"])
def test_a_ramp_is_the_same_run_on_any_layout(inputs, ramp, tmp_path, layout):
    outcome = train(inputs, tmp_path / "run", layout, *RAMP)
    assert outcome.losses == pytest.approx(Outcome.of(ramp).losses, rel=0, abs=TOLERANCE)
    assert largest_difference(outcome.weights, Outcome.of(ramp).weights) <= TOLERANCE


def test_a_run_stopped_inside_its_ramp_goes_on_in_it(inputs, ramp, tmp_path):
    train(inputs, tmp_path / "run", "single", *RAMP, "optim.max_steps=1")
    outcome = train(inputs, tmp_path / "run", "data2", *RAMP)
    assert largest_difference(outcome.weights, Outcome.of(ramp).weights) <= TOLERANCE


def averages(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and their moving averages of one checkpoint."""
    reader = CheckpointReader(folder / "checkpoints" / f"step-{step:08d}")
    return {n: reader.read(n) for n in reader.shapes}, {n: reader.read(n, kind="ema") for n in reader.shapes}


def test_the_average_follows_its_formula_step_by_step(average):
    """ema ← d·ema + (1 − d)·w, d = min(0.6, (1 + n)/(10 + n)) at update n."""
    _, expected = averages(average, 1)
    for step in range(2, 5):
        weights, found = averages(average, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * w for n, w in weights.items()}
        assert largest_difference(found, expected) <= TOLERANCE
        assert largest_difference(found, weights) > 100 * TOLERANCE


@pytest.mark.parametrize("layout", ["data2", "data2_zero2", "data2_zero3", "tensor2_data2", "pipeline2_tensor2"])
def test_the_average_is_the_same_on_any_layout(inputs, average, tmp_path, layout):
    train(inputs, tmp_path / "run", layout, *AVERAGE)
    assert largest_difference(averages(tmp_path / "run", 4)[1], averages(average, 4)[1]) <= TOLERANCE


def test_the_average_goes_on_where_it_stopped(inputs, average, tmp_path):
    train(inputs, tmp_path / "run", "data2_zero3", *AVERAGE, "optim.max_steps=2")
    train(inputs, tmp_path / "run", "tensor2", *AVERAGE)
    assert largest_difference(averages(tmp_path / "run", 4)[1], averages(average, 4)[1]) <= TOLERANCE


def test_an_average_may_begin_in_the_middle_of_a_run(inputs, average, tmp_path):
    folder = tmp_path / "run"
    train(inputs, folder, "single", *AVERAGE, "optim.max_steps=2", "optim.ema_decay=null")
    train(inputs, folder, "single", *AVERAGE, "optim.max_steps=3")
    before = Outcome.of(average).weights.keys()
    weights, found = averages(folder, 3)
    start, _ = averages(average, 2)
    assert before == found.keys()
    decay = min(0.6, 4 / 13)
    assert largest_difference(found, {n: decay * start[n] + (1 - decay) * w for n, w in weights.items()}) <= TOLERANCE


@pytest.mark.parametrize("layout", ["single", "data2_zero3"])
def test_an_export_takes_the_average_where_asked(inputs, average, tmp_path, layout):
    folder = tmp_path / "run"
    if layout == "single":
        shutil.copytree(average, folder)
    else:
        train(inputs, folder, layout, *AVERAGE)
    weights, found = averages(folder, 4)
    export_run(folder, tmp_path / "plain")
    export_run(folder, tmp_path / "average", ema=True)
    for path, expected in ((tmp_path / "plain", weights), (tmp_path / "average", found)):
        exported = dict(load_model(path).model.named_parameters())
        assert largest_difference({n: p.detach() for n, p in exported.items()}, expected) == 0.0
        opened = dict(open_model(folder, ema=expected is found).model.named_parameters())
        assert largest_difference({n: p.detach() for n, p in opened.items()}, expected) == 0.0
