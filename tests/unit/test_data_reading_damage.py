"""Shards that are damaged before or while they are read: training goes on and counts, or stops and names the shard."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hmar_mega.data.damage import Damage, DamagePolicy
from hmar_mega.data.images import tensor_to_image
from hmar_mega.data.index import TokenFormat, offsets_path, read_index
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.patience import read_patiently
from hmar_mega.data.reader import ShardReader, npy_bytes
from hmar_mega.data.samples import Pixels, SampleSet
from hmar_mega.data.stream import StreamLoader, eval_batches
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError

TOKENS = TokenFormat(patch_nums=(1, 2), codebook_size=256, fingerprint="f00d", resolution=16)
COUNT, SHARD = 60, 20
SKIP = DamagePolicy("skip", max_damaged=1.0, timeout=0.2, retries=1, pause=0.01)
STOP = DamagePolicy("stop", timeout=0.2, retries=1, pause=0.01)
MIDDLE = "shard-000001.tar"


def write(out: Path, offset: int = 0) -> Path:
    with open_shards(out, "tokens", ("a", "b"), SHARD, TOKENS) as writer:
        for number in range(COUNT):
            writer.write(
                f"{number:04d}", number % 2, {"npy": npy_bytes(np.arange(5, dtype=np.uint16) + number + offset)}
            )
    return out


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("pristine") / "out")


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def loader(folder: Path, policy: DamagePolicy = SKIP, workers: int = 0) -> StreamLoader:
    reader = ShardReader(folder, "tokens", policy)
    return StreamLoader(reader, SampleOrder(COUNT, 0), COUNT, COUNT, 0, 1, workers=workers)


def check_epoch(stream: StreamLoader, lost: set[int], kind: str) -> None:
    """An epoch is as long as ever; exactly the samples in `lost` are replaced, by whole ones, and counted."""
    (batch,) = next(stream)
    wanted = SampleOrder(COUNT, 0).sample_indices(0, COUNT).tolist()
    given = [int(key) for key in batch.keys]
    assert batch.tokens[:, 0].tolist() == given
    assert {number for number, key in zip(wanted, given, strict=True) if number != key} == lost
    assert not lost & set(given)
    found = stream.account.take_fresh()
    assert {one.sample for one in found} == lost
    assert {one.kind for one in found} == ({kind} if lost else set())
    assert [wanted[one.position] for one in found] == [one.sample for one in found]
    assert [given[one.position] for one in found] == [one.substitute for one in found]
    assert stream.account.substituted == stream.account.damaged == len(lost)


def ends_in(folder: Path) -> list[tuple[int, int]]:
    """(sample, end of its tokens in the tar) of the middle shard, cut off or not."""
    offsets = ShardReader(folder, "tokens", SKIP)._shards[1]
    column = offsets.fields.index("npy")
    ends = (offsets.starts[:, column] + offsets.sizes[:, column]).tolist()
    return [(SHARD + row, end) for row, end in enumerate(ends)]


def test_tar_truncated_at_twenty_places_loses_what_is_behind_and_no_more(folder):
    whole = (folder / MIDDLE).read_bytes()
    ends = ends_in(folder)
    places = np.random.RandomState(7).randint(0, len(whole), 20).tolist()
    for place in places:
        (folder / MIDDLE).write_bytes(whole[:place])
        check_epoch(loader(folder), {sample for sample, end in ends if end > place}, "cut off")
        with pytest.raises(Damage, match=MIDDLE):
            loader(folder, STOP)


def test_tar_truncated_while_it_is_read(folder):
    stream = loader(folder)
    next(stream)
    os.truncate(folder / MIDDLE, 20_000)
    (batch,) = next(stream)
    lost = {sample for sample, end in ends_in(folder) if end > 20_000}
    assert {one.sample for one in stream.account.take_fresh()} == lost
    assert len(lost) > 5
    assert not lost & {int(key) for key in batch.keys}


def test_garbage_in_a_header_costs_that_sample_and_not_the_rest_of_the_tar(folder):
    reader = ShardReader(folder, "tokens")
    offsets = reader._shards[1]
    start = int(offsets.starts[4, offsets.fields.index("npy")])
    with open(folder / MIDDLE, "r+b") as file:
        file.seek(start - 512)
        file.write(os.urandom(512))
    check_epoch(loader(folder), {SHARD + 4}, "content")


@pytest.mark.parametrize("remains", [None, b"", b"\0" * 10240])
def test_missing_zero_byte_and_empty_shards_are_lost_as_a_whole(folder, remains):
    (folder / MIDDLE).unlink()
    offsets_path(folder / MIDDLE).unlink()
    if remains is not None:
        (folder / MIDDLE).write_bytes(remains)
    stream = loader(folder)
    assert stream.account.damaged == SHARD
    check_epoch(stream, set(range(SHARD, 2 * SHARD)), "missing" if remains is None else "changed")
    with pytest.raises(Damage, match=MIDDLE):
        loader(folder, STOP)


def test_too_many_lost_from_the_start_names_a_shard_and_what_to_do(folder):
    (folder / MIDDLE).unlink()
    with pytest.raises(
        UserError, match=rf"20 of 60 samples cannot be read, more than data\.max_damaged=0\.3.*{MIDDLE}"
    ):
        loader(folder, DamagePolicy("skip", max_damaged=0.3))
    assert loader(folder, DamagePolicy("skip", max_damaged=0.34)).account.damaged == SHARD


def test_too_many_damaged_on_the_way_stop_the_run(folder):
    stream = loader(folder, DamagePolicy("skip", max_damaged=0.1, retries=0))
    os.truncate(folder / MIDDLE, 0)
    with pytest.raises(UserError, match=rf"7 of 60 samples cannot be read.*{MIDDLE}"):
        next(stream)


@pytest.mark.parametrize("atomically", [True, False])
def test_shard_replaced_while_it_is_read_is_noticed(folder, tmp_path, atomically):
    """Another shard of the same size and keys: in place, or by a rename before it was opened."""
    other = write(tmp_path / "other", offset=100)
    stream = loader(folder)
    if atomically:
        os.replace(other / MIDDLE, folder / MIDDLE)
        check_epoch(stream, set(range(SHARD, 2 * SHARD)), "changed")
    else:
        next(stream)
        (folder / MIDDLE).write_bytes((other / MIDDLE).read_bytes())
        (batch,) = next(stream)
        assert stream.account.damaged == SHARD
        assert batch.tokens[:, 0].tolist() == [int(key) for key in batch.keys]


def test_rename_over_an_open_shard_changes_nothing(folder, tmp_path):
    other = write(tmp_path / "other", offset=100)
    stream = loader(folder)
    next(stream)
    os.replace(other / MIDDLE, folder / MIDDLE)
    (batch,) = next(stream)
    assert batch.tokens[:, 0].tolist() == [int(key) for key in batch.keys]
    assert stream.account.substituted == 0


def test_shard_touched_but_the_same_goes_on(folder):
    stream = loader(folder)
    os.utime(folder / MIDDLE, (1, 1))
    check_epoch(stream, set(), "")


@pytest.mark.parametrize("without", ["offsets", "its time"])
def test_reading_a_whole_tar_may_take_longer_than_a_read(folder, monkeypatch, caplog, without):
    class Slow:
        def __init__(self) -> None:
            self._hash = hashlib.sha256()

        def update(self, block: bytes) -> None:
            time.sleep(SKIP.timeout / 10)
            self._hash.update(block)

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    size = (folder / MIDDLE).stat().st_size
    monkeypatch.setattr("hmar_mega.data.index._BLOCK", size // 30)  # 3 times the timeout in all
    monkeypatch.setattr("hmar_mega.data.index.hashlib", SimpleNamespace(sha256=Slow))
    if without == "offsets":
        offsets_path(folder / MIDDLE).unlink()
        stream = loader(folder)
    else:
        stream = loader(folder)
        os.utime(folder / MIDDLE, (1, 1))
    check_epoch(stream, set(), "")
    assert [MIDDLE in record.message for record in caplog.records] == [True]  # told once, and not tried twice


def test_shard_listed_twice_contradicts_the_index(folder):
    index = read_index(folder)
    (folder / "index.json").write_text(
        index.model_copy(update={"shards": (*index.shards, index.shards[1])}).model_dump_json()
    )
    with pytest.raises(UserError, match="contradicts itself"):
        loader(folder)


def test_silent_file_system_is_given_up_and_tried_again_then_left_alone(folder):
    """A named pipe in place of a shard: opening it waits for ever for a writer."""
    stream = loader(folder, workers=1)
    (folder / MIDDLE).unlink()
    os.mkfifo(folder / MIDDLE)
    begin = time.monotonic()
    check_epoch(stream, set(range(SHARD, 2 * SHARD)), "slow")
    next(stream)
    assert time.monotonic() - begin < 20 * SKIP.timeout  # not 20 samples · 2 tries · timeout, twice
    stream.close()


def test_silent_file_system_stops_the_run_by_policy(folder):
    stream = loader(folder, STOP)
    (folder / MIDDLE).unlink()
    os.mkfifo(folder / MIDDLE)
    with pytest.raises(Damage, match=rf"{MIDDLE} gives no answer within 0\.2 s"):
        next(stream)


def test_failing_reads_are_tried_again_before_they_count(folder, monkeypatch):
    failures = {"left": 3}
    pread = os.pread

    def flaky(*args: int) -> bytes:
        if failures["left"]:
            failures["left"] -= 1
            raise OSError(5, "Input/output error")
        return pread(*args)

    stream = loader(folder, DamagePolicy("skip", max_damaged=1.0, retries=3, pause=0.01))
    monkeypatch.setattr("hmar_mega.data.shard_files.os.pread", flaky)
    check_epoch(stream, set(), "")
    assert failures["left"] == 0


def test_bad_image_is_skipped_and_counted_and_by_policy_ends_the_run(tmp_path):
    good = tmp_path / "good.png"
    tensor_to_image(torch.zeros(3, 20, 24), (-1, 1)).save(good)
    with open_shards(tmp_path / "out", "images", ("a",), 4) as writer:
        for number in range(6):
            data = good.read_bytes()
            writer.write(str(number), 0, {"png": data[:60] if number == 2 else data})
    samples = SampleSet([ShardReader(tmp_path / "out", "images", SKIP)], Pixels(16, "crop", random=True))
    stream = StreamLoader(samples, SampleOrder(6, 0), 6, 3, 0, 1, workers=0)
    first, second = next(stream)
    assert tuple(first.pixels.shape) == tuple(second.pixels.shape) == (3, 3, 16, 16)
    assert [(one.sample, one.kind) for one in stream.account.take_fresh()] == [(2, "content")]
    stopping = SampleSet([ShardReader(tmp_path / "out", "images", STOP)], Pixels(16, "crop", random=True))
    with pytest.raises(Damage, match=r"shard-000000\.tar: sample 2 cannot be decoded"):
        next(StreamLoader(stopping, SampleOrder(6, 0), 6, 3, 0, 1, workers=0))


def test_evaluation_counts_as_well_and_does_not_depend_on_the_ranks(folder):
    os.truncate(folder / MIDDLE, 20_000)
    reader = ShardReader(folder, "tokens", SKIP)
    alone = [key for batch in eval_batches(reader, 7) for key in batch.keys]
    shared = [key for rank in range(3) for batch in eval_batches(reader, 7, rank, 3) for key in batch.keys]
    assert alone == shared
    assert len(alone) == COUNT


def test_closing_a_loader_does_not_wait_for_a_read_that_hangs(folder):
    reader = ShardReader(folder, "tokens", DamagePolicy("skip", max_damaged=1.0, timeout=60.0))
    stream = StreamLoader(reader, SampleOrder(COUNT, 0), COUNT, COUNT, 0, 1, workers=1, prefetch=1)
    next(stream)
    time.sleep(0.2)  # the step ahead is read
    reader.close()
    (folder / MIDDLE).unlink()
    os.mkfifo(folder / MIDDLE)
    next(stream)
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 10


def test_errors_that_are_no_damage_are_raised():
    with pytest.raises(ZeroDivisionError):
        read_patiently(lambda n: 1 // n, [2, 0], SKIP, lambda n: Damage("", "slow"))
