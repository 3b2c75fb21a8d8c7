"""Planning: parameters, activations, communication and bubbles against real models, autograd and values by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.errors import UserError
from hmar_mega.model.hmar import HMAR, decays
from hmar_mega.model.layers_torch import TorchLayers
from hmar_mega.model.stage import BALLAST
from hmar_mega.planning import activations, rates
from hmar_mega.planning.cluster import Cluster, load_cluster, packaged_clusters
from hmar_mega.planning.cost import bubble_fraction, cost_of, link, ring_bytes
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.layouts import calibration, legal_layouts
from hmar_mega.planning.memory import memory_of, rank_state
from hmar_mega.planning.tensors import parameter_count, rank_parameters, rank_runs
from hmar_mega.planning.workload import Workload

TINY = [
    "model.depth=4", "model.width=64", "model.heads=4", "model.num_classes=10", "schedule.resolution=64",
    "schedule.patch_nums=[1,2,4]", "tokenizer.codebook_size=61", "data.global_batch_size=4",
]  # fmt: skip


def work_of(name: str | None, *overrides: str) -> Workload:
    return Workload.of(load_config(name, overrides))


def grid(**sizes: int | bool | str) -> Layout:
    """A layout of one GPU but for what is given."""
    one: dict[str, int | bool | str] = {
        "tensor": 1, "sequence": False, "pipeline": 1, "virtual": 1, "data": 1, "zero": 1, "recompute": "none",
        "micro_batch": 1, "accumulation": 1,
    }  # fmt: skip
    return Layout(**{**one, **sizes})  # type: ignore[arg-type]


# FP8


@pytest.mark.parametrize("zero", [1, 3])
def test_fp8_linears_keep_two_bytes_a_weight_and_change_the_time_of_their_products_alone(zero: int) -> None:
    layout, h100 = grid(data=4, tensor=2, zero=zero, micro_batch=8), load_cluster("h100")
    bf16, fp8 = (work_of("train/d16-256", f"precision.fp8={how}") for how in ("none", "linears"))
    before, after = (memory_of(work, layout, 0) for work in (bf16, fp8))
    # of 12 C² weights of a block and tensor-parallel rank, C = 1024
    assert after.state - before.state == after.fp8 == 2 * 16 * 12 * 1024**2 / 2
    slow, fast = (cost_of(work, layout, h100) for work in (bf16, fp8))
    positions, head = 8 * 680, 4 * 2 * 8 * 680 * 1024 * 4096 / 2 / (h100.bf16_tflops * 1e12)
    blocks = 6 * positions * 16 * 12 * 1024**2 / 2 / (h100.bf16_tflops * 1e12)
    assert slow.products == pytest.approx(blocks + head)
    assert fast.products == pytest.approx(0.9217 * blocks + head, rel=1e-4)
    assert fast.attention == slow.attention


def test_fp8_copies_of_the_second_stage_are_those_of_the_branch_that_runs() -> None:
    work = work_of("train/d16-256", "stage.name=masked", "precision.fp8=linears")
    assert memory_of(work, grid(), 0).fp8 == 2 * 16 * 12 * 1024**2


# Parameters


@pytest.mark.parametrize(
    ("depth", "millions", "with_mask_branch"),
    [(16, 310.28, 467.69), (20, 600.92, 845.52), (24, 1033.40, 1384.33), (30, 2010.02, 2556.32)],
)
def test_parameter_counts_are_the_published_ones(depth: int, millions: float, with_mask_branch: float) -> None:
    """SPEC §3: the table, and the closed form d(18C² + 14C + d) + 2C² + 5823C + 4096."""
    count, width = parameter_count(work_of(f"train/d{depth}-256")), 64 * depth
    assert count == depth * (18 * width**2 + 14 * width + depth) + 2 * width**2 + 5823 * width + 4096
    assert round(count / 1e6, 2) == millions
    assert round(parameter_count(work_of(f"train/d{depth}-256", "stage.name=masked")) / 1e6, 2) == with_mask_branch


def test_the_10b_projection_has_ten_billion_parameters() -> None:
    assert parameter_count(work_of("train/10b-512")) == pytest.approx(9.83e9, rel=1e-3)


@pytest.mark.parametrize("overrides", [[], ["model.shared_aln=true"], ["stage.name=masked"], ["model.ffn_ratio=2.5"]])
@pytest.mark.parametrize("name", [None, "train/d36-s-512"])
def test_parameters_are_those_of_the_built_model(name: str | None, overrides: list[str]) -> None:
    """Names, shapes and the optimizer's groups, of a model built without memory."""
    config = load_config(name, [*(TINY if name is None else []), *overrides])
    with torch.device("meta"):
        model = HMAR(
            config.model, config.schedule.scales, config.tokenizer.codebook_size, config.tokenizer.latent_channels,
            mask_branch=config.stage.name == "masked",
        )  # fmt: skip
    real = {n: (tuple(p.shape), decays(n, p)) for n, p in model.named_parameters()}
    planned = {p.name: (p.shape, p.decays) for p in rank_parameters(Workload.of(config))}
    assert planned == real


