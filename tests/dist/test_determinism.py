"""The same configuration, seed and layout give the same bits, on the CPU."""

from __future__ import annotations

import pytest
import torch
from runs import BATCH, TRAIN_SAMPLES, Outcome, train

pytestmark = pytest.mark.dist

STEPS = 20
EPOCHS = STEPS * BATCH // TRAIN_SAMPLES + 1

SETTINGS = (
    f"optim.max_steps={STEPS}", f"optim.epochs={EPOCHS}", "model.drop_path_rate=0.4", "stage.label_drop=0.5",
    "data.workers=2",
)  # fmt: skip


@pytest.mark.parametrize("layout", ["single", "tensor2_data2", "sequence2_data2_zero3", "pipeline2_tensor2"])
def test_two_runs_are_bitwise_equal(inputs, tmp_path, layout):
    first, second = (train(inputs, tmp_path / name, layout, *SETTINGS) for name in ("first", "second"))
    assert {kind for _, kind in first.tensors} == {"weight", "exp_avg", "exp_avg_sq"}
    assert first.tensors.keys() == second.tensors.keys()
    assert [key for key, tensor in first.tensors.items() if not torch.equal(tensor, second.tensors[key])] == []
    assert (first.losses, first.norms) == (second.losses, second.norms)
    assert len(first.losses) == STEPS


def test_another_seed_is_another_run(inputs, tmp_path):
    """Else the test above could not fail."""
    first = train(inputs, tmp_path / "first", "single", *SETTINGS)
    second = train(inputs, tmp_path / "second", "single", *SETTINGS, "run.seed=1")
    assert first.losses != second.losses
