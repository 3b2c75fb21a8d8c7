"""Image transforms against the rule they implement, crops as functions of the position, and written grids."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hmar_mega.data import images, pixels
from hmar_mega.data.damage import Damage
from hmar_mega.data.images import ImageStream, crop_pixels, decode_sample, image_grid, image_to_tensor, tensor_to_image
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.pixels import Storing, peculiarities, store_image, to_rgb
from hmar_mega.data.reader import ImageSample, ShardReader
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.rng import Purpose, uniform


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row."""
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def png(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return file.getvalue()


def test_pixels_map_to_minus_one_and_one_exactly():
    image = Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8).repeat(4, 0).repeat(4, 1))
    tensor = image_to_tensor(image, 4, "none")
    assert tensor.shape == (3, 4, 4)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


@given(st.integers(9, 60), st.integers(9, 60), st.sampled_from(["none", "crop"]))
def test_result_is_always_the_square_asked_for(width, height, augment):
    tensor = image_to_tensor(ramp(width, height), 16, augment, (0.999999, 0.999999))
    assert tensor.shape == (3, 16, 16)
    assert tensor.abs().max() <= 1


def test_crop_resizes_the_shorter_side_to_nine_eighths_by_lanczos():
    """At resolution 16 the shorter side becomes 18: 3 × 3 equally likely crops of an 18 × 18 image."""
    image = ramp(36, 36)
    resized = np.asarray(image.resize((18, 18), Image.Resampling.LANCZOS))
    for place, left, top in (((0.0, 0.0), 0, 0), ((0.34, 0.999), 1, 2), ((0.67, 0.33), 2, 0), ((0.5, 0.5), 1, 1)):
        expected = torch.from_numpy(resized[top : top + 16, left : left + 16].copy()).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(image_to_tensor(image, 16, "crop", place), expected)


def test_without_augmentation_the_centre_of_the_longer_side_is_kept():
    tensor = image_to_tensor(ramp(20, 8), 8, "none")
    columns = ((tensor[0] + 1) * 127.5).round()
    assert columns[0].tolist() == list(range(6, 14))


