"""Reading other people's weight files, which may be damaged or hostile, and writing theirs; never in memory whole.

A `.pth` is opened with `weights_only=True`, so that no code in it runs, and mapped; so is a safetensors file. Tensors
are read from the disk when they are used.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import pickle
import re
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hmar_mega.errors import UserError
from hmar_mega.files import cannot_write, check_writable, sync_path

log = logging.getLogger(__name__)

#: Where training checkpoints keep the model, and their tokenizer.
MODEL_PREFIXES = ("trainer.transformer_wo_ddp.", "trainer.var_wo_ddp.")
TOKENIZER_PREFIX = "trainer.vae_local."

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

#: What torch raises for a damaged file, besides `UnpicklingError`.
_UNREADABLE = (
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, SafetensorError, struct.error,
    AssertionError, ArithmeticError,
)  # fmt: skip


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file by name, mapped from the disk.

    Attributes:
        model: of the model it holds.
        tokenizer: of the tokenizer beside it, in a training checkpoint; else empty.
        wrapper: where in a training checkpoint the model lay, such as `trainer.var_wo_ddp`; empty for a plain file.
    """

    path: Path
    model: dict[str, Tensor]
    tokenizer: dict[str, Tensor]
    wrapper: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model."""
        return {name: tuple(t.shape) for name, t in self.model.items()}


def read_weights(path: Path) -> WeightFile:
    """Open a `.pth` or safetensors file, told apart by content; the model of a training checkpoint is unwrapped.

    Raises:
        UserError: when it cannot be read, is cut short, would run code, or holds no tensors by name.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(9)
    except OSError as err:
        raise UserError(f"cannot read {path}: {err.strerror}") from None
    tree = map_safetensors(path) if begin[8:] == b"{" else _load_pickle(path, begin.startswith(b"PK\x03\x04"))
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} holds a {type(tree).__name__} instead of tensors by name")
    tensors = dict(_flatten(tree, ""))
    for prefix in MODEL_PREFIXES:
        model = _below(tensors, prefix)
        if model:
            _tell_left_out(
                path, tree, (prefix, TOKENIZER_PREFIX), f"a training checkpoint, with its model in {prefix[:-1]}"
            )
            return WeightFile(path, model, _below(tensors, TOKENIZER_PREFIX), prefix[:-1])
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    _tell_left_out(path, tree, ("",), "a file of tensors")
    return WeightFile(path, tensors, {})


def _tell_left_out(path: Path, tree: Mapping[Any, Any], kept: tuple[str, ...], what: str) -> None:
    left_out = _outside(tree, kept, "")
    if left_out:
        log.info("%s is %s; left out: %s", path, what, ", ".join(left_out))


def _outside(tree: Mapping[Any, Any], kept: tuple[str, ...], prefix: str) -> list[str]:
    """Dotted names of what is no tensor below one of the prefixes `kept`; of a dictionary with none, its own name."""
    found = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        inside = isinstance(value, Mapping) and any(f"{name}.".startswith(k) or k.startswith(f"{name}.") for k in kept)
        if inside:
            found += _outside(value, kept, f"{name}.")
        elif not (isinstance(value, Tensor) and name.startswith(kept)):
            found.append(name)
    return found


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _flatten(tree: Mapping[Any, Any], prefix: str) -> list[tuple[str, Tensor]]:
    """Tensors of nested dictionaries by dotted name; everything else is left out."""
    found: list[tuple[str, Tensor]] = []
    for key, value in tree.items():
        if isinstance(value, Tensor):
            found.append((f"{prefix}{key}", value.detach()))
        elif isinstance(value, Mapping):
            found += _flatten(value, f"{prefix}{key}.")
    return found


def _load_pickle(path: Path, zipped: bool) -> Any:
    if not zipped:
        log.info("%s is in torch's old format, which cannot be mapped: it is read into memory whole", path)
    try:
        if zipped:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise UserError(_why_refused(path, str(err))) from None
    except _UNREADABLE as err:
        raise UserError(
            f"{path} is cut short or damaged ({_first_line(err)}): {path.stat().st_size:,} bytes are here; download it "
            "again"
        ) from None


def _why_refused(path: Path, message: str) -> str:
    """What torch's restricted unpickler says of a file, for people."""
    called = re.search(r"GLOBAL (\S+)", message)
    with path.open("rb") as file:
        pickled = file.read(1) == b"\x80"
    if called is None and not pickled:
        return f"{path} is no weight file; download it again"
    wants = f"it wants to run Python code ({called[1]})" if called else "it is a pickle that may run Python code"
    return (
        f"{path} is refused: {wants}, and weights need none. Get it from where you trust, and have its owner save the "
        "tensors alone: torch.save(model.state_dict(), …)"
    )


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:160]


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each over its own part of the mapped file.

    Raises:
        UserError: when it is no such file or is cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if 8 + length > size:
                raise ValueError("its header is cut short")
            header = json.loads(file.read(length))
            spans = [about["data_offsets"] for name, about in header.items() if name != "__metadata__"]
            if 8 + length + max((stop for _, stop in spans), default=0) != size:
                raise ValueError(f"it has {size:,} bytes, not those that its header tells of")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable for torch, never written
        return {name: _part(mapped, 8 + length, about) for name, about in header.items() if name != "__metadata__"}
    except _UNREADABLE as err:
        raise UserError(f"{path} is cut short or damaged ({_first_line(err)}); download or write it again") from None


def _part(mapped: mmap.mmap, base: int, about: dict[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[about["dtype"]], about["shape"]
    start, stop = about["data_offsets"]
    count = math.prod(shape)
    if stop - start != count * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} has {stop - start} bytes")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=base + start).view(shape)


def tell_widened(tensors: Iterable[Tensor], where: object) -> None:
    """Log how many tensors of which types become float32, where some do."""
    others = Counter(str(t.dtype).removeprefix("torch.") for t in tensors if t.dtype != torch.float32)
    if others:
        log.info(
            "%s holds tensors in %s: they become float32, and stay so in what is converted back", where,
            " and ".join(f"{dtype} ({count})" for dtype, count in sorted(others.items())),
        )  # fmt: skip


def check_space(out: Path, needed: int) -> None:
    """Raise UserError unless the disk of `out` has `needed` bytes left."""
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"writing {out} needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB left; free some, or "
            "choose another disk"
        )


def write_pth(path: Path, tensors: Mapping[str, Tensor], advance: Callable[[int], None]) -> None:
    """Write a flat dictionary of tensors as `torch.save` does, whole or not at all.

    Args:
        tensors: each over memory of its own, or a file mapped by `read_weights`.
        advance: told of the bytes written.

    Raises:
        UserError: when `path` exists or cannot be written.
    """
    check_new(path)
    check_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in tensors.items()}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary, failed = Path(name), []
    try:
        with os.fdopen(handle, "wb") as file:

            class Counted:
                """What torch.save writes to; it turns errors into its own, so the first one is kept."""

                def write(self, data: memoryview) -> int:
                    try:
                        count = file.write(data)
                    except OSError as err:
                        failed.append(err)
                        raise
                    advance(count)
                    return count

                def flush(self) -> None:
                    file.flush()

            torch.save(own, Counted())  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.rename(path)
        sync_path(path.parent)
    except (OSError, RuntimeError) as err:
        cause = failed[0] if failed else err
        if isinstance(cause, OSError):
            raise cannot_write(path, cause) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_new(path: Path) -> None:
    """Raise UserError when a file to be written exists."""
    if path.exists():
        raise UserError(f"{path} exists; choose another output or remove it first")
