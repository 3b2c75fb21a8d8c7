"""Sweeps: from SWEEP.yaml to cells, plans, states, arrays and fits, without training anything."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from hmar_mega.cli import main
from hmar_mega.config_io import load_config
from hmar_mega.errors import UserError
from hmar_mega.flops import train_flops_per_image
from hmar_mega.scaling import laws, state, submit
from hmar_mega.scaling.cells import Cell, expand
from hmar_mega.scaling.fitting import Fit, predict_largest
from hmar_mega.scaling.frontier import frontier, iso_flop_groups, parabola, recommend
from hmar_mega.scaling.plan import plan_cells
from hmar_mega.scaling.plots import draw_all
from hmar_mega.scaling.results import Point, finished_points, pareto
from hmar_mega.scaling.spec import LearningRateRule, load_sweep
from hmar_mega.schedules import Schedule

#: What a recommended model of depth 2 sets.
DEPTH_2 = ["model.depth=2", "model.width=128", "model.heads=2"]

WIDTHS = (16, 32, 48, 64, 96)
IMAGES = 6400


def write_spec(tmp_path: Path, **changes: Any) -> Path:
    tree: dict[str, Any] = {
        "dir": str(tmp_path / "sweep"),
        "base": "demo",
        "settings": {"data": {"val": "tokens/val"}, "parallel": {"tensor_parallel": 1}},
        "sizes": [{"depth": 2, "width": w, "heads": 2} for w in WIDTHS],
        "budgets": {"iso_data": {"images": [IMAGES]}},
        "dataset_images": 1000,
        "cluster": "local-cpu",
        "layout": "config",
        **changes,
    }
    path = tmp_path / "SWEEP.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def cells_of(path: Path) -> list[Cell]:
    return expand(*load_sweep(path))


def enter(path: Path) -> list[str]:
    spec, base = load_sweep(path)
    planned = plan_cells(spec, expand(spec, base))
    state.write_sweep(Path(spec.dir), spec, planned)
    return [item.cell.name for item in planned]


def finish(folder: Path, name: str, loss: float) -> None:
    """What a finished attempt leaves behind, checkpoints aside."""
    path = state.cell_folder(folder, name)
    (path / "run").mkdir()
    steps = next(entry["steps"] for entry in state.read_sweep(folder) if entry["cell"] == name)
    row = {"kind": "val", "step": steps}
    for kind in ("", "_error"):
        row |= {f"all_scales{kind}": loss, f"last_scale{kind}": loss / 2}
    row |= {"scale_loss": [loss, loss / 2], "scale_error": [None, loss / 2]}
    (path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    state.record(path, "start", number=1)
    state.record(path, "end", outcome="finished", status=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": {"iso_flops": {}}}, r"unknown key budgets.iso_flops; did you mean budgets.iso_flop\?"),
        ({"seed": [1]}, r"unknown key seed; did you mean seeds\?"),
        ({"budgets": {}}, "at least one of iso_data"),
        ({"budgets": {"iso_data": {"images": [0]}}}, "above 0"),
        ({"learning_rate": {"rule": "width_power"}}, "needs reference_width"),
        ({"settings": {"optim": {"lr": 1}, "data": {"val": "v"}}}, "unknown key optim.lr; did you mean"),
        ({"settings": {}}, "data.val is not set"),
        ({"dataset_images": None}, "set dataset_images"),
        ({"processes": 8}, "local-cpu has 2"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_with_what_to_do(tmp_path, changes, words):
    path = write_spec(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        plan_cells(load_sweep(path)[0], cells_of(path))


def test_budgets_make_the_runs_they_name_and_what_two_ask_for_is_trained_once(tmp_path):
    two = [{"depth": 2, "width": w, "heads": 2} for w in (32, 64)]
    budgets = {"iso_data": {"images": [IMAGES]}, "iso_parameters": {"parameters": [1e5], "images": [IMAGES, 12800]}}
    cells = cells_of(write_spec(tmp_path, sizes=two, budgets=budgets, seeds=[0, 1]))
    assert len(cells) == 2 * 3
    shared = [c for c in cells if len(c.groups) == 2]
    assert {(c.config.model.width, c.images) for c in shared} == {(64, IMAGES)}
    flops = cells_of(write_spec(tmp_path, sizes=two, budgets={"iso_flop": {"flops": ["2e12"]}}))
    assert [c.flops for c in flops] == pytest.approx([2e12, 2e12], rel=0.02)
    assert flops[0].images != flops[1].images
    for cell in cells:
        assert Schedule.of(cell.config, 1000).total_steps == cell.steps
        # VAR's N = 18·C²·d leaves biases and heads out, 15·C·d at most
        width, depth = cell.config.model.resolved_width, cell.config.model.depth
        assert 0 < cell.non_embedding - 18 * width**2 * depth <= 15 * width * depth


def test_identity_is_what_changes_a_result_and_nothing_else(tmp_path):
    before = cells_of(write_spec(tmp_path))
    same = {"data": {"val": "tokens/val", "workers": 0}, "parallel": {"tensor_parallel": 2}, "logging": {"interval": 1}}
    assert [c.name for c in cells_of(write_spec(tmp_path, settings=same))] == [c.name for c in before]
    other = cells_of(write_spec(tmp_path, learning_rate={"base_lr": 1.0e-3}))
    assert [c.key for c in other] == [c.key for c in before]
    assert not {c.digest for c in other} & {c.digest for c in before}


def test_learning_rates_follow_the_width_unless_said_otherwise():
    rule = LearningRateRule(rule="width_power", base_lr=1e-3, reference_width=128, exponent=1, by_depth={9: 5e-4})
    assert [rule.base_lr_of(d, 64 * d, 1.0) for d in (1, 2, 4, 9)] == [2e-3, 1e-3, 5e-4, 5e-4]


def test_a_cell_too_large_for_the_memory_is_refused_with_the_nearest_that_fits(tmp_path):
    path = write_spec(tmp_path, sizes=[{"depth": 2}, {"depth": 30}])
    with pytest.raises(UserError, match=r"cell d30-.* needs .* GiB .* nearest that fits is depth \d+"):
        plan_cells(load_sweep(path)[0], cells_of(path))


def test_the_plan_is_a_table_and_json_and_writes_nothing(tmp_path, capsys):
    path = write_spec(tmp_path, price_per_gpu_hour=2.0)
    assert main(["sweep", "plan", str(path), "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert all(row["cell"] in shown for row in rows)
    assert all(row["cost"] == pytest.approx(2 * row["gpu_hours"]) for row in rows)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_grows_but_a_finished_cell_must_not_change(tmp_path):
    names = enter(write_spec(tmp_path))
    folder = tmp_path / "sweep"
    finish(folder, names[0], 2.0)
    more = enter(write_spec(tmp_path, seeds=[0, 1]))
    assert set(names) < set(more)
    assert len(state.read_sweep(folder)) == len(more)
    state.record(state.cell_folder(folder, names[1]), "start")
    by_width = {"rule": "width_power", "reference_width": 16, "exponent": 0.5}  # the first, finished one stays as it is
    other = enter(write_spec(tmp_path, learning_rate=by_width))
    kept = [entry["cell"] for entry in state.read_sweep(folder)]
    assert (names[0] in kept, names[1] in kept, set(other) <= set(kept)) == (True, False, True)
    changed = write_spec(tmp_path, learning_rate={"base_lr": 7.0e-3})
    with pytest.raises(UserError, match=r"other settings: .*optim.base_lr 0.002 → 0.007.* another dir"):
        enter(changed)
    assert main(["sweep", "submit", str(changed), "--dry-run"]) == 2


def test_states_and_reasons_follow_from_what_attempts_left(tmp_path, capsys):
    names = enter(write_spec(tmp_path))
    folder = tmp_path / "sweep"
    entries = {entry["cell"]: entry for entry in state.read_sweep(folder)}
    finish(folder, names[0], 2.0)
    for _ in range(2):
        state.record(state.cell_folder(folder, names[1]), "start")
        state.record(state.cell_folder(folder, names[1]), "end", outcome="failed", status=1, reason="out of memory")
    state.record(state.cell_folder(folder, names[2]), "start")
    state.record(state.cell_folder(folder, names[3]), "start")
    state.record(state.cell_folder(folder, names[3]), "end", outcome="stopped", status=75)

    def states(limit: int, queued: frozenset[str] = frozenset()) -> list[str]:
        return [state.state_of(folder, entries[name], limit, queued).state for name in names]

    assert states(3) == ["finished", "failed", "failed", "stopped", "new"]
    assert states(2, frozenset(names[4:])) == ["finished", "gave up", "failed", "stopped", "queued"]
    failed = state.state_of(folder, entries[names[1]], 3)
    assert (failed.attempts, failed.reason) == (2, "out of memory")
    assert "killed" in state.state_of(folder, entries[names[2]], 3).reason
    assert main(["sweep", "status", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert "out of memory" in shown
    with state.attempt_lock(state.cell_folder(folder, names[2])):
        assert states(3)[2] == "running"
    assert states(3)[2] == "failed"


@pytest.mark.parametrize(
    ("status", "text", "reason"),
    [
        (1, "x\ntorch.OutOfMemoryError: CUDA out of memory. Tried", "out of memory"),
        (1, "hmar-mega: 10 steps in a row up to step 9 had a loss or gradient that is not finite;", "not finite"),
        (2, "noise\nhmar-mega: data.train is not set\n", "data.train is not set"),
        (-9, "step 3", "killed by signal 9"),
        (1, "Traceback\nKeyError: 'x'\n", "exit status 1: KeyError: 'x'"),
    ],
)
def test_reasons_are_read_from_the_log(status: int, text: str, reason: str):
    assert reason in state.failure_reason(status, text)


def test_an_attempt_records_how_it_ended(tmp_path, monkeypatch):
    name, folder = enter(write_spec(tmp_path))[0], tmp_path / "sweep"
    path = state.cell_folder(folder, name)

    def ends_with(status: int, asked: list[int], text: str = "", finished: bool = False) -> int:
        def train(path: Path, processes: int, output: Path) -> tuple[int, list[int]]:
            output.write_text(text)
            if finished:
                checkpoint = path / "run" / "checkpoints" / "step-00000100"
                checkpoint.mkdir(parents=True)
                (checkpoint / "state.json").write_text('{"finished": true}')
                (checkpoint.parent / "latest").write_text(checkpoint.name)
            return status, asked

        monkeypatch.setattr(submit, "_train", train)
        return submit.run_cell(folder, name, 1)

    assert ends_with(1, [], "hmar-mega: the disk is red") == 1
    assert ends_with(75, [signal.SIGUSR1]) == 75
    assert ends_with(0, [signal.SIGTERM]) == 0
    assert ends_with(0, [], finished=True) == 0
    rows = [json.loads(line) for line in (path / "attempts.jsonl").read_text().splitlines()]
    ended = [(row["outcome"], row.get("reason")) for row in rows if row["event"] == "end"]
    assert ended == [("failed", "the disk is red"), ("stopped", None), ("stopped", None), ("finished", None)]
    monkeypatch.setattr(submit, "_train", None)  # a finished cell is not trained again
    assert submit.run_cell(folder, name, 1) == 0
    with pytest.raises(UserError, match="has no cell d9"):
        submit.run_cell(folder, "d9", 1)


def test_local_processes_retry_what_fails_up_to_the_limit_and_train_the_rest(tmp_path, monkeypatch):
    """A stand-in for the cells: the first fails every time, the second once, the others never."""
    names, folder = enter(write_spec(tmp_path)), tmp_path / "sweep"
    stand_in = tmp_path / "cell.sh"
    stand_in.write_text(f"""#!/bin/sh
