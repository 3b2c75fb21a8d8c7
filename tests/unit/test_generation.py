"""Thousands of images into a folder: balanced, resumable, shared among processes, and always the same bytes."""

from __future__ import annotations

import csv
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_export
from PIL import Image

from hmar_mega.cli import main
from hmar_mega.data.index import read_index
from hmar_mega.data.reader import ShardReader
from hmar_mega.errors import UserError
from hmar_mega.inference import ImageModel, generation, load_model
from hmar_mega.inference.decoding import to_bytes
from hmar_mega.inference.generation import Generation, Request, model_digest
from hmar_mega.inference.graphs import ImageSampler
from hmar_mega.inference.storage import FORMATS, Chunk, NpzStore, write_npz
from hmar_mega.progress import Tally

NUM, CHUNK, BATCH = 23, 5, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    return load_model(folder, "cpu")


@pytest.fixture
def generate(model: ImageModel, tmp_path: Path) -> Callable[..., Generation]:
    """A generation of 23 images in chunks of 5 and batches of 2 into `tmp_path / name`."""

    def make(name: str = "out", num: int = NUM, seed: int = 7, **options: object) -> Generation:
        options = {"chunk_size": CHUNK, "batch_size": BATCH, **options}
        request = Request.balanced(num, range(model.num_classes), seed)
        return Generation(model, model.sample_settings(), request, tmp_path / name, **options)  # type: ignore[arg-type]

    return make


