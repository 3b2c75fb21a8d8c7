"""Sweeps: from SWEEP.yaml to cells, plans and entries of a sweep's folder, without training anything."""

from __future__ import annotations

import json
import shutil

import pytest
from sweeps import IMAGES, cells_of, enter, finish, write_data, write_spec

from hmar_mega.cli import main
from hmar_mega.errors import UserError
from hmar_mega.scaling import record, state
from hmar_mega.scaling.plan import plan_cells
from hmar_mega.scaling.results import finished_points, mixed_data
from hmar_mega.scaling.spec import LearningRateRule, load_sweep
from hmar_mega.schedules import Schedule


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
    # where nothing lies, folders are alike: what counts is in them
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
    record.record(record.cell_folder(folder, names[1]), "start")
    by_width = {"rule": "width_power", "reference_width": 16, "exponent": 0.5}  # the first, finished one stays as it is
    other = enter(write_spec(tmp_path, learning_rate=by_width))
    kept = [entry["cell"] for entry in state.read_sweep(folder)]
    assert (names[0] in kept, names[1] in kept, set(other) <= set(kept)) == (True, False, True)
    changed = write_spec(tmp_path, learning_rate={"base_lr": 7.0e-3})
    with pytest.raises(UserError, match=r"other settings: .*optim.base_lr 0.002 → 0.007.* another dir"):
        enter(changed)
    assert main(["sweep", "submit", str(changed), "--dry-run"]) == 2


def test_data_made_anew_in_the_same_folder_are_other_cells(tmp_path):
    names, folder = enter(write_spec(tmp_path)), tmp_path / "sweep"
    finish(folder, names[0], 2.0)
    write_data(tmp_path, version="b")
    with pytest.raises(UserError, match=r"other data: .*contents of data.train \w+ → \w+.*--accept-changed-data"):
        enter(write_spec(tmp_path))
    accepted = enter(write_spec(tmp_path), accept_changed_data=True)
    assert accepted[0] == names[0]
    assert not set(accepted[1:]) & set(names)
    finish(folder, accepted[1], 1.9)
    assert [note for note in mixed_data(finished_points(folder)) if "data.train" in note]
    with pytest.raises(UserError, match="other settings"):
        enter(write_spec(tmp_path, learning_rate={"base_lr": 0.1}), accept_changed_data=True)


def test_results_alone_are_enough_to_go_on_elsewhere(tmp_path, capsys):
    """sweep.json and results/, without cells, data or tokenizer."""
    names = enter(write_spec(tmp_path))
    for name in names:
        finish(tmp_path / "sweep", name, 2.0)
    there = tmp_path / "there"
    shutil.copytree(tmp_path / "sweep" / "results", there / "sweep" / "results")
    shutil.copy(tmp_path / "sweep" / "sweep.json", there / "sweep")
    points = finished_points(there / "sweep")
    assert sorted(point.cell for point in points) == sorted(names)
    path = write_spec(there)
    assert main(["sweep", "plan", str(path)]) == 0  # without the data their contents are unknown, not changed
    assert main(["sweep", "submit", str(path), "--dry-run"]) == 2
    assert "submit where the data and the tokenizer are" in capsys.readouterr().err
    shutil.copytree(tmp_path / "tokens", there / "tokens")
    shutil.copytree(tmp_path / "vae", there / "vae")
    assert main(["sweep", "submit", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out == ""
