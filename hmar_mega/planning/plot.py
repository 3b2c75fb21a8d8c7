"""The scaling projection as a picture."""

from __future__ import annotations

from pathlib import Path

from hmar_mega.planning.report import Report
from hmar_mega.planning.scaling import WEAK_IMAGES, Curve

#: Colours of strong and weak scaling, told apart by anyone.
COLOURS = {"strong": "#0072B2", "weak": "#D55E00"}


def plot_scaling(report: Report, path: Path) -> None:
    """Write a PNG: images a second over GPUs beside perfect scaling, and efficiency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for curve in report.curves:
        _draw(left, right, curve, report.batch)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("GPUs")
        axes.grid(True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.set_ylabel("images a second")
    left.legend(frameon=False, loc="upper left")
    right.set_ylim(0, 1.15)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.set_ylabel("efficiency (images a second and GPU)")
    right.axhline(1, color="0.6", linewidth=1, linestyle="--")
    figure.suptitle(
        f"{report.name}, {report.parameters / 1e9:.2f} B parameters, on {report.cluster.gpu} — projection, not measured"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw(left: object, right: object, curve: Curve, batch: int) -> None:
    from matplotlib.axes import Axes

    assert isinstance(left, Axes)
    assert isinstance(right, Axes)
    fitting = [point for point in curve.points if point.plan is not None]
    if not fitting:
        return
    gpus = [point.gpus for point in fitting]
    rates = [point.plan.images_per_s for point in fitting if point.plan is not None]
    words = f"strong: batch {batch:,}" if curve.kind == "strong" else f"weak: {WEAK_IMAGES} images a GPU"
    colour = COLOURS[curve.kind]
    left.plot(gpus, rates, "o-", color=colour, label=words)
    best = max(rate / n for rate, n in zip(rates, gpus, strict=True))
    left.plot(gpus, [best * n for n in gpus], "--", color=colour, alpha=0.5, linewidth=1)
    right.plot(gpus, [curve.efficiency(point) or 0.0 for point in fitting], "o-", color=colour)
