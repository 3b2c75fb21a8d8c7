"""Steps whose loss or gradient is not finite: skipped, counted and named, and survived by a resumed run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
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


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient that is not finite where `where` says so."""

    @staticmethod
    def forward(ctx, values, where, bad):
        ctx.where, ctx.bad = where, bad
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.masked_fill(ctx.where, ctx.bad), None, None


def poisoned_rank(config: Config, bad_steps: list[int], bad: float = math.nan, cause: str = "loss") -> str:
    """Train while one sample of each bad step has a loss, or a gradient, that is not finite; how it ends."""
    from hmar_mega.engine import TrainingError
    from hmar_mega.objective import Objective

    honest = Objective.scores
    bad_positions = torch.tensor([(step - 1) * BATCH + 5 for step in bad_steps])

    def scores_of(self, cross_entropy, batch):
        scores = honest(self, cross_entropy, batch)
        where = torch.isin(batch.positions, bad_positions)
        if cause == "gradient":
            return dataclasses.replace(scores, loss=BadGradient.apply(scores.loss, where, bad))
        scores.loss.masked_fill_(where, bad)
        return scores

    Objective.scores = scores_of
    try:
        train_rank(config)
    except TrainingError as err:
        return str(err)
    return "finished"


def poisoned_shard_rank(config: Config, step: int) -> str:
    """Train while the last rank alone, in one step, gets a bad gradient of one of its weights (a shard of one)."""
    from hmar_mega.objective import Objective

    honest, hooks = Objective.training, []

    def training(self, forward, batch):
        for hook in hooks:
            hook.remove()
        hooks.clear()
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if last and int(batch.positions.min()) // BATCH == step - 1:
            weight = max(forward.module.parameters(), key=lambda p: getattr(p, "tensor_model_parallel", False))
            hooks.append(weight.register_hook(lambda gradient: gradient * math.inf))
        return honest(self, forward, batch)

    Objective.training = training
    train_rank(config)
    return "finished"


def run_poisoned(
    inputs, folder: Path, layout: str, bad_steps: list[int], *overrides: str, bad: float = math.nan, cause: str = "loss"
) -> list[str]:
    world, settings = LAYOUTS[layout]
    config = tiny_config(inputs, folder, *settings, f"optim.max_steps={WHOLE}", *overrides)
    return run_ranks(world, poisoned_rank, config, bad_steps, bad, cause)


def skipped_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "skipped_steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("layout", "cause", "bad"),
    [
        ("single", "loss", math.nan), ("single", "loss", -math.inf), ("single", "gradient", math.nan),
        ("tensor2", "loss", math.nan), ("tensor2", "gradient", math.inf),
        ("data2", "loss", math.inf), ("data2", "gradient", math.nan),
        ("data2_zero2", "loss", math.nan), ("data2_zero2", "gradient", math.inf),
        ("data2_zero3", "loss", math.inf), ("data2_zero3", "gradient", math.nan),
        ("tensor2_data2", "loss", math.nan), ("tensor2_data2", "gradient", math.inf),
        ("pipeline2_data2", "loss", math.nan), ("pipeline2_data2", "gradient", math.inf),
    ],
)  # fmt: skip
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(inputs, tmp_path, layout, cause, bad):
    assert set(run_poisoned(inputs, tmp_path / "run", layout, [BAD_STEP], bad=bad, cause=cause)) == {"finished"}
    (row,) = skipped_rows(tmp_path / "run")
    assert (row["step"], row["cause"]) == (BAD_STEP, cause)
    assert row["positions"] == list(range(BATCH, 2 * BATCH))
    assert len(set(row["keys"])) == BATCH
    rows = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert [r["skipped_steps"] for r in rows] == [0, 1, 1, 1, 1, 1]
    assert all(torch.isfinite(values).all() for values in Outcome.of(tmp_path / "run").tensors.values())


@pytest.mark.parametrize("layout", ["tensor2", "data2", "data2_zero2", "data2_zero3", "tensor2_data2"])
def test_the_bad_gradient_of_one_weight_on_one_rank_is_noticed_by_all(inputs, tmp_path, layout):
    world, settings = LAYOUTS[layout]
    config = tiny_config(inputs, tmp_path / "run", *settings, f"optim.max_steps={WHOLE}")
    run_ranks(world, poisoned_shard_rank, config, BAD_STEP)
    (row,) = skipped_rows(tmp_path / "run")
    assert (row["step"], row["cause"]) == (BAD_STEP, "gradient")
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


@pytest.mark.parametrize(("layout", "cause", "bad"), [("tensor2", "loss", math.nan), ("data2", "gradient", math.inf)])
def test_too_many_in_a_row_stop_every_rank(inputs, tmp_path, layout, cause, bad):
    three = ("optim.max_bad_steps=3",)
    messages = run_poisoned(inputs, tmp_path / "run", layout, [2, 3, 4], *three, bad=bad, cause=cause)
    assert len(set(messages)) == 1
    assert "3 steps in a row up to step 4" in messages[0]
    assert [row["positions"][0] for row in skipped_rows(tmp_path / "run")] == [BATCH, 2 * BATCH, 3 * BATCH]


def test_skipped_steps_that_are_run_again_are_named_once(inputs, tmp_path):
    """After going back to the checkpoint of step 2, skipping step 2 stands, and the row of step 4 goes."""
    every = ("checkpoint.interval=1", "checkpoint.keep_last=9")
    run_poisoned(inputs, tmp_path / "run", "single", [2, 4], *every)
    assert [row["step"] for row in skipped_rows(tmp_path / "run")] == [2, 4]
    run_poisoned(inputs, tmp_path / "run", "single", [5], *every, "run.resume_from=step-00000002")
    assert [row["step"] for row in skipped_rows(tmp_path / "run")] == [2, 5]


def test_bad_steps_apart_from_each_other_do_not_stop(inputs, tmp_path):
    assert run_poisoned(inputs, tmp_path / "run", "single", [2, 4], "optim.max_bad_steps=2") == ["finished"]
