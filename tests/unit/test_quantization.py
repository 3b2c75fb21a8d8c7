"""Quantized models: the numbers, the two ways of sampling, the folder and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, random_normal, tiny_config, tiny_export, tiny_hmar, write_run

from hmar_mega.checkpoint.convert import convert
from hmar_mega.checkpoint.sources import open_weights
from hmar_mega.cli import main
from hmar_mega.errors import UserError
from hmar_mega.inference import load_model, open_model, quantize
from hmar_mega.inference.generation import model_digest
from hmar_mega.inference.graphs import ImageProgram
from hmar_mega.inference.quantize import Calibration, input_amax, quantize_folder, quantized
from hmar_mega.inference.sampler import generate_tokens
from hmar_mega.model.layers_quantized import (
    PARTS,
    Fp8Linear,
    Int8Linear,
    QuantizedLinear,
    linears_of,
    quantize_linears,
    quantize_weight,
)

LABELS, SEEDS = torch.tensor([0, 3, 4]), torch.tensor([7, 0, 2**40])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("float") / "model")


def test_int8_weights_are_half_a_step_off_at_most():
    weight = random_normal(6, 50) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3, 0.0])[:, None]
    q, scale = quantize_weight(weight, "int8")
    assert q.dtype == torch.int8
    assert q.abs().amax(1).tolist() == [127] * 5 + [0]
    torch.testing.assert_close(scale[:5], weight.abs().amax(1)[:5] / 127)
    assert ((q * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


def test_fp8_weights_keep_four_bits():
    weight = random_normal(6, 50) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3, 0.0])[:, None]
    q, scale = quantize_weight(weight, "fp8")
    assert q.float().abs().amax(1).tolist() == [448.0] * 5 + [0.0]
    error = (q.float() * scale[:, None] - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, 2.0**-10 * scale[:, None]) * 1.0001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linears_multiply_with_the_weights_that_are_meant(dtype: torch.dtype):
    """Beside float64; biases given, own and left apart; inputs beyond the range are cut off."""
    linear = torch.nn.Linear(32, 48)
    x, given = random_normal(5, 2, 32).to(dtype), random_normal(48, seed=1).to(dtype)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 2e-2}
    for to in ("int8", "fp8"):
        holder = torch.nn.ModuleDict({"ada_lin": torch.nn.Linear(32, 48)})
        holder.ada_lin.load_state_dict(linear.state_dict())
        quantize_linears(holder, to, ("adaln",), {"ada_lin": torch.tensor(2.0)})
        layer = holder.ada_lin.to(dtype=torch.float32)
        layer.bias = torch.nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        assert isinstance(layer, Int8Linear if to == "int8" else Fp8Linear)
        inputs = x.double()
        if to == "fp8":
            assert float(x.abs().max()) > 2  # some are cut off
            unit = 2.0 / 448
            inputs = (x.float() / unit).clamp(-448, 448).to(torch.float8_e4m3fn).double() * unit
        exact = inputs @ layer.float_weight().double().t()
        wanted = exact + linear.bias.double().to(dtype).double()
        torch.testing.assert_close(layer(x).double(), wanted, **tolerance)
        torch.testing.assert_close(layer(x, given).double(), exact + given.double(), **tolerance)
        product, bias = layer(x, apart=True)
        torch.testing.assert_close(product.double(), exact, **tolerance)
        assert bias is layer.bias
        torch.testing.assert_close(layer.gelu(x).double(), F.gelu(wanted, approximate="tanh"), **tolerance)
        assert layer(x).dtype == dtype


def test_parts_name_every_linear_but_the_word_embedding():
    model = tiny_hmar(tiny_config(shared_aln=True))
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - set(linears_of(model)) == {"word_embed"}
    assert set(linears_of(model, ("head",))) == {"head.linear", "mask_head.linear"}
    assert set(linears_of(model, ("adaln",))) == {"shared_ada_lin", "head.ada_lin", "mask_head.ada_lin"}


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_a_quantized_folder_is_what_quantizing_in_memory_gives(folder: Path, tmp_path: Path, to: str):
    """Written, read, sampled on both paths in float32: the same tokens; other ones than the float model's logits."""
    sizes = quantize_folder(folder, tmp_path / "out", to, PARTS, calibrate=CLASSES, show_progress=False)
    assert sizes.after < 0.5 * sizes.before
    read = load_model(tmp_path / "out", "cpu")
    description = read.settings["quantization"]
    assert description["to"] == to
    assert description["calibration"] == (
        None if to == "int8" else {"labels": list(range(CLASSES)), "seed": 0, "margin": 2.0}
    )
    made = quantized(load_model(folder, "cpu"), to, PARTS, Calibration.of(CLASSES, range(CLASSES)))
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor.float(), read.model.state_dict()[name].float()), name
    settings = read.sample_settings()
    tokens, _ = generate_tokens(read.model, read.tokenizer.quantizer, LABELS, SEEDS, settings)
    packed, images = ImageProgram(read.model, read.decoder, kernels=False)(LABELS, SEEDS, settings)
    assert torch.equal(tokens, packed)
    torch.testing.assert_close(read.generate(LABELS, seed=SEEDS), images, rtol=1e-4, atol=1e-4)
    plain = load_model(folder, "cpu")
    given = (LABELS, random_normal(3, 20, 8))
    difference = (read.next_scale_logits(*given) - plain.next_scale_logits(*given)).norm()
    assert 0 < difference / plain.next_scale_logits(*given).norm() < (0.1 if to == "int8" else 0.5)
    assert model_digest(read) == model_digest(made) != model_digest(plain)