@given(tensor=st.sampled_from([1, 2, 4]), pipeline=st.integers(1, 4), virtual=st.integers(1, 3), masked=st.booleans())
def test_ranks_hold_the_model_between_them(tensor: int, pipeline: int, virtual: int, masked: bool) -> None:
    """Every parameter is on one pipeline rank; tensor-parallel parts make the whole, but for replicas and padding."""
    work = work_of(None, *TINY, "model.depth=12", *(["stage.name=masked"] if masked else []))
    whole = {p.name: p for p in rank_parameters(work)}
    held = [p for rank in range(pipeline) for p in rank_parameters(work, tensor, pipeline, virtual, rank)]
    parts = [p for p in held if p.name not in BALLAST]
    assert masked or parts == held
    assert sorted(p.name for p in parts) == sorted(whole)
    for part in parts:
        ratio = part.numel * tensor / whole[part.name].numel
        padded = (
            part.name in ("class_embed.weight", "head.linear.weight", "head.linear.bias") or "mask_head" in part.name
        )
        assert ratio in (1, tensor) or (padded and 1 <= ratio < 1.2)


@given(pipeline=st.integers(1, 8), virtual=st.integers(1, 4))
def test_every_run_lies_on_one_rank(pipeline: int, virtual: int) -> None:
    on_ranks = sorted(s for rank in range(pipeline) for s in rank_runs(rank, pipeline, virtual))
    assert on_ranks == list(range(pipeline * virtual))


def test_the_second_of_two_ranks_with_two_chunks_has_the_second_and_the_last_run() -> None:
    assert rank_runs(1, 2, 2) == [1, 3]


# State


@pytest.mark.parametrize(
    ("compute", "zero", "bytes_a_parameter"),
    [
        ("bf16", 1, 2 + 4 + 12 / 8), ("fp32", 1, 4 + 4 + 12 / 8), ("fp16", 1, 2 + 2 + 12 / 8),
        ("bf16", 2, 2 + 4 / 8 + 12 / 8), ("bf16", 3, 2 / 8 + 4 / 8 + 12 / 8),
    ],
)  # fmt: skip
def test_state_takes_the_bytes_of_the_table(compute: str, zero: int, bytes_a_parameter: float) -> None:
    """The table of memory.py, over 8 ranks; padding and ZeRO 3's whole small tensors are 1 % here."""
    work = work_of("train/d16-256", f"precision.compute={compute}")
    memory = memory_of(work, grid(data=8, zero=zero), 0)
    held = memory.weights + memory.gradients + memory.optimizer
    assert held == pytest.approx(bytes_a_parameter * parameter_count(work), rel=0.01)


def test_groups_are_padded_to_twice_the_data_ranks() -> None:
    state = rank_state(work_of(None, *TINY), 1, 1, 1, 0, 3, 1)
    assert [n % 6 for n in state.groups] == [0, 0]
    assert 0 < sum(state.groups) - state.total < 12
    assert state.owned == state.trained // 3


