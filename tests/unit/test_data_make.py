"""Making image shards from folders of images and from the demo sets, and the commands that do it."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
import re
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hmar_mega.data.cli import add_data_parser, info_lines
from hmar_mega.data.demo import write_demo
from hmar_mega.data.images import decode_sample
from hmar_mega.data.index import ShardEntry, ShardIndex, read_index
from hmar_mega.data.reader import ShardReader
from hmar_mega.data.shard import ShardSettings, shard_images
from hmar_mega.errors import UserError
from hmar_mega.tokenizer.encode import EncodeSettings


def picture(kind: str, value: int = 0, size: tuple[int, int] = (12, 9)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(file, format=kind)
    return file.getvalue()


@pytest.fixture
def src(tmp_path) -> Path:
    """Three classes with 4 images each, in three formats, one of them in a folder below its class."""
    for label, name in enumerate(("cat", "bird", "ant")):
        for number, kind in enumerate(("JPEG", "PNG", "WEBP", "PNG")):
            path = tmp_path / "src" / name / ("deep" if number == 3 else "") / f"{number}.{kind.lower()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(kind, 10 * label + number))
    return tmp_path / "src"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def facts_of(folder: Path) -> list[dict[str, object]]:
    """The json field of every sample, found by its text."""
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.tar")))
    return [json.loads(text) for text in re.findall(rb'\{"height"[^}]*\}', data)]


# Folders of images


def test_classes_are_the_sorted_subfolders_and_bytes_are_kept(src, tmp_path):
    index = shard_images(src, tmp_path / "out", ShardSettings(samples_per_shard=5), progress=False)[""]
    assert index == read_index(tmp_path / "out")
    assert index.classes == ("ant", "bird", "cat")
    assert [shard.samples for shard in index.shards] == [5, 5, 2]
    reader = ShardReader(tmp_path / "out", "images")
    stored = sorted((index.classes[s.label], s.data) for s in map(reader.read_image, range(len(reader))))
    assert stored == sorted((path.relative_to(src).parts[0], path.read_bytes()) for path in src.rglob("*.*"))


def test_origin_and_size_are_recorded(src, tmp_path):
    shard_images(src, tmp_path / "out", progress=False)
    facts = facts_of(tmp_path / "out")
    assert sorted(str(fact["source"]) for fact in facts) == sorted(
        p.relative_to(src).as_posix() for p in src.rglob("*.*")
    )
    assert {(fact["width"], fact["height"]) for fact in facts} == {(12, 9)}


def test_sharding_twice_gives_the_same_bytes_and_another_seed_another_order(src, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shard_images(src, tmp_path / name, ShardSettings(seed=seed), progress=False)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert facts_of(tmp_path / "a") != facts_of(tmp_path / "c")


def test_shards_mix_the_classes(src, tmp_path):
    shard_images(src, tmp_path / "out", progress=False)
    reader = ShardReader(tmp_path / "out", "images")
    labels = [reader.read(number).label for number in range(len(reader))]
    assert labels != sorted(labels)


def test_bad_images_are_skipped_counted_and_listed(src, tmp_path, capsys):
    (src / "ant" / "text.jpg").write_text("no image")
    (src / "bird" / "half.png").write_bytes(picture("PNG", size=(300, 300))[:200])
    (src / "cat" / "film.png").write_bytes(picture("GIF"))
    index = shard_images(src, tmp_path / "out")[""]
    assert index.samples == 12
    assert sorted((bad.source, bad.reason.split(" (")[0]) for bad in index.skipped) == [
        ("ant/text.jpg", "not an image"),
        ("bird/half.png", "image file is truncated"),
        ("cat/film.png", "format GIF is not jpg, png or webp"),
    ]
    assert read_index(tmp_path / "out").skipped == index.skipped
    assert "3 skipped, listed in" in capsys.readouterr().out


def test_the_field_is_named_by_the_format_not_by_the_file(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "0.jpeg").write_bytes(picture("PNG"))
    shard_images(tmp_path / "src", tmp_path / "out", progress=False)
    assert b"00000000.png" in (tmp_path / "out" / "shard-000000.tar").read_bytes()


def test_a_class_without_images_keeps_its_label(src, tmp_path, caplog):
    (src / "bee").mkdir()
    with caplog.at_level(logging.WARNING):
        index = shard_images(src, tmp_path / "out", progress=False)[""]
    assert index.classes == ("ant", "bee", "bird", "cat")
    assert "keep their labels: bee" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda src: None, "cannot be read: No such file"),
        (lambda src: src.mkdir(), "no subfolders"),
        (lambda src: (src / "a").mkdir(parents=True), "no images in the 1 subfolders"),
    ],
)
def test_source_without_images_is_a_user_error(tmp_path, make, message):
    make(tmp_path / "src")
    with pytest.raises(UserError, match=message):
        shard_images(tmp_path / "src", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_only_bad_images_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "0.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"1 were skipped, the first is a/0\.png"):
        shard_images(tmp_path / "src", tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_file_that_cannot_be_read_stops_with_its_name(src, tmp_path):
    (src / "ant" / "lost.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"lost\.png cannot be read"):
        shard_images(src, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_output_inside_the_source_is_refused(src):
    with pytest.raises(UserError, match="is inside"):
        shard_images(src, src / "out", progress=False)


def test_used_output_is_refused_and_kept(src, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(UserError, match="is not an empty folder"):
        shard_images(src, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "mine").read_text() == "keep"


# Demo sets


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return write_demo("digits", tmp_path_factory.mktemp("demo") / "digits", progress=False)


def test_digits_are_all_there_once_and_split_evenly_by_class(digits):
    train, val = (ShardReader(digits / part, "images") for part in ("train", "val"))
    assert len(train) + len(val) == 1797
    sources = [fact["source"] for part in ("train", "val") for fact in facts_of(digits / part)]
    assert len(set(sources)) == 1797
    counts = [np.bincount([r.read(n).label for n in range(len(r))], minlength=10) for r in (train, val)]
    assert np.array_equal(counts[1], np.round(0.1 * (counts[0] + counts[1])))


def test_a_digit_is_the_original_enlarged_bicubically(digits):
    from sklearn.datasets import load_digits

    reader = ShardReader(digits / "val", "images")
    number = int(str(facts_of(digits / "val")[5]["source"]).removeprefix("digits/"))
    sample = reader.read_image(5)
    image = Image.open(io.BytesIO(sample.data))
    small = Image.fromarray(np.round(load_digits().images[number] * 255 / 16).astype(np.uint8))
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert np.array_equal(np.asarray(image)[..., 1], np.asarray(small.resize((16, 16), Image.Resampling.BICUBIC)))
    assert sample.label == load_digits().target[number]


def test_demo_is_reproducible(digits, tmp_path):
    again = write_demo("digits", tmp_path / "again", progress=False)
    assert content(again) == content(digits)


def write_idx(path: Path, array: np.ndarray, magic: int) -> None:
    header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path) -> Path:
    """Debian's four files, with 20 training and 10 test images whose grey tells their number."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for part, count, first in (("train", 20, 0), ("t10k", 10, 20)):
        greys = np.arange(first, first + count)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", np.tile(greys[:, None, None], (1, 28, 28)), 0x803)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", greys % 10, 0x801)
    return folder


