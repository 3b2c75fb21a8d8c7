"""What the engine decides before it starts: micro-batches, DeepSpeed's settings, the optimizer's groups, and when it
refuses to go on."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import tiny_hmar
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hmar_mega.batches import BatchPlan
from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.engine import Engine, _deepspeed_config, micro_batch_size
from hmar_mega.errors import UserError
from hmar_mega.model.graphs import why_not
from hmar_mega.objective import Scores
from hmar_mega.optimizer import build_adamw, choose_adamw, fused_adam, set_steps
from hmar_mega.parallel.dims import ParallelDims
from hmar_mega.schedules import Schedule

ALONE = ParallelDims(tensor_parallel=1, data_parallel=1, rank=0, local_rank=0)

TINY = (
    "model.depth=2", "model.width=32", "model.heads=2", "model.mask_layers=1", "model.num_classes=5",
    "schedule.resolution=16", "schedule.patch_nums=[1, 2, 4]", "tokenizer.channel_mult=[1, 1, 1]",
    "tokenizer.codebook_size=32", "tokenizer.latent_channels=8", "precision.compute=fp32",
)  # fmt: skip


def config(*settings: str) -> Config:
    return load_config(None, [*TINY, *settings])


def batches(total: int, micro: int | None) -> Config:
    given_micro = "null" if micro is None else str(micro)
    return config(f"data.global_batch_size={total}", f"data.micro_batch_size={given_micro}")


# Micro-batches


@pytest.mark.parametrize(
    ("total", "micro", "ranks", "expected"),
    [
        (768, None, 8, 32),  # 96 a rank, 32 at once
        (768, None, 1, 32),
        (24, None, 2, 12),  # the whole share, being below 32
        (70, None, 2, 7),  # 35 a rank does not fit 32; its largest divisor that does
        (37, None, 1, 1),  # a prime beyond 32
        (31, None, 1, 31),
        (768, 4, 8, 4),
        (8, 8, 1, 8),
    ],
)
def test_micro_batch_is_as_configured_or_the_largest_that_fits_32(total, micro, ranks, expected):
    assert micro_batch_size(batches(total, micro), ranks) == expected


@given(total=st.integers(1, 5000), ranks=st.integers(1, 64), micro=st.none() | st.integers(1, 64))
def test_micro_batches_fill_the_global_batch_or_a_size_that_would_is_named(total, ranks, micro):
    settings = batches(total, micro)
    try:
        size = micro_batch_size(settings, ranks)
    except UserError as err:
        assert total % (ranks * (micro or 1)) != 0
        sizes = str(err).rsplit("; use global_batch_size=", 1)[1].split(", or micro_batch_size")[0]
        named = [int(word) for word in sizes.split(" or ")]
        assert min(abs(total - n) for n in named) < ranks * (micro or 1)
        for fitting in named:
            assert micro_batch_size(batches(fitting, micro), ranks) >= 1
    else:
        assert total % (size * ranks) == 0
        assert micro in (None, size)
        assert micro is not None or size <= 32


def test_sizes_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(UserError) as caught:
        micro_batch_size(batches(50, 4), 3)
    assert str(caught.value) == (
        "global_batch_size=50 does not divide into micro-batches of 4 on 3 data-parallel ranks; use "
        "global_batch_size=48 or 60"
    )


def test_a_batch_below_the_smallest_is_not_answered_with_0():
    with pytest.raises(UserError, match=r"use global_batch_size=8$"):
        micro_batch_size(batches(3, 2), 4)


# DeepSpeed


def test_deepspeed_accumulates_what_the_micro_batches_leave_and_clips():
    settings = _deepspeed_config(config("data.global_batch_size=48", "optim.clip=1.5"), micro=4, accumulation=6)
    assert "train_batch_size" not in settings  # the product of the two below and the data-parallel ranks
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 6
    assert settings["gradient_clipping"] == 1.5
    assert settings["zero_optimization"] == {"stage": 1}


def test_float32_asks_for_no_other_number_format():
    settings = _deepspeed_config(config(), micro=1, accumulation=1)
    assert not {"bf16", "fp16", "data_types"} & settings.keys()


def test_bf16_accumulates_gradients_in_float32():
    settings = _deepspeed_config(config("precision.compute=bf16"), micro=1, accumulation=4)
    assert settings["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}


# The optimizer


def names_by_decay(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[bool, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["decays"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}


def test_weight_decay_spares_vectors_biases_and_tables():
    settings = config("model.shared_aln=true")
    model = tiny_hmar(settings)
    groups = names_by_decay(model, build_adamw(model, settings, ALONE.device))
    assert {"pos_start", "pos_embed", "level_embed", "blocks.0.ada_gss", "word_embed.bias"} <= groups[False]
    assert {"blocks.1.attn.q_bias", "blocks.1.attn.log_scale", "head.linear.bias"} <= groups[False]
    assert {"class_embed.weight", "word_embed.weight", "blocks.0.attn.qkv.weight", "head.linear.weight"} <= groups[True]
    assert groups[True] | groups[False] == {name for name, _ in model.named_parameters()}
    assert not groups[True] & groups[False]


def test_the_mask_embedding_decays_and_frozen_parameters_are_in_no_group():
    settings = config("stage.name=masked")
    model = tiny_hmar(settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mask_"))
    groups = names_by_decay(model, build_adamw(model, settings, ALONE.device))
    assert "mask_embed" in groups[True]
    assert groups[True] | groups[False] == {n for n, _ in model.named_parameters() if n.startswith("mask_")}


def test_adamw_has_the_configured_betas_and_eps():
    settings = config("optim.betas=[0.8, 0.97]", "optim.eps=1e-6")
    optimizer = build_adamw(tiny_hmar(settings), settings, ALONE.device)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.97), 1e-6)}


@pytest.mark.parametrize(
    ("asked", "impl"),
    [
        (["precision.compute=bf16"], "triton"),
        (["precision.compute=bf16", "parallel.zero_stage=2"], "torch"),
        (["precision.compute=fp16"], "torch"),
        (["precision.compute=bf16", "optim.impl=torch"], "torch"),
    ],
)
def test_one_pass_is_chosen_where_it_can_be(asked, impl):
    pytest.importorskip("triton", reason="the kernel needs Triton")
    assert choose_adamw(config(*asked), torch.device("cuda"))[0] == impl
    assert choose_adamw(config(*asked), torch.device("cpu"))[0] == "torch"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (("optim.impl=triton", "precision.compute=fp16"), "is for precision.compute=bf16, not fp16"),
        (("optim.impl=triton", "parallel.zero_stage=2"), "is for parallel.zero_stage=1, not 2"),
        (("optim.impl=te", "parallel.zero_stage=3"), "counts its updates by call, of which parallel.zero_stage=3"),
    ],
)
def test_an_optimizer_is_refused_where_it_cannot_be(asked, reason):
    with pytest.raises(UserError, match=f"{reason}.*use optim.impl=torch"):
        config("precision.compute=bf16", *asked)


@pytest.mark.parametrize("impl", ["te", "apex"])
def test_fused_optimizers_need_a_gpu(impl):
    settings = config(f"optim.impl={impl}")
    with pytest.raises(UserError, match=f"optim.impl={impl} needs a CUDA GPU, not cpu; use optim.impl=torch"):
        build_adamw(tiny_hmar(settings), settings, torch.device("cpu"))


def test_the_other_apex_is_told_from_nvidias(monkeypatch):
    """The package `apex` of the index has no optimizers; NVIDIA's has `FusedAdam`, with updates counted by group."""
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    with pytest.raises(UserError, match="the package `apex` on PyPI is an unrelated project"):
        fused_adam("apex", torch.device("cuda"))

    class FusedAdam(torch.optim.SGD):
        def __init__(self, params, lr, betas, eps, adam_w_mode):
            super().__init__(params, lr=lr)
            self.asked = (betas, eps, adam_w_mode)

    monkeypatch.setitem(sys.modules, "apex.optimizers", ModuleType("apex.optimizers"))
    sys.modules["apex.optimizers"].FusedAdam = FusedAdam
    settings = config("optim.impl=apex", "optim.betas=[0.8, 0.97]")
    optimizer = build_adamw(tiny_hmar(settings), settings, torch.device("cuda"))
    assert optimizer.asked == ((0.8, 0.97), settings.optim.eps, True)
    assert [group["decays"] for group in optimizer.param_groups] == [True, False]
    set_steps(optimizer, 7)
    assert [group["step"] for group in optimizer.param_groups] == [7, 7]