def contents(folder: Path) -> dict[str, str]:
    """Checksum of every file by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ----------------------------------------------------------------------------------------------------- what is written


def test_the_npz_has_adms_layout(generate: Callable[..., Generation], model: ImageModel):
    done = generate()
    assert done.run(False) == f"23 images in {done.out / 'samples.npz'}"
    with np.load(done.out / "samples.npz") as stored:
        assert sorted(stored) == ["arr_0", "labels", "seeds"]
        images, labels, seeds = stored["arr_0"], stored["labels"], stored["seeds"]
    assert images.shape == (NUM, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [i % 5 for i in range(NUM)]
    assert seeds.tolist() == [7 + i for i in range(NUM)]
    for i in (0, 4, 11, 22):  # whatever the batch: an image is its class and its seed
        alone = to_bytes(model.generate([i % 5], seed=7 + i))[0]
        assert np.abs(alone.astype(int) - images[i]).max() <= 1
    cuts = [slice(c + b, min(c + b + BATCH, c + CHUNK, NUM)) for c in range(0, NUM, CHUNK) for b in (0, 2, 4)]
    for cut in (cut for cut in cuts if cut.start < NUM):  # and to the byte what the sampler gives a batch at a time
        given = torch.from_numpy(labels[cut]), torch.from_numpy(seeds[cut])
        assert np.array_equal(images[cut], to_bytes(model.sampler(*given, model.sample_settings())[1]))


def test_classes_are_balanced():
    labels = Request.balanced(50_000, range(1000), 0).labels
    assert set(np.bincount(labels)) == {50}
    assert np.ptp(np.bincount(Request.balanced(503, [0, 1, 2], 0).labels)) == 1
    assert Request.balanced(5, [4, 2], 0).labels.tolist() == [4, 2, 4, 2, 4]


def test_every_format_holds_the_same_images(generate: Callable[..., Generation]):
    npz, png, shards = (generate(form, form=form) for form in FORMATS)
    assert [x.run(False).split(" images in ")[0] for x in (npz, png, shards)] == ["23"] * 3
    with np.load(npz.out / "samples.npz") as stored:
        images, labels = stored["arr_0"], stored["labels"]
    with (png.out / "labels.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    reader = ShardReader(shards.out / "shards", "images")
    assert len(rows) == len(reader) == NUM
    for i, row in enumerate(rows):
        assert (row["file"], row["class"], row["seed"]) == (f"{i:06d}.png", str(labels[i]), str(7 + i))
        with Image.open(png.out / "images" / row["file"]) as image:
            assert np.array_equal(np.asarray(image), images[i])
        sample = reader.read_image(i)
        assert (sample.key, sample.label) == (f"{i:06d}", labels[i])
        assert sample.data == (png.out / "images" / row["file"]).read_bytes()
    assert read_index(shards.out / "shards").classes == tuple("01234")


def test_bytes_round_to_the_nearest():
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_bytes(values)[0, 0, :, 0].tolist() == [0, 0, 1, 255]


def test_an_npz_of_pieces_is_the_npz_of_the_whole(tmp_path: Path):
    store = tmp_path / "a.npz"
    with store.open("wb") as file:
        write_npz(file, {"arr_0": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": np.array([1, 2, 3])})
    with np.load(store) as stored:
        assert stored["arr_0"].tolist() == np.arange(12).reshape(3, 4).tolist()
        assert stored["labels"].tolist() == [1, 2, 3]


# ----------------------------------------------------------------------------------------------------- interruptions


class Killed(Exception):
    """Stands for a kill, which no block can catch."""


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_generation_killed_between_chunks_goes_on_to_the_same_bytes(
    generate: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch, form: str, after: int
):
    whole, broken = generate("whole", form=form), generate("broken", form=form)
    whole.run(False)
    images_of = Generation._images

    def dying(self: Generation, chunks: list[Chunk], tally: Tally) -> Iterator[tuple[Chunk, np.ndarray]]:
        yield from itertools.islice(images_of(self, chunks, tally), after)
        raise Killed

    monkeypatch.setattr(Generation, "_images", dying)
    with pytest.raises(Killed):
        broken.run(False)
    assert not (broken.out / "samples.npz").exists()
    again: list[int] = []

    def counted(self: Generation, chunks: list[Chunk], tally: Tally) -> Iterator[tuple[Chunk, np.ndarray]]:
        again.extend(chunk.number for chunk in chunks)
        return images_of(self, chunks, tally)

    monkeypatch.setattr(Generation, "_images", counted)
    broken.run(False)
    assert again == list(range(after, 5))  # what was complete is not made again
    assert contents(broken.out) == contents(whole.out)


def test_a_kill_within_a_chunk_leaves_nothing_that_counts(generate: Callable[..., Generation]):
    """As SIGKILL leaves it: a temporary file beside the chunks; half the PNGs of a chunk."""
    whole, broken = generate("whole"), generate("broken")
    whole.run(False)
    broken.run(False)
    (broken.out / "samples.npz").unlink()
    (broken.out / "chunks" / "000003.npz").rename(broken.out / "chunks" / ".000003.npz.x7")
    broken.run(False)
    (broken.out / "chunks" / ".000003.npz.x7").unlink()
    assert contents(broken.out) == contents(whole.out)
    png = generate("png", form="png")
    png.run(False)
    before = contents(png.out)
    (png.out / "labels.csv").unlink()
    (png.out / "images" / "000011.png").unlink()
    png.run(False)
    assert contents(png.out) == before


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path):
    """SIGKILL as soon as two chunks are there, whatever the process does at that moment."""
    arguments = [sys.executable, "-m", "hmar_mega", "sample", str(folder), "--num", "160", "--device", "cpu"]
    arguments += ["--chunk-size", "4", "--batch-size", "2", "--out"]
    killed = subprocess.Popen([*arguments, str(tmp_path / "killed")])
    chunks = tmp_path / "killed" / "chunks"
    while killed.poll() is None and len(list(chunks.glob("[0-9]*.npz"))) < 2:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    made = len(list(chunks.glob("[0-9]*.npz")))
    assert 2 <= made < 40
    assert not (tmp_path / "killed" / "samples.npz").exists()
    before = {path: path.stat().st_mtime_ns for path in chunks.glob("[0-9]*.npz")}
    for name in ("killed", "whole"):
        assert main([*arguments[3:], str(tmp_path / name)]) == 0
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    for path in chunks.glob(".*"):  # what the kill left half-written
        path.unlink()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_chunks_are_written_while_the_next_ones_are_computed(
    generate: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
):
    """The writer holds the first chunk until the first batch of the second one has been sampled."""
    sampled, write, at_most = [], NpzStore.write, threading.Event()
    sampler = ImageSampler.__call__

    def counting(self: ImageSampler, labels: torch.Tensor, *rest: object) -> object:
        sampled.append(len(labels))
        if len(sampled) == 4:  # a chunk of 5 is three batches of 2
            at_most.set()
        return sampler(self, labels, *rest)  # type: ignore[arg-type]

    def waiting(self: NpzStore, chunk: Chunk, images: np.ndarray) -> None:
        assert at_most.wait(30)
        write(self, chunk, images)

    monkeypatch.setattr(ImageSampler, "__call__", counting)
    monkeypatch.setattr(NpzStore, "write", waiting)
    assert "23 images in" in generate().run(False)


def test_what_stops_the_writer_stops_the_command_with_its_reason(
    generate: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
):
    whole, broken, write = generate("whole"), generate("broken"), NpzStore.write
    whole.run(False)

    def full(self: NpzStore, chunk: Chunk, images: np.ndarray) -> None:
        if chunk.number == 1:
            raise UserError("cannot write there: no space left on device")
        write(self, chunk, images)

    monkeypatch.setattr(NpzStore, "write", full)
    with pytest.raises(UserError, match="no space left on device"):
        broken.run(False)
    assert (broken.out / "chunks" / "000000.npz").exists()
    assert not (broken.out / "chunks" / "000004.npz").exists()  # it did not go on to the end
    monkeypatch.setattr(NpzStore, "write", write)
    broken.run(False)
    assert contents(broken.out) == contents(whole.out)


def test_a_long_generation_logs_its_rate_and_the_time_left(
    generate: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(generation, "LOG_EVERY", 0.0)
    with caplog.at_level(logging.INFO):
        generate().run(False)
    found = [re.fullmatch(r"images (\d+)/23 \| [\d.]+ img/s \| \d+ min left", m) for m in caplog.messages]
    assert [match[1] for match in found if match] == ["5", "10", "15", "20", "23"]


def test_a_complete_generation_does_nothing(generate: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch):
    done = generate()
    done.run(False)
    before = contents(done.out)
    monkeypatch.setattr(type(done.model.sampler), "__call__", None)  # any sampling would fail
    assert "23 images are complete" in done.run(False)
    for path in (done.out / "chunks").iterdir():  # what was put together needs its chunks no longer
        path.unlink()
    assert "23 images are complete" in done.run(False)
    assert (done.out / "samples.npz").exists()
    assert before["samples.npz"] == contents(done.out)["samples.npz"]


def test_a_damaged_chunk_is_named(generate: Callable[..., Generation]):
    done = generate()
    done.run(False)
    (done.out / "samples.npz").unlink()
    damaged = done.out / "chunks" / "000002.npz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(UserError, match=r"000002.npz is damaged .*; remove it and run the command again"):
        done.run(False)
    damaged.unlink()
    assert "23 images in" in done.run(False)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num": 24}, "num"),
        ({"seed": 8}, "seeds"),
        ({"form": "png"}, "format"),
        ({"chunk_size": 6}, "chunk_size"),
        ({"batch_size": 3}, "batch_size"),
    ],
)
def test_a_folder_of_another_generation_is_refused(
    generate: Callable[..., Generation], options: dict[str, object], key: str
):
    generate().run(False)
    with pytest.raises(UserError, match=f"is of another generation: {key} was"):
        generate(**options).run(False)


def test_other_settings_or_another_model_are_refused(
    generate: Callable[..., Generation], model: ImageModel, folder: Path
):
    done = generate()
    done.run(False)
    other = Generation(model, model.sample_settings(cfg_scale=3.0), done.request, done.out, "npz", CHUNK, BATCH)
    with pytest.raises(UserError, match=r"cfg_scale was 1\.5, now it is 3\.0; use the settings it was begun with"):
        other.run(False)
    changed = load_model(folder, "cpu")
    assert model_digest(changed) == model_digest(model)
    with torch.no_grad():
        changed.model.head.linear.bias += 1e-3
    with pytest.raises(UserError, match="another generation: model was"):
        Generation(changed, changed.sample_settings(), done.request, done.out, "npz", CHUNK, BATCH).run(False)
    half = load_model(folder, "cpu", torch.bfloat16)
    assert model_digest(half) != model_digest(model)


def test_the_part_that_comes_second_at_the_same_moment_compares(
    generate: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
):
    """Both have seen that there is no plan; what the first wrote stays, and only the same settings go on."""
    first, same, other = generate(), generate(), generate(seed=8)
    first._agree_on_plan()
    written = (first.out / "plan.json").read_bytes()
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "plan.json" and exists(path))
    monkeypatch.setattr(Generation, "_visible", lambda _: [])
    same._agree_on_plan()
    with pytest.raises(UserError, match="is of another generation: seeds was"):
        other._agree_on_plan()
    assert (first.out / "plan.json").read_bytes() == written
    assert [path.name for path in first.out.iterdir()] == ["plan.json"]


def test_a_plan_is_written_where_there_are_no_hard_links(
    generate: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def unable(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unable)
    generate()._agree_on_plan()
    assert "has no hard links" in caplog.text
    with pytest.raises(UserError, match="is of another generation"):
        generate(seed=8)._agree_on_plan()
    assert [path.name for path in generate().out.iterdir()] == ["plan.json"]


# ------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_together_make_what_one_process_makes(generate: Callable[..., Generation], form: str, parts: int):
    whole = generate("whole", form=form)
    whole.run(False)
    order = list(range(parts))[::-1]
    said = [generate("shared", form=form, part=part, parts=parts).run(False) for part in order]
    with_work = [part for part in order if part < 5]
    assert all("of 5 chunks are there" in text for text in said[: order.index(with_work[-1])])
    assert "23 images" in said[-1]
    assert contents(whole.out.parent / "shared") == contents(whole.out)


def test_a_part_makes_its_own_chunks_alone(generate: Callable[..., Generation]):
    generate(part=1, parts=2).run(False)
    plan = generate()
    store = NpzStore(plan.out, 16)
    assert [store.complete(chunk) for chunk in plan.request.chunks(CHUNK)] == [False, True, False, True, False]
    assert not store.finished()


def test_processes_under_torchrun_make_what_one_process_makes(folder: Path, tmp_path: Path):
    """Two real processes with the ranks of torchrun in their environment, at the same time."""
    arguments = [sys.executable, "-m", "hmar_mega", "sample", str(folder), "--num", "12", "--device", "cpu"]
    arguments += ["--chunk-size", "3", "--batch-size", "3", "--seed", "4", "--out"]
    ranks = [
        subprocess.Popen([*arguments, str(tmp_path / "two")], env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    assert main([*arguments[3:], str(tmp_path / "one")]) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# ---------------------------------------------------------------------------------------------------------- commands


def test_the_command_shares_by_part_and_says_what_is_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["sample", str(folder), "--num", "9", "--device", "cpu", "--chunk-size", "2", "--batch-size", "2"]
    for part in ("1/2", "2/2"):
        assert main([*arguments, "--part", part, "--out", str(tmp_path / "parts")]) == 0
    said = capsys.readouterr().out
    assert "part 1 of 2 is complete; of all parts 3 of 5 chunks are there" in said
    assert f"9 images in {tmp_path / 'parts' / 'samples.npz'}" in said
    plan = json.loads((tmp_path / "parts" / "plan.json").read_text())
    assert (plan["num"], plan["chunk_size"], plan["cfg_scale"]) == (9, 2, 1.5)


def test_shards_take_the_class_names_given(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\ndog\nwasp\n")
    arguments = ["sample", str(folder), "--num", "3", "--device", "cpu", "--format", "shards"]
    arguments += ["--out", str(tmp_path / "out")]
    assert main([*arguments, "--class-names", str(tmp_path / "names.txt"), "--classes", "cow"]) == 0
    assert read_index(tmp_path / "out" / "shards").classes == ("ant", "bee", "cow", "dog", "wasp")
    assert main([*arguments, "--classes", "2"]) == 2
    assert "is of another generation: class_names was" in capsys.readouterr().err


def test_num_takes_the_classes_given(folder: Path, tmp_path: Path):
    arguments = ["sample", str(folder), "--num", "5", "--device", "cpu", "--classes", "3,1", "--out"]
    assert main([*arguments, str(tmp_path / "some")]) == 0
    with np.load(tmp_path / "some" / "samples.npz") as stored:
        assert stored["labels"].tolist() == [3, 1, 3, 1, 3]


def test_a_list_makes_a_grid_or_a_folder_of_its_classes_and_seeds(folder: Path, tmp_path: Path, model: ImageModel):
    (tmp_path / "list.csv").write_text("class,seed\nwasp,40\n0,3\nant,40\n")
    (tmp_path / "names").write_text("ant\nbee\ncow\ndog\nwasp\n")
    arguments = ["sample", str(folder), "--csv", str(tmp_path / "list.csv"), "--device", "cpu"]
    arguments += ["--class-names", str(tmp_path / "names")]
    assert main([*arguments, "--out", str(tmp_path / "many")]) == 0
    with np.load(tmp_path / "many" / "samples.npz") as stored:
        assert stored["labels"].tolist() == [4, 0, 0]
        assert stored["seeds"].tolist() == [40, 3, 40]
        images = stored["arr_0"]
    assert main([*arguments, "--count", "3", "--out", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        pixels = np.asarray(grid)
    assert pixels.shape == (16, 3 * 18 - 2, 3)
    expected = to_bytes(model.generate([4, 0, 0], seed=[40, 3, 40]))
    for i in range(3):
        assert np.array_equal(pixels[:, 18 * i : 18 * i + 16], expected[i])
        assert np.array_equal(images[i], expected[i])


def test_scales_and_animation_go_with_a_grid(folder: Path, tmp_path: Path):
    arguments = ["sample", str(folder), "--classes", "0,3", "--count", "2", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "plain.png")]) == 0
    views = ["--gif", str(tmp_path / "a.gif"), "--scales-out", str(tmp_path / "scales")]
    assert main([*arguments, *views, "--out", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    names = sorted(path.name for path in (tmp_path / "scales").iterdir())
    assert names == ["scale-01-1x1.png", "scale-02-2x2.png", "scale-03-4x4.png", "scales.png"]
    assert (tmp_path / "scales" / "scale-03-4x4.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    with Image.open(tmp_path / "scales" / "scales.png") as overview:
        assert overview.size == (3 * 18 - 2, 4 * 18 - 2)  # a row an image, a column a scale
    with Image.open(tmp_path / "a.gif") as animation:
        assert (animation.n_frames, animation.size) == (3, (2 * 18 - 2, 2 * 18 - 2))
        times = []
        for frame in range(3):
            animation.seek(frame)
            times.append(animation.info["duration"])
    assert times == [300, 300, 1500]


def test_options_reach_the_sampler(folder: Path, tmp_path: Path):
    grids = {}
    for name, options in {
        "plain": [],
        "same": ["--cfg", "0,0.75,1.5", "--mask-schedule", "1;1,3;4,5,7;…"],
        "cfg": ["--cfg", "0,3,0"],
        "passes": ["--mask-schedule", "1;4"],
        "negative": ["--negative-class", "2"],
        "smooth": ["--more-smooth"],
    }.items():
        arguments = ["sample", str(folder), "--classes", "0,3", "--device", "cpu", "--out", str(tmp_path / name)]
        assert main([*arguments[:-1], str(tmp_path / f"{name}.png"), *options]) == 0
        grids[name] = (tmp_path / f"{name}.png").read_bytes()
    assert grids.pop("same") == grids["plain"]
    assert len(set(grids.values())) == len(grids)