def greys_and_labels(folder: Path) -> list[tuple[int, int]]:
    reader = ShardReader(folder, "images")
    samples = [reader.read_image(number) for number in range(len(reader))]
    return sorted((Image.open(io.BytesIO(s.data)).getpixel((0, 0))[0], s.label) for s in samples)


def test_fashion_mnist_keeps_its_published_split(fashion, tmp_path):
    out = write_demo("fashion-mnist", tmp_path / "out", progress=False, source=fashion)
    assert greys_and_labels(out / "train") == [(number, number % 10) for number in range(20)]
    assert greys_and_labels(out / "val") == [(number, number % 10) for number in range(20, 30)]
    assert read_index(out / "val").classes[9] == "Ankle boot"
    assert Image.open(io.BytesIO(ShardReader(out / "val", "images").read_image(0).data)).size == (32, 32)


def test_fashion_mnist_is_split_anew_when_a_fraction_is_given(fashion, tmp_path):
    out = write_demo("fashion-mnist", tmp_path / "out", val_fraction=0.34, progress=False, source=fashion)
    train, val = greys_and_labels(out / "train"), greys_and_labels(out / "val")
    assert sorted(train + val) == [(number, number % 10) for number in range(30)]
    assert sorted(label for _, label in val) == list(range(10))


