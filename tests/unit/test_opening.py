"""Naming a run directory in place of an exported model: its weights or their average, straight from a checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_export, tiny_hmar, tiny_tokenizer
from safetensors.torch import save_file

from hmar_mega.checkpoint.export import export_run
from hmar_mega.cli import main
from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.inference import load_model, open_model
from hmar_mega.model.hmar import HMAR


def write_step(run: Path, step: int, config: Config, weights: HMAR, average: HMAR | None, **state: Any) -> None:
    """A checkpoint of one process; the average, where there is one, is that of the mask branch, as in stage 2."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    tensors, entries = {}, []
    stored = [("weight", name, p) for name, p in weights.named_parameters()]
    if average is not None:
        stored += [("ema", name, p) for name, p in average.named_parameters() if name.startswith("mask_")]
    for kind, name, parameter in stored:
        shape, key = list(parameter.shape), f"{kind}/{name}/0"
        tensors[key] = parameter.detach().flatten().contiguous()
        entries.append(
            {"name": name, "kind": kind, "file": "rank-00000.safetensors", "key": key, "global_shape": shape,
             "offset": [0] * len(shape), "shape": shape, "start": 0, "stop": parameter.numel()}
        )  # fmt: skip
    save_file(tensors, folder / "rank-00000.safetensors")
    (folder / "index.json").write_text(json.dumps({"format": 1, "entries": entries}))
    about = {"step": step, "last_step": 20, "config": config.model_dump(mode="json"), **state}
    (folder / "state.json").write_text(json.dumps(about))
    (run / "checkpoints" / "latest").write_text(f"{folder.name}\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Step 10 without a moving average, `best`; step 20, finished, with one."""
    config = tiny_config()
    tokenizer = tiny_tokenizer(config)
    tokenizer.save(tmp_path / "vae")
    own = config.tokenizer.model_copy(update={"path": str(tmp_path / "vae")})
    config = config.model_copy(update={"tokenizer": own})
    state = {"tokenizer_fingerprint": tokenizer.fingerprint, "classes": ["ant", "bee", "cow", "dog", "wasp"]}
    write_step(tmp_path / "run", 10, config, tiny_hmar(config, seed=1), None, finished=False, **state)
    write_step(tmp_path / "run", 20, config, tiny_hmar(config), tiny_hmar(config, seed=2), finished=True, **state)
    (tmp_path / "run" / "checkpoints" / "best").write_text("step-00000010\n")
    return tmp_path / "run"


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
