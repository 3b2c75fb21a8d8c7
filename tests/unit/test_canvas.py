"""Outpainting, boxes, pictures of any size, feathered edges, and the error of what is kept."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SCHEDULE, tiny_export
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hmar_mega.cli import main
from hmar_mega.errors import UserError
from hmar_mega.inference import ImageModel, edit, edit_images, load_model
from hmar_mega.inference.canvas import (
    SIDES,
    boxed_canvas,
    masked_canvas,
    outpaint_canvas,
    parse_box,
    parse_room,
)
from hmar_mega.inference.editing import feather_weights, kept_difference, kept_tokens

R = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    return load_model(folder, "cpu")


def picture(width: int = R, height: int = R) -> Image.Image:
    """Every pixel another colour: red is the column, green the row."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(width)[None] * 5
    pixels[..., 1] = np.arange(height)[:, None] * 5
    pixels[..., 2] = 99
    return Image.fromarray(pixels)


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


# -------------------------------------------------------------------------------------------------------- outpainting


@pytest.mark.parametrize(
    ("side", "kept", "of_image"),
    [
        ("left", (slice(0, 16), slice(4, 16)), (slice(0, 16), slice(0, 12))),
        ("right", (slice(0, 16), slice(0, 12)), (slice(0, 16), slice(4, 16))),
        ("top", (slice(4, 16), slice(0, 16)), (slice(0, 12), slice(0, 16))),
        ("bottom", (slice(0, 12), slice(0, 16)), (slice(4, 16), slice(0, 16))),
    ],
)
def test_outpainting_goes_on_from_the_pictures_own_edge(
    model: ImageModel, side: str, kept: tuple[slice, slice], of_image: tuple[slice, slice]
):
    """A square picture moves away from the strip; pixels and tokens of what stays are those of the picture."""
    source = picture()
    canvas = outpaint_canvas(source, parse_room([f"{side}:4"], R), R)
    placed = as_tensor(source)[:, of_image[0], of_image[1]]
    assert torch.equal(canvas.image[:, kept[0], kept[1]], placed)
    expected = torch.ones(1, R, R, dtype=torch.bool)
    expected[:, kept[0], kept[1]] = False
    assert torch.equal(canvas.mask, expected)
    done = edit(model, canvas.image[None], canvas.mask[None], [1], seed=2)
    assert torch.equal(done.images[0][:, kept[0], kept[1]], placed)
    original = model.tokenizer.encode(canvas.image[None] * 2 - 1)
    forced = kept_tokens(canvas.mask[None], SCHEDULE)
    assert forced[0, SCHEDULE.span(2)].sum() == 12  # all cells of the last scale but one row or column of four
    assert torch.equal(done.kept, forced)
    assert torch.equal(done.tokens[forced], original[forced])
    other = edit(model, canvas.image[None], canvas.mask[None], [1], seed=3)
    assert torch.equal(other.tokens[forced], original[forced])
    assert not torch.equal(other.tokens, done.tokens)


def test_a_picture_that_fits_the_rectangle_is_placed_as_it_is():
    source = picture(10, 12)
    canvas = outpaint_canvas(source, {"left": 2, "right": 4, "top": 3, "bottom": 1}, R)
    assert torch.equal(canvas.image[:, 3:15, 2:12], as_tensor(source))
    assert int((~canvas.mask).sum()) == 10 * 12
    assert canvas.changes == ("the image lies at x 2…11, y 3…14 of 16×16 px",)
    assert torch.equal(canvas.image[:, :3, 2:12], as_tensor(source)[:, :1].expand(-1, 3, -1))  # the border repeated
    assert torch.equal(canvas.image[:, 3:15, 12:], as_tensor(source)[:, :, -1:].expand(-1, -1, 4))


def test_a_picture_of_another_shape_is_resized_and_cut_and_both_are_said():
    canvas = outpaint_canvas(picture(48, 24), {"right": 4}, R)
    assert canvas.changes == (
        "the image of 48×24 px was resized to 32×16 px and cut off 20 px left",
        "the image lies at x 0…11, y 0…15 of 16×16 px",
    )
    canvas = outpaint_canvas(picture(), {"left": 4, "right": 4}, R)
    assert canvas.changes[0] == "the image of 16×16 px was cut off 4 px left, 4 px right"
    assert torch.equal(canvas.image[:, :, 4:12], as_tensor(picture())[:, :, 4:12])
    canvas = outpaint_canvas(picture(), dict.fromkeys(SIDES, 4), R)
    assert canvas.changes[0] == "the image of 16×16 px was resized to 8×8 px"