def test_missing_fashion_mnist_names_the_package(tmp_path):
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        write_demo("fashion-mnist", tmp_path / "out", progress=False, source=tmp_path)


@pytest.mark.parametrize("damage", ["not gzip", "other magic", "cut off", "fewer labels"])
def test_damaged_fashion_mnist_is_a_user_error(fashion, tmp_path, damage):
    images = fashion / "train-images-idx3-ubyte.gz"
    if damage == "not gzip":
        images.write_bytes(b"text")
    elif damage == "other magic":
        write_idx(images, np.zeros((20, 28, 28)), 0x903)
    elif damage == "cut off":
        images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes())[:-1]))
    else:
        write_idx(images, np.zeros((19, 28, 28)), 0x803)
    with pytest.raises(UserError, match=r"dataset-fashion-mnist anew|package anew"):
        write_demo("fashion-mnist", tmp_path / "out", progress=False, source=fashion)


@pytest.mark.parametrize("options", [{"size": 2}, {"size": 5000}, {"val_fraction": 0.0}, {"val_fraction": 1.0}])
def test_impossible_demo_options(tmp_path, options):
    with pytest.raises(UserError, match="|".join(options)):
        write_demo("digits", tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


# Commands


def run(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="hmar-mega")
    add_data_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, words)])
    return args.run(args)


def test_demo_command_prints_one_line(tmp_path, capsys):
    assert run("demo", "digits", tmp_path / "out", "--size", 8, "--val-fraction", 0.5) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "899 training and 898 validation images of 8 px" in printed
    assert len(ShardReader(tmp_path / "out" / "val", "images")) == 898


def test_shard_command(src, tmp_path, capsys):
    assert run("shard", src, tmp_path / "out", "--samples-per-shard", 4, "--workers", 1) == 0
    assert "12 images of 3 classes in 3 shards" in capsys.readouterr().out
    assert len(read_index(tmp_path / "out").shards) == 3


def test_encode_command_loads_the_tokenizer_and_passes_the_options(monkeypatch, tmp_path):
    calls = []
    tokenizer = types.SimpleNamespace(to=lambda device: tokenizer, eval=lambda: tokenizer)
    model = types.ModuleType("hmar_mega.tokenizer.model")
    model.MultiScaleVQVAE = types.SimpleNamespace(load=lambda folder: calls.append(folder) or tokenizer)
    monkeypatch.setitem(sys.modules, model.__name__, model)
    monkeypatch.setattr("hmar_mega.tokenizer.encode.encode_shards", lambda *a, **k: calls.append((a, k)))
    words = ["encode", "images", "tok", tmp_path / "out", "--batch-size", 3, "--augment", "crop", "--device", "cpu"]
    assert run(*words, "--crops", 2, "--part", "2/4") == 0
    assert calls[0] == Path("tok")
    args, options = calls[1]
    assert args == (Path("images"), tokenizer, tmp_path / "out", EncodeSettings(batch_size=3, augment="crop", crops=2))
    assert (str(options["device"]), options["part"], options["parts"]) == ("cpu", 1, 4)


def test_encode_command_with_a_device_that_is_none(tmp_path):
    with pytest.raises(UserError, match="device 'tpu9'"):
        run("encode", "images", "tok", tmp_path / "out", "--device", "tpu9")


def test_info_command_shows_the_index(digits, capsys):
    assert run("info", digits / "train") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["kind       images", "samples    1,618"]
    assert lines[3] == "classes    10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert [line.split()[:2] for line in lines[-2:]] == [["shard-000000.tar", "1,024"], ["shard-000001.tar", "594"]]


