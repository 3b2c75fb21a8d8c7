"""The benchmarks' own arithmetic, that they run, and that the rival is the same model. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import attention
import data_rivals
import numpy as np
import pytest
import sampling
import sampling_accuracy
import sampling_floor
import tokenizer_quality
import tokenizer_speed
import torch
import training
from attention_table import ratios
from common import Limits, Timing, idle_graph_memory, markdown_table, relative_error
from helpers import tiny_export
from mixing import measure_mixing
from plain_model import PlainModel, PlainTrainer
from plan_memory import TINY
from profiles import group_of, kernels_of
from rivals import Problem

from hmar_mega.config import ModelConfig, TokenizerConfig
from hmar_mega.config_io import load_config
from hmar_mega.data.demo import write_demo
from hmar_mega.data.order import GroupedOrder, SampleOrder
from hmar_mega.inference.sampler import SampleSettings
from hmar_mega.model.hmar import HMAR
from hmar_mega.objective import Objective
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule, mask_schedule_for
from hmar_mega.tokenizer.quantizer import MultiScaleQuantizer

#: By its path: in the repository's root `import data` would find the room of that name.
_spec = importlib.util.spec_from_file_location("benchmarks_data", Path(attention.__file__).with_name("data.py"))
assert _spec is not None
assert _spec.loader is not None
data = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(data)

#: What one H100 reached.
H100 = Limits(matmul_tflops=778, copy_gbps=3027)


@pytest.mark.parametrize(
    ("resolution", "batch", "heads", "forward", "backward", "bound"),
    [
        (256, 64, 16, 0.118, 0.236, "bytes"),
        (256, 4, 24, 0.011, 0.022, "bytes"),
        (512, 16, 24, 0.192, 0.481, "FLOPs"),
        (1024, 4, 24, 0.777, 1.94, "FLOPs"),
    ],
)
def test_floors_are_bytes_or_flops_at_the_measured_limits(
    resolution: int, batch: int, heads: int, forward: float, backward: float, bound: str
) -> None:
    """By hand: 4·N·B·H·D bf16 numbers at 3027 GB/s or 4·D·B·H·Σp⁴ FLOPs at 778 TFLOP/s; backward 2 and 2.5 times."""
    schedule = ScaleSchedule(PATCH_NUMS[resolution])
    problem = Problem(schedule, "block_diagonal", batch, heads, 64, torch.bfloat16, torch.device("cpu"))
    found = attention.floors(problem, H100)
    assert found["forward"] == {"ms": pytest.approx(forward, rel=0.05), "bound": bound}
    assert found["backward"] == {"ms": pytest.approx(backward, rel=0.05), "bound": bound}
    assert found["both"]["ms"] == pytest.approx(found["forward"]["ms"] + found["backward"]["ms"])


def test_memory_that_graphs_keep_between_replays_is_counted() -> None:
    def segment(pool: tuple[int, int], size: int, used: int) -> dict[str, Any]:
        return {"segment_pool_id": pool, "total_size": size, "allocated_size": used}

    assert idle_graph_memory([segment((0, 0), 100, 30), segment((0, 1), 50, 20), segment((0, 2), 8, 8)]) == 30


def contender(name: str, kind: str, forward: float, backward: float) -> dict[str, Any]:
    times = {"forward": forward, "backward": backward, "both": forward + backward}
    timed = {part: Timing.of([ms]) for part, ms in times.items()}
    return {"name": name, "kind": kind, "whole": timed, **({"alone": timed} if kind == "rival" else {})}


def test_ratios_compare_our_best_with_the_best_rival_of_each_part() -> None:
    row = {
        "floor": {"forward": {"ms": 1.0}, "backward": {"ms": 2.0}, "both": {"ms": 3.0}},
        "contenders": [
            contender("slow", "ours", 8.0, 8.0),
            contender("fast", "ours", 2.0, 6.0),
            contender("one", "rival", 4.0, 12.0),
            contender("two", "rival", 5.0, 8.0),
            {"name": "three", "kind": "rival", "failed": "cannot run"},
        ],
    }
    found = ratios(row)
    assert found["limit"] == {"forward": 2.0, "backward": 3.0, "both": pytest.approx(8 / 3)}
    assert found["alone"] == {"forward": 0.5, "backward": 0.75, "both": pytest.approx(8 / 13)}
    assert ratios({**row, "contenders": row["contenders"][2:]}) == {}


def test_attention_script_times_what_is_right_and_reports_what_is_not(tmp_path: Path) -> None:
    wrong, broken = tmp_path / "wrong.py", tmp_path / "broken.py"
    wrong.write_text("def attention(q, k, v, schedule, pattern):\n    return q + k + v\n")
    broken.write_text("def attention(q, k, v, schedule, pattern):\n    raise RuntimeError('out of memory')\n")
    files = [f"--{kind}={tmp_path / 'out'}.{kind}" for kind in ("json", "markdown")]
    attention.main(
        [
            "--device=cpu", "--shapes=tiny", "--dtype=fp32", "--budget=1", "--backends=reference,sdpa",
            "--rivals=sdpa_dense,sdpa_scales,flex", f"--external={broken}", f"--external={wrong}", *files,
        ]
    )  # fmt: skip
    results = json.loads((tmp_path / "out.json").read_text())
    assert [row["pattern"] for row in results["rows"]] == ["block_diagonal", "block_causal"]
    for row in results["rows"]:
        found = {c["name"]: c for c in row["contenders"]}
        assert {name for name, c in found.items() if "whole" in c} == {"reference", "sdpa", "sdpa_dense", "sdpa_scales"}
        assert max(found["sdpa_scales"]["error"].values()) < 1e-4
        assert "CUDA" in found["flex"]["failed"]
        assert found["wrong.py"]["failed"].startswith("wrong, not timed")
        assert found["broken.py"]["failed"] == "failed: RuntimeError: out of memory"
    assert "sdpa_scales" in (tmp_path / "out.markdown").read_text()


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matmul"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 12, true, false>", "loss"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copy"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<bf16>", "norm and elementwise"),
        ("triton_poi_fused_add_gelu_mul_3", "norm and elementwise"),
        ("ncclDevKernel_Generic", "other"),
    ],
)
def test_kernels_are_grouped_by_name(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_kernels_of_a_trace_count_overlapping_work_once() -> None:
    def event(name: str, start: float, duration: float, category: str = "kernel") -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    given = [event("gemm", 0, 2000), event("flash", 1000, 2000), event("gemm", 5000, 1000)]
    found = kernels_of([*given, event("aten::mm", 0, 9000, "cpu_op")])
    assert found.by_name == {"gemm": (2, 3.0), "flash": (1, 2.0)}
    assert (found.busy, found.span) == (4.0, 6.0)
    assert found.groups() == {"matmul": 3.0, "attention": 2.0}


@pytest.fixture
def objective() -> Objective:
    config = load_config("train/d16-256", [*TINY, "model.drop_path_rate=0.3"])
    tokenizer = config.tokenizer
    torch.manual_seed(0)
    codes = MultiScaleQuantizer(tokenizer.codebook_size, tokenizer.latent_channels, config.schedule.scales)
    return Objective(config, codes, torch.device("cpu"))


def test_the_rival_is_the_same_model(objective: Objective) -> None:
    """The same loss and gradients from the same weights, drop-path and label drop included, in float32."""
    config, cpu = objective.config, torch.device("cpu")
    sizes = (config.tokenizer.codebook_size, config.tokenizer.latent_channels)
    ours, rival = HMAR(config.model, config.schedule.scales, *sizes), PlainModel(config)
    with torch.no_grad():
        for parameter in rival.parameters():  # large: as training starts, the residual branches hardly count
            parameter.normal_(0.0, 0.2)
    ours.load_state_dict(rival.state_dict())
    (batch,) = training.make_batches(load_config("train/d16-256", [*TINY, "data.micro_batch_size=4"]), 0, cpu)
    loss = objective.training(ours, batch).loss.mean()
    other = rival(**PlainTrainer(rival, config, lr=1e-3).inputs(objective, batch))
    assert relative_error(other, loss) < 1e-5
    grads = torch.autograd.grad(other, list(rival.parameters()))
    given = dict(zip(dict(rival.named_parameters()), grads, strict=True))
    for name, parameter in ours.named_parameters():
        (truth,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        assert truth.norm() > 1e-4, name
        assert relative_error(given[name], truth) < 1e-4, name


def test_the_rival_trains(objective: Objective) -> None:
    torch.manual_seed(0)
    model = PlainModel(objective.config)
    model.reset()
    trainer = PlainTrainer(model, objective.config, lr=1e-2)
    batches = training.make_batches(objective.config, 0, torch.device("cpu"))
    steps = [trainer.train_step(batches, objective) for _ in range(8)]
    assert training.check(steps, objective.config.tokenizer.codebook_size) == pytest.approx(float(steps[0][1]))
    assert float(steps[-1][1]) < float(steps[0][1]) - 0.1
    with pytest.raises(SystemExit, match="untrained model has loss"):
        training.check(steps, 10**6)


def test_training_page_takes_off_the_state_and_compares_with_the_rival() -> None:
    about = {"model": "d16-256:64", "batch": 64, "micro_batches": 1, "settings": [], "published": None, "mfu": 0.4,
             "tflops": 300.0, "parameters": 10**9, "first_loss": 8.3}  # fmt: skip
    rows = [
        {**about, "who": "ours", "timing": Timing.of([100.0]), "images_per_s": 640.0, "peak_bytes": 30 * 10**9},
        {**about, "who": "rival", "timing": Timing.of([200.0]), "images_per_s": 320.0, "peak_bytes": 40 * 10**9},
        {**about, "who": "ours", "failed": "out of | memory"},
    ]
    text = training.page({"machine": {"device": "H100"}, "rows": rows}).splitlines()
    assert [cell.strip() for cell in text[-3].split("|")[3:11]] == [
        "100.0 (100.0–100.0)", "640.0", "300", "40.0%", "30.00", "14.00", "8.3000", "2.00",
    ]  # fmt: skip
    assert "failed: out of ¦ memory" in text[-1]


def test_nsys_command_leaves_the_other_profiler_out() -> None:
    given = ["--profile", "out", "--models", "d16-256:64", "--profile=out", "--rival"]
    assert training.nsys_command(given).endswith("training.py --models d16-256:64 --rival")


def test_a_table_refuses_a_row_of_another_length() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    with pytest.raises(ValueError, match="3 cells under 2 headings"):
        markdown_table(["a", "b"], [["1", "2", "3"]])


def test_batches_are_consecutive_in_the_stream() -> None:
    config = load_config("train/d16-256", TINY)
    first, second = (training.make_batches(config, step, torch.device("cpu")) for step in (0, 1))
    positions = [batch.positions.tolist() for batch in [*first, *second]]
    assert positions == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert first[0].tokens.shape == (2, config.schedule.scales.num_tokens)


def test_mixing_of_a_random_order_is_that_of_chance_and_of_neighbours_is_not() -> None:
    labels, shard_of = np.arange(8000) * 10 // 8000, np.arange(8000) // 100
    sizes = np.bincount(shard_of).tolist()
    chance = measure_mixing(SampleOrder(8000, 0), labels, shard_of, 100)
    assert chance.distance == pytest.approx(1 / 3, abs=0.01)
    assert chance.balance == pytest.approx(1, abs=0.15)
    stored = measure_mixing(SampleOrder(8000, 0, shuffle=False), labels, shard_of, 100)
    assert stored.balance > 90
    grouped = measure_mixing(GroupedOrder(sizes, 0, 10), labels, shard_of, 100)
    assert (stored.shards, grouped.shards) == (10, 10)
    assert chance.balance < grouped.balance < stored.balance


@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_every_reader_of_the_data_benchmark_gives_what_ours_gives(kind: str, tmp_path: Path) -> None:
    folder = data.make_shards(tmp_path, kind, data_rivals.Sizes(images=128, tokens=128))
    found = data.measure("ours, threads", folder, kind, workers=1, seconds=0.01)
    assert found["samples_per_second"] > 0
    ours = next(data.open_ours(folder, kind, 1, "threads"))
    theirs = next(data_rivals.open_webdataset(folder, kind, 0, data.PACKED, 0))
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_tokenizer_quality_and_ablation_run_and_are_not_repeated(tmp_path: Path, capsys: Any) -> None:
    write_demo("digits", tmp_path / "digits", val_fraction=0.02, progress=False)
    common = ["--data", str(tmp_path / "digits"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    common += ["--device", "cpu", "--tiny", "--steps", "4"]
    tokenizer_quality.main(["quality", *common])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "grid.png", "quality.json", "quality.md", "tokenizer.safetensors", "usage.png"}
    result = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert result["training"]["steps"] == 4
    assert abs(result["bf16_decoding_loses_db"]) < 0.1
    tokenizer_quality.main(["ablation", *common, "--only", "no-phi"])
    runs = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert runs["no-phi"]["changes"]["tokenizer.phi_ratio"] == 0.0
    assert runs["no-phi"]["fingerprint"] != result["fingerprint"]
    seconds = runs["no-phi"]["training"]["seconds"]
    tokenizer_quality.main(["ablation", *common, "--only", "no-phi"])
    again = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert again["no-phi"]["training"]["seconds"] == seconds
    assert "no-phi" in capsys.readouterr().out


def test_the_steps_that_fit_the_minutes_are_measured_once(tmp_path: Path, monkeypatch: Any) -> None:
    asked = []

    def train(config: Any, folder: Path, overwrite: bool) -> None:
        asked.append(config.tokenizer.train.steps)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 120, "images_per_second": 800.0}\n')

    monkeypatch.setattr(tokenizer_quality, "train_tokenizer", train)
    words = ["quality", "--data", "x", "--out", "y", "--work", str(tmp_path), "--minutes", "2", "--tiny"]
    args = tokenizer_quality._parser().parse_args(words)
    for _ in range(2):
        assert tokenizer_quality.planned_steps(args, tmp_path, "quality", {}) == int(120 * 0.85 * 800 / 8)
    assert asked == [120]


def test_tokenizer_speed_runs(tmp_path: Path) -> None:
    given = ["--device", "cpu", "--tiny", "--batch", "1", "--ways", "1", "--json", str(tmp_path / "speed.json")]
    tokenizer_speed.main(given)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["part"] for row in rows] == ["train", "encode", "decode"]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_flops_of_the_published_tokenizer_are_counted() -> None:
    """At least the six 3×3 convolutions of the decoder's last level, 160 → 160 channels at 256²."""
    flops = tokenizer_speed.count_flops(load_config("tokenizer/published-256"))
    assert 2 < flops["decode"] / (2 * 256**2 * 6 * 160 * 160 * 9) < 6
    assert flops["encode"] < flops["decode"]
    search = 2 * 680 * 4096 * 32
    assert flops["train"] == 3 * (flops["encode"] - search + flops["decode"]) + search


