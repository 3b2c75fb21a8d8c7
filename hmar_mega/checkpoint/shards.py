"""Shard files: safetensors of float32 pieces, written and read a few megabytes at a time.

The safetensors library builds a second copy of everything it writes, and maps whole files to read a few rows. Here a
file is written from wherever the values lie, hashed on the way, and read back piece by piece into a given tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

#: Bytes written or hashed at a time.
CHUNK = 8 << 20

_FLOAT_BYTES = 4


def write_shard(path: Path, pieces: Sequence[tuple[str, int | Sequence[int]]], values: Iterable[Tensor]) -> str:
    """Write and fsync one safetensors file of float32 tensors.

    Args:
        pieces: (key, elements or shape) of each tensor, in the order of the file.
        values: float32 CPU tensors that, one after the other, hold the elements of all pieces; they may be cut
            anywhere, so that the caller never needs to hold a whole piece.

    Returns:
        SHA-256 of the file, in hexadecimal digits.

    Raises:
        OSError: when the system takes no more.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, size in pieces:
        shape = [size] if isinstance(size, int) else list(size)
        start, end = end, end + math.prod(shape) * _FLOAT_BYTES
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    with path.open("wb") as file:
        for raw in (struct.pack("<Q", len(text)), text):
            file.write(raw)
            digest.update(raw)
        for tensor in values:
            view = _bytes_of(tensor)
            for at in range(0, len(view), CHUNK):
                chunk = view[at : at + CHUNK]
                file.write(chunk)
                digest.update(chunk)
            written += len(view)
        if written != end:
            raise ValueError(f"{path} was to hold {end} bytes of values, and was given {written}")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


class ShardFile:
    """The header of a written file, and its values on demand.

    Raises:
        OSError: when the file cannot be opened.
        ValueError: when it is no safetensors file, or has not the length that its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise ValueError("it has no header of a safetensors file")
            header = json.loads(file.read(length))
        self._base = 8 + length
        self._spans: dict[str, tuple[int, int]] = {}
        try:
            for key, about in header.items():
                if key != "__metadata__":
                    first, last = about["data_offsets"]
                    if about["dtype"] != "F32":
                        raise ValueError(f"its tensor {key} is {about['dtype']}, not float32")
                    self._spans[key] = (int(first), int(last))
        except (AttributeError, KeyError, TypeError) as err:
            raise ValueError(f"its header is damaged ({err!r})") from None
        expected = self._base + max((last for _, last in self._spans.values()), default=0)
        if size != expected:
            raise ValueError(f"it has {size} bytes instead of {expected}")

    def read_into(self, key: str, first: int, last: int, target: Tensor) -> None:
        """Copy elements `first` … `last` − 1 of a flat tensor into the contiguous float32 CPU tensor `target`.

        Raises:
            OSError, ValueError: when they are not there.
        """
        if key not in self._spans:
            raise ValueError(f"it has no tensor {key}")
        start, stop = self._spans[key]
        if start + last * _FLOAT_BYTES > stop or target.numel() != last - first:
            raise ValueError(f"its tensor {key} has no elements {first} to {last}")
        view = _bytes_of(target)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._base + start + first * _FLOAT_BYTES)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError("it is cut short")
                view = view[count:]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous float32 CPU tensor."""
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(f"a contiguous float32 tensor is needed, not {tensor.dtype}")
    return tensor.detach().view(-1).numpy().data.cast("B") if tensor.numel() else memoryview(b"")
