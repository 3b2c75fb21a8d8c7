"""The transformer against SPEC §3: sizes, initial weights, and its whole forward against a float64 numpy derivation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    SCHEDULE,
    N,
    NumpyHMAR,
    V,
    Z,
    random_normal,
    tiny_config,
    tiny_hmar,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hmar_mega import flops, sequence
from hmar_mega.config import ModelConfig
from hmar_mega.config_io import load_config
from hmar_mega.model import hmar, layer
from hmar_mega.model.graphs import BlockGraphs
from hmar_mega.model.hmar import HMAR, Head, decays, mask_branch_names, pad_to_multiple
from hmar_mega.model.initialize import Initializer
from hmar_mega.model.layers_torch import TorchLayers
from hmar_mega.model.stage import split_layers
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule

# ----------------------------------------------------------------------------------------------------------- sizes


def on_meta(resolution: int = 256, mask_branch: bool = False, **model: object) -> HMAR:
    with torch.device("meta"):
        config = ModelConfig.model_validate(model)
        return HMAR(config, ScaleSchedule(PATCH_NUMS[resolution]), 4096, 32, mask_branch=mask_branch)


def count(model: HMAR) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("depth", "next_scale", "with_masks"),
    [(16, 310.28, 467.69), (20, 600.92, 845.52), (24, 1033.40, 1384.33), (30, 2010.02, 2556.32)],
)
def test_published_parameter_counts_in_millions(depth: int, next_scale: float, with_masks: float):
    assert round(count(on_meta(depth=depth)) / 1e6, 2) == next_scale
    assert round(count(on_meta(depth=depth, mask_branch=True)) / 1e6, 2) == with_masks


@pytest.mark.parametrize("depth", [1, 6, 16, 24])
def test_parameter_count_in_closed_form(depth: int):
    width = 64 * depth
    closed = depth * (18 * width**2 + 14 * width + depth) + 2 * width**2 + 5823 * width + 4096
    assert count(on_meta(depth=depth)) == closed


def test_shared_adaln_keeps_one_linear_and_a_table_a_block():
    width, depth, tokens, scales = 2304, 36, 2240, 10
    block = (
        3 * width * width + 2 * width  # qkv, with biases of q and v
        + depth  # a scale a head
        + width * width + width  # projection
        + 8 * width * width + 4 * width + width  # feed-forward
        + 6 * width  # its row of the AdaLN table
    )  # fmt: skip
    shared = 6 * width * width + 6 * width
    embeddings = (32 + 1) * width + 1001 * width + width + tokens * width + scales * width
    head = 2 * width * width + 2 * width + 4096 * width + 4096
    expected = depth * block + shared + embeddings + head
    assert count(on_meta(512, depth=36, shared_aln=True)) == expected


def test_the_mask_branch_has_eight_blocks_from_depth_16_on_and_half_of_them_below():
    assert list(on_meta(depth=16, mask_branch=True).mask_layer_numbers) == list(range(8, 16))
    assert list(on_meta(depth=30, mask_branch=True).mask_layer_numbers) == list(range(22, 30))
    assert list(on_meta(depth=6, mask_branch=True).mask_layer_numbers) == [3, 4, 5]


def test_the_mask_branch_has_a_next_scale_twin_for_every_tensor_but_its_embedding():
    model = on_meta(depth=4, mask_branch=True)
    twins = mask_branch_names(n for n, _ in model.named_parameters())
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert {n for n in shapes if n.startswith("mask_")} == {*twins, "mask_embed"}
    assert all(shapes[n] == shapes[twin] and not twin.startswith("mask") for n, twin in twins.items())


def test_weight_decay_spares_biases_vectors_and_tables():
    model = on_meta(depth=4, mask_branch=True, shared_aln=True)
    spared = {n for n, p in model.named_parameters() if not decays(n, p)}
    named = {n for n in spared if not n.endswith(".bias")}
    blocks = [f"blocks.{i}" for i in range(4)] + [f"mask_blocks.{i}" for i in (2, 3)]
    per_block = {f"{b}.{n}" for b in blocks for n in ("attn.log_scale", "attn.q_bias", "attn.v_bias", "ada_gss")}
    assert named == {"pos_start", "pos_embed", "level_embed", *per_block}
    assert all(n in spared for n, _ in model.named_parameters() if n.endswith("bias"))
    assert not {"class_embed.weight", "mask_embed", "word_embed.weight", "shared_ada_lin.weight"} & spared


def test_pad_to_multiple():
    assert [pad_to_multiple(n, 4) for n in (1, 4, 5, 4096)] == [4, 4, 8, 4096]


def test_flops_of_a_training_step_by_hand():
    config = load_config("demo")
    width, depth, vocabulary, tokens = 128, 4, 256, 21
    block = 3 * width**2 + width**2 + 2 * 4 * width**2
    matmuls = 2 * (depth * block + width * vocabulary) * tokens  # forward: a multiply and an add a weight
    attention = depth * 2 * 2 * width * (1 + 4**2 + 16**2)  # q·k and weights·v over Σ p_k⁴ pairs
    assert flops.train_flops_per_image(config) == 3 * (matmuls + attention)
    assert flops.device_peak(torch.device("cpu")) is None


# ------------------------------------------------------------------------------------------------- initial weights


def weights(**model: object) -> tuple[HMAR, Iterator[tuple[str, Tensor, float]]]:
    """A model, and (name, values, expected standard deviation) of every part of every random tensor."""
    config = tiny_config(width=256, heads=4, depth=6, mask_layers=2, gamma_init=1e-3, **model)
    built = tiny_hmar(config, random=False)
    base = math.sqrt(1 / (3 * 256))

    def parts() -> Iterator[tuple[str, Tensor, float]]:
        for name, parameter in built.named_parameters():
            values = parameter.detach()
            if name.endswith(("bias", "log_scale")):
                continue
            if name.endswith("ada_gss"):
                yield f"{name} γ", values[0, 0, :2], 1e-3 / math.sqrt(256)
                yield f"{name} s b", values[0, 0, 2:], 0.5 / math.sqrt(256)
            elif "blocks." in name and name.endswith("ada_lin.weight"):
                yield f"{name} γ1", values[:256], base * 1e-3
                yield f"{name} γ2", values[256:512], base * 1e-3
                for i, chunk in enumerate(["s1", "s2", "b1", "b2"], 2):
                    yield f"{name} {chunk}", values[256 * i : 256 * (i + 1)], base * 0.5
            elif name.endswith("head.ada_lin.weight"):
                yield name, values, base * 0.5
            elif name.endswith("head.linear.weight"):
                yield name, values, base * 0.02
            elif name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
                yield name, values, base / math.sqrt(2 * 6)
            else:
                yield name, values, base

    return built, parts()


@pytest.mark.parametrize("shared_aln", [False, True])
def test_initial_standard_deviations(shared_aln: bool):
    _, parts = weights(shared_aln=shared_aln)
    checked = 0
    for name, values, std in parts:
        error = 5 / math.sqrt(2 * values.numel())  # five standard errors of a standard deviation
        assert float(values.std()) == pytest.approx(std, rel=error), name
        assert abs(float(values.mean())) < 5 * std / math.sqrt(values.numel()), name
        checked += 1
    assert checked > 50


def test_initial_biases_are_zero_and_scales_start_at_ln_4():
    model, _ = weights()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        if name.endswith("log_scale"):
            torch.testing.assert_close(parameter.detach(), torch.full((4,), math.log(4)))
            assert parameter.shape == (4,)


def test_initial_values_belong_to_seed_and_name():
    first, again, other = (tiny_hmar(tiny_config("masked"), seed=s, random=False).state_dict() for s in (1, 1, 2))
    next_scale = tiny_hmar(tiny_config("next_scale"), seed=1, random=False).state_dict()
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(torch.equal(first[n], next_scale[n]) for n in next_scale)
    assert not torch.equal(first["class_embed.weight"], other["class_embed.weight"])
    qkv = [first[f"{b}.attn.qkv.weight"] for b in ("blocks.0", "blocks.1", "mask_blocks.1")]
    assert not any(torch.equal(a, b) for a, b in ((qkv[0], qkv[1]), (qkv[1], qkv[2])))


def test_initialisation_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    tiny_hmar(tiny_config(), random=False)
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------------- forward


def inputs(batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.tensor([1, CLASSES])[:batch]  # a class and the unconditional one
    given, features = random_normal(batch, N - 1, Z, seed=seed), random_normal(batch, N - 1, Z, seed=seed + 1)
    return labels, given, features, sequence.draw_masks(torch.arange(batch), seed, SCHEDULE)


CASES = pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])


@CASES
@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("branch", ["next_scale", "masked"])
def test_logits_are_those_of_the_specification(pattern: str, shared_aln: bool, branch: str):
    config = tiny_config("next_scale", pattern, shared_aln=shared_aln, depth=3, mask_layers=2)
    model = tiny_hmar(config, mask_branch=branch == "masked")
    labels, given, features, mask = inputs()
    extra = (features, mask) if branch == "masked" else ()
    with torch.no_grad():
        logits = model(labels, given, *extra, branch=branch)
    assert logits.shape == (N, 2, V)
    assert logits.dtype == torch.float32
    yardstick = NumpyHMAR(model)
    for b in range(2):
        extra_b = [x[b].double().numpy() if x.is_floating_point() else x[b].numpy() for x in extra]
        expected = yardstick.logits(int(labels[b]), given[b].double().numpy(), *extra_b)
        error = np.abs(logits[:, b].numpy() - expected).max() / np.abs(expected).max()
        assert error < 1e-5
        assert expected.std() > 0.1


def test_heads_scale_beyond_100_is_cut():
    model = tiny_hmar(tiny_config())
    with torch.no_grad():
        for block in model.blocks.values():
            block.attn.log_scale.fill_(20.0)
            assert block.attn.q_scale().tolist() == pytest.approx([100.0, 100.0], rel=1e-6)
    labels, given, *_ = inputs()
    with torch.no_grad():
        logits = model(labels, given)
    expected = NumpyHMAR(model).logits(1, given[0].double().numpy())
    assert np.abs(logits[:, 0].numpy() - expected).max() / np.abs(expected).max() < 1e-4


def test_a_scale_below_the_limit_gets_a_gradient_and_one_beyond_it_none():
    model = tiny_hmar(tiny_config())
    with torch.no_grad():
        model.blocks["0"].attn.log_scale.copy_(torch.tensor([1.0, 5.0]))
    labels, given, *_ = inputs()
    model(labels, given).square().sum().backward()
    assert model.blocks["0"].attn.log_scale.grad[0] != 0
    assert model.blocks["0"].attn.log_scale.grad[1] == 0


@CASES
def test_samples_of_a_batch_do_not_see_each_other(pattern: str):
    model = tiny_hmar(tiny_config("next_scale", pattern))
    labels, given, *_ = inputs()
    with torch.no_grad():
        both = model(labels, given)
        changed = model(torch.tensor([1, 2]), torch.stack([given[0], given[0]]))
    torch.testing.assert_close(changed[:, 0], both[:, 0])
    assert not torch.allclose(changed[:, 1], both[:, 1])


def test_masked_tokens_give_way_to_the_mask_embedding():
    model = tiny_hmar(tiny_config())
    labels, given, features, mask = inputs()
    noise = torch.where(mask[..., None], 100.0, 0.0)
    with torch.no_grad():
        before = model(labels, given, features, mask, branch="masked")
        hidden = model(labels, given, features + noise, mask, branch="masked")
        model.mask_embed.add_(1.0)
        moved = model(labels, given, features, mask, branch="masked")
    assert torch.equal(before, hidden)
    assert not torch.allclose(before, moved)


def test_the_branches_share_their_base_and_nothing_else():
    model = tiny_hmar(tiny_config(depth=4, mask_layers=2))
    labels, given, features, mask = inputs()
    next_scale = model(labels, given).sum()
    masked = model(labels, given, features, mask, branch="masked").sum()

    def reached(loss: Tensor) -> set[str]:
        model.zero_grad()
        loss.backward()
        return {n.split(".")[0] + "." + n.split(".")[1] if "." in n else n for n, p in model.named_parameters()
                if p.grad is not None}  # fmt: skip

    ours, masks = reached(next_scale), reached(masked)
    assert {"blocks.0", "blocks.1", "blocks.2", "blocks.3", "head.linear"} <= ours
    assert not any(n.startswith("mask_") for n in ours)
    assert {"blocks.0", "blocks.1", "mask_blocks.2", "mask_blocks.3", "mask_head.linear", "mask_embed"} <= masks
    assert not {"blocks.2", "blocks.3", "head.linear"} & masks


def test_stage_two_gradients_flow_through_the_frozen_base():
    model = tiny_hmar(tiny_config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mask_"))
    labels, given, features, mask = inputs()
    model(labels, given, features, mask, branch="masked").square().sum().backward()
    assert model.mask_embed.grad.abs().sum() > 0
    assert model.blocks["0"].attn.qkv.weight.grad is None


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("branch", ["next_scale", "masked"])
def test_drop_path_scales_each_samples_two_residuals(shared_aln: bool, branch: str):
    model = tiny_hmar(tiny_config(shared_aln=shared_aln))
    labels, given, features, mask = inputs()
    extra = (features, mask) if branch == "masked" else ()
    factors = torch.tensor([[[1.5, 1.0], [0.0, 1.0]], [[1.0, 1.0], [2.0, 0.0]]])  # layer, residual, sample
    with torch.no_grad():
        assert torch.equal(
            model(labels, given, *extra, branch=branch),
            model(labels, given, *extra, branch=branch, drop_path=torch.ones(2, 2, 2)),
        )
        logits = model(labels, given, *extra, branch=branch, drop_path=factors)
    for b in range(2):
        extra_b = [x[b].numpy() for x in extra] or [None, None]
        expected = NumpyHMAR(model).logits(int(labels[b]), given[b].numpy(), *extra_b, factors[:, :, b].numpy())
        assert np.abs(logits[:, b].numpy() - expected).max() / np.abs(expected).max() < 1e-5


def test_bf16_weights_still_give_float32_logits():
    model = tiny_hmar(tiny_config())
    labels, given, features, mask = inputs()
    with torch.no_grad():
        full = model(labels, given)
        model.to(torch.bfloat16)
        logits = model(labels, given)
        masked = model(labels, given, features, mask, branch="masked", drop_path=torch.ones(2, 2, 2))
    assert logits.dtype == masked.dtype == torch.float32
    assert (logits - full).abs().max() / full.abs().max() < 0.1


def test_shared_conditions_reach_every_block():
    """With shared AdaLN one linear moves all blocks, and each block's own table moves only itself."""
    model = tiny_hmar(tiny_config("next_scale", shared_aln=True))
    labels, given, *_ = inputs()
    model(labels, given).square().sum().backward()
    assert model.shared_ada_lin.weight.grad.abs().sum() > 0
    assert all(b.ada_gss.grad.abs().sum() > 0 for b in model.blocks.values())
    assert not hasattr(model.blocks["0"], "ada_lin")


