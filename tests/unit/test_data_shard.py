"""Sharding: what becomes of peculiar images, order and split, resuming, processes, and byte-for-byte reproduction."""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hmar_mega.data import shard_worker
from hmar_mega.data.cli import add_data_parser, info_lines
from hmar_mega.data.index import read_index
from hmar_mega.data.make_cli import parse_size
from hmar_mega.data.pixels import Storing, UnusableImage, peculiarities, store_image, to_rgb
from hmar_mega.data.processes import map_processes
from hmar_mega.data.reader import ShardReader
from hmar_mega.data.shard import ShardSettings, shard_images
from hmar_mega.data.split import stratified_split
from hmar_mega.errors import UserError


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


def noise(width: int = 16, height: int = 12, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def src(tmp_path) -> Path:
    """Twelve images of two classes, in shards of four: three."""
    for number in range(12):
        path = tmp_path / "src" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(seed=number)))
    return tmp_path / "src"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Images


def lying() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(), "JPEG", exif=exif)


PECULIAR = {
    "plain": (lambda: encoded(noise()), ()),
    "turned": (lying, ("turned",)),
    "palette": (lambda: encoded(noise().convert("P")), ("palette",)),
    "palette with transparency": (lambda: encoded(noise().convert("P"), transparency=3), ("palette", "alpha")),
    "alpha": (lambda: encoded(noise().convert("RGBA")), ("alpha",)),
    "CMYK": (lambda: encoded(noise().convert("CMYK"), "JPEG"), ("CMYK",)),
    "grey": (lambda: encoded(noise().convert("L")), ("grey",)),
    "16 bits": (lambda: encoded(Image.fromarray(np.full((4, 4), 0x8000, np.uint16))), ("16-bit",)),
    "profile": (lambda: encoded(noise(), icc_profile=b"x" * 200), ("profile",)),
}


@pytest.mark.parametrize("name", PECULIAR)
def test_what_is_peculiar_is_noted_and_bytes_are_kept(name):
    make, notes = PECULIAR[name]
    stored = store_image(make(), Storing())
    assert (stored.notes, stored.data) == (notes, make())


@pytest.mark.parametrize("name", PECULIAR)
def test_encoding_anew_stores_the_pixels_that_reading_would_give(name):
    data = PECULIAR[name][0]()
    stored = store_image(data, Storing("png"))
    image = Image.open(io.BytesIO(stored.data))
    assert (stored.field, image.mode, image.size, peculiarities(image)) == ("png", "RGB", stored.size, ())
    assert np.array_equal(np.asarray(image), np.asarray(to_rgb(Image.open(io.BytesIO(data)))))


def test_encodings_qualities_and_sizes():
    data = encoded(noise(60, 40), "BMP")
    small, large = (store_image(data, Storing("jpeg", quality)) for quality in (20, 95))
    assert (small.field, len(small.data) < len(large.data)) == ("jpg", True)
    webp = store_image(data, Storing("webp", 80, shorter_side=20))
    assert (webp.field, webp.size, Image.open(io.BytesIO(webp.data)).format) == ("webp", (30, 20), "WEBP")
    assert store_image(data, Storing("png", shorter_side=50)).size == (60, 40)  # never made larger


@pytest.mark.parametrize(
    ("data", "storing", "message"),
    [
        (encoded(noise(300, 100)), Storing(max_pixels=29_999), "300 × 100 pixels are more than the limit"),
        (encoded(noise(), "BMP"), Storing(), "format BMP is not jpg, png or webp"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), Storing("png"), "floating-point"),
        (encoded(noise())[:200], Storing("png"), "truncated"),
        (b"", Storing(), "not an image"),
    ],
)
def test_images_that_cannot_be_used(data, storing, message):
    with pytest.raises(UnusableImage, match=message):
        store_image(data, storing)


