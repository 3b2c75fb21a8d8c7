"""`hmar-mega report`: what the page says about one run, about several, and about what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from test_report import ENTRIES, Reader, make_run, write_lines

from hmar_mega import report_plots
from hmar_mega.cli import main
from hmar_mega.errors import UserError
from hmar_mega.metrics import read_metrics
from hmar_mega.run_report import report

MEASURES = [
    {"name": "FID", "value": 12.345, "low": 11.0, "high": 13.5, "note": ""},
    {"name": "sFID", "value": None, "low": None, "high": None, "note": "the reference has none"},
    {"name": "KID", "value": 0.00123, "low": None, "high": None, "note": ""},
]


def make_pair(root: Path) -> list[Path]:
    """A next-scale run with grids, memory and an evaluation, and a masked run beside it with neither."""
    first = make_run(root / "a" / "run", "next_scale", 1, [e for e in ENTRIES if e["name"] == "cut"])
    second = make_run(root / "b" / "run", "masked", 2, ENTRIES)
    rows = [
        {**row, "peak_memory_bytes": 3 * 2**30, "grad_norm": 1.0, "lr": 1e-3} if row["kind"] == "train" else row
        for row in read_metrics(first)
    ]
    write_lines(first / "metrics.jsonl", rows)
    (first / "grids").mkdir()
    for step in range(10, 110, 10):
        Image.new("RGB", (step, 8)).save(first / "grids" / f"step-{step:08d}.png")
    (first / "evaluation").mkdir()
    result = {"network": "pixels", "network_digest": "c2c5", "reference": "real", "images": 5000, "measures": MEASURES}
    (first / "evaluation" / "evaluation.json").write_text(json.dumps(result))
    return [first, second]


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Without curves, drawing which takes most of the time."""
    for name in ("stage_curves", "comparison_curves", "resource_curves"):
        monkeypatch.setattr(report_plots, name, lambda *_, **__: "<svg></svg>")


def test_two_runs_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = make_pair(tmp_path)
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader(text)
    assert "://" not in text
    assert "<script" not in text
    told = reader.text
    assert "2 runs: a/run, b/run" in told  # the last part alone would not tell them apart
    assert "parameters 40 46" in told
    assert "best validation loss 4.2500 at step 100 4.2500 at step 100 (masked tokens)" in told
    assert "… of each scale 4.00 5.00 6.00 – 5.00 6.00" in told
    assert "peak memory of the first process 3.0 GiB –" in told
    assert "share of the GPU's peak" not in told  # neither run knows it
    assert "FID 12.35 (11.00 to 13.50)" in told
    assert "sFID –" in told
    assert "KID 0.00123" in told
    differences = told[told.index("configurations have different") : told.index("Environment")]
    assert "stage.name next_scale masked" in differences
    assert "model.depth" not in differences
    assert "processes 1 2" in told
    labels = [a["aria-label"] for tag, a in reader.tags if tag == "svg"]
    assert [label.split(" ")[0] for label in labels] == ["Validation", "Throughput,"]
    assert [word for word in reader.words if word.startswith("step ")] == [f"step {s}" for s in (10, 40, 70, 100)]
    assert "b/run: none" in told
    assert text.count("data:image/png;base64,") == 4


def test_a_run_alone_shows_its_settings_and_lies_beside_them(tmp_path: Path, undrawn: None) -> None:
    run, _ = make_pair(tmp_path)
    assert main(["report", str(run)]) == 0
    told = Reader((run / "report.html").read_text(encoding="utf-8")).text
    assert "model.depth 4 16" in told
    assert "model.num_classes 10 1000" in told
    assert told.count("step 10 ") == 1
    assert re.findall(r"step (\d+)(?= step| Settings)", told)[-1] == "100"


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run, _ = make_pair(tmp_path)
    for path in ("checkpoints/latest", "versions.json"):
        (run / path).unlink()
    write_lines(run / "metrics.jsonl", [row for row in read_metrics(run) if row["kind"] == "train"][:1])
    told = Reader(report([run], tmp_path / "page.html", ["young & new"]).read_text(encoding="utf-8")).text
    assert "young & new" in told
    assert "state at step 50, not finished" in told
    assert "best validation loss" not in told
    assert "device –" in told


@pytest.mark.parametrize(
    ("damage", "message"),
    [("config.yaml", "is not a run directory"), ("metrics.jsonl", "nothing to report yet")],
)
def test_what_is_missing_is_named(tmp_path: Path, undrawn: None, damage: str, message: str) -> None:
    run, _ = make_pair(tmp_path)
    (run / damage).unlink()
    with pytest.raises(UserError, match=message):
        report([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path, undrawn: None) -> None:
    runs = make_pair(tmp_path)
    with pytest.raises(UserError, match="1 names for 2 runs"):
        report(runs, tmp_path / "page.html", ["a"])
    with pytest.raises(UserError, match="given twice"):
        report([runs[0], runs[0]], tmp_path / "page.html")
    (runs[0] / "evaluation" / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json is damaged"):
        report(runs, tmp_path / "page.html")
