"""SHA-256 of every file of a checkpoint: `SHA256SUMS`, which `sha256sum -c` reads too."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hmar_mega.errors import UserError

SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)")


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written.

    Attributes:
        file: its name in the checkpoint.
        expected, actual: SHA-256 by `SHA256SUMS` and of what is there; or why nothing could be read.
    """

    file: str
    expected: str
    actual: str

    def __str__(self) -> str:
        return f"{self.file}: expected sha256 {self.expected}, found {self.actual}"


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Write and fsync the checksums of a checkpoint's files, by name."""
    with (folder / SUMS_FILE).open("w", encoding="utf-8") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        file.flush()
        os.fsync(file.fileno())


def read_sums(folder: Path) -> dict[str, str] | None:
    """Checksums by file name; None where there are none, as in checkpoints of format 1.

    Raises:
        UserError: when the list itself is damaged.
    """
    path = folder / SUMS_FILE
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(
            f"{path} cannot be read ({err}): the checkpoint is damaged; pick another one of its run"
        ) from None
    sums = {}
    *lines, rest = text.split("\n")
    for line in [*lines, rest] if rest else lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path} is damaged: its line {line!r} is no checksum; pick another checkpoint of the run")
        sums[match[2]] = match[1]
    return sums


def sha256_of(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal digits; `advance` is told the bytes hashed."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()


def find_damage(
    folder: Path, sums: dict[str, str], names: Iterable[str] | None = None, advance: Callable[[int], None] | None = None
) -> list[Damage]:
    """Hash files of a checkpoint and compare; the ones that differ or are missing.

    Args:
        names: which files; default all.
    """
    damage = []
    for name in sorted(sums) if names is None else names:
        try:
            actual = sha256_of(folder / name, advance)
        except OSError as err:
            actual = f"nothing ({err.strerror})"
        expected = sums.get(name, "(none is listed)")
        if actual != expected:
            damage.append(Damage(name, expected, actual))
    return damage


def describe(folder: Path, damage: list[Damage]) -> str:
    """The beginning of the error about a damaged checkpoint."""
    more = f" (and {len(damage) - 1} more damaged files)" if len(damage) > 1 else ""
    return f"checkpoint {folder.name} is damaged and not used: {folder}/{damage[0]}{more}"