def test_a_bomb_is_not_unpacked(monkeypatch):
    """The size stands in the head of the file: nothing is decoded to find out."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnusableImage, match="2000 × 1000 pixels are more than the limit of 1 megapixels"):
        store_image(encoded(Image.new("1", (2000, 1000))), Storing(max_pixels=1_000_000))


# Order, split, cut


def test_split_takes_a_share_of_every_class_and_always_the_same(src, tmp_path):
    settings = ShardSettings(samples_per_shard=4, val_fraction=0.34)
    indexes = shard_images(src, tmp_path / "out", settings, progress=False)
    counts = {part: Counter(sample_labels(tmp_path / "out" / part)) for part in indexes}
    assert counts == {"train": {0: 4, 1: 4}, "val": {0: 2, 1: 2}}
    shard_images(src, tmp_path / "again", settings, progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "again")


def sample_labels(folder: Path) -> list[int]:
    reader = ShardReader(folder, "images")
    return [reader.read(number).label for number in range(len(reader))]


def test_a_class_of_one_image_stays_in_train():
    assert stratified_split(np.array([0, 1, 1, 1, 2]), 0.5).tolist()[0::4] == [False, False]
    assert stratified_split(np.array([0, 1, 1, 1, 2]), 0.5).sum() == 2


def test_a_source_in_parts_is_not_split_again(src, tmp_path):
    (tmp_path / "parts").mkdir()
    for part in ("train", "val"):
        (tmp_path / "parts" / part).symlink_to(src)
    with pytest.raises(UserError, match="has the parts train, val already"):
        shard_images(tmp_path / "parts", tmp_path / "out", ShardSettings(val_fraction=0.1), progress=False)


def test_shards_can_be_cut_by_bytes(src, tmp_path):
    sizes = [path.stat().st_size for path in src.rglob("*.png")]
    index = shard_images(src, tmp_path / "out", ShardSettings(shard_bytes=3 * max(sizes)), progress=False)[""]
    assert [shard.samples for shard in index.shards] == [3, 3, 3, 3]
    smaller = ShardSettings(shard_bytes=3 * max(sizes), storing=Storing("webp", 10))
    index = shard_images(src, tmp_path / "webp", smaller, progress=False)[""]
    assert len(index.shards) < 4
    assert (index.images.encoding, index.images.quality) == ("webp", 10)


def test_equal_files_are_listed_with_their_classes(src, tmp_path):
    (src / "b" / "copy.png").write_bytes((src / "a" / "04.png").read_bytes())
    index = shard_images(src, tmp_path / "out", progress=False)[""]
    assert index.duplicates == 1
    rows = (tmp_path / "out" / "duplicates.csv").read_text().splitlines()
    assert rows[1:] == [",b/copy.png,b,,a/04.png,a"]
    assert "duplicates 1 images" in info_lines(index)


def test_classes_are_written_as_sample_reads_them(src, tmp_path):
    from hmar_mega.inference.options import class_names

    shard_images(src, tmp_path / "out", progress=False)
    assert class_names(tmp_path / "out" / "classes.json", None, 2).names == ("a", "b")


# Stopping and going on


def note_shards(monkeypatch: pytest.MonkeyPatch, count: int = 99) -> list[str]:
    """The list gets the name of every shard that is made; after so many comes a Ctrl-C."""
    made: list[str] = []
    original = shard_worker.make_shard

    def make(task: shard_worker.ShardTask) -> object:
        if len(made) == count:
            raise KeyboardInterrupt
        made.append(task.job.name)
        return original(task)

    monkeypatch.setattr(shard_worker, "make_shard", make)
    return made


def make_two_shards(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin, and be stopped after two of three shards."""
    with monkeypatch.context() as patch:
        note_shards(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            shard_images(src, out, ShardSettings(samples_per_shard=4), progress=False)


def test_finished_shards_are_not_made_again(src, tmp_path, monkeypatch, caplog):
    settings = ShardSettings(samples_per_shard=4)
    shard_images(src, tmp_path / "undisturbed", settings, progress=False)
    make_two_shards(src, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / ".shard-000002.tar.x1").write_bytes(b"half")
    made = note_shards(monkeypatch)
    shard_images(src, tmp_path / "out", settings, progress=False)
    assert made == ["shard-000002.tar"]
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert not (tmp_path / "out.partial").exists()
    shard_images(src, tmp_path / "out", settings, progress=False)
    assert made == ["shard-000002.tar"]


def test_a_tar_that_is_not_as_long_as_recorded_is_made_again(src, tmp_path, monkeypatch):
    settings = ShardSettings(samples_per_shard=4)
    make_two_shards(src, tmp_path / "out", monkeypatch)
    (tmp_path / "out.partial" / "shard-000000.tar").write_bytes(b"cut")
    made = note_shards(monkeypatch)
    shard_images(src, tmp_path / "out", settings, progress=False)
    assert made == ["shard-000000.tar", "shard-000002.tar"]


def test_other_options_or_another_source_do_not_go_on(src, tmp_path, monkeypatch):
    make_two_shards(src, tmp_path / "out", monkeypatch)
    with pytest.raises(UserError, match="source or options have changed"):
        shard_images(src, tmp_path / "out", ShardSettings(samples_per_shard=4, seed=1), progress=False)
    (src / "a" / "02.png").unlink()
    with pytest.raises(UserError, match="source or options have changed"):
        shard_images(src, tmp_path / "out", ShardSettings(samples_per_shard=4), progress=False)
    assert len(list((tmp_path / "out.partial").glob("*.tar"))) == 2


def test_two_at_once_are_refused(src, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with open(partial / ".lock-all", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (partial / "x.tar").touch()
        with pytest.raises(UserError, match="another process is at work"):
            shard_images(src, tmp_path / "out", progress=False)


def test_processes_make_the_same_bytes(src, tmp_path):
    settings = ShardSettings(samples_per_shard=2, val_fraction=0.34)
    shard_images(src, tmp_path / "one", settings, progress=False)
    shard_images(src, tmp_path / "two", settings, progress=False, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_process_that_is_killed_is_an_error():
    with pytest.raises(UserError, match="a worker process was killed"):
        list(map_processes(os._exit, [9], workers=2))


def test_after_an_error_no_further_task_is_taken(monkeypatch):
    class Threads(ThreadPoolExecutor):
        def __init__(self, workers: int, **_: object) -> None:
            super().__init__(workers)

    def fail(_: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("hmar_mega.data.processes.ProcessPoolExecutor", Threads)
    tasks = iter(range(100))
    with pytest.raises(ZeroDivisionError):
        list(map_processes(fail, tasks, workers=2))
    assert next(tasks) == 4  # two for each process


def test_without_a_terminal_progress_is_logged(src, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hmar_mega.progress.SECONDS_A_LINE", 0.0)
    with caplog.at_level("INFO"):
        shard_images(src, tmp_path / "out", ShardSettings(samples_per_shard=4))
    lines = [record.getMessage() for record in caplog.records if record.name == "hmar_mega.progress"]
    assert [re.sub(r"[\d,]+/s", "R/s", line) for line in lines[:2]] == [
        "shard: 4 of 12, R/s, 0 min left",
        "shard: 8 of 12, R/s, 0 min left",
    ]


# The command


def run(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="hmar-mega")
    add_data_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, words)])
    return args.run(args)


def test_dry_run_tells_and_writes_nothing(src, tmp_path, capsys):
    assert run("shard", src, tmp_path / "out", "--val-fraction", 0.34, "--samples-per-shard", 3, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "folder of images, 2 classes: a, b"
    assert "out/train: 8 images of 2 classes in 3 shards, the first of 3 images, 0.0 MB as they are" in lines[1]
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_options_reach_the_shards(src, tmp_path, capsys):
    words = ["--encoding", "webp", "--quality", 50, "--shorter-side", 8, "--shard-size", "1K", "--workers", 1]
    assert run("shard", src, tmp_path / "out", *words) == 0
    index = read_index(tmp_path / "out")
    assert index.images.model_dump() == {"encoding": "webp", "quality": 50, "shorter_side": 8}
    assert len(index.shards) > 1
    assert "12 images of 2 classes in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", 90], "--quality would do nothing: --encoding keep"),
        (["--encoding", "png", "--quality", 90], "png loses nothing"),
        (["--encoding", "jpeg", "--quality", 101], "use 1 to 100"),
        (["--max-megapixels", 1000], "use at most 179"),
        (["--val-fraction", 2], "between 0 and 1"),
        (["--samples-per-shard", 0], "at least 1 sample"),
    ],
)
def test_options_that_cannot_be(src, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run("shard", src, tmp_path / "out", "--workers", 1, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_sizes_have_units():
    assert [parse_size(text) for text in ("300", "2K", "1.5M", "1GB")] == [300, 2000, 1_500_000, 10**9]
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        parse_size("many")
