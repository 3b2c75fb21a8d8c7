"""Zero-shot editing, the commands that sample and edit files, and the sample grid of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_export, tiny_hmar, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hmar_mega.cli import main
from hmar_mega.errors import UserError
from hmar_mega.inference import ImageModel, commands, edit_images, load_model
from hmar_mega.inference.editing import Edit, edit, kept_tokens
from hmar_mega.inference.grid import GridSampler
from hmar_mega.scales import ScaleSchedule


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    return load_model(folder, "cpu")


@given(data=st.data(), patch_nums=st.sampled_from([(1, 2, 4), (1, 2, 3, 4), (1, 3, 5)]))
def test_a_token_is_kept_when_no_pixel_of_its_cell_is_edited(data: st.DataObject, patch_nums: tuple[int, ...]):
    schedule, side = ScaleSchedule(patch_nums), 4 * patch_nums[-1]
    pixels = data.draw(st.lists(st.tuples(st.integers(0, side - 1), st.integers(0, side - 1)), max_size=6))
    mask = torch.zeros(2, 1, side, side, dtype=torch.bool)
    for y, x in pixels:
        mask[0, 0, y, x] = True
    kept = kept_tokens(mask, schedule)
    assert kept.shape == (2, schedule.num_tokens)
    assert kept.dtype == torch.bool
    assert kept[1].all()
    expected = []
    for p in patch_nums:
        for row in range(p):
            for column in range(
                p
            ):  # pixel y belongs to cell `row` when they overlap: row·s/p < y + 1, y < (row + 1)·s/p
                touched = any(
                    row * side < (y + 1) * p and y * p < (row + 1) * side
                    and column * side < (x + 1) * p and x * p < (column + 1) * side
                    for y, x in pixels
                )  # fmt: skip
                expected.append(not touched)
    assert kept[0].tolist() == expected


def half_mask() -> Tensor:
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 8:] = True
    return mask


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_kept_pixels_are_exactly_the_originals(model: ImageModel):
    images = pictures()
    edited = edit_images(model, images, half_mask(), [1, 2], seed=3)
    assert edited.shape == (2, 3, 16, 16)
    assert edited.dtype == torch.float32
    assert torch.equal(edited[..., :8], images[..., :8])
    assert not torch.equal(edited[..., 8:], images[..., 8:])
    assert edited.min() >= 0
    assert edited.max() <= 1


def test_without_pasting_the_decoders_own_pixels_show(model: ImageModel):
    images = pictures()
    pasted = edit_images(model, images, half_mask(), [1, 2], seed=3)
    own = edit_images(model, images, half_mask(), [1, 2], seed=3, paste=False)
    assert torch.equal(own[..., 8:], pasted[..., 8:])
    assert not torch.equal(own[..., :8], images[..., :8])


def test_editing_nothing_is_reconstruction_and_editing_everything_generation(model: ImageModel):
    images = pictures()
    reconstructed = edit_images(model, images, torch.zeros(1, 1, 16, 16, dtype=torch.bool), [1, 2], paste=False)
    tokens = model.tokenizer.encode(images * 2 - 1)
    torch.testing.assert_close(reconstructed, model.tokenizer.decode_tokens(tokens) / 2 + 0.5, rtol=0, atol=1e-5)
    anew = edit_images(model, images, torch.ones(1, 1, 16, 16, dtype=torch.bool), [1, 2], seed=3)
    assert torch.equal(anew, model.generate([1, 2], seed=3))


def test_each_image_may_have_its_own_mask_class_and_seed(model: ImageModel):
    images, masks = pictures(), torch.cat([half_mask(), ~half_mask()])
    both = edit_images(model, images, masks, [1, 2], seed=[7, 8])
    for i in range(2):
        alone = edit_images(model, images[i : i + 1], masks[i : i + 1], [i + 1], seed=7 + i)
        torch.testing.assert_close(alone[0], both[i], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("image_size", "mask_size", "message"),
    [
        ((16, 12), (16, 16), "the image is 12×16 px, the model makes 16×16 px; resize the image"),
        ((16, 16), (32, 32), "the mask is 32×32 px, the model makes 16×16 px; resize the mask"),
    ],
)
def test_wrong_sizes_are_refused(
    model: ImageModel, image_size: tuple[int, int], mask_size: tuple[int, int], message: str
):
    with pytest.raises(UserError, match=message):
        edit_images(model, torch.zeros(1, 3, *image_size), torch.zeros(1, 1, *mask_size, dtype=torch.bool), [0])


@pytest.mark.parametrize(
    ("images", "mask", "labels"),
    [
        (pictures(2), half_mask(), [1]),
        (pictures(1), half_mask(), [1, 2]),
        (pictures(2), half_mask().expand(3, -1, -1, -1), [1, 2]),
        (pictures(2)[:, :1], half_mask(), [1, 2]),
    ],
    ids=["a label too few", "a label too many", "three masks", "grey images"],
)
def test_batches_that_do_not_fit_each_other_are_refused(
    model: ImageModel, images: Tensor, mask: Tensor, labels: list[int]
):
    with pytest.raises(UserError):
        edit_images(model, images, mask, labels)


def test_editing_with_a_class_that_does_not_exist_is_refused(model: ImageModel):
    with pytest.raises(UserError, match="class 9 is out of range"):
        edit_images(model, pictures(1), half_mask(), [9])


# -------------------------------------------------------------------------------------------- commands and the grid


def test_the_sample_command_draws_a_row_a_class(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["sample", str(folder), "--classes", "0,3", "--count", "3", "--device", "cpu", "--out"]
    assert main([*arguments, str(tmp_path / "grid.png")]) == 0
    assert main([*arguments, str(tmp_path / "again.png")]) == 0
    assert main([*arguments, str(tmp_path / "other.png"), "--seed", "9"]) == 0
    assert main([*arguments, str(tmp_path / "guided.png"), "--mask-cfg", "9"]) == 0
    assert "6 images of 2 classes" in capsys.readouterr().out
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width / grid.height == pytest.approx(3 / 2, rel=0.05)
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    for other in ("other.png", "guided.png"):
        assert (tmp_path / "grid.png").read_bytes() != (tmp_path / other).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "0,x"], "class 'x' is not a number"),
        (["--classes", "7"], "class 7 is out of range"),
        (["--classes", "0", "--count", "0"], "at least 1 image"),
        (["--classes", "0", "--top-p", "2"], "top_p=2"),
        (["--classes", "0", "--mask-cfg", "1,2"], "mask_cfg has 2 numbers for 3 scales"),
    ],
)
def test_the_sample_command_refuses_before_it_writes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert main(["sample", str(folder), "--device", "cpu", "--out", str(tmp_path / "grid.png"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_edit_command_keeps_what_is_black(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shades = (pictures(1)[0] * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(shades).save(tmp_path / "image.png")
    Image.fromarray(half_mask()[0, 0].byte().mul(255).numpy()).save(tmp_path / "mask.png")
    arguments = ["edit", str(folder), str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]
    assert main([*arguments, "--class", "2", "--device", "cpu", "--out", str(tmp_path / "out.png")]) == 0
    assert "128 of 256 pixels" in capsys.readouterr().out
    assert (tmp_path / "out.png").exists()
    (tmp_path / "mask.png").write_text("no image")
    assert main([*arguments, "--class", "2", "--device", "cpu", "--out", str(tmp_path / "second.png")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_many_versions_are_made_batch_by_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sizes: list[int] = []

    def watched(model: ImageModel, images: Tensor, *rest: Any, **options: Any) -> Edit:
        sizes.append(len(images))
        return edit(model, images, *rest, **options)

    Image.fromarray((pictures(1)[0] * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    arguments = ["edit", str(folder), str(tmp_path / "image.png"), "--box", "8,0,16,16", "--class", "2"]
    arguments += ["--count", "11", "--device", "cpu", "--seed", "3", "--out"]
    assert main([*arguments, str(tmp_path / "once.png")]) == 0
    monkeypatch.setattr(commands, "edit", watched)
    monkeypatch.setattr(commands, "BATCH", 4)
    assert main([*arguments, str(tmp_path / "often.png")]) == 0
    assert sizes == [4, 4, 3]
    once, often = capsys.readouterr().out.replace("often", "once").splitlines()[1::2]
    assert once == often
    with Image.open(tmp_path / "once.png") as first, Image.open(tmp_path / "often.png") as second:
        assert first.size == (8 * 18 - 2, 2 * 18 - 2)
        assert np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max() <= 1


@pytest.mark.parametrize("stage", ["next_scale", "masked"])
def test_the_training_grid_repeats_and_follows_the_model(tmp_path: Path, stage: str):
    config = tiny_config(stage)
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"grid_count": 7})})
    model = tiny_hmar(config)
    sampler = GridSampler(model, tiny_tokenizer(config), config, writes=True)
    assert sampler.labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    sampler(tmp_path / "grids" / "a.png")
    sampler(tmp_path / "grids" / "b.png")
    with torch.no_grad():
        model.head.linear.weight.neg_()
    sampler(tmp_path / "grids" / "c.png")
    first, second, third = ((tmp_path / "grids" / f"{n}.png").read_bytes() for n in "abc")
    assert first == second != third
    GridSampler(model, tiny_tokenizer(config), config, writes=False)(tmp_path / "silent.png")
    assert not (tmp_path / "silent.png").exists()
