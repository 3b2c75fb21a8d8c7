"""Images whose files have the same bytes: found by their hashes, and written down."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from hmar_mega.data.sources.base import Item


@dataclass(frozen=True)
class Duplicate:
    """An image that has the bytes of an earlier one, `original`, and the parts that both are in."""

    part: str
    item: Item
    original_part: str
    original: Item


def duplicate_rows(images: Sequence[tuple[str, Item, str]]) -> list[Duplicate]:
    """The images whose hash came before, in the order of (part, name).

    Args:
        images: (part, image, hash); an empty hash is none.
    """
    first: dict[str, tuple[str, Item]] = {}
    found = []
    for part, item, digest in sorted(
        (image for image in images if image[2]), key=lambda image: (image[0], image[1].name)
    ):
        part_of, original = first.setdefault(digest, (part, item))
        if original is not item:
            found.append(Duplicate(part, item, part_of, original))
    return found


def duplicates_csv(rows: Sequence[Duplicate], classes: Sequence[str]) -> str:
    """A table of duplicates: what they are, what they repeat, and whether class and part agree."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["part", "image", "class", "same_as_part", "same_as", "same_as_class"])
    for row in rows:
        table.writerow(
            [
                row.part,
                row.item.name,
                classes[row.item.label],
                row.original_part,
                row.original.name,
                classes[row.original.label],
            ]
        )
    return file.getvalue()
