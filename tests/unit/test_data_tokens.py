"""Token samples as bytes: exact bits, every codebook size, and the crops that epochs read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmar_mega.data.index import TokenFormat
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader, npy_bytes
from hmar_mega.data.stream import StreamLoader
from hmar_mega.data.tars import read_comment
from hmar_mega.data.tokens import TokenCodec, bits_for, choose_crops
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError


def token_format(
    codes: int, patch_nums: tuple[int, ...] = (1, 2), crops: int = 1, storage: str = "packed"
) -> TokenFormat:
    bits = bits_for(codes) if storage == "packed" else 16
    return TokenFormat(
        patch_nums=patch_nums,
        codebook_size=codes,
        fingerprint="f",
        resolution=8,
        crops=crops,
        storage=storage,
        bits=bits,
    )


def test_680_tokens_of_a_codebook_of_4096_are_1020_bytes():
    codec = TokenCodec(token_format(4096, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)))
    assert (codec.field, codec.sample_bytes) == ("tok", 1020)


def test_bits_stand_where_the_format_says():
    """12 bits: ids 0xABC, 0x123, … little-endian give BC 3A 12 ….  Five ids are 60 bits, so 8 bytes a crop."""
    codec = TokenCodec(token_format(4096))
    assert codec.encode(np.array([[0xABC, 0x123, 0, 0, 0xFFF]])) == bytes.fromhex("bc3a12000000ff0f")


@given(st.integers(1, 65536), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from(["packed", "npy"]))
def test_every_codebook_survives(codes, crops, seed, storage):
    codec = TokenCodec(token_format(codes, (1, 2, 3, 5), crops, storage))
    ids = np.random.RandomState(seed).randint(0, codes, (crops, 39))
    data = codec.encode(ids)
    assert len(data) == codec.sample_bytes
    for crop in range(crops):
        decoded = codec.decode(data, "x", crop)
        assert decoded.dtype == np.int64
        assert decoded.tolist() == ids[crop].tolist()


def test_one_crop_of_npy_is_the_array_that_earlier_versions_wrote():
    assert TokenCodec(token_format(300, storage="npy")).encode(np.arange(5)[None]) == npy_bytes(
        np.arange(5, dtype="<u2")
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"1234567", "does not hold 5 tokens"), (b"\xff" * 6, "has token 511, its codebook only 300")],
)
def test_bytes_that_are_no_tokens_name_the_sample(data, message):
    with pytest.raises(UserError, match=f"s.tar: sample 7 {message}"):
        TokenCodec(token_format(300)).decode(data, "s.tar: sample 7")


def test_too_few_bits_for_the_codebook_are_refused():
    with pytest.raises(UserError, match="8 bits an id cannot hold a codebook of 300"):
        TokenCodec(token_format(300).model_copy(update={"bits": 8}))


@given(st.integers(2, 6), st.integers(0, 2**40), st.integers(1, 9))
def test_every_crop_is_shown_once_in_as_many_epochs_as_there_are_crops(crops, seed, samples):
    numbers = np.arange(samples)
    epochs = [choose_crops(crops, seed, samples, epoch * samples, numbers) for epoch in range(2 * crops)]
    for half in (epochs[:crops], epochs[crops:]):
        assert np.array_equal(np.sort(np.stack(half), axis=0), np.tile(np.arange(crops)[:, None], samples))


def test_choice_of_crops_does_not_depend_on_how_positions_are_cut():
    numbers = np.array([3, 1, 4, 1, 5, 2, 0])
    whole = choose_crops(4, 9, 7, 100, numbers)
    parts = [choose_crops(4, 9, 7, 100, numbers[:2]), choose_crops(4, 9, 7, 102, numbers[2:])]
    assert whole.tolist() == np.concatenate(parts).tolist()
    assert choose_crops(1, 9, 7, 100, numbers).tolist() == [0] * 7


def test_stream_reads_the_chosen_crops(tmp_path):
    """Token 0 of every crop tells sample and crop."""
    form = token_format(64, crops=3)
    with open_shards(tmp_path / "out", "tokens", ("a",), 4, form) as writer:
        for number in range(6):
            ids = np.zeros((3, 5), int)
            ids[:, 0] = 10 * number + np.arange(3)
            writer.write(str(number), 0, {"tok": TokenCodec(form).encode(ids)})
    reader, order = ShardReader(tmp_path / "out", "tokens"), SampleOrder(6, seed=2)
    loader = StreamLoader(reader, order, 6, 3, dp_rank=0, dp_size=1, workers=0)
    seen: Counter[int] = Counter()
    for epoch in range(3):
        firsts = [int(token) for batch in next(loader) for token in batch.tokens[:, 0]]
        indices = order.sample_indices(6 * epoch, 6)
        crops = choose_crops(3, 2, 6, 6 * epoch, indices)
        assert firsts == (10 * indices + crops).tolist()
        seen.update(firsts)
    assert sorted(seen) == [10 * number + crop for number in range(6) for crop in range(3)]


def test_plain_tars_have_no_comment(tmp_path):
    with open_shards(tmp_path / "out", "images", ("a",), 4) as writer:
        writer.write("0", 0, {"png": b"x"})
    assert read_comment(tmp_path / "out" / "shard-000000.tar") is None
