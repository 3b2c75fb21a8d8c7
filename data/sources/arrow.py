"""Hugging Face datasets on disk: what `save_to_disk` writes (.arrow), and parquet files as on the hub. Needs pyarrow.

In uncompressed .arrow files the bytes of every image lie in one piece, and are read from there. Parquet is compressed
by column and cannot be read image by image: its images are copied into a spool file first, which is removed at the end.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hmar_mega.data.sources.base import (
    Item,
    Source,
    SourceOptions,
    label_names,
    label_numbers,
    label_text,
    may_spool,
    read_class_file,
    refuse_same_part,
    spool_name,
)
from hmar_mega.errors import UserError
from hmar_mega.files import open_atomic, write_atomic

#: How a column of images, or of labels, is named where its type does not tell.
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label")

_PART = re.compile(r"(.+?)-\d{5}-of-\d{5}")
_SHORT = {"validation": "val"}
_MARKERS = ("dataset_info.json", "state.json", "dataset_dict.json")

#: A row of a table: its image (None: it has none), its label as text (None: the same), and what it is called.
_Row = tuple[Item | None, str | None, str]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Columns:
    """Which columns hold images and labels, and the labels' names where the file says them."""

    image: str
    label: str
    names: tuple[str, ...]


def is_arrow(src: Path) -> bool:
    """Whether a path is a data set of .arrow or .parquet files, or one of these."""
    if src.is_file():
        return src.suffix in (".arrow", ".parquet")
    return src.is_dir() and (any((src / name).is_file() for name in _MARKERS) or bool(_files(src)))


def read_arrow(src: Path, options: SourceOptions) -> Source:
    """Images and labels of a data set, its splits as parts (`validation` becomes `val`)."""
    _pyarrow()
    files = _files(src)
    if not any(files.values()):
        raise UserError(f"{src} has no .arrow or .parquet file; give the folder that `save_to_disk` wrote")
    parts: dict[str, list[Item]] = {}
    texts: list[str] = []
    names: tuple[str, ...] = ()
    lost: list[tuple[str, str]] = []
    for part, paths in files.items():
        items = parts.setdefault(part, [])
        for path in paths:
            columns = _find_columns(path, options)
            names = names or columns.names
            reading = _read_parquet if path.suffix == ".parquet" else _read_stream
            for item, label, name in reading(path, columns, src, options):
                if item is None or label is None:
                    no_label = f"no label in {columns.label}: a name, or a whole number"
                    lost.append((name, "no image in this row" if item is None else no_label))
                    continue
                items.append(item)
                texts.append(label)
    if not texts:
        why = f"; the first row: {lost[0][1]}" if lost else ""
        raise UserError(f"no images with a label in {src}{why}")
    classes, numbers = _number(texts, names, options, str(src))
    at = iter(numbers)
    parts = {part: [item._replace(label=next(at)) for item in items] for part, items in parts.items() if items}
    return Source("Hugging Face data set", classes, parts, lost=tuple(lost))


def _number(
    texts: list[str], names: tuple[str, ...], options: SourceOptions, where: str
) -> tuple[tuple[str, ...], list[int]]:
    """Classes and labels; a file that names its classes numbers them too."""
    if not names:
        return label_names(texts, options, where)
    classes = names if options.classes is None else read_class_file(options.classes)
    return classes, label_numbers(texts, classes, where)


def _files(src: Path) -> dict[str, list[Path]]:
    """Files by part, sorted."""
    if src.is_file():
        return {"": [src]}
    found: dict[str, list[Path]] = {}
    if (src / "dataset_dict.json").is_file():
        splits = json.loads((src / "dataset_dict.json").read_text())["splits"]
        refuse_same_part(src, splits, _SHORT)
        for split in splits:
            found[_SHORT.get(split, split)] = sorted((src / split).glob("*.arrow"))
        return found
    splits: list[str] = []
    for path in sorted([*src.glob("*.arrow"), *src.glob("*.parquet"), *src.glob("data/*.parquet")]):
        match = _PART.match(path.stem)
        splits.append(match[1] if match and path.suffix == ".parquet" else "")
        found.setdefault(_SHORT.get(splits[-1], splits[-1]), []).append(path)
    refuse_same_part(src, splits, _SHORT)
    return found


def _find_columns(path: Path, options: SourceOptions) -> _Columns:
    schema = _schema(path)
    features: dict[str, Any] = {}
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata:
        features = json.loads(metadata).get("info", {}).get("features", {})
    images = [name for name, feature in features.items() if _type(feature) == "Image"]
    labels = [name for name, feature in features.items() if _type(feature) == "ClassLabel"]
    image = options.image_column or next(iter(images), None) or _usual(schema.names, IMAGE_COLUMNS)
    label = options.label_column or next(iter(labels), None) or _usual(schema.names, LABEL_COLUMNS)
    for column, what, option in ((image, "images", "--image-column"), (label, "labels", "--label-column")):
        if column not in schema.names:
            raise UserError(f"{path}: which column has the {what}? It has {', '.join(schema.names)}; give {option}")
    assert image is not None
    assert label is not None
    feature = features.get(label)
    names = tuple(feature["names"]) if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else ()
    return _Columns(image, label, names)


def _type(feature: Any) -> str | None:
    return feature.get("_type") if isinstance(feature, dict) else None


def _usual(names: list[str], usual: tuple[str, ...]) -> str | None:
    return next((name for name in usual if name in names), None)