def test_frozen_parameters_have_no_gradients_and_no_moments() -> None:
    config = load_config("train/d16-256", ["stage.name=masked"])
    work = Workload.of(config)
    memory, trained = memory_of(work, grid(), 0), 467_691_904 - 310_283_520
    assert memory.gradients == pytest.approx(2 * trained, abs=8)
    assert memory_of(work, grid(data=2), 0).gradients == pytest.approx(4 * trained, abs=16)
    assert memory.optimizer == pytest.approx(12 * trained, abs=48)
    assert memory.weights == pytest.approx(2 * 467_691_904, abs=8)


# Activations


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_what_autograd_saves(compute: str, backend: str, recompute: str) -> None:
    """Within 5 %, counting the storage behind every saved tensor once."""
    config = load_config(
        None,
        [
            "model.depth=3", "model.width=128", "model.heads=2", "model.num_classes=10", "schedule.resolution=128",
            "schedule.patch_nums=[1,2,3,4,6,8]", "tokenizer.codebook_size=64", "data.global_batch_size=4",
            f"precision.compute={compute}", f"model.attention.backend={backend}", f"parallel.recompute={recompute}",
        ],
    )  # fmt: skip
    work, one = Workload.of(config, "cpu"), Layout.of(config, 1)
    head, logits = activations.head_bytes(work, one, chunk=None)
    planned = 3 * activations.block_bytes(work, one).kept(recompute) + head + logits / activations.LOGITS_COPIES
    assert planned == pytest.approx(saved_bytes(config), rel=0.05)


