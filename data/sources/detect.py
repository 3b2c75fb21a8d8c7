"""Which kind of collection a source is."""

from __future__ import annotations

from pathlib import Path

from hmar_mega.data.sources.arrow import is_arrow, read_arrow
from hmar_mega.data.sources.base import Format, Source, SourceOptions
from hmar_mega.data.sources.folder import read_csv, read_folder
from hmar_mega.data.sources.imagenet import is_imagenet, read_imagenet
from hmar_mega.data.sources.tars import is_webdataset, read_webdataset


def detect(src: str) -> Format:
    """The kind of a source, by its name and by what lies in it; "folder" where nothing else fits."""
    path = Path(src)
    if is_imagenet(path):
        return "imagenet"
    if is_webdataset(src):
        return "webdataset"
    if is_arrow(path):
        return "arrow"
    if path.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    return "folder"


def read_source(src: str, form: Format | None, options: SourceOptions) -> Source:
    """List the images of a source.

    Args:
        src: a path; for tars also with braces, `shards/{000..099}.tar`, or `pipe:` and a command.
        form: what it is; None: `detect`.

    Raises:
        UserError: when it is not of that kind, holds no image, or cannot be read.
    """
    form = form or detect(src)
    if form == "webdataset":
        return read_webdataset(src, options)
    readers = {"folder": read_folder, "imagenet": read_imagenet, "arrow": read_arrow, "csv": read_csv}
    return readers[form](Path(src), options)