# ------------------------------------------------------------------------------------------------- cross-entropy


class LargestFloat32(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return out


def head_and_inputs() -> tuple[Head, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = Head("head", 8, 512, TorchLayers(), Initializer(0, 0.3))
    x = torch.randn(40, 3, 8, generator=generator, requires_grad=True)
    cond = torch.randn(3, 8, generator=generator, requires_grad=True)
    return head, x, cond, torch.randint(512, (40, 3), generator=generator)


def test_cross_entropy_in_chunks_is_that_of_whole_logits(monkeypatch):
    results = []
    for size in (2**27, 4 * 3 * 512 * 7, 1):  # all rows, 7 at a time, one at a time
        monkeypatch.setattr(hmar, "LOGITS_CHUNK_BYTES", size)
        head, x, cond, targets = head_and_inputs()
        losses = head(x, cond, targets)
        (losses * torch.linspace(0.5, 2, 120).view(40, 3)).sum().backward()
        gradients = [x.grad, cond.grad, *(p.grad for p in head.parameters())]
        results.append([losses.detach(), *gradients])
        expected = torch.nn.functional.cross_entropy(head(x, cond).flatten(0, 1), targets.flatten(), reduction="none")
        torch.testing.assert_close(losses.flatten(), expected)
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [5, 40])
def test_no_more_float32_logits_exist_at_a_time_than_a_chunk_has(monkeypatch, rows):
    monkeypatch.setattr(hmar, "LOGITS_CHUNK_BYTES", 4 * 3 * 512 * rows)
    head, x, cond, targets = head_and_inputs()
    with LargestFloat32() as seen:
        head(x, cond, targets).sum().backward()
    assert seen.largest == 3 * 512 * rows


@given(depth=st.integers(1, 64), runs=st.integers(1, 64))
def test_layers_are_cut_into_runs_of_almost_equal_size(depth: int, runs: int):
    if runs > depth:
        with pytest.raises(ValueError, match="use 1 to"):
            split_layers(depth, runs)
        return
    stages = split_layers(depth, runs)
    assert [layer for stage in stages for layer in stage.layers] == list(range(depth))
    sizes = [len(stage.layers) for stage in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert [s.first for s in stages] == [True] + [False] * (runs - 1)
    assert [s.last for s in stages] == [False] * (runs - 1) + [True]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(recompute: hmar.Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and GELU, or whole blocks, computed again in the backward pass: the same gradients, bit by bit."""
    torch.manual_seed(1)
    given = {
        "labels_B": torch.randint(CLASSES, (3,)),
        "teacher_input_BNZ": torch.randn(3, N - 1, Z),
        "targets_BN": torch.randint(V, (3, N)),
    }
    gradients, calls = [], []
    gelu = layer.bias_gelu
    monkeypatch.setattr(layer, "bias_gelu", lambda *given: calls.append(0) or gelu(*given))
    for choice in ("none", recompute):
        model = tiny_hmar(tiny_config("next_scale")).train()
        model.set_recompute(choice)
        model(**given).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(calls) == (1 + 2) * model.config.depth
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_captured_function_is_the_blocks(recompute: bool, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA graphs capture, run without capture: parts chained, parameters as inputs, the same gradients."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda functions, samples, **_: functions)
    gradients = []
    for parts in (None, 1):
        model = tiny_hmar(tiny_config("next_scale", shared_aln=shared)).train()
        model.graphs = None if parts is None else BlockGraphs(parts)
        model.set_recompute("full" if recompute else "none")
        torch.manual_seed(2)
        factors = torch.rand(model.config.depth, 2, 3)
        for _ in range(2):  # the second finds what the first captured
            labels, features = torch.randint(CLASSES, (3,)), torch.randn(3, N - 1, Z)
            targets = torch.randint(V, (3, N))
            model(labels, features, drop_path=factors, targets_BN=targets).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
