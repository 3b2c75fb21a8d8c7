"""Imported models go on training: on any layout the run of one process, in stage 1, stage 2 and on other classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published_makers import make_pair, make_transformer
from runs import Inputs, Outcome, largest_difference, make_inputs, train

from hmar_mega.checkpoint.convert import convert
from hmar_mega.checkpoint.sources import open_weights

pytestmark = pytest.mark.dist

#: In nats for losses, absolute for norms and parameters, as in test_parity.py.
TOLERANCE = 1e-6

LAYOUT = "pipeline2_tensor2"

#: A published file has width 64·depth. Steps are small, since its random weights are large.
SIZES = ("model.width=256", "model.heads=4", "model.depth=4", "model.mask_layers=2", "optim.base_lr=0.01")

#: Kind of the file, and settings of the run that starts from it.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "stage_1": ("nvlabs-next-scale", ()),
    "stage_1_of_a_composite": ("nvlabs-hmar", ()),
    "stage_2_of_a_next_scale_model": ("nvlabs-next-scale", ("stage.name=masked", "stage.mask_input=reference")),
    "stage_2_goes_on": ("nvlabs-hmar", ("stage.name=masked", "stage.mask_input=reference")),
    "var": ("var", ("model.attention.pattern=block_causal", "stage.loss_weights=uniform")),
    "shared_aln": ("nvlabs-hmar", ("stage.name=masked", "model.shared_aln=true")),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> dict[str, Path]:
    """A model folder of every kind, by case."""
    folder = tmp_path_factory.mktemp("imported")
    for case, (kind, settings) in CASES.items():
        sizes = {"classes": inputs.classes, "codes": inputs.codebook, "mask_layers": 2}
        tensors = make_transformer(kind, 4, shared="model.shared_aln=true" in settings, **sizes)
        soften(tensors)
        torch.save(tensors, folder / f"{case}.pth")
        convert(folder / f"{case}.pth", folder / case, tokenizer=inputs.tokenizer)
    return {case: folder / case for case in CASES}


def soften(tensors: dict[str, torch.Tensor]) -> None:
    """Matrices of the size that training starts with, so that float32 losses agree to 1e-6."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim == 2:
            tensor.mul_(0.2)
        elif "bias" in name and not name.startswith("attn_bias"):
            tensor.mul_(0.1)


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_with_tensor_parallelism_goes_on_as_one_process(
    case: str, imported: dict[str, Path], inputs: Inputs, tmp_path: Path
):
    settings = (*SIZES, *CASES[case][1], f"run.init_from={imported[case]}")
    one = train(inputs, tmp_path / "one", "single", *settings)
    many = train(inputs, tmp_path / "many", LAYOUT, *settings)
    assert many.losses[0] == pytest.approx(one.losses[0], abs=TOLERANCE)
    assert many.losses == pytest.approx(one.losses, abs=1e-5)
    assert many.norms == pytest.approx(one.norms, rel=1e-5)


def test_without_a_step_the_weights_are_those_of_the_file(imported: dict[str, Path], inputs: Inputs, tmp_path: Path):
    """On four ranks, and out again into a published file: bitwise what came in."""
    still = ("optim.base_lr=1e-30", "optim.max_steps=1", "optim.weight_decay=0", "optim.weight_decay_end=0")
    case = "stage_2_goes_on"
    folder = imported[case]
    settings = (*SIZES, *CASES[case][1], *still, f"run.init_from={folder}")
    found = train(inputs, tmp_path / "run", LAYOUT, *settings).weights
    source = open_weights(folder)
    assert largest_difference(found, {name: source.read(name) for name in source.shapes}) == 0
    convert(tmp_path / "run", tmp_path / "back.pth")
    given, back = (torch.load(p, weights_only=True) for p in (f"{folder}.pth", tmp_path / "back.pth"))
    assert given.keys() == back.keys()
    assert all(torch.equal(given[name], back[name]) for name in given)


def test_fine_tuning_on_other_classes_keeps_all_but_the_class_table(
    imported: dict[str, Path], tmp_path: Path, inputs: Inputs
):
    others = make_inputs(tmp_path / "inputs", codebook=inputs.codebook, classes=3)
    still = ("optim.base_lr=1e-30", "optim.max_steps=1", "optim.weight_decay=0", "optim.weight_decay_end=0")
    folder = imported["stage_1"]
    settings = (*SIZES, f"run.init_from={folder}", "run.new_classes=true")
    tuned = train(others, tmp_path / "tuned", LAYOUT, *settings, *still).weights
    source = open_weights(folder)
    assert tuned["class_embed.weight"].shape == (4, 256)
    kept = tuned.keys() - {"class_embed.weight"}
    assert kept == source.shapes.keys() - {"class_embed.weight"}
    assert all(torch.equal(tuned[name], source.read(name)) for name in kept)
    one = train(others, tmp_path / "one", "single", *settings)
    many = train(others, tmp_path / "many", LAYOUT, *settings)
    assert many.losses[0] == pytest.approx(one.losses[0], abs=TOLERANCE)


def test_a_merged_pair_goes_on_in_stage_2(inputs: Inputs, tmp_path: Path):
    pair = make_pair(classes=inputs.classes, codes=inputs.codebook)
    for name, tensors in zip(("next", "masked"), pair, strict=True):
        soften(tensors)
        torch.save(tensors, tmp_path / f"{name}.pth")
    convert(tmp_path / "next.pth", tmp_path / "ours", masked=tmp_path / "masked.pth", tokenizer=inputs.tokenizer)
    settings = (*SIZES, "stage.name=masked", f"run.init_from={tmp_path / 'ours'}")
    outcomes: list[Outcome] = [
        train(inputs, tmp_path / layout, layout, *settings) for layout in ("single", LAYOUT)
    ]
    assert outcomes[1].losses[0] == pytest.approx(outcomes[0].losses[0], abs=TOLERANCE)
