"""bf16 training whose AdamW is one pass (`optim.impl=triton`), interpreted on CPUs, against DeepSpeed's and torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import run_ranks
from runs import LAYOUTS, Inputs, Outcome, largest_difference, tiny_config, train, train_rank

from hmar_mega.config import Config

pytest.importorskip("triton", reason="the kernels need Triton")
pytestmark = pytest.mark.dist

BF16 = "precision.compute=bf16"


#: Whether updates read the bf16 gradients: alone, or in tensor-parallel ranks of one micro-batch; else float32 sums.
DIRECT = {"single": True, "tensor2": True, "accumulated": False, "data2": False, "pipeline2_tensor2": False}


def direct_rank(config: Config) -> bool:
    """Train, and tell what updates read."""
    from hmar_mega import loop

    honest, found = loop.train, []

    def probed(run: loop.Run) -> None:
        honest(run)
        found.append(run.engine.zero.direct)

    loop.train = probed
    train_rank(config)
    return bool(found[0])


@pytest.mark.parametrize("layout", DIRECT)
def test_weights_are_those_of_torch(inputs: Inputs, tmp_path: Path, layout: str) -> None:
    theirs = train(inputs, tmp_path / "torch", layout, BF16, "optim.impl=torch")
    world, settings = LAYOUTS[layout]
    config = tiny_config(inputs, tmp_path / "triton", *settings, BF16, "optim.impl=triton")
    assert set(run_ranks(world, direct_rank, config)) == {DIRECT[layout]}
    ours = Outcome.of(tmp_path / "triton")
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
