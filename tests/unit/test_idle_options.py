"""Options of `sample` and `edit` that would do nothing: refused by name and reason before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_export
from PIL import Image

from hmar_mega.cli import main
from hmar_mega.errors import UserError, refuse_options
from hmar_mega.inference import ImageModel, commands, edit, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    return load_model(folder, "cpu")


def test_what_was_given_is_refused_by_name_and_what_was_not_passes():
    refuse_options("of no reason", seed=None, ema=False)
    with pytest.raises(UserError, match=r"^--seed would do nothing: it is Monday; leave it out$"):
        refuse_options("it is Monday", seed=0, ema=False)
    with pytest.raises(UserError, match=r"^--chunk-size and --ema would do nothing: .*; leave them out$"):
        refuse_options("it is Monday", chunk_size=3, ema=True)


GRID = ["--classes", "0", "--out", "grid.png"]
REFUSED = {
    "seed of a grid": (["--csv", "w.csv", "--seed", "77", "--out", "grid.png"], "--seed would do nothing: --csv gives"),
    "seed 0 of a grid": (["--csv", "w.csv", "--seed", "0", "--out", "grid.png"], "--seed would do nothing: --csv"),
    "seed of a folder": (["--csv", "w.csv", "--seed", "77", "--out", "many"], "--seed would do nothing: --csv gives"),
    "format": ([*GRID, "--format", "shards"], "--format would do nothing: grid.png is to be a grid in one PNG"),
    "chunk size": ([*GRID, "--chunk-size", "3"], "--chunk-size would do nothing: grid.png is to be a grid in one PNG"),
    "the default": ([*GRID, "--format", "npz", "--chunk-size", "500"], "--format and --chunk-size would do nothing"),
    "batch of none": ([*GRID, "--batch-size", "0"], "--batch-size 0: sample at least 1"),
    "two number formats": ([*GRID, "--precision", "bf16", "--dtype", "fp32"], "give one of the two"),
    "negative class": ([*GRID, "--cfg", "0", "--negative-class", "2"], "negative_class=2 would do nothing: no pass is"),
    "mask guidance of other scales": (
        [*GRID, "--cfg", "0", "--mask-cfg", "0,1,0", "--mask-schedule", "1;4;4,12"],
        "mask_cfg=(0.0, 1.0, 0.0) would do nothing: mask_schedule has no mask pass at the scales it guides",
    ),
    "mask guidance": ([*GRID, "--mask-cfg", "1", "--mask-schedule", "1;4;16"], "mask_cfg=1.0 would do nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sample_refuses_what_would_do_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
):
    arguments, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    Path("w.csv").write_text("0,3\n")
    assert main(["sample", str(folder), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["w.csv"]


def test_guidance_of_mask_passes_alone_leads_away_from_a_class_too(model: ImageModel):
    """Only no guidance at all makes a negative class idle; the model's own, and that of mask passes, does not."""
    assert model.sample_settings(negative_class=2).negative_class == 2
    given = {"cfg_scale": 0.0, "mask_cfg": [0.0, 1.0, 0.0], "mask_schedule": [[1], [1, 3]], "seed": 3}
    plain = model.generate([0, 1, 3, 4], **given)
    assert not torch.equal(model.generate([0, 1, 3, 4], **given, negative_class=2), plain)


@pytest.mark.parametrize("views", [False, True])
def test_a_grid_is_sampled_in_batches_of_the_size_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: bool
):
    sizes: list[int] = []

    def watched(inner: Callable[..., torch.Tensor], position: int) -> Callable[..., torch.Tensor]:
        def call(*args: object) -> torch.Tensor:
            sizes.append(len(args[position]))  # type: ignore[arg-type]
            return inner(*args)

        return call

    monkeypatch.setattr(commands, "_images", watched(commands._images, 2))
    monkeypatch.setattr(ImageModel, "generate_scales", watched(ImageModel.generate_scales, 1))
    arguments = ["sample", str(folder), "--classes", "0,3", "--count", "3", "--device", "cpu"]
    arguments += ["--gif", str(tmp_path / "a.gif")] if views else []
    assert main([*arguments, "--out", str(tmp_path / "once.png")]) == 0
    assert main([*arguments, "--batch-size", "4", "--out", str(tmp_path / "often.png")]) == 0
    assert sizes == [6, 4, 2]


def test_feathering_without_pasting_is_refused(
    folder: Path, model: ImageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    images, mask = torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16, dtype=torch.bool)
    with pytest.raises(UserError, match="feather=8 would do nothing: it fades into the pasted pixels"):
        edit(model, images, mask, [1], paste=False, feather=8)
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    arguments = ["edit", str(folder), str(tmp_path / "photo.png"), "--box", "0,0,8,8", "--class", "1", "--no-paste"]
    assert main([*arguments, "--feather", "8", "--device", "cpu", "--out", str(tmp_path / "out.png")]) == 2
    assert "feather=8 would do nothing" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
