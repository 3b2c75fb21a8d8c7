"""What every kind of image collection becomes: images as ranges of bytes in files, each with a name and a label."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hmar_mega.errors import UserError

Format = Literal["folder", "imagenet", "webdataset", "arrow", "csv"]
FORMATS: tuple[Format, ...] = ("folder", "imagenet", "webdataset", "arrow", "csv")

#: File names that are taken for images.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")

#: Further ones, of formats that have to be encoded anew.
OTHER_EXTENSIONS = (".bmp", ".gif", ".ppm", ".tif", ".tiff")


class Item(NamedTuple):
    """One image, not read yet.

    Attributes:
        path: file that holds its bytes.
        start: where in the file they begin.
        size: how many they are; −1: the whole file, whose size nobody asked for.
        name: what it is called in the source.
        label: index into the classes.
    """

    path: str
    start: int
    size: int
    name: str
    label: int


@dataclass(frozen=True)
class Source:
    """A collection of images.

    Attributes:
        kind: what it was taken for, in words.
        classes: identities of labels 0, 1, ….
        names: the same for people, where they differ (ImageNet's words); else empty.
        parts: images by part, "" where the source is not divided.
        lost: what cannot be had, (name, reason), such as the tail of a damaged tar; by part.
    """

    kind: str
    classes: tuple[str, ...]
    parts: dict[str, list[Item]]
    names: tuple[str, ...] = ()
    lost: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source.

    Attributes:
        spool: folder for copies of what can only be read from front to back.
        look_only: make no such copies.
        classes: a file with the names of the classes in order: a name a line, or JSON.
        image_column, label_column: columns of a table, or fields of a WebDataset sample; None: found by themselves.
        all_formats: also list images that have to be encoded anew.
        sizes: the sizes of files are needed.
        damaged_tars: "stop" at a tar that lost its tail, or "skip" the tail and list it.
    """

    spool: Path
    look_only: bool = False
    classes: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    all_formats: bool = False
    sizes: bool = False
    damaged_tars: Literal["stop", "skip"] = "stop"

    @property
    def extensions(self) -> tuple[str, ...]:
        """File names that are taken for images."""
        return EXTENSIONS + (OTHER_EXTENSIONS if self.all_formats else ())


def read_class_file(path: Path) -> tuple[str, ...]:
    """Names of classes in order: a name a line, or JSON: a list, {"0": name, …} or {name: 0, …}.

    Of an [id, name] pair, as in `imagenet_class_index.json` and the `classes.json` of ImageNet's shards, the id counts.

    Raises:
        UserError: when it cannot be read, or a name comes twice.
    """
    try:
        text = path.read_text()
        tree = json.loads(text) if text.lstrip().startswith(("[", "{")) else text.rstrip("\n").split("\n")
        if isinstance(tree, dict):
            if set(tree) == {str(number) for number in range(len(tree))}:
                tree = [tree[str(number)] for number in range(len(tree))]
            elif sorted(tree.values()) == list(range(len(tree))):
                tree = sorted(tree, key=tree.__getitem__)
            else:
                raise ValueError("its numbers are not 0, 1, 2, …")
        names = tuple(str(name[0] if isinstance(name, list) else name).strip() for name in tree)
    except (OSError, ValueError, TypeError, IndexError) as err:
        raise UserError(f"cannot read class names from {path}: {err}; give a name a line, or JSON") from None
    repeated = next((name for name, count in Counter(names).items() if count > 1 or not name), None)
    if repeated is not None or not names:
        raise UserError(
            f"{path} has no class, or {repeated!r} more than once or empty; give every class a name of its own"
        )
    return names


def label_names(labels: Sequence[str], options: SourceOptions, where: str) -> tuple[tuple[str, ...], list[int]]:
    """Classes and numbers from labels as text: numbers as they are, names in sorted order, or as --classes says.

    Raises:
        UserError: when a label is not among the classes.
    """
    numeric = all(label.isascii() and label.isdigit() for label in labels)
    if options.classes is not None:
        classes = read_class_file(options.classes)
    elif numeric:
        classes = tuple(str(number) for number in range(max(map(int, labels), default=-1) + 1))
    else:
        classes = tuple(sorted(set(labels)))
    if numeric and not set(labels) <= set(classes):
        table = {str(number): number for number in range(len(classes))}
        labels = [str(int(label)) for label in labels]
    else:
        table = {name: number for number, name in enumerate(classes)}
    strange = sorted(set(labels) - set(table))
    if strange:
        raise UserError(
            f"{where}: label {strange[0]!r} is none of the {len(classes)} classes; mend it, or give --classes FILE"
        )
    return classes, [table[label] for label in labels]


def refuse_same_part(src: Path, names: Sequence[str], parts: Mapping[str, str]) -> None:
    """Raise UserError when two of the subfolders or splits `names` would become one part, as `parts` maps them."""
    taken: dict[str, str] = {}
    for name in names:
        other = taken.setdefault(parts.get(name, name), name)
        if other != name:
            raise UserError(f"{src} has both {other} and {name}, which mean the same part; take one away")


def label_text(value: Any) -> str | None:
    """A label as text, whole numbers without a point (tables with gaps hold floats); None where it is none.

    None are nothing, an empty text, and numbers that are not whole: of them no class is made.
    """
    if value is None or value == "":
        return None
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and value == int(value) else None
    return str(value)


def label_numbers(labels: Sequence[str], classes: Sequence[str], where: str) -> list[int]:
    """Labels as text → numbers of the classes of a source that numbers them itself.

    Raises:
        UserError: when one is no number, or of no class.
    """
    try:
        numbers = [int(label) for label in labels]
    except ValueError as err:
        raise UserError(
            f"{where}: a label is not the number of a class: {err}; mend it, or give --label-column"
        ) from None
    strange = next((number for number in numbers if not 0 <= number < len(classes)), None)
    if strange is not None:
        raise UserError(
            f"{where} has labels outside 0 … {len(classes) - 1}, its classes, such as {strange}; mend them, or give "
            "--classes"
        )
    return numbers


def spool_name(*of: object) -> str:
    """The name of a copy, from all that decides what is in it: a copy of something else has another name."""
    return hashlib.sha256("\0".join(map(str, of)).encode(errors="surrogateescape")).hexdigest()[:32]


def may_spool(options: SourceOptions, what: str) -> None:
    """Raise UserError where a copy of `what` would have to be made only to look at it."""
    if options.look_only:
        raise UserError(f"{what} can only be read by copying it, which --dry-run does not do; leave --dry-run out")
