"""benchmarks/scaling.py: cases, that two ranks are measured once, and what the page says of them. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scaling

pytestmark = pytest.mark.dist

TINY = ["--device", "cpu", "--tiny", "--models", "d24-256:16", "--set", "precision.compute=fp32", "--steps", "2"]


def test_two_ranks_are_measured_once_and_a_case_that_fails_again(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--out", str(tmp_path), *TINY, "--gpus", "2", "--layouts", "sequence2"]
    scaling.main([*arguments, "--set", "model.depth=7", "--set", "model.mask_layers=9"])
    assert "mask_layers=9 is more than depth=7" in capsys.readouterr().out
    scaling.main(arguments)
    (file,) = (file for file in (tmp_path / "cases").glob("*.json") if "model.depth" not in file.name)
    row = json.loads(file.read_text())
    # 21 tokens: conditions and tables, which the plan leaves out, count for more than in test_communication.py
    assert row["planned_sent"] <= row["sent_bytes"] < 1.3 * row["planned_sent"]
    assert row["images_per_s"] == pytest.approx(4e3 / row["step_ms"])
    scaling.main(arguments)
    assert f"{row['name']}: measured already" in capsys.readouterr().out


def test_efficiency_is_the_rate_by_that_of_one_gpu_times_their_number(tmp_path: Path) -> None:
    (tmp_path / "cases").mkdir()
    with pytest.raises(SystemExit, match="holds no measured case yet"):
        scaling.main(["--out", str(tmp_path), "--page"])
    shared = {"model": "d24-256:16", "settings": [], "machine": {"device": "two GPUs"}, "mfu": 0.4, "peak_bytes": 2e10,
              "planned_bytes": 2e10, "sent_bytes": 1e6, "planned_sent": 1e6}  # fmt: skip
    for gpus, layout, rate in ((1, "data", 100.0), (2, "data", 190.0), (2, "tensor2", 150.0)):
        ms = 16e3 * gpus / rate
        row = shared | {"gpus": gpus, "layout": layout, "images_per_s": rate, "step_ms": ms, "planned_ms": 0.9 * ms}
        (tmp_path / "cases" / f"{gpus}{layout}.json").write_text(json.dumps(row))
    scaling.main(["--out", str(tmp_path), "--page"])
    lines = (tmp_path / "scaling.md").read_text().splitlines()
    assert [line.split(" | ")[8] for line in lines[-3:]] == ["100.0%", "95.0%", "75.0%"]
    assert (tmp_path / "scaling.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "two"], "--gpus two: numbers with commas"),
        (["--layouts", "tensor3"], "'tensor3' is none of data, zero2"),
        (["--models", "d24-256"], "'d24-256' is not NAME:BATCH"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, capsys: Any, arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--out", str(tmp_path), *TINY, *arguments])
    assert words in capsys.readouterr().err
