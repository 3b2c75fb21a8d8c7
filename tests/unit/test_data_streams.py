"""Streams without positions: what they give, and that damage in them is counted or ends the run, never silent."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from hmar_mega.batches import BatchPlan
from hmar_mega.data.damage import Damage, DamagePolicy
from hmar_mega.data.index import TokenFormat
from hmar_mega.data.reader import ShardReader, npy_bytes
from hmar_mega.data.streams import TokenStreamLoader, open_stream
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError

TOKENS = TokenFormat(patch_nums=(1, 2), codebook_size=256, fingerprint="f00d", resolution=16)
COUNT, SHARD = 40, 10
SKIP = DamagePolicy("skip", max_damaged=1.0, timeout=0.2, retries=1)


@pytest.fixture
def folder(tmp_path) -> Path:
    with open_shards(tmp_path / "out", "tokens", ("a", "b"), SHARD, TOKENS) as writer:
        for number in range(COUNT):
            row = np.arange(5, dtype=np.uint16) + number
            writer.write(f"{number:04d}", number % 2, {"npy": npy_bytes(row)})
    return tmp_path / "out"


def loader(source: str, policy: DamagePolicy = SKIP, reader="webdataset", rank=0, world=1, at=0) -> TokenStreamLoader:
    stream = open_stream(reader, source, COUNT, TOKENS, 2, policy)
    return TokenStreamLoader(stream, BatchPlan.constant(20), 5, rank, world, at, seed=0)


def take(stream: TokenStreamLoader, steps: int) -> list[int]:
    """Sample numbers of so many steps; every batch is what its keys say."""
    seen = []
    for step in range(steps):
        for batch in next(stream):
            numbers = [int(key) for key in batch.keys]
            assert batch.tokens[:, 0].tolist() == numbers
            assert batch.labels.tolist() == [number % 2 for number in numbers]
            seen += numbers
        assert batch.positions[-1] + 1 == stream.state()["position"] == 20 * (step + 1)
    stream.close()
    return seen


@pytest.mark.parametrize("source", ["{0}", "{0}/shard-{{000000..000003}}.tar", "pipe:cat {0}/shard-00000{{0..3}}.tar"])
def test_every_source_gives_its_samples(folder, source, caplog):
    stream = loader(source.format(folder))
    assert set(take(stream, 30)) == set(range(COUNT))
    assert stream.account.substituted == 0
    assert ("has no index.json" in caplog.text) == (source != "{0}")


def test_ranks_and_restarts_draw_for_themselves(folder):
    drawn = []
    for rank, world, at in ((0, 2, 0), (1, 2, 0), (0, 2, 400)):
        stream = loader(str(folder), rank=rank, world=world, at=at)
        drawn.append([int(key) // SHARD for _ in range(6) for batch in next(stream) for key in batch.keys])
        stream.close()
    assert len({str(shards) for shards in drawn}) == 3
    assert {len(shards) for shards in drawn} == {60}


def damaged_header(folder: Path) -> int:
    """Garbage over the header of the fifth sample of shard 1; the samples behind it."""
    offsets = ShardReader(folder, "tokens")._shards[1]
    first = int(min(offsets.starts[4])) - 512
    with open(folder / "shard-000001.tar", "r+b") as file:
        file.seek(first)
        file.write(b"\xff" * 512)
    return SHARD - 4


def cut_off(folder: Path) -> int:
    offsets = ShardReader(folder, "tokens")._shards[1]
    os.truncate(folder / "shard-000001.tar", int(offsets.starts[7].max()))
    return SHARD - 7


def missing(folder: Path) -> int:
    (folder / "shard-000001.tar").unlink()
    return SHARD


@pytest.mark.parametrize("damage", [damaged_header, cut_off, missing])
def test_the_lost_end_of_a_tar_is_counted_once_and_by_policy_ends_the_run(folder, damage):
    lost = damage(folder)
    stream = loader(str(folder))
    seen = set(take(stream, 30))
    assert set(range(COUNT)) - seen == set(range(2 * SHARD - lost, 2 * SHARD))
    assert stream.account.damaged == lost
    assert stream.account.substituted > lost  # read again and again
    with pytest.raises(Damage, match=r"shard-000001\.tar"):
        take(loader(str(folder), DamagePolicy("stop")), 30)


def test_a_stream_that_hangs_ends_the_run(tmp_path, folder):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(Damage, match=r"gives no sample within 0\.4 s"):
        take(loader(str(tmp_path / "pipe.tar")), 1)


def test_closing_does_not_wait_for_a_stream_that_hangs(folder):
    stream = loader(str(folder), DamagePolicy("skip", max_damaged=1.0, timeout=20.0, retries=0))
    samples, hanging = stream._samples, threading.Event()

    def one_step() -> Iterator[object]:
        yield from islice(samples, 20)
        hanging.set()
        threading.Event().wait(60)

    stream._samples = one_step()
    next(stream)
    assert hanging.wait(20)  # in the step ahead
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 10


def test_nothing_readable_ends_the_run_instead_of_looking_for_ever(tmp_path):
    with pytest.raises(Damage, match="nothing can be read"):
        take(loader(str(tmp_path / "none.tar")), 1)


def test_what_a_stream_needs_is_said(folder, monkeypatch):
    with pytest.raises(UserError, match=r"data\.stream_samples"):
        open_stream("webdataset", str(folder / "shard-000000.tar"), None, TOKENS, 2, SKIP)
    monkeypatch.setitem(sys.modules, "megatron.energon", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'hmar-mega\[energon\]'"):
        open_stream("energon", str(folder), None, TOKENS, 2, SKIP)


def test_energon_gives_its_samples(folder):
    """Runs where megatron-energon is installed."""
    pytest.importorskip("megatron.energon")
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    with pytest.raises(UserError, match="energon prepare"):
        loader(str(folder), reader="energon")
    BaseWebdatasetFactory.prepare_dataset(
        folder, [tar.name for tar in sorted(folder.glob("*.tar"))], split_parts_ratio=[("train", 1.0)], workers=1
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    stream = loader(str(folder), reader="energon")
    assert set(take(stream, 10)) == set(range(COUNT))
    assert stream.account.substituted == 0
