"""Images as files: a folder a class (torchvision's ImageFolder), or a table of paths and labels."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from pathlib import Path

from hmar_mega.data.sources.base import Item, Source, SourceOptions, label_names, read_class_file, refuse_same_part
from hmar_mega.errors import UserError

#: Headings that a column of paths, or of labels, is known by.
PATH_HEADINGS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_HEADINGS = ("label", "class", "target", "category", "y")

#: Subfolders that are parts of a set, when there are no others.
PARTS = {"train": "train", "val": "val", "validation": "val", "test": "test"}

log = logging.getLogger(__name__)


def read_folder(src: Path, options: SourceOptions) -> Source:
    """Images of `src/<class>/**`, or `src/train/<class>/**` and `src/val/<class>/**`; symbolic links are followed."""
    roots = _roots(src)
    found = sorted({name for root in roots.values() for name in _subfolders(root)})
    classes = tuple(found) if options.classes is None else read_class_file(options.classes)
    strange = sorted(set(found) - set(classes))
    if strange:
        raise UserError(f"{src}: folder {strange[0]} is none of the {len(classes)} classes in {options.classes}")
    ignored: Counter[str] = Counter()
    used: set[int] = set()
    parts: dict[str, list[Item]] = {}
    for part, root in roots.items():
        items = parts[part] = []
        for label, name in enumerate(classes):
            items += class_items(root, root / name, label, options, ignored)
        if not items:
            raise UserError(
                f"no images in the {len(classes)} subfolders of {root}; looked for {', '.join(options.extensions)}"
            )
        used.update(item.label for item in items)
    empty = [name for label, name in enumerate(classes) if label not in used]
    if empty:
        log.warning("classes without images keep their labels: %s", ", ".join(empty))
    if ignored:
        kinds = ", ".join(f"{count} × {suffix or 'no suffix'}" for suffix, count in ignored.most_common(5))
        log.warning("files in %s that are not taken for images: %s", src, kinds)
    return Source("folder of images", classes, parts)


def _roots(src: Path) -> dict[str, Path]:
    """The folders of classes by part: `src` itself, or its train and val where it has nothing else."""
    names = _subfolders(src)
    if set(names) <= set(PARTS) and all(any(sub.is_dir() for sub in (src / name).iterdir()) for name in names):
        refuse_same_part(src, names, PARTS)
        return {PARTS[name]: src / name for name in names}
    return {"": src}


def _subfolders(src: Path) -> list[str]:
    try:
        found = sorted(entry.name for entry in os.scandir(src) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as err:
        raise UserError(f"{src} cannot be read: {err.strerror}; give a folder with one subfolder a class") from None
    if not found:
        raise UserError(f"{src} has no subfolders; images must lie in {src}/<class>/, one subfolder a class")
    return found


def class_items(src: Path, folder: Path, label: int, options: SourceOptions, ignored: Counter[str]) -> list[Item]:
    """The image files below a folder, sorted by their name relative to `src`; others are counted in `ignored`."""
    items = []
    for where, _, files in os.walk(folder, followlinks=True):
        for file in files:
            if file.startswith("."):
                continue
            if not file.lower().endswith(options.extensions):
                ignored[Path(file).suffix.lower()] += 1
                continue
            path = os.path.join(where, file)
            items.append(Item(path, 0, _size(path, options), Path(path).relative_to(src).as_posix(), label))
    return sorted(items, key=lambda item: item.name)


def read_csv(src: Path, options: SourceOptions) -> Source:
    """Images of a table: a path (relative to the table) and a label, a name or a number, a row.

    The first row is a heading when it names the columns; else the first column is the path and the second the label.
    """
    try:
        with open(src, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file, delimiter="\t" if src.suffix == ".tsv" else ",") if row]
    except (OSError, ValueError, csv.Error) as err:
        raise UserError(f"{src} cannot be read: {err}; give a table with a path and a label a row") from None
    if not rows:
        raise UserError(f"{src} is empty; give a table with a path and a label a row")
    path_column, label_column, headings = _columns(src, rows[0], options)
    lines = rows[headings:]
    short = next((number for number, row in enumerate(lines) if len(row) <= max(path_column, label_column)), None)
    if short is not None:
        raise UserError(f"{src}: row {short + 1 + headings} has {len(lines[short])} columns; give a path and a label")
    lost = [(row[path_column].strip(), "no label in this row") for row in lines if not row[label_column].strip()]
    lines = [row for row in lines if row[label_column].strip()]
    classes, labels = label_names([row[label_column].strip() for row in lines], options, str(src))
    items = []
    for row, label in zip(lines, labels, strict=True):
        name = row[path_column].strip()
        path = os.path.join(src.parent, name)
        items.append(Item(path, 0, _size(path, options), name, label))
    if not items:
        raise UserError(f"{src} has no rows with a label; give a path and a label a row")
    return Source("table of paths and labels", classes, {"": items}, lost=tuple(lost))


def _columns(src: Path, first: list[str], options: SourceOptions) -> tuple[int, int, int]:
    """Numbers of the path's and the label's column, and of heading rows."""
    names = [cell.strip().lower() for cell in first]
    wanted = (
        (options.image_column, PATH_HEADINGS, "--image-column"),
        (options.label_column, LABEL_HEADINGS, "--label-column"),
    )
    found: list[int | None] = []
    for chosen, usual, option in wanted:
        if chosen is not None and chosen.lower() not in names:
            raise UserError(f"{src} has no column {chosen!r} ({option}); it has {', '.join(first)}")
        heading = (chosen.lower(),) if chosen is not None else usual
        found.append(next((names.index(name) for name in heading if name in names), None))
    path, label = found
    if path is not None and label is not None:
        return path, label, 1
    if path is None and label is None and len(first) >= 2:
        return 0, 1, 0
    raise UserError(
        f"{src}: which of the columns {', '.join(first)} is the path and which the label is not clear; "
        "give --image-column and --label-column"
    )


def _size(path: str, options: SourceOptions) -> int:
    if not options.sizes:
        return -1
    try:
        return os.stat(path).st_size
    except OSError as err:
        raise UserError(f"{path} cannot be read: {err.strerror}; mend it, or take it away") from None