def saved_bytes(config: Config) -> int:
    """Bytes that a forward pass saves, parameters apart; of hooks inside one another only the inner ones are called."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision.compute]
    scales, batch, latents = config.schedule.scales, config.data.global_batch_size, config.tokenizer.latent_channels
    model = HMAR(config.model, scales, config.tokenizer.codebook_size, latents).to(dtype)
    model.set_recompute(config.parallel.recompute)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: list[Tensor] = []  # keeps them alive, so that no address is used twice

    hooks = torch.autograd.graph.saved_tensors_hooks

    def counting(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        def keep(tensor: Tensor) -> Any:
            packed = pack(tensor)
            saved.extend([packed] if isinstance(packed, Tensor) else [])
            return packed

        return hooks(keep, unpack)

    labels = torch.zeros(batch, dtype=torch.long)
    given = torch.randn(batch, scales.num_tokens - 1, latents)
    drop_path = torch.ones(config.model.depth, 2, batch)
    targets = torch.zeros(scales.num_tokens, batch, dtype=torch.long)
    with (
        mock.patch.object(torch.autograd.graph, "saved_tensors_hooks", counting),
        counting(lambda tensor: tensor, lambda tensor: tensor),
    ):
        TorchLayers().cross_entropy(model(labels, given, drop_path=drop_path), targets)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for address, size in storages.items() if address not in own)


def test_sequence_parallelism_cuts_what_lies_outside_the_tensor_parallel_regions() -> None:
    work = work_of("train/d16-256")
    kept = [
        activations.block_bytes(work, grid(tensor=4, sequence=sequence, micro_batch=8)).none
        for sequence in (False, True)
    ]
    outside = 680 * 8 * 6 * 1024 * 2
    assert kept[0] - kept[1] == pytest.approx(outside * 3 / 4)


def test_a_block_on_a_gpu_keeps_the_units_of_the_table() -> None:
    """18 and 12 tensors of N·B·C, and three float32 rows a head for the attention, give or take the conditions."""
    work, layout = work_of("train/d16-256"), grid(micro_batch=64)
    block, unit, rows = activations.block_bytes(work, layout), 64 * 680 * 1024 * 2, 12 * 64 * 680 * 16
    assert block.none - rows == pytest.approx(18 * unit, rel=2e-3)
    assert block.selective - rows == pytest.approx(12 * unit, rel=2e-3)
    assert activations.head_bytes(work, layout, chunk=None) == (3 * unit, 64 * 680 * 4096 * 2)
    assert activations.head_bytes(work, grid(tensor=2, micro_batch=64), chunk=None)[1] == 3 * 64 * 680 * 2048 * 4


def test_graphs_hold_gradients_and_copies_and_lend_nothing_to_the_update() -> None:
    settings = ("train/d16-256", "optim.impl=torch")
    work, without = (work_of(*settings, f"parallel.cuda_graphs={how}") for how in ("true", "false"))
    row, blocks = 8 * 680 * 1024 * 2, 16 * (18 * 1024**2 + 14 * 1024 + 16)
    assert activations.graph_bytes(work, grid(micro_batch=8)) == 3 * row + 2 * blocks
    assert activations.graph_bytes(work, grid(micro_batch=8, data=2)) == 4 * 3 * row + 2 * blocks
    for eager in (grid(tensor=2), grid(pipeline=2), grid(zero=3)):
        assert activations.graph_bytes(work, eager) == 0
    graphs, eager = (memory_of(w, grid(micro_batch=8), 0) for w in (work, without))
    assert eager.training == eager.state + max(eager.activations + eager.logits + eager.buffers, eager.step)
    assert graphs.training - graphs.state - graphs.activations - graphs.graphs == graphs.step == eager.step
    assert activations.graph_bytes(Workload.of(load_config("train/d16-256"), "cpu"), grid()) == 0


def test_one_pass_over_the_gradients_of_one_micro_batch_needs_no_sums() -> None:
    """Weights and gradients in bf16, masters and moments, and nothing to copy; several micro-batches are summed."""
    work, torch_work = work_of("train/d16-256"), work_of("train/d16-256", "optim.impl=torch")
    alone, summed = memory_of(work, grid(), 0), memory_of(work, grid(accumulation=2), 0)
    assert (alone.gradients, alone.buffers, alone.step) == (alone.weights, 0, 0)
    assert summed.gradients == memory_of(torch_work, grid(), 0).gradients == 2 * alone.gradients
    assert summed.step == 0 < memory_of(torch_work, grid(), 0).step
    for other in (grid(data=2), grid(pipeline=2)):
        assert memory_of(work, other, 0).gradients == memory_of(torch_work, other, 0).gradients


@pytest.mark.parametrize(
    ("pipeline", "virtual", "accumulation", "rank", "chunks"),
    [(1, 1, 8, 0, 1), (4, 1, 8, 0, 4), (4, 1, 8, 3, 1), (4, 1, 2, 0, 2), (4, 2, 8, 0, 11), (4, 2, 8, 3, 5)],
)
def test_micro_batches_in_flight(pipeline: int, virtual: int, accumulation: int, rank: int, chunks: int) -> None:
    """1F1B: pp − rank; interleaved: 2(pp − rank − 1) + (vpp − 1)·pp to warm up, and one."""
    shape = grid(pipeline=pipeline, virtual=virtual, accumulation=accumulation)
    assert activations.in_flight(shape, rank) == chunks


# Cost


def test_bubble_is_that_of_the_interleaved_schedule() -> None:
    """(pp − 1)/(vpp · m), Narayanan et al."""
    assert bubble_fraction(4, 1, 8) == 3 / 8
    assert bubble_fraction(4, 2, 8) == 3 / 16
    assert bubble_fraction(1, 1, 8) == 0


def test_a_ring_sends_all_but_its_own_part() -> None:
    assert ring_bytes(800, 8) == 700
    assert ring_bytes(800, 1) == 0


def test_groups_that_leave_a_node_share_its_network() -> None:
    cluster = load_cluster("h100-8x8")
    assert link(cluster, 8, 1).bandwidth == 360e9
    assert link(cluster, 64, 1).bandwidth == 8 * 42e9
    assert link(cluster, 16, 4).bandwidth == 2 * 42e9
    assert link(cluster, 8, 8).bandwidth == 42e9


def test_communication_volumes_of_a_step() -> None:
    """In bf16: ZeRO 1 all-reduces gradients and gathers weights; a tensor-parallel block has four all-reduces."""
    work, cluster = work_of("train/d16-256"), load_cluster("h100-8x1")
    count = parameter_count(work)
    data = cost_of(work, grid(data=8, micro_batch=4), cluster)
    assert data.data_bytes == pytest.approx(3 * 2 * count * 7 / 8, rel=1e-3)
    assert data.tensor_bytes == 0
    zero3 = cost_of(work, grid(data=8, micro_batch=4, zero=3, accumulation=2), cluster)
    assert zero3.data_bytes == pytest.approx(2 * 2 * 2 * count * 7 / 8, rel=5e-3)  # small enough to stay gathered
    large = work_of("train/d30-256")
    count = parameter_count(large)
    zero3 = cost_of(large, grid(data=8, micro_batch=4, zero=3), cluster)
    assert zero3.data_bytes == pytest.approx(2 * (2 * count + count - 5e8) * 7 / 8, rel=5e-3)
    tensor = cost_of(work, grid(tensor=2, micro_batch=4, accumulation=3), cluster)
    activation = 680 * 4 * 1024 * 2
    assert tensor.tensor_bytes == 3 * (4 * 16 + 1) * 2 * activation / 2  # and one of the head's input
    pipeline = cost_of(work, grid(pipeline=2, micro_batch=4, accumulation=3), cluster)
    assert pipeline.pipeline_bytes == 3 * 681 * 4 * 1024 * 2  # the first stage sends on, the last one back
    pipeline = cost_of(work, grid(pipeline=4, micro_batch=4, accumulation=3), cluster)
    assert pipeline.pipeline_bytes == 3 * 2 * 681 * 4 * 1024 * 2


def test_the_bubble_of_a_step_is_its_share_of_the_work() -> None:
    work, cluster = work_of("train/d16-256"), load_cluster("h100-8x1")
    cost = cost_of(work, grid(pipeline=4, micro_batch=8, accumulation=8), cluster)
    working = cost.products + cost.attention + cost.elementwise + cost.host
    assert cost.bubble == pytest.approx(working * 3 / 8)


def test_attention_takes_the_measured_times_at_the_measured_shapes() -> None:
    for row in rates.ATTENTION:
        flops = row.flops_per_call * row.scales
        assert rates.attention_seconds(flops, row.scales, 778, False) * 1e3 == pytest.approx(row.forward_ms, rel=0.08)
        assert rates.attention_seconds(flops, row.scales, 778, True) * 1e3 == pytest.approx(row.backward_ms, rel=0.08)


def test_a_profiled_step_is_predicted_part_by_part() -> None:
    """ms of d16 and d24 at 256 px on an H100: products, attention, elementwise with the head's logits, and update."""
    measured = {("train/d16-256", 64): (70.4, 13.4, 22.5, 15), ("train/d24-256", 32): (114.9, 15.3, 27.8, 32)}
    for (name, batch), parts in measured.items():
        cost = cost_of(work_of(name, "optim.impl=torch"), grid(micro_batch=batch), load_cluster("h100"))
        predicted = [1e3 * s for s in (cost.products, cost.attention, cost.elementwise, cost.update)]
        assert predicted == pytest.approx(parts, rel=0.12)
        assert cost.host == 0


