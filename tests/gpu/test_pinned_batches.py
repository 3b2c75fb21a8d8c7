"""Batches in page-locked memory, from which a GPU copies while it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hmar_mega.data.index import TokenFormat
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader, npy_bytes
from hmar_mega.data.stream import StreamLoader
from hmar_mega.data.writer import open_shards

pytestmark = pytest.mark.gpu


def test_pinned_batches_are_the_same_batches(tmp_path: Path) -> None:
    tokens = TokenFormat(patch_nums=(1, 2), codebook_size=256, fingerprint="f00d", resolution=16)
    with open_shards(tmp_path / "out", "tokens", ("a",), 8, tokens) as writer:
        for number in range(16):
            writer.write(str(number), 0, {"npy": npy_bytes(np.full(5, number, np.uint16))})
    reader = ShardReader(tmp_path / "out", "tokens")
    plain, pinned = (StreamLoader(reader, SampleOrder(16, 0), 8, 4, 0, 1, workers=1, pin=pin) for pin in (False, True))
    for ours, theirs in zip(next(plain), next(pinned), strict=True):
        assert theirs.tokens.is_pinned()
        assert theirs.labels.is_pinned()
        assert torch.equal(ours.tokens, theirs.tokens.cuda(non_blocking=True).cpu())
    plain.close()
    pinned.close()
