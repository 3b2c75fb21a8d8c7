"""What `hmar-mega doctor` and the start of training say about a machine, here one without a GPU or one made up."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from hmar_mega import doctor, doctor_cluster, probe
from hmar_mega.cli import main
from hmar_mega.config_io import load_config
from hmar_mega.errors import UserError
from hmar_mega.probe import Check, Machine

HOPPER = Machine("NVIDIA H100 80GB HBM3", (9, 0), "2.11.0", "9.19.0", None)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
def test_doctor_says_what_is_missing_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    items = {item["name"]: item for item in report["items"]}
    assert {name for name, item in items.items() if item["status"] == "ok"} >= {"Python", "torch", "CPU cores"}
    assert items["GPU"]["status"] == items["NCCL"]["status"] == "missing"
    assert items["gloo, 2 processes"]["value"].endswith(" GB/s in node")
    assert {
        "SLURM",
        "storage here",
        "megatron-core",
        "deepspeed",
        "transformer-engine",
        "triton",
        "free disk here",
        "/dev/shm",
    } <= set(items)
    assert all(item["advice"] for item in items.values() if item["status"] != "ok")
    assert [done["reason"] for done in report["kernels"]] == ["no CUDA GPU is visible"] * 10


@without_gpu
def test_doctor_prints_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "inspect_cluster", list)  # the test before starts its processes
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("GPU") and "missing" in line for line in lines)
    assert any(
        line.startswith("fp8 attention, head_dim 128") and line.endswith("no CUDA GPU is visible") for line in lines
    )


def test_the_unrelated_apex_is_named_and_nvidias_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    if importlib.util.find_spec("apex") is None:
        assert doctor_cluster.inspect_apex() == []
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    (item,) = doctor_cluster.inspect_apex()
    assert (item.status, item.value) == ("warning", "not NVIDIA's")
    assert "pip uninstall apex" in item.advice
    (tmp_path / "apex" / "optimizers.py").touch()
    importlib.invalidate_caches()
    (item,) = doctor_cluster.inspect_apex()
    assert (item.status, item.value) == ("ok", "NVIDIA's")
    sys.modules.pop("apex", None)


def test_slow_or_closed_storage_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cluster, "STORAGE_BYTES", 1 << 20)
    assert doctor_cluster.inspect_storage(tmp_path / "missing").status == "warning"
    monkeypatch.setattr(doctor_cluster, "SLOW_STORAGE", 1.0)
    assert doctor_cluster.inspect_storage(tmp_path).status == "ok"
    monkeypatch.setattr(doctor_cluster, "SLOW_STORAGE", 1e15)
    assert "hold training up" in doctor_cluster.inspect_storage(tmp_path).advice


def test_without_slurm_the_doctor_says_what_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    item = doctor_cluster.inspect_slurm()
    assert (item.status, item.value) == ("missing", "-")
    assert "--local" in item.advice


def test_a_package_of_another_version_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.SUPPORTED, "torch", "==1.0")
    (torch_item,) = (item for item in doctor.inspect_software() if item.name == "torch")
    assert (torch_item.status, torch_item.advice) == ("warning", "tested is torch==1.0")


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ([(0.05, 0.1), (0.08, 0.117), (0.07, 0.1)], None),
        ([(0.001, 0.1), (0.93, 0.5)], "wrong in step 2: relative errors 0.93 and 0.5 (gradients), allowed are 0.12"),
        ([(0.05, 0.6)], "wrong in step 1"),
        ([(math.nan, 0.1)], "wrong in step 1: relative errors nan"),
    ],
)
def test_a_kernel_that_goes_wrong_in_a_later_step_does_not_run(
    errors: list[tuple[float, float]], words: str | None
) -> None:
    """The second row is what TE's own delayed scaling does."""
    done = probe.judge("fp8 attention", 128, errors)
    assert done.runs == (words is None)
    assert (words or "") in done.reason
    if words is None:
        assert done.errors == (0.08, 0.117)


def test_an_error_of_a_later_gradient_is_not_hidden_by_nan() -> None:
    good, bad = torch.ones(3), torch.full((3,), math.nan)
    for gradients in ([good, bad], [bad, good]):
        assert math.isnan(probe._errors((good, gradients), (good, [good, good]))[1])


def test_old_gpus_are_told_so() -> None:
    old = Machine("NVIDIA A100", (8, 0), "2.11.0", "9.19.0", None)
    assert "FP8 needs compute capability 8.9" in probe.check(old, "fp8 linears, delayed").reason


def test_the_table_has_a_line_a_kernel_with_its_reason() -> None:
    checks = [
        probe.judge("bf16 attention", 64, [(0.003, 0.004)]),
        probe.judge("fp8 attention", 64, [(0.05, 0.1)]),
        Check("fp8 linears, delayed", None, False, None, "no cuBLAS"),
    ]
    assert probe.format_checks(checks).splitlines() == [
        "kernel                       runs  output  gradients",
        "bf16 attention, head_dim 64  yes   0.003   0.004",
        "fp8 attention, head_dim 64   yes   0.05    0.1        zero-padded to 128 (precision.fp8_pad_head_dim)",
        "fp8 linears, delayed         no    -       -          no cuBLAS",
    ]


FP8_ATTENTION = ("precision.fp8=linears_and_attention", "model.heads=8")


@pytest.mark.parametrize(
    ("overrides", "kernels"),
    [
        ((), []),
        (("model.attention.backend=te",), [("bf16 attention", 64)]),
        (("precision.fp8=linears",), [("fp8 linears, delayed", None)]),
        (
            (*FP8_ATTENTION, "precision.fp8_recipe=current"),
            [("bf16 attention", 128), ("fp8 attention", 128), ("fp8 linears, current", None)],
        ),
        (
            ("precision.fp8=linears_and_attention", "model.attention.backend=triton"),
            [("bf16 attention, triton", 64), ("fp8 attention, triton", 64), ("fp8 linears, delayed", None)],
        ),
    ],
)
def test_training_tries_the_kernels_it_stands_on(overrides: tuple[str, ...], kernels: list[object]) -> None:
    assert probe.wanted_kernels(load_config(None, overrides)) == kernels


@pytest.mark.parametrize(
    ("overrides", "wrong", "words"),
    [
        (("precision.fp8=linears",), "fp8 linears, delayed", "precision.fp8=linears needs fp8 linears, delayed, which"),
        (FP8_ATTENTION, "fp8 attention", "wrong in step 2: relative errors 0.9 .*; set precision.fp8=linears "),
        (("model.attention.backend=te",), "bf16 attention", "set model.attention.backend=auto"),
    ],
)
def test_a_wrong_kernel_never_trains(
    monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], wrong: str, words: str
) -> None:
    def fake(machine: Machine, kind: probe.Kind, head_dim: int | None = None) -> Check:
        return probe.judge(kind, head_dim, [(0.001, 0.001), (0.9 if kind == wrong else 0.001, 0.001)])

    monkeypatch.setattr(probe, "look_at_machine", lambda: HOPPER)
    monkeypatch.setattr(probe, "check", fake)
    with pytest.raises(UserError, match=words):
        probe.require_kernels(load_config(None, overrides))
    monkeypatch.setattr(probe, "check", lambda m, kind, dim=None: probe.judge(kind, dim, [(0.001, 0.001)]))
    assert all(done.runs for done in probe.require_kernels(load_config(None, overrides)))
