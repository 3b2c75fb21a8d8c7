"""Programs for other runtimes: written, loaded back, compared; nothing is left of a wrong one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers import CLASSES, random_normal, tiny_config, tiny_hmar, tiny_tokenizer, write_export

from hmar_mega.cli import main
from hmar_mega.errors import UserError
from hmar_mega.inference import deploy, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, one pass a scale: programs are unrolled, and tracing takes its time."""
    config = tiny_config("next_scale", depth=1)
    path = tmp_path_factory.mktemp("float") / "model"
    write_export(path, config, tiny_hmar(config), tiny_tokenizer(config))
    settings = json.loads((path / "config.json").read_text())
    settings["sampling"]["mask_schedule"] = []
    (path / "config.json").write_text(json.dumps(settings))
    return path


def test_torch_programs_decode_any_batch_and_draw_the_models_tokens(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert main(["export", str(folder), str(out), "--format", "torch-export", "--batch", "2"]) == 0
    assert f"generate: {out}/generate.pt2 (cpu), labels int64 (2,), seeds int64 (2,)" in capsys.readouterr().out
    described = json.loads((out / "export.json").read_text())
    assert set(described["programs"]) == {"decoder", "generate"}
    assert described["programs"]["generate"]["outputs"]["tokens"] == "int64 (2, 21)"
    model = load_model(folder, "cpu")
    decoder, generate = (deploy.load_program(out / f"{n}.pt2", "torch-export") for n in ("decoder", "generate"))
    f_hat = random_normal(5, 8, 4, 4)
    torch.testing.assert_close(decoder(f_hat), model.to_images(f_hat), rtol=0, atol=1e-5)
    labels, seeds = torch.tensor([4, 1]), torch.tensor([2**40, 3])
    tokens, images = generate(labels, seeds)
    wanted, pixels = model.sampler(labels, seeds, model.sample_settings())
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(images, pixels, rtol=0, atol=1e-5)


def test_onnx_decoders_decode_any_batch(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the extra `export` is not installed")
    with caplog.at_level(logging.INFO):
        assert main(["export", str(folder), str(tmp_path / "out"), "--format", "onnx"]) == 0
    assert not [record for record in caplog.records if record.name.startswith("onnx")]
    f_hat = random_normal(5, 8, 4, 4)
    found = deploy.load_program(tmp_path / "out" / "decoder.onnx", "onnx")(f_hat)
    torch.testing.assert_close(found, load_model(folder, "cpu").to_images(f_hat), rtol=0, atol=1e-4)


def test_a_program_that_is_wrong_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Block-causal, of which the decoder alone can be exported."""
    config = tiny_config("next_scale", "block_causal", depth=1)
    model = load_model(
        write_export(tmp_path / "model", config, tiny_hmar(config), tiny_tokenizer(config)), "cpu"
    )  # fmt: skip
    load = deploy.load_program
    for wrong, told in ((lambda x: x + 0.01, r"1\.0e-02 off"), (lambda x: x[:, :2], "inf off")):

        def load_wrong(path: Path, runtime: deploy.Runtime, wrong: deploy.Run = wrong) -> deploy.Run:
            run = load(path, runtime)
            return lambda f_hat: wrong(run(f_hat))

        monkeypatch.setattr(deploy, "load_program", load_wrong)
        with pytest.raises(UserError, match=told):
            deploy.deploy(model, tmp_path / "out", "torch-export")
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(deploy, "load_program", load)
    assert set(deploy.deploy(model, tmp_path / "out", "torch-export")) == {"decoder"}


def test_options_that_do_not_go_together(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "out")
    for given, told in (
        (["--format", "onnx", "--batch", "2"], "--batch would do nothing"),
        (["--format", "onnx", "--device", "cpu"], "bound to no device"),
        (["--format", "aoti", "--dtype", "bf16"], "--dtype would do nothing"),
        (["--device", "cpu"], "other runtimes"),
    ):
        assert main(["export", str(folder), out, *given]) == 2
        assert told in capsys.readouterr().err
    model = load_model(folder, "cpu")
    with pytest.raises(UserError, match="batches ≥ 1"):
        deploy.deploy(model, tmp_path / "out", "torch-export", batch=0)
    assert model.num_classes == CLASSES
