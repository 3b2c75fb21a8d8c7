"""The comparison of VAR and HMAR runs, is not repeated, stops in time and merges seeds; no figure is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comparison
import comparison_measure
import pytest
from comparison_figures import interval, page, read_results
from comparison_variants import MASKED_SHARE, PUBLISHED, VARIANTS, mask_schedules

from hmar_mega.data.demo import write_demo
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule, mask_schedule_for


def test_masked_variants_spend_the_budget_of_the_others() -> None:
    for name, variant in VARIANTS.items():
        spent = variant.share + (VARIANTS[variant.start].share if variant.start else 0)
        expected = 1 + MASKED_SHARE if name.startswith("top") else 1 - MASKED_SHARE if name == "base" else 1
        assert spent == pytest.approx(expected), name


@pytest.mark.parametrize("patch_nums", [(1, 2), (1, 2, 4), (1, 2, 3, 4, 6, 8), PATCH_NUMS[256]])
def test_every_schedule_of_the_sweep_keeps_all_tokens(patch_nums: tuple[int, ...]) -> None:
    scales = ScaleSchedule(patch_nums)
    found = mask_schedules(scales)
    for passes in found.values():
        assert mask_schedule_for(scales, passes) == passes
        assert all(count > 0 for entry in passes for count in entry)
    assert found[PUBLISHED][:2] == ((1,), (1, 3))
    if patch_nums[2:3] == (3,):
        assert found[PUBLISHED][2:4] == ((1, 1, 2, 5), (16,))
    assert {len(entry) for entry in found["all in two"][1:]} == {2}


@pytest.mark.slow
def test_the_comparison_runs_and_goes_on(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(comparison_measure, "CFG_SCALES", (0.0, 1.5))
    monkeypatch.setattr(comparison_measure, "MASK_CFGS", (1.5,))
    write_demo("digits", tmp_path / "digits", val_fraction=0.02, progress=False)
    out, work = tmp_path / "out", tmp_path / "work"
    common = ["--out", str(out), "--work", str(work), "--device", "cpu", "--tiny", "--images", "40"]
    small = ["--tokenizer-steps", "4", "--steps", "3", "--count", "24", "--sweep-count", "20", "--bootstrap", "2"]
    words = [*common, *small, "--network", "pixels", "--data"]
    comparison.main([*words, str(tmp_path / "digits"), "--only", "prepare"])
    assert {path.name for path in (out / "prepared").iterdir()} == {"tokens.npz", "images.npz", "tokenizer"}
    prepared = [*words, str(out / "prepared"), "--only", "masked-leak-free"]
    comparison.main([*prepared, "--minutes", "0.1"])
    assert "the minutes are over" in caplog.text
    assert not (out / "table.md").exists()
    comparison.main(prepared)
    written = {"comparison.json", "comparison.png", "grids.png", "report.html", "table.md"}
    assert {path.name for path in out.iterdir()} - {"prepared"} == written
    (result,) = json.loads((out / "comparison.json").read_text())["steps"]["masked-leak-free"]
    assert result["training"]["steps"] == 3  # two of stage 1 and one of stage 2
    assert list(result["fid_by_cfg"]) == ["0", "1.5"]
    assert [t["schedule"] for t in result["mask_sweep"]] == [*mask_schedules(ScaleSchedule((1, 2, 4))), PUBLISHED]
    assert result["figures"]["FID"]["low"] < result["figures"]["FID"]["value"]
    assert "leak_free" in (work / "steps-seed0" / "masked-leak-free" / "config.yaml").read_text()
    monkeypatch.setattr(comparison._Seed, "_train", lambda *_: pytest.fail("trained again"))
    comparison.main(prepared)


def result_of(seed: int, fid: float, variant: str = "var") -> dict[str, Any]:
    figure = {"value": fid, "low": fid - 1, "high": fid + 1}
    return {
        "variant": variant, "label": VARIANTS[variant].label, "seed": seed, "budget": "steps", "cfg": 1.5 + seed,
        "network": "pixels (c2c5)", "count": 100, "fid_by_cfg": {"0": fid, "1.5": fid + 2}, "figures": {"FID": figure},
        "training": {"steps": 10, "images": 80, "seconds": 4.0, "images_per_second": 20.0, "peak_memory_bytes": 10**9,
                     "validation": {"all_scales": 3.5}},
        "sampling": {"batch": 16, "default_ms": 1.0, "plain_ms": 2.0, "graphs": seed == 0},
        "machine": {"device": "H100"}, "parameters": 1000, "passes": 3,
    }  # fmt: skip


def test_seeds_of_several_machines_are_merged(tmp_path: Path) -> None:
    here = tmp_path / "results" / "steps-seed1"
    here.mkdir(parents=True)
    (here / "var.json").write_text(json.dumps(result_of(1, 14.0)))
    stale = [result_of(0, 10.0), result_of(1, 99.0)]  # what was measured here wins
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"steps": {"weights": [result_of(0, 9.0, "weights")], "var": stale}}))
    found = read_results(tmp_path / "results", [other, tmp_path / "absent.json"])
    assert {name: [row["seed"] for row in rows] for name, rows in found["steps"].items()} == {
        "var": [0, 1], "weights": [0],
    }  # fmt: skip
    assert interval(found["steps"]["var"], "FID") == "12.00 (10.00–14.00)"
    text = page(found)
    assert "## The same steps, seeds 0, 1" in text
    assert "| VAR | 12.00 (10.00–14.00) | 1.5, 2.5 | 3.5000 (3.5000–3.5000) |" in text
    assert "| + loss weights | 9.00 (8.00–10.00) | 1.5 | 3.5000 |" in text
    assert "| 1.000 (graph) | 2.000 |" in text