@pytest.mark.parametrize(("depth", "batch", "expected"), [(16, 1, 2.5), (30, 1, 14.0), (30, 50, 263.0)])
def test_floor_of_sampling(depth: int, batch: int, expected: float) -> None:
    """By hand, within a tenth: small batches read the weights 13 times; d30 at B 50 multiplies 1.34 G of them with
    68 000 tokens; the decoder does 0.39 TFLOP an image.
    """
    with torch.device("meta"):
        model = HMAR(ModelConfig(depth=depth), ScaleSchedule(PATCH_NUMS[256]), 4096, 32, mask_branch=True).bfloat16()
    settings = SampleSettings(1.6, 650, 0.99, mask_schedule_for(model.schedule, sampling.MASK_SCHEDULE))
    found = sampling_floor.floor(model, TokenizerConfig(), settings, batch, H100)
    assert found["total"] == pytest.approx(expected, rel=0.1)


def test_sampling_benchmark_checks_and_times_a_rival_too(tmp_path: Path) -> None:
    (tmp_path / "rival.py").write_text(
        "def sampler(model, tokenizer, settings, batch, device):\n    return lambda: batch\n"
    )
    out, rival = tmp_path / "out.json", str(tmp_path / "rival.py")
    sampling.main(
        [
            "--device",
            "cpu",
            "--tiny",
            "--models",
            "d16-256:2",
            "--external",
            rival,
            "--json",
            str(out),
        ]
    )
    (row,) = json.loads(out.read_text())["rows"]
    assert row["checked"]["logits"] < 1e-3
    assert row["checked"]["tokens_as_plain"] == 1
    assert row["refused"] == "CUDA graphs need a CUDA GPU, not cpu"
    assert row["external"]["p50"] < row["ours"]["p50"] <= row["ours"]["p95"]
    assert set(row["phases"]["transformer"]) == {"1", "2", "4"}


def test_accuracy_of_float32_is_that_of_the_plain_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tiny_export(tmp_path / "model"), tmp_path / "out.json"
    sampling_accuracy.main([str(folder), "--count", "4", "--device", "cpu", "--json", str(out)])
    rows = {row["precision"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["fp32"]["draws"] == rows["fp32"]["tokens"] == rows["fp32"]["images"] == 1
    assert rows["fp32"]["image_psnr"] > 80 > rows["bf16"]["decoder_psnr"] > 30
    assert "bf16" in capsys.readouterr().out
