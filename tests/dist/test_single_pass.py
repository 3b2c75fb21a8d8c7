"""bf16 training whose AdamW is one pass (`optim.impl=triton`), interpreted on CPUs, against DeepSpeed's and torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import Inputs, Outcome, largest_difference, train

pytest.importorskip("triton", reason="the kernels need Triton")
pytestmark = pytest.mark.dist

BF16 = "precision.compute=bf16"


#: What updates read: alone, or in tensor-parallel ranks of one micro-batch, the bf16 gradients; else float32 sums.
LAYOUTS_READ = {
    "single": "from bf16 gradients", "tensor2": "from bf16 gradients", "accumulated": "from float32 sums",
    "data2": "from float32 sums", "pipeline2_tensor2": "from float32 sums",
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS_READ)
def test_weights_are_those_of_torch(inputs: Inputs, tmp_path: Path, layout: str) -> None:
    theirs, ours = (train(inputs, tmp_path / i, layout, BF16, f"optim.impl={i}") for i in ("torch", "triton"))
    assert f"AdamW in one pass {LAYOUTS_READ[layout]}" in (tmp_path / "triton" / "train.log").read_text()
    assert ours.losses == pytest.approx(theirs.losses, rel=2e-5)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-3)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for kind, limit in (("weight", 1e-3), ("exp_avg", 2e-2), ("exp_avg_sq", 2e-2)):
        mine, right = (torch.cat([t.flatten() for k, t in r.tensors.items() if k[1] == kind]) for r in (ours, theirs))
        assert (mine - right).norm() <= limit * right.norm(), kind


def test_a_run_goes_on_with_the_other_implementation(inputs: Inputs, tmp_path: Path) -> None:
    """Counted updates and moments are the same in both, and a step that is not finite counts in neither."""
    whole = train(inputs, tmp_path / "whole", "single", BF16, "optim.impl=torch")
    train(inputs, tmp_path / "parts", "single", BF16, "optim.impl=triton", "optim.max_steps=2")
    parts = train(inputs, tmp_path / "parts", "accumulated", BF16, "optim.impl=torch")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)
    assert parts.norms == pytest.approx(whole.norms, rel=1e-2)


def test_a_resumed_run_is_bitwise_the_same(inputs: Inputs, tmp_path: Path) -> None:
    settings = (BF16, "optim.impl=triton")
    whole = train(inputs, tmp_path / "whole", "single", *settings)
    train(inputs, tmp_path / "parts", "single", *settings, "optim.max_steps=2")
    parts = train(inputs, tmp_path / "parts", "single", *settings)
    assert parts.losses == whole.losses
    assert largest_difference(parts.tensors, whole.tensors) == 0
