"""bf16 and fp16 on every kind of layout: float32 accumulation, close to float32, dynamic loss scaling."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from harness import run_ranks
from runs import LAYOUTS, Inputs, Outcome, refusal_rank, tiny_config, train, train_rank

from hmar_mega.config import Config

pytestmark = pytest.mark.dist

EVERY_KIND = ["single", "tensor2_data2_zero2", "sequence2_data2_zero3", "pipeline2_tensor2", "pipeline2_data2"]

#: Relative, of losses and norms: bf16 keeps 8 bits, fp16 11.
CLOSE = {"bf16": 2e-3, "fp16": 5e-4}


def probe_rank(config: Config, fp16_on_cpu: bool = False, loss_factor: float = 1.0) -> dict[str, Any]:
    """Train on a loss so many times larger; the format in which gradients add up, the loss scale at the end and the steps skipped."""
    import deepspeed

    from hmar_mega import loop
    from hmar_mega.objective import Objective

    if fp16_on_cpu:  # DeepSpeed refuses it there, though torch computes in it
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    scores_of = Objective.scores

    def larger(self: Objective, *given: Any) -> Any:
        scores = scores_of(self, *given)
        return dataclasses.replace(scores, loss=loss_factor * scores.loss)

    Objective.scores = larger
    honest, found = loop.train, {}

    def probed(run: loop.Run) -> None:
        honest(run)
        zero = run.engine.zero
        found["accumulation"] = str(getattr(zero, "grad_acc_dtype", None) or zero.gradient_accumulation_dtype)
        found["loss_scale"], found["skipped"] = run.engine.loss_scale, run.engine.skipped

    loop.train = probed
    train_rank(config)
    return found


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Outcome:
    return train(inputs, tmp_path_factory.mktemp("float32") / "run", "single")


def assert_close(ours: Outcome, exact: Outcome, compute: str) -> None:
    assert ours.losses != exact.losses
    assert ours.losses == pytest.approx(exact.losses, rel=CLOSE[compute])
    assert ours.norms == pytest.approx(exact.norms, rel=CLOSE[compute] * 5)


@pytest.mark.parametrize("layout", EVERY_KIND)
def test_bf16_adds_up_in_float32_and_is_close_to_it(inputs, float32, tmp_path, layout):
    world, settings = LAYOUTS[layout]
    config = tiny_config(inputs, tmp_path / "run", *settings, "precision.compute=bf16")
    for found in run_ranks(world, probe_rank, config):
        assert found == {"accumulation": "torch.float32", "loss_scale": 1.0, "skipped": 0}
    assert_close(Outcome.of(tmp_path / "run"), float32, "bf16")


@pytest.mark.parametrize("layout", EVERY_KIND)
def test_fp16_is_close_to_float32(inputs, float32, tmp_path, layout):
    world, settings = LAYOUTS[layout]
    config = tiny_config(inputs, tmp_path / "run", *settings, "precision.compute=fp16")
    for found in run_ranks(world, probe_rank, config, True):
        assert (found["loss_scale"], found["skipped"]) == (2.0**16, 0)
    assert_close(Outcome.of(tmp_path / "run"), float32, "fp16")


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_stages_that_train_nothing_stay_finite_at_any_loss_scale(inputs, tmp_path, compute):
    """Stage 2 on four stages: on the second, and in part on others, only ballast is trained."""
    world, settings = LAYOUTS["pipeline4"]
    deep = ("model.depth=4", "model.mask_layers=1")
    train(inputs, tmp_path / "first", "single", *deep, "optim.max_steps=1")
    config = tiny_config(
        inputs, tmp_path / "run", *settings, *deep, "stage.name=masked", f"run.init_from={tmp_path / 'first'}",
        f"precision.compute={compute}",
    )  # fmt: skip
    assert {found["skipped"] for found in run_ranks(world, probe_rank, config, True)} == {0}


@pytest.mark.parametrize("layout", ["single", "pipeline2_tensor2", "sequence2_data2_zero3"])
def test_fp16_halves_the_loss_scale_where_gradients_overflow_and_skips_the_step(inputs, tmp_path, layout):
    """A loss 300 times as large, times 65 536, is beyond fp16."""
    world, settings = LAYOUTS[layout]
    config = tiny_config(
        inputs, tmp_path / "run", *settings, "precision.compute=fp16", "optim.max_steps=4", "optim.base_lr=1e-30",
    )  # fmt: skip
    found = run_ranks(world, probe_rank, config, True, 300.0)
    assert len({(f["loss_scale"], f["skipped"]) for f in found}) == 1
    assert found[0]["skipped"] >= 1
    assert found[0]["loss_scale"] == 2.0 ** (16 - found[0]["skipped"])


def test_fp16_without_a_gpu_is_refused_with_what_there_is(inputs, tmp_path):
    (message,) = run_ranks(1, refusal_rank, tiny_config(inputs, tmp_path / "run", "precision.compute=fp16"))
    assert "precision.compute=fp16" in message
    assert "use precision.compute=bf16 or fp32" in message
