"""A step that never ends while every process lives: all ranks show where they stand and leave to be started again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from harness import RanksFailed, run_ranks
from runs import BATCH, Inputs, config_file, tiny_config

from hmar_mega.parallel.liveness import LOST_RANK_STATUS

pytestmark = pytest.mark.dist

STALLED_STEP = 7  # five steps must be known first


def stalling_rank(file: str) -> int:
    """Run the command line, in which rank 1 never comes back from the forward of a step."""
    from hmar_mega.cli import main
    from hmar_mega.objective import Objective

    honest = Objective.inputs

    def inputs_that_never_come(self, batch, *, training, stage=None):
        if int(batch.positions.min()) // BATCH == STALLED_STEP - 1 and os.environ["RANK"] == "1":
            time.sleep(600)
        return honest(self, batch, training=training, stage=stage)

    Objective.inputs = inputs_that_never_come
    return main(["train", file])


def test_a_step_that_never_ends_shows_the_stacks_of_all_ranks(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.SHOWN_LINES", 1000)  # stacks of all threads are long
    settings = ("optim.max_steps=9", "optim.epochs=9", "checkpoint.interval=3", "run.hang_floor=2")
    file = config_file(tiny_config(inputs, tmp_path / "run", *settings))
    with pytest.raises(RanksFailed) as caught:
        run_ranks(2, stalling_rank, file, grace=10, timeout=60)
    report = str(caught.value)
    assert caught.value.exit_codes == [LOST_RANK_STATUS] * 2, report
    assert "stacks of rank 0" in report
    assert "in inputs_that_never_come" in report.split("stacks of rank 1")[1]
    assert "no step for " in report
    assert "last checkpoint: step-00000006; start the same command again" in report