def test_steps_with_graphs_and_one_pass_are_predicted_as_they_were_measured() -> None:
    """ms and peak GB of d16 and d24 at 256 px, selective recomputation, on an H100 (benchmarks/results/training.md)."""
    measured = {("train/d16-256", 64): (140.9, 24.06), ("train/d24-256", 32): (207.2, 36.07)}
    for (name, batch), (ms, gigabytes) in measured.items():
        work = work_of(name, "parallel.cuda_graphs=true")
        layout = grid(micro_batch=batch, recompute="selective")
        cost = cost_of(work, layout, load_cluster("h100"), calibration())
        assert 1e3 * cost.step == pytest.approx(ms, rel=0.03)
        without_tokenizer = memory_of(work, layout, 0).training - 4 * work.tokenizer
        assert without_tokenizer / 1e9 == pytest.approx(gigabytes, rel=0.03)


def test_recomputation_costs_what_it_repeats() -> None:
    """Selective: two norms and GELU, at the reach of the kernels; attention too where its backend keeps copies."""
    cluster = load_cluster("h100")
    none, selective = (cost_of(work_of("train/d16-256"), grid(micro_batch=8, recompute=r), cluster)
                       for r in ("none", "selective"))  # fmt: skip
    extra = 16 * (4 + 8) * 8 * 680 * 1024 * 2 / (3027e9 * rates.FUSED_REACH)
    assert selective.elementwise - none.elementwise == pytest.approx(extra)
    assert selective.attention == none.attention
    sdpa = [cost_of(work_of("train/d16-256", "model.attention.backend=sdpa"), grid(micro_batch=8, recompute=r), cluster)
            for r in ("none", "selective")]  # fmt: skip
    assert sdpa[1].attention > sdpa[0].attention


