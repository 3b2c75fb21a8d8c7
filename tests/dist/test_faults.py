"""Steps whose loss or gradient is not finite: skipped, counted and named, and survived by a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from runs import BATCH, LAYOUTS, Outcome, tiny_config, train_rank

from hmar_mega.config import Config
from hmar_mega.metrics import read_metrics

pytestmark = pytest.mark.dist

#: The second step of six; its batch holds stream positions 8 … 15.
BAD_STEP, WHOLE = 2, 6


def poisoned_rank(config: Config, bad_steps: list[int]) -> str:
    """Train while one sample of each bad step has a loss that is not a number; how it ends."""
    from hmar_mega.engine import TrainingError
    from hmar_mega.objective import Objective

    honest = Objective.scores
    bad_positions = [(step - 1) * BATCH + 5 for step in bad_steps]

    def scores_of(self, cross_entropy, batch):
        scores = honest(self, cross_entropy, batch)
        for position in bad_positions:
            scores.loss.masked_fill_(batch.positions == position, float("nan"))
        return scores

    Objective.scores = scores_of
    try:
        train_rank(config)
    except TrainingError as err:
        return str(err)
    return "finished"


def run_poisoned(inputs, folder: Path, layout: str, bad_steps: list[int], *overrides: str) -> list[str]:
    world, settings = LAYOUTS[layout]
    config = tiny_config(inputs, folder, *settings, f"optim.max_steps={WHOLE}", *overrides)
    return run_ranks(world, poisoned_rank, config, bad_steps)


@pytest.mark.parametrize("layout", ["single", "tensor2", "data2", "data2_zero2", "data2_zero3", "tensor2_data2", "pipeline2_data2"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(inputs, tmp_path, layout):
    assert set(run_poisoned(inputs, tmp_path / "run", layout, [BAD_STEP])) == {"finished"}
    (row,) = map(json.loads, (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines())
    assert (row["step"], row["cause"]) == (BAD_STEP, "loss")
    assert row["positions"] == list(range(BATCH, 2 * BATCH))
    assert len(set(row["keys"])) == BATCH
    rows = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert [r["skipped_steps"] for r in rows] == [0, 1, 1, 1, 1, 1]
    assert all(torch.isfinite(values).all() for values in Outcome.of(tmp_path / "run").tensors.values())


def test_bf16_skips_too(inputs, tmp_path):
    assert run_poisoned(inputs, tmp_path / "run", "single", [BAD_STEP], "precision.compute=bf16") == ["finished"]
    rows = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert rows[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("layout", ["single", "data2_zero3"])
def test_a_run_resumed_after_a_skipped_step_ends_as_the_one_that_never_stopped(inputs, tmp_path, layout):
    """Adam has made one update less than there were steps, also after a restart."""
    run_poisoned(inputs, tmp_path / "whole", layout, [BAD_STEP])
    run_poisoned(inputs, tmp_path / "halves", layout, [BAD_STEP], "optim.max_steps=3")
    run_poisoned(inputs, tmp_path / "halves", layout, [BAD_STEP])
    whole, halves = Outcome.of(tmp_path / "whole"), Outcome.of(tmp_path / "halves")
    assert whole.tensors.keys() == halves.tensors.keys()
    for key, values in whole.tensors.items():
        assert torch.equal(halves.tensors[key], values), key


def test_too_many_in_a_row_stop_every_rank(inputs, tmp_path):
    messages = run_poisoned(inputs, tmp_path / "run", "tensor2", [2, 3, 4], "optim.max_bad_steps=3")
    assert len(set(messages)) == 1
    assert "3 steps in a row up to step 4" in messages[0]
    assert len((tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()) == 3


def test_bad_steps_apart_from_each_other_do_not_stop(inputs, tmp_path):
    assert run_poisoned(inputs, tmp_path / "run", "single", [2, 4], "optim.max_bad_steps=2") == ["finished"]
