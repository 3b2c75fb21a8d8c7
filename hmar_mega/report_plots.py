"""The curves of reports: rows of metrics.jsonl → SVG that takes its ink from the page around it.

Drawn with matplotlib's figure object alone, so that no global backend is chosen. K is the number of scales.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hmar_mega.tokenizer.codebook import USAGE_WINDOW

Rows = Sequence[Mapping[str, Any]]

#: Stand-ins that nothing else is drawn in; the page's own colours take their place, in light and dark alike.
INK, LINE = "#010203", "#040506"
PAGE_COLOURS = {INK: "currentColor", LINE: "var(--line)"}

#: Colours of middle lightness, readable on white and on black.
TRAINING, VALIDATION = "#3b7dd8", "#d9822b"
SCALE_COLOURS = LinearSegmentedColormap.from_list("scales", [TRAINING, "#b0539c", VALIDATION])

#: A colour a run, of middle lightness too; they come again after the last.
RUN_COLOURS = (TRAINING, VALIDATION, "#2f9e6e", "#b0539c", "#c44e52", "#7a6fd0", "#8c8c3a", "#3aa6a6")

#: Panels in a row of small ones, and the height of such a row in inches.
SMALL_PANELS, SMALL_HEIGHT = 4, 2.3

#: What training cost, beside its loss: key of a row, title, label of the axis, what it is divided by.
RESOURCES = (
    ("images_per_second", "Throughput", "images/s", 1.0),
    ("peak_memory_bytes", "Memory of the first process", "peak, GB", 1e9),
    ("lr", "Learning rate", "× 10⁻³", 1e-3),
    ("grad_norm", "Gradient norm", "before clipping", 1.0),
)

#: Curves of at most this many points show each of them.
FEW_POINTS = 15

#: Size of a row of panels in inches; 720 pt wide, which the page shows at about 4/3.
FIGURE_SIZE = (10.0, 2.9)

#: matplotlib would name its site and the time.
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font, and can be searched
    "svg.hashsalt": "hmar_mega",  # the same figures give the same bytes
    "font.family": "DejaVu Sans",  # to measure with; the page sets its own
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.edgecolor": LINE,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
}


def tokenizer_curves(rows: Rows, patch_nums: Sequence[int], val_psnr: float) -> str:
    """Loss, PSNR and share of the codebook used at each scale, over the steps of tokenizer training.

    Args:
        rows: of the tokenizer's metrics.jsonl: step, loss, psnr (dB), usage (K shares).
        patch_nums: side of each scale's token map.
        val_psnr: of held-out images after training, dB.

    Returns:
        One `<svg>` element.
    """
    steps = [row["step"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = _figure()
        loss, quality, usage = figure.subplots(1, 3)
        _label(loss, "Loss", "loss (pixels + codes)")
        _curve(loss, steps, [row["loss"] for row in rows], TRAINING)
        loss.set_ylim(bottom=0)
        _label(quality, "Reconstruction", "PSNR (dB)")
        _curve(quality, steps, [row["psnr"] for row in rows], TRAINING, label="training batch")
        quality.axhline(val_psnr, color=VALIDATION, linestyle="--", label=f"held-out, end: {val_psnr:.1f} dB")
        quality.legend(loc="lower right")
        _label(usage, "Codebook", f"codes used in {USAGE_WINDOW} steps (%)")
        for k, colour in enumerate(_colours(len(patch_nums))):
            values = [100 * row["usage"][k] for row in rows]
            _curve(usage, steps, values, colour, label=_scale_name(k, patch_nums))
        usage.set_ylim(0, 105)
        _scale_legend(usage, len(patch_nums))
        return _svg(figure, "Tokenizer training: loss, PSNR and codebook usage per scale over optimizer steps")


def stage_curves(
    rows: Rows, patch_nums: Sequence[int], name: str, train_label: str, guess: tuple[str, float] | None = None
) -> str:
    """Training and validation cross-entropy over the steps of a stage: of all tokens, and of each scale.

    Args:
        rows: of a run's metrics.jsonl, `train` (loss, scale_loss) and `val` (all_scales, scale_loss), nats per token.
            A scale that nothing is predicted at, the first in stage 2, is None.
        patch_nums: side of each scale's token map.
        name: of the stage, for those who hear the page.
        train_label: what the training loss is a mean of.
        guess: name and height of a line to compare with, such as a guess that knows nothing.

    Returns:
        One `<svg>` element.
    """
    train, val = ([row for row in rows if row["kind"] == kind] for kind in ("train", "val"))
    with matplotlib.rc_context(STYLE):
        figure = _figure()
        total, scales = figure.subplots(1, 2)
        _label(total, "All scales", "cross-entropy (nats per token)")
        _curve(total, _steps(train), [row["loss"] for row in train], TRAINING, label=train_label)
        _curve(total, _steps(val), [row["all_scales"] for row in val], VALIDATION, "validation, mean of tokens", True)
        if guess is not None:
            total.axhline(guess[1], color=INK, linestyle=":", linewidth=1, label=guess[0])
        total.legend(loc="best")
        _label(scales, "Each scale", "cross-entropy (nats per token)")
        handles = []
        for k, colour in enumerate(_colours(len(patch_nums))):
            train_k, val_k = _of_scale(train, k), _of_scale(val, k)
            if train_k or val_k:
                _curve(scales, *_columns(train_k), colour)
                _curve(scales, *_columns(val_k), colour, validation=True)
                handles.append(Line2D([], [], color=colour, label=_scale_name(k, patch_nums)))
        handles += [
            Line2D([], [], color=INK, label="training"),
            Line2D([], [], color=INK, linestyle="--", marker="o", label="validation"),
        ]
        _scale_legend(scales, len(patch_nums), handles=handles)
        return _svg(figure, f"{name}: training and validation cross-entropy, of all scales and of each, over steps")


def comparison_curves(runs: Mapping[str, Rows], patch_nums: Sequence[int], masked: Collection[str] = ()) -> str:
    """Cross-entropy of several runs over their steps, of all tokens and of each scale, a small panel each.

    Args:
        runs: name → rows of metrics.jsonl as for `stage_curves`; of a run that was never validated, the training rows.
        patch_nums: side of each scale's token map, the same in all runs.
        masked: runs that predict masked tokens, whose lines are dashed.

    Returns:
        One `<svg>` element.
    """
    told = {name: _told(rows) for name, rows in runs.items()}
    with matplotlib.rc_context(STYLE):
        figure, panels = _small_panels(1 + len(patch_nums), len(runs))
        _label(panels[0], "All scales", "nats per token")
        for k in range(len(patch_nums)):
            _label(panels[1 + k], _scale_name(k, patch_nums).capitalize(), "nats per token" if (1 + k) % 4 == 0 else "")
        for (name, rows), colour in zip(told.items(), _run_colours(len(runs)), strict=True):
            total = [(row["step"], row.get("all_scales", row.get("loss"))) for row in rows]
            for axes, points in zip(
                panels, [total, *(_of_scale(rows, k) for k in range(len(patch_nums)))], strict=True
            ):
                _curve(axes, *_columns(points), colour, validation=name in masked)
        _run_legend(figure, list(runs), masked)
        return _svg(figure, f"Validation cross-entropy of {', '.join(runs)}, of all scales and of each, over steps")


def resource_curves(runs: Mapping[str, Rows]) -> str:
    """Images a second, memory, learning rate and gradient norm of runs over their steps, as one `<svg>` element."""
    with matplotlib.rc_context(STYLE):
        figure, panels = _small_panels(len(RESOURCES), len(runs))
        for axes, (key, title, label, unit) in zip(panels, RESOURCES, strict=True):
            _label(axes, title, label)
            for rows, colour in zip(runs.values(), _run_colours(len(runs)), strict=True):
                points = [(row["step"], row[key] / unit) for row in rows if row["kind"] == "train" and key in row]
                _curve(axes, *_columns(points), colour)
            axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.has_data() else 1)
        if len(runs) > 1:
            _run_legend(figure, list(runs))
        return _svg(figure, "Throughput, memory, learning rate and gradient norm over steps")


def _told(rows: Rows) -> Rows:
    """Validation rows, or training rows where there is none."""
    return [row for row in rows if row["kind"] == "val"] or [row for row in rows if row["kind"] == "train"]


def _small_panels(count: int, runs: int) -> tuple[Figure, list[Axes]]:
    height = -(-count // SMALL_PANELS)
    legend = 0.3 * -(-runs // SMALL_PANELS)
    figure = Figure(
        figsize=(FIGURE_SIZE[0], SMALL_HEIGHT * height + legend), layout=ConstrainedLayoutEngine(hspace=0.06)
    )
    panels = list(figure.subplots(height, SMALL_PANELS, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _run_colours(count: int) -> list[str]:
    return [RUN_COLOURS[i % len(RUN_COLOURS)] for i in range(count)]


def _run_legend(figure: Figure, names: list[str], masked: Collection[str] = ()) -> None:
    handles = [
        Line2D([], [], color=colour, label=name, linestyle="--" if name in masked else "-")
        for name, colour in zip(names, _run_colours(len(names)), strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(SMALL_PANELS, len(names)))


def _figure() -> Figure:
    return Figure(figsize=FIGURE_SIZE, layout=ConstrainedLayoutEngine(wspace=0.04))


def _of_scale(rows: Rows, scale: int) -> list[tuple[int, float]]:
    """(step, loss) of 0-based `scale` where a row has one."""
    return [(row["step"], row["scale_loss"][scale]) for row in rows if row["scale_loss"][scale] is not None]


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _steps(rows: Rows) -> list[int]:
    return [row["step"] for row in rows]


def _curve(
    axes: Axes, steps: list[int], values: list[float], colour: str, label: str = "_nolegend_", validation: bool = False
) -> None:
    axes.plot(
        steps,
        values,
        color=colour,
        label=label,
        linestyle="--" if validation else "-",
        marker="o" if validation or len(steps) <= FEW_POINTS else "",
    )


def _label(axes: Axes, title: str, y_label: str) -> None:
    axes.set_title(title, fontweight="bold")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _scale_name(scale: int, patch_nums: Sequence[int]) -> str:
    return f"scale {scale + 1} ({patch_nums[scale]}×{patch_nums[scale]})"


def _colours(count: int) -> list[str]:
    return [to_hex(SCALE_COLOURS(at)) for at in np.linspace(0, 1, count)]


def _scale_legend(axes: Axes, num_scales: int, **options: Any) -> None:
    """A legend to the right of the panel, where it hides no curve, and not higher than it."""
    axes.legend(ncols=1 if num_scales <= 8 else 2, loc="center left", bbox_to_anchor=(1.0, 0.5), **options)


def _svg(figure: Figure, description: str) -> str:
    """The figure as an element to stand inside HTML: no prologue, no addresses, no style that reaches beyond it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None, "matplotlib writes a viewBox"
    inner = text[text.index("</defs>") + len("</defs>") :]  # the first defs hold a style sheet for the whole page
    inner = re.sub(r'<g id="[^"]*">', "<g>", inner)  # numbered from 1 in every figure, and never referred to
    for stand_in, colour in PAGE_COLOURS.items():
        inner = inner.replace(stand_in, colour)
    return f'<svg class="plot" {view_box[0]} role="img" aria-label="{html.escape(description)}">{inner}'
