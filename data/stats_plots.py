"""The figures of a folder of shards as PNG plots. Drawn with matplotlib's figure object alone: no backend is chosen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from hmar_mega.data.stats import Stats

BLUE, ORANGE, GREY = "#3b7dd8", "#d9822b", "#c4c9d1"
SCALE_COLOURS = LinearSegmentedColormap.from_list("scales", [BLUE, "#b0539c", ORANGE])

#: Up to this many classes each has its name and its own bar.
NAMED_CLASSES = 40

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "grid.color": "#e6e9ee",
    "xtick.color": "#4a5160",
    "ytick.color": "#4a5160",
}


def plot_stats(stats: Stats) -> dict[str, bytes]:
    """PNGs by file name: `classes.png`, and `resolutions.png` for images or `codebook.png` for tokens."""
    with matplotlib.rc_context(STYLE):
        plots = {"classes.png": _classes(stats)}
        if len(stats.sizes):
            plots["resolutions.png"] = _resolutions(stats)
        if stats.scales:
            plots["codebook.png"] = _codebook(stats)
        return {name: _png(figure) for name, figure in plots.items()}


def _classes(stats: Stats) -> Figure:
    count = len(stats.per_class)
    few = count <= NAMED_CLASSES
    figure = Figure(figsize=(9, max(2.2, 0.9 + 0.24 * count)) if few else (9, 3.2), layout="constrained")
    axes = figure.subplots()
    title = f"{Path(stats.folder).name}: {stats.index.samples:,} samples of {count} classes"
    if few:
        names = [name if len(name) <= 28 else name[:27] + "…" for name in stats.index.classes]
        bars = axes.barh(range(count), stats.per_class, color=BLUE, height=0.72)
        axes.bar_label(bars, labels=[f"{n:,}" for n in stats.per_class], padding=3, fontsize=8, color="#4a5160")
        axes.set_yticks(range(count), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.12 * max(1, stats.per_class.max()))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("samples")
    else:
        axes.fill_between(range(count), np.sort(stats.per_class)[::-1], step="mid", color=BLUE, linewidth=0)
        axes.set_xlim(0, count - 1)
        axes.set_ylim(0, None)
        axes.set_xlabel("classes, the most frequent first")
        axes.set_ylabel("samples")
    axes.set_title(title)
    return figure


def _resolutions(stats: Stats) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    width, height = stats.sizes.T
    if len(np.unique(stats.sizes, axis=0)) == 1:
        left.scatter(width[:1], height[:1], s=60, color=BLUE)
        left.annotate(f"all {width[0]} × {height[0]}", (width[0], height[0]), (8, 8), textcoords="offset points")
        left.set_xlim(0, 2 * width[0])
        left.set_ylim(0, 2 * height[0])
    else:
        _density(left, figure, width, height)
    left.set_xlabel("width in pixels")
    left.set_ylabel("height in pixels")
    left.set_title(f"sizes of {len(width):,} images")
    unit, factor = ("kB", 1000) if stats.file_bytes.max() >= 10_000 else ("bytes", 1)
    amounts = stats.file_bytes / factor
    right.hist(amounts, bins=min(60, max(5, len(np.unique(amounts)))), color=BLUE)
    right.axvline(float(np.median(amounts)), color=ORANGE, linewidth=1.5)
    right.set_title(f"{unit} a file: median {np.median(amounts):,.0f}, mean {amounts.mean():,.0f}")
    right.set_xlabel(unit)
    right.set_ylabel("images")
    return figure


def _density(axes: Axes, figure: Figure, width: np.ndarray, height: np.ndarray) -> None:
    top = max(int(np.percentile(width, 99.5)), int(np.percentile(height, 99.5)))
    edges = np.linspace(0, 1.05 * top + 1, 61)
    counts, _, _ = np.histogram2d(width, height, bins=(edges, edges))
    colours = LinearSegmentedColormap.from_list("count", ["#dbe7f8", BLUE, "#1c2f57"])
    shown = axes.pcolormesh(
        edges, edges, np.ma.masked_equal(counts.T, 0), cmap=colours, norm=LogNorm(1, max(2, counts.max()))
    )
    figure.colorbar(shown, ax=axes, label="images")
    beyond = int(((width > edges[-1]) | (height > edges[-1])).sum())
    if beyond:
        axes.text(0.98, 0.02, f"{beyond} larger ones", transform=axes.transAxes, ha="right", fontsize=8)


def _codebook(stats: Stats) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    used, spread, ranks = figure.subplots(1, 3)
    sides = [f"{scale.side}×{scale.side}" for scale in stats.scales]
    colours = [SCALE_COLOURS(k / max(1, len(sides) - 1)) for k in range(len(sides))]
    codes = len(stats.scales[0].counts)
    # fewer tokens than codes cannot use them all: the mark says how many could be used at best
    best = [min(1.0, scale.counts.sum() / codes) for scale in stats.scales]
    used.bar(sides, [scale.used for scale in stats.scales], color=colours)
    used.scatter(sides, best, marker="_", s=140, color="#4a5160", label="with no code twice")
    used.set_ylim(0, 1.2)
    used.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    used.set_title(f"codes used, of {codes:,}")
    used.legend(frameon=False, fontsize=8, loc="upper left")
    spread.bar(sides, [scale.perplexity for scale in stats.scales], color=colours)
    spread.set_yscale("log")
    spread.axhline(codes, color="#4a5160", linewidth=1, linestyle=":")
    spread.set_title("perplexity (dotted: all codes alike)")
    for axes in (used, spread):
        axes.tick_params(axis="x", rotation=60)
        axes.grid(axis="x", visible=False)
    for scale, side, colour in zip(stats.scales, sides, colours, strict=True):
        share = np.sort(scale.counts[scale.counts > 0])[::-1] / scale.counts.sum()
        ranks.plot(np.arange(1, len(share) + 1), share, color=colour, linewidth=1.3, label=side)
    ranks.set_xscale("log")
    ranks.set_yscale("log")
    ranks.set_xlabel("rank of the code")
    ranks.set_title("share of the tokens of a scale")
    ranks.legend(frameon=False, fontsize=7, ncols=2)
    figure.suptitle(f"{Path(stats.folder).name}: {stats.read:,} images", x=0.01, ha="left", fontsize=10)
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return file.getvalue()
