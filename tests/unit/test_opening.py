"""Naming a run directory in place of an exported model: its weights or their average, straight from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers import tiny_config, tiny_export, tiny_hmar, tiny_tokenizer, write_run

from hmar_mega.checkpoint.export import export_run
from hmar_mega.cli import main
from hmar_mega.errors import UserError
from hmar_mega.inference import load_model, open_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_gives_the_images_of_its_export(run: Path, tmp_path: Path, ema: bool):
    export_run(run, tmp_path / "out", ema=ema)
    exported, opened = load_model(tmp_path / "out", "cpu"), open_model(run, "cpu", ema=ema)
    assert opened.settings == exported.settings | {"trained": {**exported.settings["trained"], "ema": ema}}
    assert torch.equal(opened.generate([0, 3], seed=2), exported.generate([0, 3], seed=2))
    expected, averaged = (dict(tiny_hmar(tiny_config(), seed=s).named_parameters()) for s in (0, 2))
    for name, parameter in opened.model.named_parameters():
        source = averaged if ema and name.startswith("mask_") else expected
        assert torch.equal(parameter, source[name]), name


def test_another_checkpoint_and_number_format_can_be_named(run: Path):
    best = open_model(run, "cpu", torch.bfloat16, checkpoint="best")
    weight = tiny_hmar(tiny_config(), seed=1).head.linear.weight
    assert torch.equal(best.model.head.linear.weight, weight.to(torch.bfloat16))


def test_an_unfinished_run_may_be_looked_at_and_is_said_to_be_one(run: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        open_model(run, "cpu", checkpoint="step-00000010")
    assert f"weights of step 10 of {run}, which is unfinished" in caplog.text


def test_a_run_without_moving_average_or_checkpoint_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"step-00000010 holds no moving average: .* leave --ema out"):
        open_model(run, "cpu", ema=True, checkpoint="step-00000010")
    with pytest.raises(UserError, match=r"has no checkpoint 'step-00000099'; see hmar-mega checkpoint list"):
        open_model(run, "cpu", checkpoint="step-00000099")
    with pytest.raises(UserError, match="is not an exported model"):
        open_model(tmp_path / "nowhere", "cpu")


def test_an_export_says_which_weights_it_has(run: Path, tmp_path: Path):
    export_run(run, tmp_path / "average", ema=True)
    assert open_model(tmp_path / "average", "cpu", ema=True).settings["trained"]["ema"]
    with pytest.raises(UserError, match="was exported without its moving average"):
        open_model(tiny_export(tmp_path / "plain"), "cpu", ema=True)
    for options in ({"checkpoint": "best"}, {"tokenizer_folder": tmp_path / "vae"}):
        with pytest.raises(UserError, match="is an exported model, with one checkpoint and its own tokenizer"):
            open_model(tmp_path / "plain", "cpu", **options)


def test_a_tokenizer_that_has_moved_is_named(run: Path, tmp_path: Path):
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="holds no tokenizer"):
        open_model(run, "cpu")
    open_model(run, "cpu", tokenizer_folder=tmp_path / "elsewhere")
    tiny_tokenizer(tiny_config(), seed=5).save(tmp_path / "vae")
    with pytest.raises(UserError, match="put the tokenizer it was trained with back"):
        open_model(run, "cpu")


def test_the_command_samples_a_run_by_its_own_class_names(run: Path, tmp_path: Path):
    arguments = ["sample", str(run), "--device", "cpu", "--count", "2"]
    for name, options in {
        "names": ["--classes", "wasp,Bee"],
        "numbers": ["--classes", "4,1"],
        "ema": ["--classes", "4,1", "--ema"],
        "away": ["--classes", "4,1", "--negative-class", "bee"],
    }.items():
        assert main([*arguments, *options, "--out", str(tmp_path / f"{name}.png")]) == 0
    grids = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("names", "numbers", "ema", "away")}
    assert grids["names"] == grids["numbers"]
    assert len(set(grids.values())) == 3