file=$5/cells/$6/attempts.jsonl
echo '{{"event": "start"}}' >> "$file"
if [ "$6" = {names[0]} ] || {{ [ "$6" = {names[1]} ] && [ "$(wc -l < "$file")" = 1 ]; }}; then
    echo '{{"event": "end", "outcome": "failed", "reason": "on purpose"}}' >> "$file"; exit 1
fi
echo '{{"event": "end", "outcome": "finished"}}' >> "$file"
""")
    stand_in.chmod(stat.S_IRWXU)
    monkeypatch.setattr(submit.sys, "executable", str(stand_in))
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    outcome = submit.run_local(folder, names, 1, concurrency=2, max_attempts=2)
    assert outcome.gave_up == [names[0]]
    assert set(outcome.finished) == set(names[1:])
    assert [submit.state.count_attempts(state.cell_folder(folder, n)) for n in names] == [2, 2, 1, 1, 1]


def test_an_array_has_a_task_a_cell_and_what_slurm_still_holds_is_not_submitted_again(tmp_path, monkeypatch, capsys):
    names, path, folder = enter(write_spec(tmp_path)), tmp_path / "SWEEP.yaml", tmp_path / "sweep"
    assert main(["sweep", "submit", str(path), "--slurm", "2", "--option=--partition=gpu", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --array=0-4%2\n" in shown
    assert "#SBATCH --partition=gpu\n" in shown
    assert re.findall(r"@[A-Z]+@", shown) == []
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("sbatch", "echo 77"), ("squeue", "echo '77 1'; echo '77 3'; echo '9 0'")):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert main(["sweep", "submit", str(path), "--slurm", "2", "--dependency", "afterok:5"]) == 0
    assert "#SBATCH --dependency=afterok:5\n" in (folder / "arrays" / "001.sbatch").read_text()
    assert (folder / "arrays" / "001.cells").read_text().split() == names
    assert submit.queued_cells(folder) == {names[1], names[3]}
    assert main(["sweep", "submit", str(path), "--slurm", "2", "--option=--exclusive"]) == 0
    assert (folder / "arrays" / "002.cells").read_text().split() == [names[0], names[2], names[4]]


def test_the_largest_model_is_predicted_before_it_is_measured_and_compared_after(tmp_path, capsys, monkeypatch):
    """Losses are 1.2 + 40·N^−0.3 exactly, so that the law with irreducible term must meet the largest."""
    monkeypatch.setattr(laws, "RESAMPLES", 40)
    wider = [{"depth": 2, "width": w, "heads": 2} for w in (*WIDTHS, 128)]
    names, path, folder = enter(write_spec(tmp_path, sizes=wider)), tmp_path / "SWEEP.yaml", tmp_path / "sweep"
    sizes = {entry["cell"]: entry["non_embedding"] for entry in state.read_sweep(folder)}
    for name in names[:-1]:
        finish(folder, name, 1.2 + 40 * sizes[name] ** -0.3)
    early = predict_largest(folder, finished_points(folder), 0, [])
    assert early
    assert all(p.before and p.measured is None for p in early)
    finish(folder, names[-1], 1.2 + 40 * sizes[names[-1]] ** -0.3)
    assert main(["sweep", "fit", str(path)]) == 0
    result = json.loads((folder / "fit" / "fit.json").read_text())
    kept = {(p["quantity"], p["irreducible"]): p for p in result["predictions"]}
    assert all(p["before"] for p in kept.values())
    assert kept["loss/all", True]["relative_error"] == pytest.approx(0, abs=1e-4)
    assert abs(kept["loss/all", False]["relative_error"]) > 1e-3
    found = {(law["quantity"], law["variable"], law["with_irreducible"]): law for law in result["laws"]}
    assert found["loss/2", "N", True]["exponent"] == pytest.approx(0.3, abs=1e-3)
    page = (folder / "fit" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((folder / "fit").glob("*.png")))
    assert "no frontier" in capsys.readouterr().out


def point(size: int, flops: float, loss: float) -> Point:
    return Point("c", (f"flops={flops:.6g}",), 2, 0, size, size, 1000, flops, {"loss/all": loss})


def test_the_best_size_of_a_budget_is_the_lowest_point_of_its_parabola():
    def loss(size: int) -> float:
        return float(np.exp(0.5 + 0.02 * np.log(size / 3e5) ** 2))

    sizes = (100_000, 200_000, 400_000, 800_000)
    found = parabola(1e12, [point(n, 1e12, loss(n)) for n in sizes], "loss/all")
    assert found.optimum == pytest.approx(3e5)
    assert found.loss == pytest.approx(np.exp(0.5))
    outside = parabola(1e12, [point(n, 1e12, loss(n)) for n in (10_000, 20_000, 40_000)], "loss/all")
    assert outside.optimum is None
    assert "add larger" in outside.why_not
    with pytest.raises(UserError, match="it needs 3"):
        parabola(1e12, [point(n, 1e12, loss(n)) for n in sizes[:2]], "loss/all")


def test_the_frontier_through_the_best_sizes_gives_a_model_for_a_budget_and_a_picture(tmp_path):
    budgets = {1e12: 5e4, 4e12: 1e5, 16e12: 2e5}  # N_opt ∝ C^0.5
    runs = [
        point(int(best * factor), flops, 2 - 0.1 * np.log10(flops) + 0.05 * np.log(factor) ** 2)
        for flops, best in budgets.items()
        for factor in (0.4, 0.7, 1.0, 1.5, 2.5)
    ]
    curves = [parabola(flops, group, "loss/all") for flops, group in iso_flop_groups(runs).items()]
    line = frontier(curves)
    assert line.exponent == pytest.approx(0.5, abs=0.02)
    best = recommend(line, 64e12, load_config("demo"), 16e12)
    assert best.wanted == pytest.approx(4e5, rel=0.1)
    assert (best.depth, best.extrapolated) == (2, 4.0)  # 18·128²·2 = 590 k; depth 1 has 74 k
    assert best.images * train_flops_per_image(load_config("demo", DEPTH_2)) == pytest.approx(64e12)
    fit = Fit(tuple(runs), (), (), tuple(curves), line, (best,), ())
    (picture,) = draw_all(fit, tmp_path).values()
    assert Image.open(picture).width > 500


def test_runs_that_cheaper_ones_beat_are_not_on_the_frontier_of_compute():
    runs = [point(1, 1e12, 3.0), point(2, 2e12, 3.5), point(3, 3e12, 2.0), point(4, 3e12, 2.5)]
    assert [p.parameters for p in pareto(runs, "loss/all")] == [1, 3]
