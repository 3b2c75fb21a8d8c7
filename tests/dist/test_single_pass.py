"""bf16 training whose AdamW is one pass (`optim.impl=triton`), interpreted on CPUs, against DeepSpeed's and torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import Inputs, Outcome, largest_difference, train

pytest.importorskip("triton", reason="the kernels need Triton")
pytestmark = pytest.mark.dist

BF16 = "precision.compute=bf16"


@pytest.mark.parametrize("layout", ["single", "accumulated", "data2", "pipeline2_tensor2"])
def test_weights_are_those_of_torch(inputs: Inputs, tmp_path: Path, layout: str) -> None:
    """Alone it updates from bf16 gradients; with micro-batches, ranks or stages from float32 sums."""
    theirs, ours = (train(inputs, tmp_path / i, layout, BF16, f"optim.impl={i}") for i in ("torch", "triton"))
    assert ours.losses == pytest.approx(theirs.losses, rel=2e-5)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-3)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, values in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], values, atol=5e-4, rtol=0)


def test_a_resumed_run_is_bitwise_the_same(inputs: Inputs, tmp_path: Path) -> None:
    settings = (BF16, "optim.impl=triton")
    whole = train(inputs, tmp_path / "whole", "single", *settings)
    train(inputs, tmp_path / "parts", "single", *settings, "optim.max_steps=2")
    parts = train(inputs, tmp_path / "parts", "single", *settings)
    assert parts.losses == whole.losses
    assert largest_difference(parts.tensors, whole.tensors) == 0
