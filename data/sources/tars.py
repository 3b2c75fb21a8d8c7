"""Images in tars: plain listings, tars in a tar, and WebDataset samples, also of tars that a command prints."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand

from hmar_mega.data.index import INDEX_NAME, read_index
from hmar_mega.data.sources.base import (
    EXTENSIONS,
    Item,
    Source,
    SourceOptions,
    label_names,
    label_numbers,
    label_text,
    may_spool,
    spool_name,
)
from hmar_mega.data.tars import Member, SeekableFile, Walk, samples_of, walk_tar
from hmar_mega.errors import UserError
from hmar_mega.files import open_atomic

PIPE = "pipe:"
_COPY_BYTES = 1 << 20

log = logging.getLogger(__name__)


def list_tar(path: Path, options: SourceOptions, lost: list[tuple[str, str]], prefix: str) -> list[Item]:
    """The images of a tar, sorted by name, labels 0; what a damaged one lost goes to `lost`."""
    with _open(path) as file:
        walk = _walk(file, path.stat().st_size, str(path), options, lost)
    items = [
        Item(str(path), m.start, m.size, prefix + Path(m.name).name, 0)
        for m in walk.members
        if m.name.lower().endswith(options.extensions)
    ]
    return sorted(items, key=lambda item: item.name)


def list_tar_of_tars(path: Path, options: SourceOptions, lost: list[tuple[str, str]]) -> list[tuple[str, Item]]:
    """(name of the inner tar, image) for a tar of tars, sorted; images are named `inner/name`."""
    found = []
    with _open(path) as file:
        outer = _walk(file, path.stat().st_size, str(path), options, lost)
        for tar in sorted((m for m in outer.members if m.name.endswith(".tar")), key=lambda m: m.name):
            inner = _walk(_Window(file, tar.start, tar.size), tar.size, f"{path}: {tar.name}", options, lost)
            stem = Path(tar.name).stem
            items = [
                Item(str(path), tar.start + m.start, m.size, f"{stem}/{Path(m.name).name}", 0)
                for m in inner.members
                if m.name.lower().endswith(options.extensions)
            ]
            found += [(tar.name, item) for item in sorted(items, key=lambda item: item.name)]
    return found


def is_webdataset(src: str) -> bool:
    """Whether a source is given as tars: `pipe:`, braces, a .tar, or a folder of tars."""
    path = Path(src)
    if src.startswith(PIPE) or src.endswith((".tar", ".tar.gz", ".tgz")) or ("{" in src and not path.exists()):
        return True
    return path.is_dir() and any(path.glob("*.tar"))


def read_webdataset(src: str, options: SourceOptions) -> Source:
    """Samples of WebDataset tars: an image and a label, in `cls` or under "label" in `json`, each.

    `--label-column` names another field, or another key of `json`. Classes are those of the folder's own index where
    there is one.
    """
    urls = _expand(src)
    classes_of_index = _own_classes(Path(src))
    lost: list[tuple[str, str]] = []
    items, labels = [], []
    for url in urls:
        path = _spool(url, options) if url.startswith(PIPE) else Path(url)
        try:
            found = list(_samples(path, url, options, lost))
        except UserError:
            if url.startswith(PIPE):  # once the source is mended, the command has to print it again
                path.unlink(missing_ok=True)
            raise
        items += [item for item, _ in found]
        labels += [label for _, label in found]
    if not items:
        raise UserError(f"no samples with an image in {src}; looked for the fields {', '.join(EXTENSIONS)}")
    if classes_of_index and options.classes is None:
        classes, numbers = classes_of_index, label_numbers(labels, classes_of_index, src)
    else:
        classes, numbers = label_names(labels, options, src)
    items = [item._replace(label=number) for item, number in zip(items, numbers, strict=True)]
    return Source("WebDataset tars", classes, {"": items}, lost=tuple(lost))


def _expand(src: str) -> list[str]:
    path = Path(src)
    if path.is_dir():
        return [str(tar) for tar in sorted(path.glob("*.tar"))]
    try:
        urls = list(braceexpand(src)) if not path.exists() else [src]
    except UnbalancedBracesError as err:
        raise UserError(f"{src}: {err}; write shard-{{000000..000009}}.tar") from None
    packed = next((url for url in urls if url.endswith((".gz", ".tgz")) and not url.startswith(PIPE)), None)
    if packed is not None:
        raise UserError(f"{packed} is compressed; give 'pipe:gunzip -c {packed}', or unpack it")
    return urls


def _own_classes(folder: Path) -> tuple[str, ...]:
    return read_index(folder).classes if (folder / INDEX_NAME).is_file() else ()


def _samples(path: Path, url: str, options: SourceOptions, lost: list[tuple[str, str]]) -> Iterator[tuple[Item, str]]:
    """Each image with its label as text, in stored order; samples without an image or a label go to `lost`."""
    with _open(path) as file:
        walk = _walk(file, path.stat().st_size, url, options, lost)
        for key, fields in samples_of(walk):
            where = f"{Path(url).name if not url.startswith(PIPE) else url}: {key}"
            image = _image_member(fields, options)
            label = _label(file, fields, options)
            if image is None or label is None:
                what = "no image" if image is None else f"no label in {', '.join(sorted(fields))}"
                lost.append((where, what))
                continue
            yield Item(str(path), image.start, image.size, where, 0), label


def _image_member(fields: dict[str, Member], options: SourceOptions) -> Member | None:
    if options.image_column is not None:
        return fields.get(options.image_column.lower())
    return next((fields[e[1:]] for e in options.extensions if e[1:] in fields), None)


def _label(file: BinaryIO, fields: dict[str, Member], options: SourceOptions) -> str | None:
    wanted = options.label_column or "cls"
    if wanted in fields:
        return _read(file, fields[wanted]).decode(errors="replace").strip() or None
    if "json" not in fields:
        return None
    try:
        tree = json.loads(_read(file, fields["json"]))
        return label_text(tree[options.label_column or "label"])
    except (ValueError, KeyError, TypeError):
        return None


def _read(file: BinaryIO, member: Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.start)


def _walk(file: SeekableFile, length: int, where: str, options: SourceOptions, lost: list[tuple[str, str]]) -> Walk:
    walk = walk_tar(file, length)
    if walk.damage:
        if options.damaged_tars == "stop":
            raise UserError(
                f"{where} is damaged after {len(walk.members)} files: {walk.damage}; restore it, or go on without what "
                "is lost with --damaged-tars skip"
            )
        log.warning(
            "%s is damaged after %d files: %s; the rest of it is left out", where, len(walk.members), walk.damage
        )
        lost.append((where, f"damaged after {len(walk.members)} files: {walk.damage}"))
    return walk


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as err:
        raise UserError(f"{path} cannot be read: {err.strerror}; mend it, or take it away") from None


def _spool(url: str, options: SourceOptions) -> Path:
    """What a command prints, copied into a file once; a command that fails leaves none.

    The command is a shell's, as in WebDataset: whoever gives the source decides what runs.
    """
    path = options.spool / f"{spool_name(url)}.tar"
    if path.exists():
        log.info("taking what %s printed before from %s; remove that file to run it again", url, path)
        return path
    may_spool(options, url)
    command = url.removeprefix(PIPE)
    log.info("copying what %s prints to %s", command, path)
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(["bash", "-o", "pipefail", "-c", command], stdout=subprocess.PIPE, stderr=errors) as run,
        open_atomic(path) as file,
    ):
        assert run.stdout is not None
        while data := run.stdout.read(_COPY_BYTES):
            file.write(data)
        if run.wait() != 0:
            errors.seek(0)
            message = errors.read().decode(errors="replace").strip()
            last = message.splitlines()[-1] if message else "it said nothing"
            raise UserError(f"{url} failed with exit status {run.returncode}: {last}; mend the command")
    return path


class _Window:
    """Part of a file as a file, for reading a tar in a tar."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes from here; all that is left where it is negative."""
        left = max(0, self._size - self._at)
        data = os.pread(self._file.fileno(), left if size < 0 else min(size, left), self._start + self._at)
        self._at += len(data)
        return data

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, counted from the window's start, from here or from its end."""
        self._at = position + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at
