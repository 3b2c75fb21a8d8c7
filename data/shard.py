"""From a folder of images, one subfolder a class, to image shards."""

from __future__ import annotations

import io
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hmar_mega.data.images import DECODE_ERRORS, describe_damage
from hmar_mega.data.index import ShardIndex
from hmar_mega.data.order import permutation
from hmar_mega.data.threads import map_ahead
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.progress import track
from hmar_mega.rng import Purpose

#: File names that are taken for images.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")

#: What Pillow calls a format → the sample's field. MPO is a JPEG with further pictures after it, as some cameras write.
FIELD_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    path: Path
    name: str  # relative to the folder given, with forward slashes
    label: int


@dataclass(frozen=True)
class _Checked:
    """An image file that was read: its fields, or why it is left out."""

    source: _Source
    fields: dict[str, bytes]
    problem: str = ""


def shard_images(
    src: Path, out: Path, samples_per_shard: int = 1024, progress: bool = True, seed: int = 0, workers: int = 4
) -> ShardIndex:
    """Write the images of `src/<class>/**` into image shards in the new folder `out`.

    Classes are the sorted names of the subfolders. The bytes of the files are kept. Samples are shuffled, always in the
    same way for the same files and seed, so that each shard holds all classes; the output is byte for byte
    reproducible. An image that cannot be decoded is skipped and listed, with the reason, in the index.

    Args:
        progress: show a bar on a terminal and a closing line.
        workers: threads that check images.

    Raises:
        UserError: when there are no classes or no images, a file cannot be read, or `out` is taken, inside `src` or
            cannot be written.
    """
    src, out = Path(src), Path(out)
    if out.resolve().is_relative_to(src.resolve()):
        raise UserError(f"{out} is inside {src}, the folder to read; give an output folder outside of it")
    classes, sources = find_images(src)
    order = permutation(len(sources), seed, 0, Purpose.SHARD_ORDER).tolist()
    checked = map_ahead(_check, (sources[number] for number in order), workers)
    with track("shard", len(sources), progress) as tally:
        with open_shards(out, "images", classes, samples_per_shard) as writer:
            written = 0
            for image in checked:
                if image.problem:
                    writer.skip(image.source.name, image.problem)
                else:
                    writer.write(f"{written:08d}", image.source.label, image.fields)
                    written += 1
                tally.advance()
        index = writer.index
        tally.summary = f"{index.samples} images of {len(classes)} classes in {len(index.shards)} shards at {out}"
        if index.skipped:
            tally.summary += f"; {len(index.skipped)} skipped, listed in {out / 'index.json'}"
    return index


def image_fields(field: str, data: bytes, source: str, size: tuple[int, int]) -> dict[str, bytes]:
    """The files of an image sample: the image under its format's field, and `json` with its origin and size."""
    facts = {"source": source, "width": size[0], "height": size[1]}
    return {field: data, "json": json.dumps(facts, sort_keys=True).encode()}


def find_images(src: Path) -> tuple[list[str], list[_Source]]:
    """The class names and image files of `src`, both in sorted order; symbolic links are followed."""
    try:
        classes = sorted(entry.name for entry in os.scandir(src) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as err:
        raise UserError(f"{src} cannot be read: {err.strerror}; give a folder with one subfolder a class") from None
    if not classes:
        raise UserError(f"{src} has no subfolders; images must lie in {src}/<class>/, one subfolder a class")
    sources = []
    empty = []
    for label, name in enumerate(classes):
        paths = [
            Path(folder, file)
            for folder, _, files in os.walk(src / name, followlinks=True)
            for file in files
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        ]
        named = sorted((path.relative_to(src).as_posix(), path) for path in paths)
        sources += [_Source(path, relative, label) for relative, path in named]
        if not named:
            empty.append(name)
    if not sources:
        raise UserError(f"no images in the {len(classes)} subfolders of {src}; looked for {', '.join(EXTENSIONS)}")
    if empty:
        log.warning("classes without images keep their labels: %s", ", ".join(empty))
    return classes, sources


def _check(source: _Source) -> _Checked:
    """Read and fully decode an image file, so that a truncated one is found now and not in training."""
    try:
        data = source.path.read_bytes()
    except OSError as err:
        raise UserError(f"{source.path} cannot be read: {err.strerror}; mend it, or take it away") from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            field, size = FIELD_OF_FORMAT.get(image.format or ""), image.size
            if field is None:
                return _Checked(source, {}, f"format {image.format} is not jpg, png or webp")
            image.load()
    except DECODE_ERRORS as err:
        return _Checked(source, {}, describe_damage(err))
    return _Checked(source, image_fields(field, data, source.name, size))
