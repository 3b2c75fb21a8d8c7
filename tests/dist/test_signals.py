"""Signals: the ranks save and stop together, in a step, in an evaluation, in a sample grid and before the first step."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from runs import Command, LAYOUTS, Inputs, Outcome, checkpoint_state, config_file, tiny_config, train
from tables import record

from hmar_mega.checkpoint.sources import find_checkpoint
from hmar_mega.metrics import read_metrics

pytestmark = pytest.mark.dist

WHOLE = 4

#: Evaluated at steps 2 and 4: validation of 15 samples, in batches of 4, and a grid.
EVALUATED = ("eval.interval=2", "eval.grid_count=4", f"optim.max_steps={WHOLE}")

Signals = dict[int, signal.Signals]  #: by the rank that gets it


def command_rank(file: str, moment: str, signals: Signals) -> tuple[int, float]:
    """Run the command line while this rank signals itself, once, at a moment; exit status and seconds it then took."""
    from hmar_mega.cli import main
    from hmar_mega.inference import sampler
    from hmar_mega.objective import Objective

    sent: list[float] = []
    own = signals.get(int(os.environ["RANK"]))

    def send() -> None:
        if own is not None and not sent:
            sent.append(time.monotonic())
            os.kill(os.getpid(), own)

    owner, name, when = {
        "step": (Objective, "inputs", lambda *_, training, **__: training),
        "validation": (Objective, "inputs", lambda *_, training, **__: not training),
        "grid": (sampler, "_sample_scale", lambda state, scale, *_: scale == 1),
    }[moment]
    honest = getattr(owner, name)

    def signalled(*args: object, **settings: object) -> object:
        if when(*args, **settings):
            send()
        return honest(*args, **settings)

    setattr(owner, name, signalled)
    status = main(["train", file])
    return status, time.monotonic() - sent[0] if sent else 0.0


def run_signalled(inputs: Inputs, folder: Path, layout: str, moment: str, signals: Signals) -> list[int]:
    """The exit status of every rank; none takes longer than a tiny step or batch and a save may."""
    world, settings = LAYOUTS[layout]
    config = tiny_config(inputs, folder, f"data.val={inputs.val}", *settings, *EVALUATED)
    ended = run_ranks(world, command_rank, config_file(config), moment, signals)
    slowest = max(seconds for _, seconds in ended)
    names = ", ".join(f"{number.name} at rank {rank}" for rank, number in signals.items())
    record("faults", fault=f"{names} in a {moment}", layout=layout, seconds=slowest)
    assert slowest < 5
    return [status for status, _ in ended]


class Undisturbed:
    """Runs of each layout that got no signal."""

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        self.folder, self.inputs = folder, inputs

    def __call__(self, layout: str) -> Path:
        folder = self.folder / layout
        if not folder.exists():
            train(self.inputs, folder, layout, f"data.val={self.inputs.val}", *EVALUATED)
        return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, inputs) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"), inputs)


def go_on(inputs: Inputs, folder: Path, layout: str) -> None:
    train(inputs, folder, layout, f"data.val={inputs.val}", *EVALUATED)


def assert_same_run(folder: Path, whole: Path) -> None:
    """Weights and moments, every row of figures, and the grids."""
    ours, theirs = Outcome.of(folder), Outcome.of(whole)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert [key for key, tensor in ours.tensors.items() if not torch.equal(tensor, theirs.tensors[key])] == []
    rows, expected = (
        {(row["kind"], row["step"]): row.get("loss", row.get("all_scales")) for row in read_metrics(run)}
        for run in (folder, whole)
    )
    assert rows == expected
    assert len(read_metrics(folder)) == len(read_metrics(whole))
    for grid in (whole / "grids").iterdir():
        assert (folder / "grids" / grid.name).read_bytes() == grid.read_bytes()
    best = Path("checkpoints") / "best"
    assert (folder / best).read_text() == (whole / best).read_text()


def val_steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder) if row["kind"] == "val"]


@pytest.mark.parametrize(
    ("layout", "signals", "status", "last"),
    [
        ("single", {0: signal.SIGTERM}, 0, 1),
        ("single", {0: signal.SIGUSR1}, 75, 1),
        ("single", {0: signal.SIGINT}, 0, 1),
        # in the step in which a rank is told it has voted already: all stop after the next, before its evaluation
        ("data2", {1: signal.SIGTERM}, 0, 2),
        ("tensor2", {0: signal.SIGTERM, 1: signal.SIGUSR1}, 75, 2),
        ("pipeline2", {1: signal.SIGUSR1}, 75, 2),
    ],
)
def test_in_a_step_all_ranks_save_and_stop_together(inputs, tmp_path, undisturbed, layout, signals, status, last):
    folder = tmp_path / "run"
    assert set(run_signalled(inputs, folder, layout, "step", signals)) == {status}
    assert find_checkpoint(folder).name == f"step-{last:08d}"
    assert not checkpoint_state(folder, f"step-{last:08d}")["finished"]
    go_on(inputs, folder, layout)
    assert_same_run(folder, undisturbed(layout))


@pytest.mark.parametrize("layout", ["single", "data2", "data2_zero3", "pipeline2"])
def test_an_evaluation_cut_short_leaves_nothing_and_is_made_up_for(inputs, tmp_path, undisturbed, layout):
    folder = tmp_path / "run"
    last_rank = LAYOUTS[layout][0] - 1
    assert set(run_signalled(inputs, folder, layout, "validation", {last_rank: signal.SIGUSR1})) == {75}
    assert find_checkpoint(folder).name == "step-00000002"
    assert val_steps(folder) == []
    assert not (folder / "grids").exists()
    go_on(inputs, folder, layout)
    assert val_steps(folder) == [2, 4]
    assert_same_run(folder, undisturbed(layout))


@pytest.mark.parametrize(("layout", "rank"), [("single", 0), ("tensor2", 1), ("data2_zero3", 1), ("pipeline2", 1)])
def test_a_grid_cut_short_is_not_written_and_is_made_up_for(inputs, tmp_path, undisturbed, layout, rank):
    folder = tmp_path / "run"
    assert set(run_signalled(inputs, folder, layout, "grid", {rank: signal.SIGTERM})) == {0}
    assert find_checkpoint(folder).name == "step-00000002"
    assert val_steps(folder) == []
    assert not (folder / "grids").exists()
    go_on(inputs, folder, layout)
    assert_same_run(folder, undisturbed(layout))




LONG = ("optim.max_steps=100000", "optim.epochs=100000", "checkpoint.interval=1000000", "eval.interval=1000000")


def test_a_command_can_be_stopped_while_it_imports_and_while_it_trains(inputs, tmp_path):
    command = ("hmar_mega", "train", config_file(tiny_config(inputs, tmp_path / "run", *LONG)))
    with Command(*command) as run:
        handled = re.compile(r"SigCgt:\s*([0-9a-f]+)")
        while not int(handled.search(Path(f"/proc/{run.process.pid}/status").read_text())[1], 16) >> 9 & 1:
            time.sleep(0.01)
        started = time.monotonic()
        run.process.send_signal(signal.SIGUSR1)
        assert run.end(within=60) == 75
        assert time.monotonic() - started > 1, "the signal should have come before the slow imports"
    assert "stopped at step 0 as asked" in run.text
    assert find_checkpoint(tmp_path / "run") is None
    with Command(*command) as run:
        run.wait_for("step +5/")
        run.process.send_signal(signal.SIGTERM)
        assert run.end(within=10) == 0
    (stopped,) = re.findall(r"stopped at step (\d+) as asked", run.text)
    assert find_checkpoint(tmp_path / "run").name == f"step-{int(stopped):08d}"
