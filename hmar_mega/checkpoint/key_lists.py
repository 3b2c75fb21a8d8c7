"""Keys that a weight file lacks or has too many of: a few are named in the error, all of them in the log."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from hmar_mega.errors import UserError

log = logging.getLogger(__name__)

#: Names listed in an error before only their number is told.
LISTED = 4

_BLOCK = re.compile(r"(.*?\.\d+)\.")


def check_keys(
    shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: object, what: str
) -> None:
    """Raise UserError, with names, unless a file has exactly the wanted keys at the wanted shapes.

    Args:
        shapes: of the file's tensors.
        wanted: shapes of those it must have.
        where: the file.
        what: it should be.
    """
    missing = [n for n in wanted if n not in shapes]
    surplus = [n for n in shapes if n not in wanted]
    wrong = [f"{n} {shapes[n]} instead of {wanted[n]}" for n in wanted if n in shapes and tuple(shapes[n]) != wanted[n]]
    faults = [(missing, "missing"), (surplus, "surplus"), (wrong, "of another shape")]
    if any(names for names, _ in faults):
        said = "; ".join(f"{len(names)} {word}: {listed(names, where, word)}" for names, word in faults if names)
        raise UserError(f"{where} does not hold {what}: of {len(wanted)} keys, {said}")


def listed(names: Sequence[str], where: object, word: str) -> str:
    """The first few names for an error, which stays short; where there are more, all are logged, a line a block.

    Args:
        where: the file they are of.
        word: what is the matter with them, such as `missing`.
    """
    if len(names) <= LISTED:
        return ", ".join(names)
    for block, own in _by_block(names).items():
        log.error("%s: %s%s (%d): %s", where, word, f", {block}.*" if block else "", len(own), ", ".join(own))
    return f"{', '.join(names[:LISTED])}, … {len(names) - LISTED} more (all of them in the log)"


def _by_block(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by what stands before the first number and with it, such as `blocks.7`; by nothing without a number."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = _BLOCK.match(name)
        found[match[1] if match else ""].append(name)
    return found
