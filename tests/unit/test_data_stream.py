"""The stream of a run over ranks, workers, mixtures, groups and restarts; copies of shards on a local disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmar_mega.batches import BatchPlan
from hmar_mega.data.cache import ShardCache
from hmar_mega.data.damage import DamagePolicy
from hmar_mega.data.index import TokenFormat, read_index
from hmar_mega.data.order import GroupedOrder, MixedOrder, Order, SampleOrder
from hmar_mega.data.reader import ShardReader, npy_bytes
from hmar_mega.data.samples import SampleSet
from hmar_mega.data.stream import StreamLoader
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError

TOKENS = TokenFormat(patch_nums=(1, 2), codebook_size=256, fingerprint="f00d", resolution=16)
SIZES = (23, 10)


def write(out: Path, count: int, offset: int = 0) -> Path:
    with open_shards(out, "tokens", ("a", "b"), 4, TOKENS) as writer:
        for number in range(count):
            row = np.arange(5, dtype=np.uint16) + number + offset
            writer.write(f"{number + offset:04d}", number % 2, {"npy": npy_bytes(row)})
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("sets")
    return [write(root / "first", SIZES[0]), write(root / "second", SIZES[1], 100)]


@pytest.fixture(scope="module")
def samples(folders) -> SampleSet:
    return SampleSet([ShardReader(folder, "tokens") for folder in folders])


def order_of(kind: str, seed: int, samples: SampleSet) -> Order:
    if kind == "grouped":
        return GroupedOrder([size for reader in samples.readers for size in reader.shard_sizes], seed, 2)
    if kind == "mixed":
        return MixedOrder([SampleOrder(SIZES[0], seed), GroupedOrder([4, 4, 2], seed, 2)], [3, 1])
    return SampleOrder(len(samples), seed)


# Any world, any place, any restart


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["global", "grouped", "mixed"]),
    before=st.sampled_from([(1, 12), (2, 3), (3, 2), (4, 1), (6, 2)]),
    after=st.sampled_from([(1, 6), (2, 6), (3, 4), (4, 3), (12, 1)]),
    workers=st.integers(0, 3),
    position=st.integers(0, 80),
    steps=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_global_batches_are_those_of_one_rank_whatever_reads_them_and_wherever_it_was_stopped(
    samples, kind, before, after, workers, position, steps, seed
):
    expected = order_of(kind, seed, samples).sample_indices(position, 12 * (steps + 2)).tolist()
    seen: list[int] = []
    positions: list[int] = []
    for (world, micro), count in ((before, steps), (after, 2)):
        loaders = [
            StreamLoader(samples, order_of(kind, seed, samples), 12, micro, rank, world, position, workers)
            for rank in range(world)
        ]
        for _ in range(count):
            for batch in (batch for one in loaders for batch in next(one)):
                seen += [int(key) for key in batch.keys]
                positions += batch.positions.tolist()
                assert batch.tokens[:, 0].tolist() == seen[-len(batch.keys) :]
        position = loaders[-1].state()["position"]  # the other world goes on from what this one saved
        for one in loaders:
            one.close()
    assert positions == list(range(positions[0], positions[0] + len(seen)))
    assert [key if key < 100 else key - 100 + SIZES[0] for key in seen] == expected


@settings(max_examples=60)
@given(st.sampled_from(["global", "grouped"]), st.integers(0, 5), st.integers(0, 2**62))
def test_every_sample_stands_once_in_every_epoch(samples, kind, epoch, seed):
    order = order_of(kind, seed, samples)
    assert sorted(order.sample_indices(epoch * 33, 33).tolist()) == list(range(33))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(5, 30), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 500),
    st.integers(1, 4),
)
def test_a_mixture_has_exact_shares_in_every_window_and_each_set_in_whole_epochs(sets, start, periods):
    weights = np.array([weight for _, weight in sets])
    shares = weights // np.gcd.reduce(weights)
    mixture = MixedOrder([SampleOrder(size, number) for number, (size, _) in enumerate(sets)], weights.tolist())
    edges = np.cumsum([0, *(size for size, _ in sets)])
    window = mixture.sample_indices(start, periods * int(shares.sum()))
    assert np.histogram(window, bins=edges)[0].tolist() == (periods * shares).tolist()
    stream = mixture.sample_indices(0, 300)
    for number, (size, _) in enumerate(sets):
        own = stream[(stream >= edges[number]) & (stream < edges[number + 1])] - edges[number]
        assert own.tolist() == SampleOrder(size, number).sample_indices(0, len(own)).tolist()
    assert mixture.sample_indices(start, 7).tolist() == mixture.sample_indices(0, start + 7)[start:].tolist()


def test_a_short_window_of_a_mixture_is_off_by_at_most_one_sample_of_two_sets():
    mixture = MixedOrder([SampleOrder(50, 0), SampleOrder(50, 1)], [7, 3])
    for start in range(10):
        for length in range(1, 10):
            of_second = (mixture.sample_indices(start, length) >= 50).sum()
            assert abs(of_second - 0.3 * length) < 1


def test_a_batch_ramp_resumes_inside_the_ramp(samples):
    plan = BatchPlan(12, 4, 4, 40)
    whole = StreamLoader(samples, SampleOrder(33, 0), plan, 2, 0, 1, workers=0)
    keys = [batch.keys for _ in range(8) for batch in next(whole)]
    stopped = StreamLoader(samples, SampleOrder(33, 0), plan, 2, 0, 1, workers=0)
    first = [batch.keys for _ in range(3) for batch in next(stopped)]
    again = StreamLoader(samples, SampleOrder(33, 0), plan, 2, 0, 1, stopped.state()["position"], workers=2)
    assert first + [batch.keys for _ in range(5) for batch in next(again)] == keys
    again.close()


# Groups of shards


def test_a_group_is_finished_before_the_next_one_begins_and_groups_change_with_the_epoch():
    order = GroupedOrder([5] * 8, seed=1, group_shards=2)
    epochs = [(order.sample_indices(epoch * 40, 40) // 5).reshape(4, 10) for epoch in range(3)]
    for epoch in epochs:
        assert [len(set(group.tolist())) for group in epoch] == [2, 2, 2, 2]
        assert any(group.tolist() != sorted(group.tolist()) for group in epoch)
    assert len({str([sorted(set(g.tolist())) for g in epoch]) for epoch in epochs}) == 3


def test_golden_grouped_order():
    """A change here changes the data every resumed run sees."""
    assert GroupedOrder([3, 3, 3, 2], 0, 2).sample_indices(0, 11).tolist() == [9, 6, 8, 7, 10, 1, 3, 2, 4, 0, 5]


# Processes


def test_processes_give_what_threads_give_and_one_that_dies_is_an_error(samples):
    order = SampleOrder(len(samples), 0)
    threads = StreamLoader(samples, order, 12, 3, 1, 2, workers=0)
    processes = StreamLoader(samples, order, 12, 3, 1, 2, workers=1, worker_kind="processes")
    for _ in range(3):
        for ours, theirs in zip(next(threads), next(processes), strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            assert (ours.keys, ours.positions.tolist()) == (theirs.keys, theirs.positions.tolist())
    process = processes._processes._processes[0]
    process.kill()
    with pytest.raises(UserError, match=r"reader process \d+ died \(exit status -9\)"):
        drain(processes)
    processes.close()


def drain(stream: StreamLoader) -> None:
    """Go on until an error: what was read ahead comes first."""
    while True:
        next(stream)


# Copies on a local disk


def read_all(reader: ShardReader) -> list[int]:
    return [int(reader.read(number).tokens[0]) for number in range(len(reader))]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it is so; fail after 10 seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def copies(cache: ShardCache, count: int) -> list[Path]:
    """Wait for `count` finished copies."""
    wait_for(lambda: len(list(cache.folder.glob("*.tar"))) >= count)
    return sorted(cache.folder.glob("*.tar"))


def test_copies_are_read_once_they_are_there_even_when_the_original_is_gone(folders, tmp_path):
    folder = Path(shutil.copytree(folders[1], tmp_path / "original"))
    cache = ShardCache(tmp_path / "cache", 10**9)
    reader = ShardReader(folder, "tokens", cache=cache)
    wanted = list(range(100, 110))
    assert read_all(reader) == wanted
    assert {path.stem for path in copies(cache, 3)} == {shard.sha256 for shard in read_index(folder).shards}
    assert read_all(reader) == wanted  # switches over
    for tar in folder.glob("*.tar"):
        os.truncate(tar, 0)
    assert read_all(reader) == wanted
    assert cache.copied == 3


def test_a_cache_stays_within_its_limit_and_drops_what_was_used_longest_ago(folders, tmp_path):
    sizes = [shard.bytes for shard in read_index(folders[0]).shards]
    limit = 2 * max(sizes)
    cache = ShardCache(tmp_path / "cache", limit, keep_seconds=0.0)
    reader = ShardReader(folders[0], "tokens", cache=cache)
    for shard in range(len(sizes)):
        reader.read(4 * shard)
        name = f"{reader.index.shards[shard].sha256}.tar"
        wait_for(lambda name=name: (cache.folder / name).exists())
        found = {path.name for path in cache.folder.glob("*.tar")}
        assert name in found
        assert sum((cache.folder / path).stat().st_size for path in found) <= limit
    assert read_all(reader) == list(range(SIZES[0]))


def test_shards_in_use_are_not_dropped_and_the_rest_is_read_where_it_is(folders, tmp_path, caplog):
    sizes = [shard.bytes for shard in read_index(folders[0]).shards]
    cache = ShardCache(tmp_path / "cache", 2 * max(sizes))
    reader = ShardReader(folders[0], "tokens", cache=cache)
    for _ in range(3):
        assert read_all(reader) == list(range(SIZES[0]))
        assert len(copies(cache, 2)) == 2
    wait_for(lambda: "full of shards in use" in caplog.text)
    assert cache.copied == 2


def test_a_changed_original_is_not_copied_and_leftovers_of_the_dead_are_removed(folders, tmp_path, caplog):
    folder = Path(shutil.copytree(folders[1], tmp_path / "original"))
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".0123.abc.partial").write_bytes(b"left by a killed process")
    reader = ShardReader(folder, "tokens", DamagePolicy("skip", 1.0, retries=0), cache=ShardCache(cache, 10**9))
    assert not list(cache.glob(".*.partial"))
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"root", b"toor"))
    with pytest.raises(UserError, match="shard-000000"):
        reader.read(0)
    wait_for(lambda: "is not the shard of its index" in caplog.text)
    assert not list(cache.glob("*.tar"))


def test_a_full_disk_leaves_the_original_to_be_read(folders, tmp_path, monkeypatch, caplog):
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hmar_mega.data.cache.os.posix_fallocate", full)
    cache = ShardCache(tmp_path / "cache", 10**9)
    reader = ShardReader(folders[1], "tokens", cache=cache)
    assert read_all(reader) == list(range(100, 110))
    wait_for(lambda: "the disk is full" in caplog.text)
    assert not list(cache.folder.glob("*.tar"))
    assert not list(cache.folder.glob(".*.partial"))


def test_sets_of_a_mixture_choose_their_stored_crops_by_their_own_epochs(tmp_path):
    """k = 3 crops: in three epochs of its own set every sample shows each of them once."""
    tokens, sizes = TOKENS.model_copy(update={"crops": 3}), (4, 6)
    for name, size in zip("ab", sizes, strict=True):
        with open_shards(tmp_path / name, "tokens", ("a",), 4, tokens) as writer:
            for number in range(size):
                rows = np.arange(3, dtype=np.uint16)[:, None] + np.zeros(5, np.uint16)
                writer.write(f"{name}{number}", 0, {"npy": npy_bytes(rows)})
    samples = SampleSet([ShardReader(tmp_path / name, "tokens") for name in "ab"])
    order = MixedOrder([SampleOrder(size, 0) for size in sizes], [2, 1])
    stream = StreamLoader(samples, order, 9, 9, 0, 1, workers=0)
    shown: dict[str, list[int]] = {}
    for _ in range(6):  # 54 positions: 36 of the first set, 18 of the second, 9 and 3 epochs
        (batch,) = next(stream)
        for key, crop in zip(batch.keys, batch.tokens[:, 0].tolist(), strict=True):
            shown.setdefault(key, []).append(crop)
    assert {len(crops) for crops in shown.values()} == {9, 3}
    for crops in shown.values():
        assert all(sorted(crops[at : at + 3]) == [0, 1, 2] for at in range(0, len(crops), 3))


def test_processes_that_share_a_cache_copy_each_shard_once(folders, tmp_path):
    """Two caches on one folder stand for two processes: their locks are of different open files."""
    caches = [ShardCache(tmp_path / "cache", 10**9) for _ in range(2)]
    readers = [ShardReader(folders[0], "tokens", cache=cache) for cache in caches]
    for reader in readers:
        assert read_all(reader) == list(range(SIZES[0]))
    copies(caches[0], 6)
    for reader in readers:
        assert read_all(reader) == list(range(SIZES[0]))
    assert sum(cache.copied for cache in caches) == 6
    assert not list((tmp_path / "cache").glob(".*.partial"))
