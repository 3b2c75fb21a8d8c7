"""What can be chosen in sampling, in the grid of a training run, is drawn alike by tensor- and pipeline-parallel ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import run_ranks
from PIL import Image
from runs import LAYOUTS, Inputs, tiny_config, train_rank

from hmar_mega.config import Config

pytestmark = pytest.mark.dist

CHOICES = {
    "negative class": {"negative_class": 1},
    "guidance by scale": {"cfg_scale": (0.5, 0.0, 2.0)},
    "mixed codes": {"more_smooth": True},
}


def grid_rank(config: Config, choice: str) -> None:
    """Train with grids sampled under one of the choices."""
    import dataclasses

    from hmar_mega.inference import grid
    from hmar_mega.inference.smooth import Smoothing

    changes = {name: Smoothing() if value is True else value for name, value in CHOICES[choice].items()}
    settings = grid.SampleSettings
    grid.SampleSettings = lambda *given: dataclasses.replace(settings(*given), **changes)
    train_rank(config)


def pixels(inputs: Inputs, folder: Path, layout: str, choice: str) -> np.ndarray:
    """The grid after one step."""
    world, own = LAYOUTS[layout]
    settings = (f"data.val={inputs.val}", "eval.grid_count=4", "model.depth=4", "optim.max_steps=1")
    run_ranks(world, grid_rank, tiny_config(inputs, folder, *own, *settings), choice)
    with Image.open(folder / "grids" / "step-00000001.png") as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", ["tensor2", "pipeline2"])
def test_ranks_sample_as_one_process_does(inputs, tmp_path, layout, choice):
    alone = pixels(inputs, tmp_path / "single", "single", choice)
    together = pixels(inputs, tmp_path / layout, layout, choice)
    assert np.abs(together - alone).max() <= 1  # mixed codes carry rounding to the pixels, tokens do not