# Steps: the engine around a stand-in for DeepSpeed


class StandIn:
    """Counts calls and answers with a given gradient norm."""

    def __init__(self, norm: float | None) -> None:
        self.norm = norm
        self.losses: list[torch.Tensor] = []
        self.steps = 0

    def backward(self, loss: torch.Tensor) -> None:
        self.losses.append(loss)

    def step(self) -> None:
        self.steps += 1

    def set_train_batch_size(self, images: int) -> None:
        self.images = images

    def get_global_grad_norm(self) -> float | None:
        return self.norm


def engine_with(norm: float | None, schedule: Schedule) -> Engine:
    engine = Engine.__new__(Engine)
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.AdamW([{"params": [p], "decays": p.ndim > 1} for p in parameters], lr=1.0)
    engine.zero = SimpleNamespace(optimizer=optimizer)
    engine.deepspeed, engine.schedule, engine.step = StandIn(norm), schedule, 0
    engine.skipped = engine.skipped_in_a_row = 0
    engine.batches, engine._images_at_once = BatchPlan.constant(12), 4
    engine._pipeline, engine._ema, engine.ema_decay, engine.fp8 = None, [], None, None
    return engine


class Losses:
    """An objective in which a batch is its loss."""

    def training(self, forward: object, batch: float) -> Scores:
        return Scores(torch.tensor([float(batch)]), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))


