"""What `convert` says of a file besides its error: every key by name, parts left out, and types that change."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_hmar, tiny_tokenizer, write_export, write_run
from published_makers import make_transformer, make_vqvae

from hmar_mega.checkpoint.convert import convert
from hmar_mega.checkpoint.export import export_run
from hmar_mega.errors import UserError
from hmar_mega.inference import load_model, open_model


def saved(path: Path, tensors: Any) -> Path:
    torch.save(tensors, path)
    return path


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return saved(tmp_path / "vae.pth", make_vqvae())


def lines(caplog: pytest.LogCaptureFixture, *parts: str) -> list[str]:
    """Messages that hold every part."""
    return [record.message for record in caplog.records if all(part in record.message for part in parts)]


# -------------------------------------------------------------------------------------------------------------- keys


def test_every_missing_and_surplus_key_is_in_the_log_by_name(
    vae: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole = make_transformer("nvlabs-hmar", 4, mask_layers=2)
    gone = [name for name in whole if name.startswith("base_blocks.0.")] + ["ns_head.bias"]
    added = [f"adapter.{i}.{part}" for i in range(2) for part in ("up", "down", "scale")]
    tensors = {n: t for n, t in whole.items() if n not in gone} | {n: torch.zeros(1) for n in added}
    with pytest.raises(UserError) as refused:
        convert(saved(tmp_path / "bad.pth", tensors), tmp_path / "ours", tokenizer=vae)
    message = str(refused.value)
    assert f"{len(gone)} missing: base_blocks.0." in message
    assert f"{len(gone) - 4} more (all of them in the log); 6 surplus: adapter.0.up" in message
    assert len(message) < 600
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 4  # a line for each of base_blocks.0, names without a block, adapter.0 and adapter.1
    told = {name for line in errors for name in line.split("): ")[1].split(", ")}
    assert told == {*gone, *added}
    assert lines(caplog, "bad.pth: missing, base_blocks.0.* (13): ")
    assert lines(caplog, "bad.pth: surplus, adapter.1.* (3): adapter.1.up, adapter.1.down, adapter.1.scale")


def test_a_few_keys_are_in_the_error_alone(vae: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = make_transformer("var")
    del tensors["head.bias"]
    with pytest.raises(UserError, match=r"1 missing: head\.bias$"):
        convert(saved(tmp_path / "bad.pth", tensors), tmp_path / "ours", tokenizer=vae)
    assert not [record for record in caplog.records if record.levelno == logging.ERROR]


# ------------------------------------------------------------------------------------------------- parts and types


def test_parts_of_a_training_checkpoint_that_are_left_out_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    trainer = {
        "transformer_wo_ddp": make_transformer("nvlabs-next-scale"), "var_wo_ddp": make_transformer("var"),
        "vae_local": make_vqvae(), "optimizer": optimizer,
    }  # fmt: skip
    source = saved(tmp_path / "ckpt.pth", {"epoch": 3, "trainer": trainer, "args": {"depth": 2}})
    convert(source, tmp_path / "ours")
    assert lines(caplog, "left out") == [
        f"{source} is a training checkpoint, with its model in trainer.transformer_wo_ddp; left out: epoch, "
        "trainer.var_wo_ddp, trainer.optimizer, args"
    ]
    caplog.clear()
    convert(source, tmp_path / "out.pth")
    assert lines(caplog, "tokenizer in trainer.vae_local", "is left out: a published file of a model holds none")
    caplog.clear()
    convert(source, tmp_path / "other", tokenizer=tmp_path / "ours" / "tokenizer")
    assert lines(caplog, "tokenizer in trainer.vae_local", "is left out: ", "ours/tokenizer is taken")


def test_what_is_no_tensor_in_a_plain_file_is_told_and_a_plain_file_tells_nothing(
    vae: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    tensors = make_transformer("var")
    convert(saved(tmp_path / "plain.pth", tensors), tmp_path / "plain", tokenizer=vae)
    assert not lines(caplog, "left out")
    assert not lines(caplog, "float32")
    source = saved(tmp_path / "more.pth", {**tensors, "step": 7, "about": {"by": "me"}})
    convert(source, tmp_path / "more", tokenizer=vae)
    assert lines(caplog, "left out") == [f"{source} is a file of tensors; left out: step, about.by"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_that_change_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype):
    caplog.set_level(logging.INFO)
    name = str(dtype).removeprefix("torch.")
    half = {n: t.to(dtype) if n.startswith("blocks.") else t for n, t in make_transformer("var").items()}
    narrow = saved(tmp_path / "vae.pth", {n: t.to(dtype) for n, t in make_vqvae().items()})
    source = saved(tmp_path / "half.pth", half)
    convert(source, tmp_path / "ours", tokenizer=narrow)
    # zero_k_bias is a buffer, made anew
    count = sum(n.startswith("blocks.") and not n.endswith("zero_k_bias") for n in half)
    after = "they become float32, and stay so in what is converted back"
    assert lines(caplog, f"{source} holds tensors in {name} ({count}): {after}")
    assert lines(caplog, f"{narrow} holds tensors in {name} (", after)
    convert(tmp_path / "ours", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert {t.dtype for t in back.values() if t.is_floating_point()} == {torch.float32}


# ------------------------------------------------------------------------------------- attention backend of training


def test_an_export_is_not_tied_to_the_attention_backend_of_training(tmp_path: Path):
    run = write_run(tmp_path)
    for step in (run / "checkpoints").glob("step-*"):
        state = json.loads((step / "state.json").read_text())
        state["config"]["model"]["attention"]["backend"] = "triton"
        (step / "state.json").write_text(json.dumps(state))
    assert export_run(run, tmp_path / "out")["model"]["attention"]["backend"] == "auto"
    labels, given = torch.tensor([1]), torch.zeros(1, 20, 8)
    for model in (load_model(tmp_path / "out", "cpu"), open_model(run, "cpu")):
        assert model.next_scale_logits(labels, given).isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "te", "reference"])
def test_a_folder_that_names_a_backend_of_gpus_opens_anywhere_and_is_converted_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, backend: str
):
    caplog.set_level(logging.INFO)
    config = tiny_config()
    folder = write_export(tmp_path / "ours", config, tiny_hmar(config), tiny_tokenizer(config))
    settings = json.loads((folder / "config.json").read_text())
    expected = load_model(folder, "cpu").generate([1, 2], seed=3)
    assert not lines(caplog, "attention.backend=", "takes auto")
    settings["model"]["attention"]["backend"] = backend
    (folder / "config.json").write_text(json.dumps(settings))
    model = load_model(folder, "cpu")
    assert model.model.config.attention.backend == ("reference" if backend == "reference" else "auto")
    assert len(lines(caplog, f"attention.backend={backend}", "sampling takes auto")) == (backend != "reference")
    torch.testing.assert_close(model.generate([1, 2], seed=3), expected)
    convert(folder, tmp_path / "larger", patch_nums=(1, 2, 3, 4))
    assert json.loads((tmp_path / "larger" / "config.json").read_text())["model"]["attention"]["backend"] == "auto"
