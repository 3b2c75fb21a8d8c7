"""`hmar-mega sweep fit` on made-up results: the largest model predicted, parabolas, frontier and recommendation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from sweeps import WIDTHS, enter, finish, write_spec

from hmar_mega.cli import main
from hmar_mega.config_io import load_config
from hmar_mega.errors import UserError
from hmar_mega.flops import train_flops_per_image
from hmar_mega.scaling import laws, state
from hmar_mega.scaling.fitting import Fit, predict_largest
from hmar_mega.scaling.frontier import frontier, iso_flop_groups, parabola, recommend
from hmar_mega.scaling.plots import draw_all
from hmar_mega.scaling.results import Point, finished_points, pareto

#: What a recommended model of depth 2 sets.
DEPTH_2 = ["model.depth=2", "model.width=128", "model.heads=2"]


def test_the_largest_model_is_predicted_before_it_is_measured_and_compared_after(tmp_path, capsys, monkeypatch):
    """Losses are 1.2 + 40·N^−0.3 exactly, so that the law with irreducible term must meet the largest."""
    monkeypatch.setattr(laws, "RESAMPLES", 40)
    wider = [{"depth": 2, "width": w, "heads": 2} for w in (*WIDTHS, 128)]
    names, path, folder = enter(write_spec(tmp_path, sizes=wider)), tmp_path / "SWEEP.yaml", tmp_path / "sweep"
    sizes = {entry["cell"]: entry["non_embedding"] for entry in state.read_sweep(folder)}
    for number, name in enumerate(names[:-1]):
        finish(folder, name, 1.2 + 40 * sizes[name] ** -0.3)
        if number == 2:  # a look while others still train, which is no last word
            assert {p.irreducible for p in predict_largest(folder, finished_points(folder), 0, [])} == {False}
    early = predict_largest(folder, finished_points(folder), 0, [])
    assert {p.irreducible for p in early} == {False, True}
    assert all(p.before and p.measured is None and p.from_cells == tuple(names[:-1]) for p in early)
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