SCHEDULE = Schedule(
    total_steps=11, warmup_steps=4, peak_lr=0.5, warmup_start=0.0, flat_fraction=0.0, final_ratio=0.0,
    weight_decay=0.2, weight_decay_end=0.4,
)  # fmt: skip


def test_a_step_takes_every_micro_batch_and_gives_the_norm():
    engine = engine_with(0.75, SCHEDULE)
    norm, scored = engine.train_step([1, 2, 3], Losses())
    assert norm == 0.75
    assert [float(loss) for loss in engine.deepspeed.losses] == [1.0, 2.0, 3.0]
    assert [float(scores.loss) for scores in scored] == [1.0, 2.0, 3.0]
    assert (engine.deepspeed.steps, engine.step, engine.deepspeed.images) == (3, 1, 12)


def test_a_loss_that_is_not_finite_reaches_the_gradients_as_nan():
    engine = engine_with(0.75, SCHEDULE)
    engine.train_step([1, float("inf"), float("nan")], Losses())
    assert [math.isnan(float(loss)) for loss in engine.deepspeed.losses] == [False, True, True]


def test_each_step_has_its_learning_rate_and_only_the_decaying_group_its_weight_decay():
    engine = engine_with(1.0, SCHEDULE)
    decaying, other = engine.zero.optimizer.param_groups
    for step in range(3):
        assert engine.learning_rate == 0.125 * step
        engine.train_step([0], Losses())
        assert decaying["lr"] == other["lr"] == 0.125 * step
        assert decaying["weight_decay"] == SCHEDULE.decay(step)
        assert other["weight_decay"] == 0.0
    assert SCHEDULE.decay(2) > SCHEDULE.decay(0) == 0.2


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_counts_as_a_skipped_step(norm):
    engine = engine_with(norm, SCHEDULE)
    engine.step = 7
    for expected in (1, 2):
        engine.train_step([0], Losses())
        assert (engine.step, engine.skipped, engine.skipped_in_a_row) == (7 + expected, expected, expected)
    engine.deepspeed = StandIn(1.0)
    engine.train_step([0], Losses())
    assert (engine.step, engine.skipped, engine.skipped_in_a_row) == (10, 2, 0)


# CUDA graphs


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((), None),
        (("parallel.cuda_graphs=false",), "parallel.cuda_graphs=false"),
        (("precision.compute=fp32",), "with precision.compute=fp32 gradients may stay where the next replay writes"),
        (("precision.compute=fp16",), "with precision.compute=fp16 gradients may stay"),
        (("parallel.zero_stage=2",), "with parallel.zero_stage=2 gradients may stay"),
        (("parallel.zero_stage=3",), "ZeRO-3 gathers weights between the blocks"),
        (("parallel.tensor_parallel=2",), "with tensor_parallel > 1 blocks communicate"),
        (("parallel.pipeline_parallel=2",), "several micro-batches of a pipeline are under way at once"),
        (("model.attention.backend=reference",), "attention.backend=reference is not captured"),
        (("precision.fp8=linears", "parallel.recompute=full"), "recomputation in FP8 is not captured"),
        (
            ("precision.fp8=linears_and_attention", "precision.fp8_pad_head_dim=true"),
            "which heads attend in FP8 changes",
        ),
    ],
)
def test_blocks_are_captured_only_where_replays_are_right(overrides, reason):
    settings = load_config(None, [*TINY, "precision.compute=bf16", "parallel.cuda_graphs=true", *overrides])
    found = why_not(settings, "cuda")
    assert (found is None) if reason is None else (reason in found)
    assert "need a CUDA GPU, not cpu" in why_not(settings, "cpu")