def test_sides_and_sizes_are_read():
    assert parse_room(["right:5", "top"], 16) == {"right": 5, "top": 4}
    assert parse_room(["left:1,bottom:2"], 16) == {"left": 1, "bottom": 2}
    for text in ("up:3", "left:0", "left:-1", "left:x", "", "left:1,left:2"):
        with pytest.raises(UserError, match="is not SIDE or SIDE:PIXELS"):
            parse_room([text], 16)


@pytest.mark.parametrize("room", [{}, {"left": 16}, {"left": 8, "right": 8}, {"top": 20}, {"left": -1, "right": 2}])
def test_room_that_leaves_no_picture_is_refused(room: dict[str, int]):
    with pytest.raises(UserError, match="leave at least 1 px"):
        outpaint_canvas(picture(), room, R)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- boxes and any size


def test_a_box_is_edited_and_the_rest_kept(model: ImageModel):
    canvas = boxed_canvas(picture(), parse_box("4,8,12,16"), R)
    assert int(canvas.mask.sum()) == 64
    assert bool(canvas.mask[0, 8:16, 4:12].all())
    one, other = (edit_images(model, canvas.image[None], canvas.mask[None], [c], seed=1) for c in (0, 3))
    kept = ~canvas.mask.expand(3, -1, -1)
    assert torch.equal(one[0][kept], canvas.image[kept])
    assert not torch.equal(one, other)  # another class, another filling


@pytest.mark.parametrize("box", [(0, 0, 17, 4), (4, 4, 4, 8), (-1, 0, 4, 4), (8, 0, 4, 4)])
def test_a_box_outside_is_refused(box: tuple[int, int, int, int]):
    with pytest.raises(UserError, match="is not within the 16×16 px"):
        boxed_canvas(picture(), box, R)


def test_a_picture_of_the_models_size_is_untouched():
    canvas = masked_canvas(picture(), Image.new("L", (R, R), 127), R)
    assert canvas.changes == ()
    assert torch.equal(canvas.image, as_tensor(picture()))
    assert not canvas.mask.any()
    assert masked_canvas(picture(), Image.new("L", (R, R), 128), R).mask.all()


def test_picture_and_mask_of_one_size_go_the_same_way():
    mask = Image.new("L", (64, 32))
    mask.putpixel((16 + 9, 21), 255)  # one pixel of a 2 × 2 cell: the whole cell is generated
    canvas = masked_canvas(picture(64, 32), mask, R)
    assert canvas.changes == ("the image of 64×32 px was resized to 32×16 px and cut off 8 px left, 8 px right",)
    assert torch.nonzero(canvas.mask[0]).tolist() == [[10, 4]]


def test_a_mask_of_the_models_size_is_taken_as_it_is():
    mask = Image.new("L", (R, R))
    mask.putpixel((3, 5), 255)
    assert torch.nonzero(masked_canvas(picture(64, 32), mask, R).mask[0]).tolist() == [[5, 3]]


def test_a_mask_of_a_third_size_is_refused_and_exact_refuses_any_change():
    with pytest.raises(UserError, match="the mask is 20×20 px, the model makes 16×16 px"):
        masked_canvas(picture(64, 32), Image.new("L", (20, 20)), R)
    with pytest.raises(UserError, match="the image is 64×32 px"):
        masked_canvas(picture(64, 32), Image.new("L", (R, R)), R, exact=True)
    with pytest.raises(UserError, match="the image is 8×16 px"):
        boxed_canvas(picture(8, 16), (0, 0, 4, 4), R, exact=True)


# ------------------------------------------------------------------------------------------------ feather, error kept


@given(pixels=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=5), width=st.integers(0, 6))
def test_feather_falls_linearly_with_the_distance(pixels: list[tuple[int, int]], width: int):
    mask = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    for y, x in pixels:
        mask[0, 0, y, x] = True
    weights = feather_weights(mask, width)
    for y in range(12):
        for x in range(12):
            distance = min((max(abs(y - a), abs(x - b)) for a, b in pixels), default=math.inf)
            assert float(weights[0, 0, y, x]) == pytest.approx(max(0.0, 1 - distance / (width + 1)), abs=1e-6)
    assert torch.equal(weights == 1, mask)


