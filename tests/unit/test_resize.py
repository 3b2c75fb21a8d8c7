"""Positions and levels for another schedule: the stated method, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import bicubic, random_normal
from published_makers import make_transformer, make_vqvae
from safetensors.torch import load_file

from hmar_mega.checkpoint.convert import convert
from hmar_mega.checkpoint.resize import resize_levels, resize_positions, source_scale
from hmar_mega.cli import main
from hmar_mega.errors import UserError
from hmar_mega.inference import load_model
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule

SMALL, LARGE = ScaleSchedule((1, 2, 4)), ScaleSchedule((1, 2, 3, 6, 8))


@pytest.mark.parametrize(
    ("resolution", "sources"),
    [
        (512, (1, 2, 3, 4, 6, 10, 13, 16, 16, 16)),  # 10/9 < 9/8
        (1024, (1, 2, 3, 4, 5, 8, 10, 13, 16, 16, 16, 16, 16, 16)),
    ],
)
def test_scales_take_their_positions_from_the_one_nearest_in_ratio(resolution: int, sources: tuple[int, ...]):
    old = ScaleSchedule(PATCH_NUMS[256])
    assert tuple(old.patch_nums[source_scale(p, old)] for p in PATCH_NUMS[resolution]) == sources


def test_of_two_equally_near_scales_the_larger_one_is_taken():
    assert source_scale(2, ScaleSchedule((1, 4))) == 1


def test_positions_are_copied_where_sides_are_equal_and_else_resized_bicubically():
    old = random_normal(1, 21, 5)
    new = resize_positions(old, SMALL, LARGE)
    assert torch.equal(new[:, :5], old[:, :5])
    grid = old[0, 5:].T.reshape(5, 4, 4).double().numpy()
    for k, side in ((3, 6), (4, 8)):
        found = new[0, LARGE.span(k)].T.reshape(5, side, side)
        np.testing.assert_allclose(found, bicubic(grid, side), rtol=1e-5, atol=1e-6)


def test_shrinking_keeps_a_constant_and_a_slope():
    """3 × 3 from 4 × 4, with anti-aliasing: the middle of a slope stays its middle."""
    slope = torch.arange(4.0).repeat(4).view(1, 16, 1)
    old = torch.cat([torch.zeros(1, 5, 1), slope], dim=1)
    new = resize_positions(old, SMALL, LARGE)[0, LARGE.span(2), 0].view(3, 3)
    torch.testing.assert_close(new[:, 1], torch.full((3,), 1.5))
    torch.testing.assert_close(new[0], new[2])
    assert (new.diff(dim=1) > 1).all()


def test_levels_are_interpolated_over_relative_size():
    """Of 4: 1/4, 1/2, 1. Of 8: 1/8 → first; 1/4 → first; 3/8 → half way; 3/4 → half way of the last two; 1 → last."""
    old = random_normal(3, 6)
    new = resize_levels(old, SMALL, LARGE)
    assert torch.equal(new[[0, 1, 4]], old[[0, 0, 2]])
    torch.testing.assert_close(new[2], (old[0] + old[1]) / 2)
    torch.testing.assert_close(new[3], (old[1] + old[2]) / 2)


def test_the_same_schedule_changes_nothing():
    old, level = random_normal(1, 21, 5), random_normal(3, 5)
    assert torch.equal(resize_positions(old, SMALL, SMALL), old)
    assert torch.equal(resize_levels(level, SMALL, SMALL), level)


@pytest.mark.parametrize("kind", ["nvlabs-hmar", "var"])
def test_a_file_becomes_a_model_of_another_schedule(tmp_path: Path, kind: str):
    tensors = make_transformer(kind)
    torch.save(tensors, tmp_path / "m.pth")
    torch.save(make_vqvae(), tmp_path / "vae.pth")
    convert(tmp_path / "m.pth", tmp_path / "old", tokenizer=tmp_path / "vae.pth")
    text = ",".join(map(str, LARGE.patch_nums))
    command = ["convert", str(tmp_path / "m.pth"), str(tmp_path / "new"), "--patch-nums", text]
    assert main([*command, "--tokenizer", str(tmp_path / "vae.pth")]) == 0
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("old", "new"))
    changed = {n for n in old if old[n].shape != new[n].shape or not torch.equal(old[n], new[n])}
    assert changed == {"pos_embed", "level_embed"}
    model = load_model(tmp_path / "new", "cpu")
    assert model.generate([1]).shape == (1, 3, 32, 32)
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    assert settings["resolution"] == 32
    assert len(settings["sampling"]["mask_schedule"]) == 5
    # of a folder, and straight to a published file, it is the same
    convert(tmp_path / "old", tmp_path / "folder", patch_nums=LARGE.patch_nums)
    again = load_file(tmp_path / "folder" / "model.safetensors")
    assert all(torch.equal(new[n], again[n]) for n in new)
    assert load_model(tmp_path / "folder", "cpu").settings["sampling"] == settings["sampling"]
    convert(tmp_path / "m.pth", tmp_path / "new.pth", patch_nums=LARGE.patch_nums)
    theirs = torch.load(tmp_path / "new.pth", weights_only=True)
    assert theirs["lvl_1L"].tolist() == [LARGE.level_ids().tolist()]
    assert torch.equal(theirs["pos_1LC"], new["pos_embed"])
    assert theirs["attn_bias_for_masking"].shape == (1, 1, 114, 114)


def test_an_illegal_schedule_is_refused(tmp_path: Path):
    torch.save(make_transformer("var"), tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"--patch-nums \(1, 4, 2\) is not a legal schedule"):
        convert(tmp_path / "m.pth", tmp_path / "out", patch_nums=(1, 4, 2))