def test_info_lists_ten_shards_and_counts_the_rest():
    shards = tuple(ShardEntry(name=f"shard-{n:06d}.tar", samples=1, bytes=1, sha256="ab" * 32) for n in range(13))
    lines = info_lines(ShardIndex(kind="images", samples=13, classes=("a",), shards=shards))
    assert lines[-1] == "… and 3 more"
    assert lines[-2].startswith("shard-000009.tar")


@pytest.mark.parametrize("command", ["demo", "shard", "encode", "info", "check", "stats", "view"])
def test_help_ends_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    assert f"example:\n  hmar-mega data {command} " in capsys.readouterr().out


def emoji_package(folder: Path, vendor: str) -> Path:
    """Three emoji, the first with a skin tone, one not drawn by this vendor."""
    package = folder / f"emoji-datasource-{vendor}"
    (package / "img" / vendor / "64").mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"name": package.name}))
    drawn = {"has_img_google": True, "has_img_twitter": True}
    tone = {"image": "hand-dark.png", **drawn}
    entries = [
        {"unified": "1", "image": "hand.png", "category": "People", "skin_variations": {"D": tone}, **drawn},
        {"unified": "2", "image": "nose.png", "category": "People", **drawn},
        {"unified": "3", "image": "flag.png", "category": "Flags", **drawn, f"has_img_{vendor}": False},
    ]
    (package / "emoji.json").write_text(json.dumps(entries))
    for name in ("hand.png", "hand-dark.png", "nose.png", "flag.png"):
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(package / "img" / vendor / "64" / name)
    return folder


def test_emoji_of_both_vendors_and_all_tones_stay_on_one_side(tmp_path, caplog):
    emoji_package(tmp_path / "node_modules", "google")
    emoji_package(tmp_path / "node_modules", "twitter")
    with caplog.at_level("INFO"):
        out = write_demo("emoji", tmp_path / "out", val_fraction=0.5, progress=False, source=tmp_path / "node_modules")
    assert "Apache-2.0" in caplog.text
    assert "CC-BY-4.0" in caplog.text
    sides = [ShardReader(out / part, "images") for part in ("train", "val")]
    assert sides[0].index.classes == ("People",)  # flags are drawn by nobody here
    assert sorted(len(side) for side in sides) == [2, 4]
    pixels = np.array(decode_sample(sides[0].read_image(0)))
    assert pixels.shape == (64, 64, 3)
    assert (pixels == 255).all()  # transparent becomes white


def test_openclipart_is_padded_and_small_or_gigantic_pictures_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("hmar_mega.data.demo_sets.CLIPART_MOST_PIXELS", 100 * 100)
    for topic, name, size in (
        ("food", "a", (40, 20)), ("food", "b", (8, 8)), ("food", "c", (20, 40)), ("tools", "d", (200, 200)),
        ("tools", "e", (32, 32)), ("tools", "f", (32, 32)),
    ):  # fmt: skip
        (tmp_path / topic / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 0).save(tmp_path / topic / "deep" / f"{name}.png")
    out = write_demo("openclipart", tmp_path / "out", size=32, val_fraction=0.5, progress=False, source=tmp_path)
    sides = [ShardReader(out / part, "images") for part in ("train", "val")]
    assert sides[0].index.classes == ("food", "tools")
    assert [len(side) for side in sides] == [2, 2]
    black = {int((np.array(decode_sample(s.read_image(i)))[..., 0] == 0).sum()) for s in sides for i in range(2)}
    assert black == {32 * 16, 32 * 32}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("emoji", r"npm install --no-save emoji-datasource-google@16\.0\.0 emoji-datasource-twitter@16\.0\.0"),
        ("openclipart", "apt-get install openclipart-png.*dpkg -x"),
        ("fashion-mnist", "apt-get download dataset-fashion-mnist.*dpkg -x"),
    ],
)
def test_a_missing_package_says_how_to_get_it(tmp_path, name, says):
    with pytest.raises(UserError, match=says):
        write_demo(name, tmp_path / "out", progress=False, source=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
