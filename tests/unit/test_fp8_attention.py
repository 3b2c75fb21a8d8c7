"""Which layers attend in FP8: by their learned scales, over all ranks, with every change logged."""

from __future__ import annotations

import contextlib
import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hmar_mega.config import ModelConfig
from hmar_mega.config_io import load_config
from hmar_mega.fp8_attention import choose_fp8_attention
from hmar_mega.model import attention
from hmar_mega.model.hmar import HMAR
from hmar_mega.model.layers_torch import TorchLayers
from hmar_mega.scales import ScaleSchedule
from hmar_mega.train import build_model


@pytest.fixture
def engine() -> Any:
    """Two layers of two heads, with what is read of an engine."""
    model = HMAR(ModelConfig(depth=2, width=16, heads=2, num_classes=3), ScaleSchedule((1, 2)), 8, 4)
    model.training_backend = "te_fp8"
    dims = SimpleNamespace(world_size=2, is_main=True)
    return SimpleNamespace(model=model, step=7, dims=dims, whole=lambda parameters: contextlib.nullcontext())


def set_scale(engine: Any, layer: int, *scales: float) -> None:
    with torch.no_grad():
        engine.model.blocks[str(layer)].attn.log_scale.copy_(torch.tensor([math.log(s) for s in scales]))


@pytest.fixture(autouse=True)
def theirs(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The scales of the other of two ranks."""
    scales: dict[str, float] = {}

    def gather(parts: list[Any], own: Any) -> None:
        parts[:] = [own, scales]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    return scales


def test_layers_go_to_bf16_and_back_by_their_largest_scale(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    choose_fp8_attention(engine)
    set_scale(engine, 1, 4.0, 19.9)
    choose_fp8_attention(engine)
    assert engine.model.bf16_attention == set()
    assert not caplog.messages
    set_scale(engine, 1, 4.0, 20.5)
    for _ in range(2):  # told once
        choose_fp8_attention(engine)
    assert engine.model.bf16_attention == {"blocks.1.attn"}
    set_scale(engine, 1, 4.0, 4.0)
    choose_fp8_attention(engine)
    assert engine.model.bf16_attention == set()
    told, back = caplog.messages
    assert told.startswith("step 7 | learned scales above 20, too large for FP8 attention: blocks.1.attn (20.5); these")
    assert told.endswith("the other 1 in FP8")
    assert "none any more" in back


def test_heads_of_other_ranks_count(
    engine: Any, theirs: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    theirs.update({"blocks.0.attn": 30.0, "blocks.1.attn": 21.0})
    choose_fp8_attention(engine)
    assert engine.model.bf16_attention == {"blocks.0.attn", "blocks.1.attn"}
    assert caplog.messages[0].endswith("the other 0 in FP8: precision.fp8=linears is the same training")


def test_the_chosen_layers_alone_attend_in_fp8(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("te", "te_fp8"):

        def attend(*given: Any, name: str = name) -> torch.Tensor:
            called.append(name)
            return attention._sdpa(*given)

        monkeypatch.setitem(attention._BACKENDS, name, attend)
    set_scale(engine, 0, 50.0, 1.0)
    choose_fp8_attention(engine)
    engine.model.train()(torch.tensor([0]), torch.zeros(1, 4, 4))
    assert called == ["te", "te_fp8"]


def test_training_without_fp8_attention_is_not_looked_at(engine: Any, theirs: dict[str, float]) -> None:
    engine.model.training_backend = "sdpa"
    set_scale(engine, 0, 50.0, 1.0)
    choose_fp8_attention(engine)
    assert engine.model.bf16_attention == set()


@pytest.mark.parametrize(
    ("overrides", "backend"),
    [
        (["precision.fp8=linears_and_attention", "model.attention.backend=triton"], "triton_fp8"),
        (["precision.fp8=linears_and_attention", "precision.fp8_pad_head_dim=true"], "te_fp8"),
        (["precision.fp8=linears", "model.attention.backend=triton"], "triton"),
    ],
)
def test_the_attention_backend_decides_whose_fp8_attention_trains(overrides: list[str], backend: str) -> None:
    config = load_config(None, ["model.depth=2", "model.width=64", "model.heads=1", "model.mask_layers=1", *overrides])
    assert build_model(config, TorchLayers()).training_backend == backend


def test_own_kernels_choose_by_head_and_are_counted(
    engine: Any, theirs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    caplog.set_level(logging.INFO)
    engine.model.training_backend, engine.dims.tp_rank = "triton_fp8", 0
    set_scale(engine, 1, 9.9, 10.1)
    theirs.update({"blocks.0.attn 1": [4.0, 30.0], "blocks.0.attn 0": [4.0, 4.0]})  # other heads, and a copy of ours
    choose_fp8_attention(engine)
    assert engine.model.bf16_attention == set()
    assert caplog.messages == [
        "step 7 | FP8 attention: 4 of 6 heads, those with a learned scale below 10; the largest is 30.0"
    ]