def test_feathering_mixes_result_and_original_by_these_weights(model: ImageModel):
    images = torch.rand(2, 3, R, R, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, R, R, dtype=torch.bool)
    mask[..., 8:] = True
    hard = edit(model, images, mask, [1, 2], seed=3)
    soft = edit(model, images, mask, [1, 2], seed=3, feather=3)
    assert torch.equal(soft.decoded, hard.decoded)
    weights = feather_weights(mask, 3)
    torch.testing.assert_close(soft.images, weights * soft.decoded + (1 - weights) * images)
    assert torch.equal(soft.images[..., 8:], hard.images[..., 8:])
    assert torch.equal(soft.images[..., :5], images[..., :5])  # beyond 3 px the original
    assert not torch.equal(soft.images[..., 5:8], images[..., 5:8])
    plain = edit(model, images, mask, [1, 2], seed=3, feather=0)
    assert torch.equal(plain.images, hard.images)
    with pytest.raises(UserError, match="feather=-1"):
        edit(model, images, mask, [1, 2], feather=-1)


def test_the_error_of_kept_pixels_is_that_before_pasting(model: ImageModel):
    images = torch.rand(2, 3, R, R, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, R, R, dtype=torch.bool)
    mask[..., 8:] = True
    done = edit(model, images, mask, [1, 2], seed=3)
    for b in range(2):
        off = (done.decoded[b] - images[b])[:, :, :8].double()
        assert float(done.kept_psnr[b]) == pytest.approx(-10 * math.log10(float(off.square().mean())), rel=1e-5)
        assert float(done.kept_error[b]) == pytest.approx(float(off.abs().max()))
    assert torch.equal(done.images[..., :8], images[..., :8])


def test_the_error_by_hand():
    decoded, images = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    decoded[0, 0, 0, 0], decoded[0, 1, 1, 1] = 0.5, 1.0  # the second is edited
    mask = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    mask[0, 0, 1, 1] = True
    mask[1] = True
    psnr, error = kept_difference(decoded, images, mask)
    assert float(psnr[0]) == pytest.approx(10 * math.log10(9 / 0.25))
    assert float(error[0]) == 0.5
    assert psnr[1].isnan()
    assert error[1].isnan()


# ---------------------------------------------------------------------------------------------------------- commands


def test_the_edit_command_outpaints_and_says_what_it_did(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture(48, 24).save(tmp_path / "photo.png")
    arguments = ["edit", str(folder), str(tmp_path / "photo.png"), "--class", "bee", "--device", "cpu"]
    arguments += ["--class-names", str(tmp_path / "names"), "--out", str(tmp_path / "out.png")]
    (tmp_path / "names").write_text("ant\nbee\ncow\ndog\nwasp\n")
    assert main([*arguments, "--outpaint", "right:4", "--outpaint", "top:2", "--count", "2"]) == 0
    said = capsys.readouterr().out
    assert "the image of 48×24 px was resized to 28×14 px and cut off 16 px left" in said
    assert "the image lies at x 0…11, y 2…15 of 16×16 px" in said
    assert f"{256 - 12 * 14} of 256 pixels generated anew" in said
    assert "kept pixels as they were decoded: PSNR" in said
    assert "put back as they were" in said
    with Image.open(tmp_path / "out.png") as grid:
        assert grid.size == (2 * 18 - 2, 16)


def test_the_edit_command_fits_boxes_and_feathers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture(24, 24).save(tmp_path / "photo.png")
    arguments = ["edit", str(folder), str(tmp_path / "photo.png"), "--class", "1", "--device", "cpu"]
    arguments += ["--box", "4,4,12,12", "--out", str(tmp_path / "out.png")]
    assert main([*arguments, "--feather", "2"]) == 0
    said = capsys.readouterr().out
    assert "the image of 24×24 px was resized to 16×16 px" in said
    assert "64 of 256 pixels generated anew" in said
    assert "fading over 2 px" in said
    assert main([*arguments, "--no-paste"]) == 0
    assert "left so" in capsys.readouterr().out
    assert main([*arguments, "--fit", "exact"]) == 2
    assert "the image is 24×24 px, the model makes 16×16 px; resize the image" in capsys.readouterr().err
