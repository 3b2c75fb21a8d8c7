"""What is in a folder of shards, counted: classes, sizes of images, and how much of the codebook each scale uses."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hmar_mega.data.index import ShardIndex, load_offsets, read_index
from hmar_mega.data.pixels import DECODE_ERRORS
from hmar_mega.data.reader import ShardReader
from hmar_mega.progress import track

#: Samples that are read at most, evenly spaced; classes are counted in all.
SAMPLE_LIMIT = 50_000


@dataclass(frozen=True)
class ScaleUsage:
    """How one scale uses the codebook.

    Attributes:
        side: p_k.
        counts: (V,) how often each code stands there.
    """

    side: int
    counts: np.ndarray

    @property
    def used(self) -> float:
        """Share of the codes that stand there at all."""
        return float((self.counts > 0).mean())

    @property
    def perplexity(self) -> float:
        """exp of the entropy: how many codes it would be if all of them were equally frequent."""
        share = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(share * np.log(share)).sum()))


@dataclass(frozen=True)
class Stats:
    """The figures of a folder.

    Attributes:
        per_class: (number of classes,) samples.
        read: samples of which the rest is known.
        sizes: (read, 2) width and height in pixels; for images.
        file_bytes: (read,) of the images' files.
        unreadable: images read whose size could not be found.
        scales: for tokens.
    """

    folder: str
    index: ShardIndex
    per_class: np.ndarray
    read: int
    sizes: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    file_bytes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    unreadable: int = 0
    scales: tuple[ScaleUsage, ...] = ()

    def tree(self) -> dict[str, Any]:
        """The figures as JSON."""
        tree: dict[str, Any] = {
            "folder": self.folder,
            "kind": self.index.kind,
            "samples": self.index.samples,
            "read": self.read,
            "per_class": dict(zip(self.index.classes, self.per_class.tolist(), strict=True)),
        }
        if len(self.sizes):
            tree["width"], tree["height"] = (_spread(self.sizes[:, axis]) for axis in (0, 1))
            tree["bytes"] = _spread(self.file_bytes)
            tree["unreadable"] = self.unreadable
        if self.scales:
            tree["scales"] = [
                {"side": s.side, "tokens": int(s.counts.sum()), "used": s.used, "perplexity": s.perplexity}
                for s in self.scales
            ]
        return tree


def count_folder(folder: Path, limit: int = SAMPLE_LIMIT, progress: bool = True) -> Stats:
    """Count a folder of shards.

    Args:
        limit: samples to read at most, evenly spaced over the folder.

    Raises:
        UserError: when it cannot be read.
    """
    index = read_index(folder)
    reader = ShardReader(folder, index.kind)
    labels = np.concatenate([load_offsets(folder, shard).labels for shard in index.shards])
    per_class = np.bincount(labels, minlength=len(index.classes))
    chosen = np.unique(np.linspace(0, len(reader) - 1, min(limit, len(reader))).round().astype(np.int64)).tolist()
    with track("stats", len(chosen), progress) as tally:
        count = _count_images if index.kind == "images" else _count_tokens
        return count(reader, Stats(str(folder), index, per_class, len(chosen)), chosen, tally)


def _count_images(reader: ShardReader, plain: Stats, chosen: list[int], tally: Any) -> Stats:
    sizes, lengths, unreadable = [], [], 0
    for number in chosen:
        data = reader.read_image(number).data
        try:
            with Image.open(io.BytesIO(data)) as image:  # reads the head of the file only
                sizes.append(image.size)
                lengths.append(len(data))
        except DECODE_ERRORS:
            unreadable += 1
        tally.advance()
    return Stats(
        plain.folder,
        plain.index,
        plain.per_class,
        plain.read,
        np.array(sizes, np.int64).reshape(-1, 2),
        np.array(lengths, np.int64),
        unreadable,
    )


def _count_tokens(reader: ShardReader, plain: Stats, chosen: list[int], tally: Any) -> Stats:
    tokens = plain.index.tokens
    assert tokens is not None
    lengths = [p * p for p in tokens.patch_nums]
    edges = np.cumsum([0, *lengths])
    counts = np.zeros((len(lengths), tokens.codebook_size), np.int64)
    for number in chosen:
        for crop in range(tokens.crops):
            ids = reader.read_tokens(number, crop).tokens
            for scale in range(len(lengths)):
                np.add.at(counts[scale], ids[edges[scale] : edges[scale + 1]], 1)
        tally.advance()
    scales = tuple(ScaleUsage(side, row) for side, row in zip(tokens.patch_nums, counts, strict=True))
    return Stats(plain.folder, plain.index, plain.per_class, plain.read, scales=scales)


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": int(values.max()),
    }


def stats_lines(stats: Stats) -> list[str]:
    """The figures as lines of text."""
    fewest, most = int(stats.per_class.argmin()), int(stats.per_class.argmax())
    names = stats.index.classes
    lines = [
        f"{stats.folder}: {stats.index.samples:,} {stats.index.kind} of {len(names)} classes; from "
        f"{stats.per_class[fewest]:,} ({names[fewest]}) to {stats.per_class[most]:,} ({names[most]}) a class",
        f"{stats.read:,} samples read" + (" (evenly spaced)" if stats.read < stats.index.samples else ""),
    ]
    tree = stats.tree()
    for what in ("width", "height", "bytes"):
        if what in tree:
            lines.append(f"{what:<11}" + ", ".join(f"{name} {value:,.0f}" for name, value in tree[what].items()))
    if stats.unreadable:
        lines.append(f"unreadable {stats.unreadable:,} images: `hmar-mega data check --deep` names them")
    if stats.scales:
        lines.append(f"{'scale':<9}{'tokens':>14}{'codes used':>13}{'perplexity':>13}")
        for scale in stats.scales:
            side = f"{scale.side}×{scale.side}"
            lines.append(f"{side:<9}{scale.counts.sum():>14,}{scale.used:>13.1%}{scale.perplexity:>13,.1f}")
    return lines


def write_stats(stats: Stats, out: Path) -> list[Path]:
    """Write `stats.json` and the plots into a folder; gives their paths."""
    from hmar_mega.data.stats_plots import plot_stats  # slow to import
    from hmar_mega.files import write_atomic

    write_atomic(out / "stats.json", json.dumps(stats.tree(), indent=1, ensure_ascii=False) + "\n")
    paths = [out / "stats.json"]
    for name, data in plot_stats(stats).items():
        write_atomic(out / name, data)
        paths.append(out / name)
    return paths
