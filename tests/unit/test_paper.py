"""The configurations of the paper's tables are the published recipe, and their hours are what the planner says."""

from __future__ import annotations

from typing import Any

import paper_plan
import pytest
from docs_blocks import ROOT

from hmar_mega.config_io import load_config

#: Depth → batch, epochs, base_lr, gamma_init, final_ratio, weight decay and where it ends (arXiv 2506.04421).
RECIPE = {
    16: (768, 200, 1e-4, 1e-3, 0.1, 0.05, None),
    20: (768, 250, 1e-4, 1e-3, 0.1, 0.05, None),
    24: (768, 350, 8e-5, 1e-4, 0.01, 0.05, None),
    30: (1024, 350, 8e-5, 1e-5, 0.01, 0.05, 0.08),
}


def differing(first: Any, second: Any, prefix: str = "") -> set[str]:
    """Dotted keys at which two trees differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        return {key for name in first for key in differing(first[name], second[name], f"{prefix}{name}.")}
    return set() if first == second else {prefix[:-1]}


def changed(first: str, second: str) -> set[str]:
    return differing(load_config(first).model_dump(), load_config(second).model_dump())


@pytest.mark.parametrize("name", [name for name in paper_plan.runs() if not name.endswith("-masked")])
def test_stage_1_is_the_published_recipe(name: str) -> None:
    config = load_config(name)
    optim = config.optim
    assert (
        config.data.global_batch_size, optim.epochs, optim.base_lr, config.model.gamma_init, optim.final_ratio,
        optim.weight_decay, optim.weight_decay_end,
    ) == RECIPE[config.model.depth]  # fmt: skip
    assert (config.schedule.resolution, config.stage.name) == (int(name[-3:]), "next_scale")


@pytest.mark.parametrize("name", [name for name in paper_plan.runs() if name.endswith("-masked")])
def test_stage_2_differs_from_stage_1_in_stage_and_epochs(name: str) -> None:
    assert changed(name.removesuffix("-masked"), name) == {"stage.name", "stage.mask_input", "optim.epochs"}
    config = load_config(name)
    assert (config.stage.name, config.stage.mask_input, config.optim.epochs) == ("masked", "reference", 100)


def test_each_row_of_the_ablation_changes_one_thing() -> None:
    sampling = {"schedule.mask_schedule", "eval.cfg_scale", "eval.top_k", "eval.top_p"}
    assert changed("paper/var-d16-256", "paper/markov-d16-256") - sampling == {"model.attention.pattern"}
    assert changed("paper/markov-d16-256", "paper/hmar-d16-256") == {"stage.loss_weights"}


def test_the_page_has_the_row_that_the_planner_gives_now() -> None:
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    shown = page.partition(paper_plan.BEGIN)[2].partition(paper_plan.END)[0]
    assert paper_plan.row("paper/hmar-d16-256") in shown.splitlines()
    assert [name for name in paper_plan.runs() if f"| `{name}` |" not in shown] == []
