"""Reading token shards: any sample at any time, and global batches that do not depend on who reads them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmar_mega.data.index import TokenFormat, offsets_path, read_index
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader, check_fingerprint, npy_bytes
from hmar_mega.data.stream import Batch, StreamLoader, eval_batches
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.micro_batches import check_batch_sizes

TOKENS = TokenFormat(patch_nums=(1, 2), codebook_size=256, fingerprint="f00d", resolution=16)
COUNT = 26  # in shards of 7: no batch size below fits the edges of shards or epochs


def tokens_of(number: int) -> np.ndarray:
    return np.arange(5, dtype=np.uint16) + number


def write_tokens(out: Path, count: int = COUNT, rows=tokens_of) -> Path:
    with open_shards(out, "tokens", ("a", "b", "c"), 7, TOKENS) as writer:
        for number in range(count):
            writer.write(f"{number:08d}", number % 3, {"npy": npy_bytes(rows(number))})
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "out")


@pytest.fixture
def reader(folder) -> ShardReader:
    return ShardReader(folder, "tokens")


# Single samples


def test_every_sample_in_any_order(reader):
    assert len(reader) == COUNT
    for number in reversed(range(COUNT)):
        sample = reader.read(number)
        assert sample.tokens.dtype == np.int64
        assert sample.tokens.tolist() == tokens_of(number).tolist()
        assert (sample.key, sample.label) == (f"{number:08d}", number % 3)


@pytest.mark.parametrize("number", [-1, COUNT])
def test_sample_beyond_the_end(reader, number):
    with pytest.raises(IndexError):
        reader.read(number)


def test_many_threads_read_at_once(reader):
    numbers = [(7 * n) % COUNT for n in range(400)]
    with ThreadPoolExecutor(8) as pool:
        firsts = list(pool.map(lambda number: int(reader.read(number).tokens[0]), numbers))
    assert firsts == numbers


def test_a_forked_process_reads_without_disturbing_its_parent(reader):
    assert reader.read(3).tokens[0] == 3
    child = os.fork()
    if child == 0:
        right = all(reader.read(number).tokens[0] == number for number in range(COUNT))
        os._exit(0 if right else 1)
    assert all(reader.read(number).tokens[0] == number for number in range(COUNT))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_files_are_closed_with_the_reader(folder):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    reader = ShardReader(folder, "tokens")
    for number in range(COUNT):
        reader.read(number)
    assert descriptors() == before + 4
    reader.close()
    assert descriptors() == before
    reader.read(0)
    del reader
    assert descriptors() == before


def test_reading_needs_no_offsets_file(folder, tmp_path):
    copy = write_tokens(tmp_path / "copy")
    for tar in copy.glob("*.tar"):
        offsets_path(tar).unlink()
    assert ShardReader(copy, "tokens").read(COUNT - 1).tokens[0] == COUNT - 1


def test_the_wrong_kind_says_what_to_do(folder):
    with pytest.raises(UserError, match=r"holds tokens, but images are needed here; .*data shard"):
        ShardReader(folder, "images")


def test_tar_truncated_under_an_open_reader_names_shard_and_sample(tmp_path):
    reader = ShardReader(write_tokens(tmp_path / "out"), "tokens")
    os.truncate(tmp_path / "out" / "shard-000001.tar", 2000)
    with pytest.raises(UserError, match=r"shard-000001\.tar: sample 00000013 is cut off"):
        reader.read(13)


def test_bytes_that_are_no_tokens_name_shard_and_sample(tmp_path):
    folder = write_tokens(tmp_path / "out")
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"\x00NUMPY", 1))
    with pytest.raises(UserError, match=r"shard-000000\.tar: sample 00000000 does not hold 5 tokens"):
        ShardReader(folder, "tokens").read(0)


def test_token_beyond_the_codebook(tmp_path):
    folder = write_tokens(tmp_path / "out", rows=lambda n: np.full(5, 250 + n, np.uint16))
    reader = ShardReader(folder, "tokens")
    assert reader.read(5).tokens[0] == 255
    with pytest.raises(UserError, match="has token 256, its codebook only 256"):
        reader.read(6)


def test_sample_without_tokens(tmp_path):
    with open_shards(tmp_path / "out", "tokens", ("a",), 7, TOKENS) as writer:
        writer.write("0", 0, {"txt": b""})
    with pytest.raises(UserError, match="sample 0 must have exactly one field of npy"):
        ShardReader(tmp_path / "out", "tokens")


# Fingerprints


def test_matching_tokenizer_and_scales_pass(folder):
    check_fingerprint(read_index(folder), "f00d")
    check_fingerprint(read_index(folder), "f00d", patch_nums=[1, 2])


def test_another_tokenizer_is_named_beside_the_right_one(folder):
    with pytest.raises(UserError, match=r"f00d.*beef"):
        check_fingerprint(read_index(folder), "beef")


def test_other_scales(folder):
    with pytest.raises(UserError, match=r"\[1, 2\].*\[1, 2, 4\]"):
        check_fingerprint(read_index(folder), "f00d", patch_nums=(1, 2, 4))


# Global batches


def loader(
    reader: ShardReader, world: int, rank: int, position: int = 0, micro: int = 1, workers: int = 0, seed: int = 3
) -> StreamLoader:
    return StreamLoader(reader, SampleOrder(len(reader), seed), 12, micro, rank, world, position, workers)


def global_batches(
    reader: ShardReader, world: int, steps: int, position: int = 0, micro: int = 1, workers: int = 0
) -> list[list[tuple[int, str, int]]]:
    """What all ranks together see in each step: (position, key, first token) in the order of the ranks."""
    loaders = [loader(reader, world, rank, position, micro, workers) for rank in range(world)]
    seen = []
    for _ in range(steps):
        batches = [batch for one in loaders for batch in next(one)]
        seen.append(
            [
                (position, key, first)
                for batch in batches
                for position, key, first in zip(
                    batch.positions.tolist(), batch.keys, batch.tokens[:, 0].tolist(), strict=True
                )
            ]
        )
    for one in loaders:
        one.close()
    return seen


def test_a_micro_batch_has_tokens_labels_positions_and_keys(reader):
    batches = next(loader(reader, world=2, rank=1, micro=3))
    assert [tuple(batch.tokens.shape) for batch in batches] == [(3, 5), (3, 5)]
    assert torch.cat([batch.positions for batch in batches]).tolist() == [6, 7, 8, 9, 10, 11]
    for batch in batches:
        assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
        numbers = [int(key) for key in batch.keys]
        assert batch.labels.tolist() == [number % 3 for number in numbers]
        assert batch.tokens.tolist() == [tokens_of(number).tolist() for number in numbers]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("world", "micro"), [(1, 12), (2, 3), (3, 2), (4, 1), (4, 3)])
def test_global_batches_do_not_depend_on_ranks_micro_batches_or_threads(reader, world, micro, workers):
    assert global_batches(reader, world, 7, micro=micro, workers=workers) == global_batches(reader, 1, 7)


def test_each_sample_comes_once_an_epoch(reader):
    stream = [entry for batch in global_batches(reader, 3, 13) for entry in batch]
    assert [position for position, _, _ in stream] == list(range(13 * 12))
    for epoch in range(13 * 12 // COUNT):
        keys = [key for _, key, _ in stream[epoch * COUNT : (epoch + 1) * COUNT]]
        assert sorted(keys) == [f"{number:08d}" for number in range(COUNT)]


@pytest.mark.parametrize("worlds", [(2, 2), (2, 4), (4, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("steps_before", [1, 2, 3])  # the epoch's edge at 26 lies in the third step
def test_resuming_with_another_number_of_ranks_continues_the_stream(reader, worlds, steps_before):
    unbroken = global_batches(reader, 1, 6)
    before = global_batches(reader, worlds[0], steps_before, workers=2)
    after = global_batches(reader, worlds[1], 6 - steps_before, position=12 * steps_before, workers=2)
    assert before + after == unbroken


def test_state_counts_what_was_given_out_not_what_was_read_ahead(reader):
    stream = loader(reader, world=2, rank=1, workers=3)
    assert stream.state() == {"epoch": 0, "position": 0}
    for _ in range(3):
        next(stream)
    assert stream.state() == {"epoch": 1, "position": 36}
    resumed = loader(reader, world=2, rank=1, position=stream.state()["position"])
    assert next(resumed)[0].keys == next(stream)[0].keys


def test_a_resumed_position_need_not_be_a_multiple_of_the_batch(reader):
    whole = [entry for batch in global_batches(reader, 1, 4) for entry in batch]
    resumed = global_batches(reader, 2, 2, position=17)
    assert [entry for batch in resumed for entry in batch] == whole[17:41]


def test_seeds_give_different_streams(reader):
    assert next(loader(reader, 1, 0, seed=3))[0].keys != next(loader(reader, 1, 0, seed=4))[0].keys


def test_wait_is_the_time_of_the_last_step(reader, monkeypatch):
    stream = loader(reader, world=1, rank=0)
    clock = iter([10.0, 10.5])
    monkeypatch.setattr("hmar_mega.data.stream.time.perf_counter", lambda: next(clock))
    next(stream)
    assert stream.wait_seconds == 0.5


def test_an_error_in_a_thread_reaches_the_caller_and_is_not_the_end_of_the_stream(tmp_path):
    reader = ShardReader(write_tokens(tmp_path / "out"), "tokens")
    stream = loader(reader, world=1, rank=0, workers=2)
    for shard in range(4):
        os.truncate(tmp_path / "out" / f"shard-{shard:06d}.tar", 0)
    with pytest.raises(UserError, match="cut off"):
        next(stream)
    with pytest.raises(RuntimeError, match="stopped at an error"):
        next(stream)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 2, 4), "global_batch_size=8 or 16$"),
        ((5, 4, 2), "global_batch_size=8$"),
        ((12, 4, 2), "global_batch_size=8 or 16, or micro_batch_size=1, 2, 3, 6$"),
        ((0, 1, 1), "at least 1"),
        ((4, 0, 1), "at least 1"),
    ],
)
def test_batch_sizes_that_do_not_fit_name_those_that_do(sizes, message):
    with pytest.raises(UserError, match=message):
        check_batch_sizes(*sizes)


def test_loader_refuses_batch_sizes_that_do_not_fit(reader):
    with pytest.raises(UserError, match="global_batch_size=12"):
        loader(reader, world=5, rank=0)


def test_loader_refuses_an_order_of_another_size(reader):
    with pytest.raises(ValueError, match="27 samples"):
        StreamLoader(reader, SampleOrder(27, 0), 12, 1, 0, 1)


# Evaluation


def numbers_of(batches: list[Batch]) -> list[int]:
    return [int(key) for batch in batches for key in batch.keys]


@given(st.integers(1, 9), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 40)))
def test_evaluation_sees_every_sample_once_over_all_ranks(folder, world, batch_size, limit):
    reader = ShardReader(folder, "tokens")
    ranks = [list(eval_batches(reader, batch_size, rank, world, limit)) for rank in range(world)]
    expected = min(COUNT, limit or COUNT)
    assert [number for rank in ranks for number in numbers_of(rank)] == list(range(expected))
    parts = [len(numbers_of(rank)) for rank in ranks]
    assert max(parts) - min(parts) <= 1
    assert all(len(batch.keys) == batch_size for rank in ranks for batch in rank[:-1])
    assert all(batch.positions.tolist() == numbers_of([batch]) for rank in ranks for batch in rank)