def _schema(path: Path) -> Any:
    pa = _pyarrow()
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_schema(path)
        with pa.memory_map(str(path)) as file:
            return _open_stream(file).schema
    except (OSError, pa.ArrowException) as err:
        raise UserError(f"{path} cannot be read: {err}; get it anew") from None


def _open_stream(file: Any) -> Any:
    """The batches of an .arrow file: `datasets` writes streams, others files."""
    pa = _pyarrow()
    try:
        return pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        reader = pa.ipc.open_file(file)
        return _FileBatches(reader)


class _FileBatches:
    """The batches of Arrow's file format, one after the other like those of a stream."""

    def __init__(self, reader: Any) -> None:
        self.schema, self._reader = reader.schema, reader

    def __iter__(self) -> Iterator[Any]:
        return (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))


def _read_stream(path: Path, columns: _Columns, src: Path, options: SourceOptions) -> Iterator[_Row]:
    """Images by their place in the file; batches that are compressed, and so have none, go through the spool."""
    pa = _pyarrow()
    row = 0
    try:
        with pa.memory_map(str(path)) as file:
            first = file.read_buffer(1).address
            file.seek(0)
            length = path.stat().st_size
            for batch in _open_stream(file):
                contents, paths = _image_arrays(batch.column(columns.image), path, columns.image)
                labels = [label_text(label) for label in batch.column(columns.label).to_pylist()]
                data = contents.buffers()[2] if len(contents) and contents.buffers()[2] else None
                if data is not None and not first <= data.address < first + length:
                    yield from _spooled(path, iter([batch]), columns, options, row)
                else:
                    starts = (0 if data is None else data.address - first) + _starts(contents)
                    for number, label in enumerate(labels):
                        name = f"{path.name}:{row + number}"
                        yield _item(path, src, contents, paths, number, starts, name), label, name
                row += len(labels)
    except (OSError, pa.ArrowException) as err:
        raise UserError(f"{path} cannot be read: {err}; get it anew") from None


def _item(
    path: Path, src: Path, contents: Any, paths: list[str | None], number: int, starts: np.ndarray, name: str
) -> Item | None:
    if contents[number].is_valid:
        start, end = int(starts[number]), int(starts[number + 1])
        return Item(str(path), start, end - start, name, 0)
    file = paths[number]
    return None if file is None else Item(os.path.join(src if src.is_dir() else src.parent, file), 0, -1, name, 0)


def _image_arrays(column: Any, path: Path, name: str) -> tuple[Any, list[str | None]]:
    """The bytes of a column of images, and the paths of those that are files."""
    pa = _pyarrow()
    if pa.types.is_struct(column.type):
        # flatten: unlike `field`, it knows of rows that are missing as a whole
        fields = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
        if "bytes" in fields:
            return fields["bytes"], fields["path"].to_pylist() if "path" in fields else [None] * len(column)
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return column, [None] * len(column)
    raise UserError(f"{path}: column {name} has type {column.type}; images are bytes, or a struct with `bytes`")


def _starts(contents: Any) -> np.ndarray:
    """Where the values of a binary array begin in its buffer, and where the last one ends, (n + 1,) int64."""
    wide = _pyarrow().types.is_large_binary(contents.type)
    raw = np.frombuffer(contents.buffers()[1], np.int64 if wide else np.int32)
    return raw[contents.offset : contents.offset + len(contents) + 1].astype(np.int64)


def _read_parquet(path: Path, columns: _Columns, src: Path, options: SourceOptions) -> Iterator[_Row]:
    import pyarrow.parquet

    pa = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256, columns=[columns.image, columns.label])
            yield from _spooled(path, batches, columns, options, 0)
    except (OSError, pa.ArrowException) as err:
        raise UserError(f"{path} cannot be read: {err}; get it anew") from None


def _spooled(path: Path, batches: Iterator[Any], columns: _Columns, options: SourceOptions, row: int) -> Iterator[_Row]:
    """Images copied into a file of their own, once: a second start finds it, with its list of places and labels."""
    stat = path.stat()
    stem = spool_name(path.resolve(), stat.st_size, stat.st_mtime_ns, columns.image, columns.label, row)
    images, listing = options.spool / f"{stem}.bin", options.spool / f"{stem}.npz"
    if not listing.exists():
        may_spool(options, str(path))
        log.info("copying the images of %s to %s", path, images)
        ends, labels = [0], []
        with open_atomic(images) as file:
            for batch in batches:
                contents, _ = _image_arrays(batch.column(columns.image), path, columns.image)
                for content in contents:
                    ends.append(ends[-1] + file.write(content.as_buffer() if content.is_valid else b""))
                labels += [label_text(label) or "" for label in batch.column(columns.label).to_pylist()]
        packed = io.BytesIO()
        np.savez(packed, ends=np.array(ends), labels=np.array(labels))
        write_atomic(listing, packed.getvalue())
    with np.load(listing) as stored:
        ends, labels = stored["ends"].tolist(), stored["labels"].tolist()
    for number, label in enumerate(labels):
        start, end = ends[number], ends[number + 1]
        name = f"{path.name}:{row + number}"
        yield (Item(str(images), start, end - start, name, 0) if end > start else None), label or None, name


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
        import pyarrow.ipc
    except ImportError:
        raise UserError(
            "reading .arrow and .parquet files needs pyarrow; install it with `pip install 'hmar-mega[arrow]'`"
        ) from None
    return pa