# Layouts and clusters


def test_layouts_under_a_batch_ramp_divide_each_of_its_sizes() -> None:
    ramp = "data.batch_ramp={start: 4, increment: 4, images: 100}"
    config = load_config("train/d16-256", ["data.global_batch_size=16", ramp])
    found = list(legal_layouts(config, load_cluster("h100-8x1").resized(8)))
    assert found
    for one in found:
        assert all(size % (one.data * one.micro_batch) == 0 for size in (4, 8, 12, 16))


def test_a_world_that_the_axes_do_not_divide_is_refused() -> None:
    config = load_config("train/d16-256", ["parallel.tensor_parallel=4"])
    with pytest.raises(UserError, match=r"does not divide the 6 GPUs; use a multiple of 4"):
        Layout.of(config, 6)


def test_interleaving_wants_micro_batches_that_the_pipeline_divides() -> None:
    config = load_config(
        "train/d16-256",
        ["parallel.pipeline_parallel=4", "parallel.virtual_pipeline_parallel=2", "data.micro_batch_size=256"],
    )
    with pytest.raises(UserError, match=r"makes \[3\] micro-batches a step.* a multiple of the 4 pipeline stages"):
        Layout.of(config, 4)


@pytest.mark.parametrize("name", packaged_clusters())
def test_every_packaged_cluster_loads_and_reaches_less_than_its_peak(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.bf16_tflops <= cluster.bf16_peak_tflops
    assert 0 < cluster.usable_bytes < cluster.memory_gib * 2**30


def test_a_part_of_a_cluster() -> None:
    cluster = load_cluster("h100-8x8")
    assert (cluster.resized(4).nodes, cluster.resized(4).gpus) == (1, 4)
    assert (cluster.resized(4096).nodes, cluster.resized(4096).gpus) == (512, 4096)
    with pytest.raises(UserError, match=r"12 GPUs do not fill whole nodes of 8"):
        cluster.resized(12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu: X\nmemory: 80\n", "unknown key memory; did you mean memory_gib?"),
        ("gpu: X\n", "memory_gib is missing; it is of one GPU"),
        ("- 1\n", "must be a mapping"),
        ("gpu: [", "cannot read"),
        ("gpu: X\nmemory_gib: much\n", "memory_gib='much'"),
    ],
)
def test_a_broken_cluster_says_what_is_wrong(tmp_path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_cluster(str(path))
    assert words in str(error.value)


def test_an_unknown_cluster_names_the_nearest_and_nodes_win_over_the_file() -> None:
    with pytest.raises(UserError, match=r"no cluster 'h100-8x9'.*nearest: .*h100-8x8"):
        load_cluster("h100-8x9")
    cluster = load_cluster("h100-8x1", nodes=3, gpus_per_node=4)
    assert isinstance(cluster, Cluster)
    assert cluster.gpus == 12
