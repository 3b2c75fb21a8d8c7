"""A checkpoint written anew into evenly sized files, or its weights alone: piece by piece, whatever its size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hmar_mega.checkpoint.checksums import sha256_of, write_sums
from hmar_mega.checkpoint.layout import whole
from hmar_mega.checkpoint.shards import write_shard
from hmar_mega.checkpoint.sources import CHECKPOINT_FORMAT, JSON_FILES, CheckpointReader
from hmar_mega.errors import UserError
from hmar_mega.files import new_folder
from hmar_mega.progress import Tally

#: Elements read and written at a time.
STEP = 4 << 20


@dataclass(frozen=True)
class _Piece:
    """Elements `start` … `stop` − 1 of one flattened tensor."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def key(self) -> str:
        """Its name in a shard file."""
        return f"{self.kind}/{self.name}/{self.start}"


def rewrite_checkpoint(
    reader: CheckpointReader, out: Path, files: int, weights_only: bool = False, kind: str = "weight",
    tally: Tally | None = None,
) -> list[str]:  # fmt: skip
    """Write a checkpoint's tensors into `files` files that differ by one element at most.

    Args:
        out: new folder; it appears when it is complete, and is a checkpoint that any layout reads.
        weights_only: leave out what only training needs; a run can start from the result, but not go on from it.
        kind: with `weights_only`, which values become the weights: `weight`, or `ema` where it was kept.
        tally: is told the elements written.

    Returns:
        Names of the shard files.

    Raises:
        UserError: when the checkpoint has no such values or is damaged, or `out` cannot be written.
    """
    wanted = _wanted(reader, weights_only, kind)
    total = sum(math.prod(shape) for _, _, shape in wanted)
    if not 1 <= files <= total:
        raise UserError(f"--files {files}: the checkpoint has {total:,} values; choose 1 to {total:,} files")
    sums: dict[str, str] = {}
    entries: list[dict[str, Any]] = []
    with new_folder(out) as temporary:
        for number, pieces in enumerate(_cut(wanted, files, total)):
            name = f"shard-{number:05d}.safetensors"
            keys = [(piece.key, piece.stop - piece.start) for piece in pieces]
            sums[name] = write_shard(temporary / name, keys, _values(reader, pieces, tally))
            entries += [
                {"name": p.name, "kind": "weight" if weights_only else p.kind, "file": name, "key": p.key,
                 "global_shape": p.shape, "offset": (0,) * len(p.shape), "shape": p.shape,
                 "start": p.start, "stop": p.stop}
                for p in pieces
            ]  # fmt: skip
        state = {**reader.state, **({"weights_only": True, "weights_kind": kind} if weights_only else {})}
        index = {"format": CHECKPOINT_FORMAT, "entries": entries}
        for json_name, tree in zip(JSON_FILES, (index, state), strict=True):
            (temporary / json_name).write_text(json.dumps(tree))
            sums[json_name] = sha256_of(temporary / json_name)
        write_sums(temporary, sums)
    return sorted(set(sums) - set(JSON_FILES))


def _wanted(reader: CheckpointReader, weights_only: bool, kind: str) -> list[tuple[str, str, tuple[int, ...]]]:
    stored = reader.tensors()
    if not weights_only:
        return stored
    kinds = {name: {k for n, k, _ in stored if n == name} for name in reader.shapes}
    if kind != "weight" and not any(kind in have for have in kinds.values()):
        raise UserError(
            f"checkpoint {reader.folder} holds no {kind} values, only "
            f"{', '.join(sorted(set().union(*kinds.values())))}; leave --kind out to take the weights"
        )
    # what was not trained has no average: its weight stands for it
    return [(name, kind if kind in kinds[name] else "weight", shape) for name, shape in reader.shapes.items()]


def _cut(wanted: list[tuple[str, str, tuple[int, ...]]], files: int, total: int) -> Iterator[list[_Piece]]:
    """The pieces of each file, of the elements of all tensors one after the other."""
    ends = iter([total * (number + 1) // files for number in range(files)])
    end, position = next(ends), 0
    pieces: list[_Piece] = []
    for name, kind, shape in wanted:
        start, count = 0, math.prod(shape)
        while start < count:
            stop = min(count, start + end - position)
            pieces.append(_Piece(name, kind, shape, start, stop))
            position, start = position + stop - start, stop
            if position == end:
                yield pieces
                pieces, end = [], next(ends, total)


def _values(reader: CheckpointReader, pieces: list[_Piece], tally: Tally | None) -> Iterator[Tensor]:
    for piece in pieces:
        for start in range(piece.start, piece.stop, STEP):
            stop = min(piece.stop, start + STEP)
            yield reader.read_range(piece.name, whole(piece.shape), start, stop, piece.kind)
            if tally is not None:
                tally.advance(stop - start)