def test_calibration_sees_the_largest_input_of_every_linear(folder: Path):
    """Also where no pass of the schedule asks the mask branch; scales hold twice of it."""
    model = load_model(folder, "cpu")
    model.settings["sampling"]["mask_schedule"] = []
    seen: dict[str, float] = {}
    name = "mask_blocks.1.ffn.fc2"
    layer = model.model.get_submodule(name)
    handle = layer.register_forward_pre_hook(
        lambda module, given: seen.update(largest=max(seen.get("largest", 0.0), float(given[0].abs().max())))
    )
    amax = input_amax(model, PARTS, Calibration((0, 4), seed=3))
    handle.remove()
    assert float(amax[name]) == seen["largest"] > 0
    assert all(float(value) > 0 for value in amax.values())
    quantized(model, "fp8", PARTS, Calibration((0, 4), seed=3))
    scale = model.model.get_submodule(name).input_scale
    torch.testing.assert_close(448 * scale, torch.tensor(2 * seen["largest"]))


def test_calibration_spreads_its_images_over_classes():
    assert Calibration.of(5, range(2)).labels == (0, 1, 0, 1, 0)
    assert Calibration.of(4, range(1000)).labels == (0, 250, 500, 750)
    with pytest.raises(UserError, match="at least 1"):
        Calibration.of(0, range(3))


def test_the_command_takes_runs_and_says_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path)
    given = ["quantize", str(run), str(tmp_path / "out"), "--to", "fp8", "--calibrate", "3", "--classes", "bee,4"]
    assert main([*given, "--ema", "--device", "cpu", "--dtype", "bf16", "--parts", "blocks"]) == 0
    assert "fp8 of blocks, the rest bf16: 0.3 MB → 0.1 MB" in capsys.readouterr().out
    model = open_model(tmp_path / "out", "cpu", ema=True)
    assert model.settings["quantization"]["calibration"]["labels"] == [1, 4, 1]
    assert isinstance(model.model.get_submodule("mask_blocks.1.attn.qkv"), QuantizedLinear)
    assert not isinstance(model.model.get_submodule("blocks.0.ada_lin"), QuantizedLinear)
    grid = tmp_path / "grid.png"
    assert main(["sample", str(tmp_path / "out"), "--classes", "1", "--count", "1", "--out", str(grid)]) == 0
    assert grid.is_file()


def test_what_cannot_be_done_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = tmp_path / "small"
    quantize_folder(folder, small, "int8", show_progress=False)
    for given, told in (
        ([str(small), str(tmp_path / "again"), "--to", "fp8"], "quantized already, to int8"),
        ([str(folder), str(small), "--to", "int8"], "exists"),
        ([str(folder), str(tmp_path / "x"), "--to", "int8", "--calibrate", "4"], "--calibrate would do nothing"),
        ([str(folder), str(tmp_path / "x"), "--to", "int8", "--parts", "blocks,tail"], "choose one or several"),
        ([str(folder), str(tmp_path / "x"), "--to", "fp8", "--calibrate", "0"], "at least 1 image"),
    ):
        assert main(["quantize", *given, "--device", "cpu"]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    with pytest.raises(UserError, match="quantized already"):
        load_model(small, "cpu", quantize="int8")
    for use in (lambda: open_weights(small), lambda: convert(small, tmp_path / "out.pth")):
        with pytest.raises(UserError, match="can be sampled and nothing else"):
            use()
    settings = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(settings | {"format": 1}))
    with pytest.raises(UserError, match="format 1"):
        load_model(small, "cpu")


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_weights_that_are_not_finite_are_refused(folder: Path, to: str):
    model = load_model(folder, "cpu")
    model.model.blocks["0"].ffn.fc1.weight[3, 4] = float("inf")
    with pytest.raises(UserError, match=r"blocks.0.ffn.fc1.weight has values that are infinite"):
        quantized(model, to, calibration=Calibration((0,)))


def test_on_the_fly_fp8_calibrates_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantize, "CALIBRATION_IMAGES", 2)
    model = load_model(folder, "cpu", quantize="fp8")
    assert model.settings["quantization"]["calibration"]["labels"] == [0, 2]
    assert model.generate([1]).isfinite().all()