def test_image_is_turned_upright_as_its_exif_says():
    image = ramp(4, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    turned = to_rgb(Image.open(io.BytesIO(png(image, exif=exif))))
    assert turned.size == (2, 4)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def lying(*further: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of an image that lies on its side, and further fields: (tag, type, count, value or offset)."""
    fields = [(0x0112, 3, 1, b"\6\0\0\0"), *further]
    body = b"".join(struct.pack("<HHL4s", *field) for field in fields)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + body + b"\0\0\0\0"


def test_malformed_exif_fields_do_not_matter_to_the_orientation():
    """Both fields have a type that Pillow reads and cannot write again."""
    for field in ((0x0100, 2, 4, b"abc\0"), (0x011A, 1, 1, b"\1\0\0\0")):
        file = io.BytesIO()
        ramp(40, 30).save(file, format="JPEG", exif=lying(field))
        turned = decode_sample(ImageSample("0", 0, file.getvalue(), "it"))
        assert turned.size == to_rgb(turned).size == (30, 40)  # and is not turned twice
        assert store_image(file.getvalue(), Storing("png")).size == (30, 40)


def test_exif_that_cannot_be_read_is_told_once_and_taken_as_upright(caplog):
    pixels._tell_bad_exif.cache_clear()
    for _ in range(2):
        image = Image.open(io.BytesIO(png(ramp(40, 30), exif=b"Exif\0\0XX*\0\0\0\0\0")))
        assert "bad EXIF" in peculiarities(image)
        assert to_rgb(image).size == (40, 30)
    assert [record.message for record in caplog.records] == [
        "there are images whose EXIF cannot be read: they are taken as upright"
    ]


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 255))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (2, 2))).mode == "RGB"


def test_sixteen_bit_grey_keeps_its_upper_half():
    image = Image.open(io.BytesIO(png(Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)))))
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_damaged_image_names_shard_and_sample():
    with pytest.raises(UserError, match=r"s\.tar: sample 7 cannot be decoded"):
        decode_sample(ImageSample("7", 0, png(ramp(9, 9))[:50], "s.tar: sample 7"))


def test_what_fails_while_an_image_becomes_rgb_is_damage(monkeypatch):
    def fail(image: Image.Image) -> Image.Image:
        raise KeyError("7")

    monkeypatch.setattr(images, "to_rgb", fail)
    with pytest.raises(Damage, match=r"s\.tar: sample 7 cannot be decoded: malformed \(KeyError: '7'\)"):
        decode_sample(ImageSample("7", 0, png(ramp(9, 9)), "s.tar: sample 7"))


# Thin images


@pytest.mark.parametrize("size", [(40, 300), (300, 40), (7, 200)])
def test_crops_that_are_resized_alone_are_those_of_the_whole(monkeypatch, size):
    image, places = ramp(*size), [(0.0, 0.0), (0.5, 0.5), (0.3, 0.8), (0.999, 0.999)]
    whole = crop_pixels(image, 16, "crop", places)
    monkeypatch.setattr(images, "WHOLE_PIXELS", 0)
    assert np.abs(crop_pixels(image, 16, "crop", places).astype(int) - whole).max() <= 1


@pytest.mark.parametrize("size", [(4, 10_000), (3_000_000, 1)])
def test_a_thin_image_is_never_enlarged_as_a_whole(monkeypatch, size):
    """As a whole, 4 × 10000 would become 288 × 720000 pixels, of 2 GB on the way."""
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *a, **k: made.append(to) or resize(self, to, *a, **k))
    assert crop_pixels(Image.new("RGB", size), 256, "crop", [(0.5, 0.999)]).shape == (1, 3, 256, 256)
    assert made == [(256, 256)]


# Streams


@pytest.fixture
def reader(tmp_path) -> ShardReader:
    with open_shards(tmp_path / "out", "images", ("a",), 4) as writer:
        for number in range(6):
            writer.write(str(number), 0, {"png": png(ramp(40 + number, 40))})
    return ShardReader(tmp_path / "out", "images")


def stream(reader: ShardReader, seed: int = 1, augment: str = "crop", workers: int = 0) -> ImageStream:
    return ImageStream(reader, SampleOrder(6, seed=0), 16, augment, seed, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_depends_on_its_position_alone(reader, workers):
    whole = stream(reader).batch(0, 14)
    parts = [stream(reader, workers=workers).batch(start, count) for start, count in ((0, 5), (5, 1), (6, 8))]
    assert whole.shape == (14, 3, 16, 16)
    assert torch.equal(torch.cat(parts), whole)


def test_position_decides_sample_and_crop(reader):
    order, position = SampleOrder(6, seed=0), 9
    place = uniform(torch.tensor(1), torch.tensor([position]), Purpose.CROP, 2)[0].tolist()
    image = decode_sample(reader.read_image(order.sample_index(position)))
    assert torch.equal(stream(reader).batch(position, 1)[0], image_to_tensor(image, 16, "crop", tuple(place)))


def test_crops_change_with_epoch_and_seed_and_are_still_without_augmentation(reader):
    sample = SampleOrder(6, seed=0)
    again = next(p for p in range(6, 12) if sample.sample_index(p) == sample.sample_index(0))
    moved = [
        not torch.equal(stream(reader, seed).batch(0, 1), stream(reader, seed).batch(again, 1)) for seed in range(8)
    ]
    assert any(moved)
    still = stream(reader, augment="none")
    assert torch.equal(still.batch(0, 1), still.batch(again, 1))


# Writing images


def test_ranges_are_explicit_and_values_beyond_are_clipped():
    image = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 5)
    signed, unit = (np.asarray(tensor_to_image(image, value_range))[0, :, 0] for value_range in ((-1, 1), (0, 1)))
    assert signed.tolist() == [0, 0, 128, 255, 255]
    assert unit.tolist() == [0, 0, 0, 255, 255]


def test_tensor_and_image_are_inverse():
    red = np.asarray(ramp(16, 16))
    assert np.array_equal(np.asarray(tensor_to_image(image_to_tensor(ramp(16, 16), 16, "none"), (-1, 1))), red)


def test_grid_places_images_row_by_row(tmp_path):
    greys = torch.tensor([0.0, 0.2, 0.4])[:, None, None, None].expand(3, 3, 4, 4)
    image_grid(greys, 2, tmp_path / "new" / "grid.png", (0, 1))
    grid = Image.open(tmp_path / "new" / "grid.png")
    assert grid.size == (10, 10)
    assert [grid.getpixel(place)[0] for place in ((0, 0), (6, 0), (0, 6), (6, 6), (4, 0))] == [0, 51, 102, 255, 255]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_grid_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="0 images"):
        image_grid(torch.empty(0, 3, 4, 4), 2, tmp_path / "grid.png", (0, 1))
