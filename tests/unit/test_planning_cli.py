"""`hmar-mega plan`: what it prints, its JSON, its choice of layouts, and its words for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hmar_mega.cli import main
from hmar_mega.config_io import load_config
from hmar_mega.planning.cli import make_report
from hmar_mega.planning.cluster import load_cluster
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.layouts import calibration, legal_layouts, ranked
from hmar_mega.planning.memory import memory_of
from hmar_mega.planning.rates import STEPS, MeasuredStep, read_steps
from hmar_mega.planning.scaling import project
from hmar_mega.planning.workload import Workload


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_layout_offered_is_a_legal_configuration_for_its_gpus() -> None:
    """What the plan prints as overrides reads back as a configuration that asks for this very layout."""
    config, cluster = load_config("train/d30-256"), load_cluster("h100-8x1")
    for plan in ranked(config, cluster):
        again = load_config("train/d30-256", plan.layout.overrides)
        assert Layout.of(again, cluster.gpus) == plan.layout


def test_heads_that_do_not_divide_are_never_offered() -> None:
    """30 heads: tensor-parallel 4 and 8 are illegal on 8 GPUs, 2 is legal; ZeRO 2 and 3 go without a pipeline."""
    layouts = list(legal_layouts(load_config("train/d30-256"), load_cluster("h100-8x1")))
    assert {found.tensor for found in layouts} == {1, 2}
    assert {found.zero for found in layouts if found.pipeline > 1} == {1}
    assert {found.world for found in layouts} == {8}
    assert all(found.accumulation % found.pipeline == 0 for found in layouts if found.virtual > 1)
    assert all(found.images == 1024 for found in layouts)


def test_what_fits_comes_first_and_less_recomputation_is_not_passed_over() -> None:
    plans = ranked(load_config("train/d36-s-512"), load_cluster("h100-8x1"))
    assert [p.fits for p in plans] == sorted((p.fits for p in plans), reverse=True)
    assert plans[0].fits


def test_stages_of_a_pipeline_without_trained_parameters_need_almost_no_optimizer() -> None:
    """Stage 2 trains the last blocks, and the mask embedding on the first stage; others carry two zeros as ballast."""
    config = load_config("train/d16-256", ["stage.name=masked"])
    assert any(plan.layout.pipeline == 8 for plan in ranked(config, load_cluster("h100-8x1")))
    second = memory_of(Workload.of(config), Layout(1, False, 4, 1, 2, 1, "none", 8, 48), 1)
    assert (second.gradients, second.optimizer) == (32, 48)  # two groups, padded to a multiple of four elements
    assert second.weights > 0


def test_the_json_has_the_model_its_layouts_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("train/d16-256", "data.micro_batch_size=32", "parallel.cuda_graphs=true")
    found = plan_json(capsys, *asked, "--cluster", "h100-8x8", "--nodes", "1")
    assert found["model"]["parameters"] == 310_283_520
    assert found["cluster"]["gpus"] == 8
    assert found["own"]["plan"]["layout"]["micro_batch"] == 32
    assert found["own"]["plan"]["fits"]
    best = found["recommended"]
    assert best == found["layouts"][0]
    parts = best["bytes"]
    held = sum(parts[p] for p in ("weights", "gradients", "optimizer", "ema", "tokenizer"))
    assert parts["graphs"] > 0
    moving = max(parts["logits"] + parts["buffers"], parts["step"])
    assert parts["peak"] == max(held + parts["activations"] + parts["graphs"] + moving, parts["start"])
    assert "fastest of" in found["why"]
    assert found["assumptions"]
    assert load_config("train/d16-256", best["overrides"]).parallel.zero_stage == best["layout"]["zero"]


def test_the_plan_says_what_of_fp8_it_models(capsys: pytest.CaptureFixture[str]) -> None:
    fp8 = ("precision.fp8=linears_and_attention", "precision.fp8_pad_head_dim=true")
    found = plan_json(capsys, "train/d16-256", "--cluster", "h100", *fp8)
    assert "bf16 with FP8 linears" in found["model"]["about"]
    assert found["recommended"]["bytes"]["fp8"] == 2 * 16 * 12 * 1024**2
    assert "take 0.92 of bf16's time" in found["assumptions"][0]
    assert found["assumptions"][1].startswith("FP8 attention is not modelled")


def test_json_goes_to_a_file_beside_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", "train/d16-256", "--json", str(path), "--top", "3"]) == 0
    printed = capsys.readouterr().out
    assert len(json.loads(path.read_text())["layouts"]) == 3
    for words in ("310.3 M parameters", "layouts: the first 3", "bytes a GPU", "recommended:", "assumptions"):
        assert words in printed
    assert "parallel.tensor_parallel=1" in printed


def test_a_layout_that_does_not_fit_says_why_and_what_to_take(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, "train/d30-256", "data.micro_batch_size=128")
    assert not found["own"]["plan"]["fits"]
    assert "GiB a GPU and" in found["own"]["problem"]
    assert "most of it is activations" in found["own"]["problem"]
    assert "; use " in found["own"]["problem"]


def test_a_layout_that_cannot_be_is_told_and_the_others_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, "train/d16-256", "parallel.tensor_parallel=16")
    assert found["own"]["plan"] is None
    assert "does not divide the 8 GPUs" in found["own"]["problem"]
    assert found["recommended"] is not None


def test_where_nothing_fits_it_says_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, "train/10b-512", "--gpus-per-node", "1")
    assert found["recommended"] is None
    assert "GiB a GPU" in found["why"]
    assert "use more GPUs" in found["why"]
    assert main(["plan", "train/10b-512", "--gpus-per-node", "1"]) == 0
    assert "nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train/d16-265"], "nearest"),
        (["train/d16-256", "--cluster", "nowhere"], "no cluster 'nowhere'"),
        (["train/d16-256", "--calibration", "nowhere.json"], "cannot read calibration nowhere.json"),
        (["train/d30-256", "parallel.tensor_parallel=4"], "use 1, 2, 3, 5, 6, 10, 15 or 30"),
    ],
)
def test_bad_input_is_a_user_error(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_the_calibration_puts_the_measured_steps_where_they_were_measured(step: MeasuredStep) -> None:
    """The median exactly, the others as well as one factor can."""
    report = make_report(step.config, load_config(step.config, step.overrides), load_cluster(step.cluster).resized(1))
    assert report.own is not None
    assert report.own.images_per_s == pytest.approx(step.images_per_s, rel=0.1)
    assert f"× {calibration():.2f}" in report.calibration


def test_measured_steps_of_the_benchmark_are_read(tmp_path: Path) -> None:
    row = {
        "config": "train/d16-256",
        "overrides": ["data.global_batch_size=8"],
        "cluster": "h100",
        "images_per_s": 99.0,
    }
    path = tmp_path / "plan_memory.json"
    path.write_text(
        json.dumps(
            {"rows": [{**row, "images_per_s": 99.0}, {"config": "train/d16-256", "overrides": [], "failed": "…"}]}
        )
    )
    (step,) = read_steps(path)
    assert (step.images_per_s, step.cluster) == (99.0, "h100")
    assert step.overrides == ("data.global_batch_size=8", "optim.impl=torch")  # there was no other when it was written
    assert calibration((step,)) > 0
    path.write_text(json.dumps({"rows": [{**row, "overrides": ["optim.impl=triton"]}]}))
    assert read_steps(path)[0].overrides == ("optim.impl=triton",)


def test_scaling_goes_from_one_gpu_up_and_loses_nothing_on_the_way() -> None:
    strong, weak = project(load_config("train/d16-256"), load_cluster("h100-8x1"), 1.0, gpus=(1, 2, 8, 64))
    assert [p.batch for p in strong.points] == [768] * 4
    assert [p.batch for p in weak.points] == [8, 16, 64, 512]
    rates = [p.plan.images_per_s for p in strong.points if p.plan is not None]
    assert rates == sorted(rates)
    assert len(rates) == 4
    for curve in (strong, weak):
        shares = [curve.efficiency(p) for p in curve.points]
        assert all(share is not None and 0 < share <= 1 for share in shares)
        assert max(share for share in shares if share is not None) == 1


@pytest.mark.slow
def test_the_projection_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "scaling.png"
    assert main(["plan", "train/d16-256", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "strong scaling" in printed
    assert "weak scaling" in printed
    assert "4,096" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
