"""The pictures of `sweep fit`: laws in N, D and C, every scale's law, the prediction, and the iso-FLOP parabolas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hmar_mega.scaling.fitting import Fit, Law, Prediction
from hmar_mega.scaling.frontier import iso_flop_groups
from hmar_mega.scaling.results import VARIABLES, Point

#: Colours told apart by anyone (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"

#: Irreducible terms below this are none: the fit went as low as logarithms go.
NO_FLOOR = 1e-5

AXES = {"N": "parameters of the blocks", "D": "images trained on", "C": "training FLOPs"}
NAMES = {
    "loss/last": "loss, last scale", "loss/all": "loss, all scales",
    "error/last": "top-1 error, last scale", "error/all": "top-1 error, all scales",
}  # fmt: skip


def draw_all(fit: Fit, folder: Path) -> dict[str, Path]:
    """Write the PNGs that there is something for; returns caption → file."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Path] = {}
    for variable in VARIABLES:
        laws = [law for law in fit.laws if law.variable == variable and law.quantity in NAMES]
        if any(law.law is not None for law in laws):
            caption = f"Losses and errors in {AXES[variable]}; bands: 95 % of the bootstrap"
            drawn[caption] = _laws(laws, variable, fit, folder / f"laws_{variable}.png")
    scales = [law for law in fit.laws if law.quantity not in NAMES and law.quantity.startswith("loss/")]
    if any(law.law is not None for law in scales):
        drawn["Loss of every scale in parameters of the blocks, without irreducible term"] = _scales(
            scales, folder / "laws_by_scale.png"
        )
    if fit.parabolas:
        drawn["Loss over size at fixed compute, and the best sizes"] = _parabolas(fit, folder / "iso_flop.png")
    return drawn


def _new(columns: int, height: float = 4.2, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.2 * columns, height * rows), layout="constrained", squeeze=False
    )
    for one in axes.flat:
        one.set_xscale("log")
        one.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        one.xaxis.set_major_formatter(EngFormatter(sep=" "))
        one.xaxis.set_minor_formatter(NullFormatter())
        one.grid(True, which="major", color="0.92")
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes.flatten()


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _laws(laws: Sequence[Law], variable: str, fit: Fit, path: Path) -> Path:
    figure, axes = _new(2, rows=2)
    for one, (quantity, name) in zip(axes, NAMES.items(), strict=True):
        mine = [law for law in laws if law.quantity == quantity]
        points = mine[0].points if mine else ()
        of = VARIABLES[variable]
        others = [p for p in fit.points if p not in points and quantity in p.values]
        one.plot([of(p) for p in others], [p.values[quantity] for p in others], "o", color="0.8", markersize=4)
        one.plot([of(p) for p in points], [p.values[quantity] for p in points], "ko", markersize=5)
        for law in mine:
            _curve(one, law, [of(p) for p in points])
        if variable == "N":
            _mark_prediction(one, [p for p in fit.predictions if p.quantity == quantity])
        one.set(title=name, xlabel=AXES[variable])
        _log_values(one)
        if one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("nats a token")
    return _save(figure, path)


def _curve(axes: Any, law: Law, x: Sequence[float]) -> None:
    if law.law is None:
        return
    found, colour = law.law, ORANGE if law.irreducible else BLUE
    at = np.geomspace(min(x), max(x), 25)
    floor = f"{found.irreducible:.3g} + " if law.irreducible and found.irreducible > NO_FLOOR else ""
    axes.plot(at, found(at), color=colour, label=f"{floor}{found.scale:.3g}·{law.variable}^−{found.exponent:.3f}")
    band = np.array([found.interval(float(value)) for value in at])
    axes.fill_between(at, band[:, 0], band[:, 1], color=colour, alpha=0.15, linewidth=0)


def _mark_prediction(axes: Any, predictions: Sequence[Prediction]) -> None:
    for prediction in predictions:
        colour = ORANGE if prediction.irreducible else BLUE
        bars = [[prediction.predicted - prediction.low], [prediction.high - prediction.predicted]]
        axes.errorbar(
            [prediction.size], [prediction.predicted], yerr=np.maximum(bars, 0), fmt="D", color=colour,
            markerfacecolor="none", capsize=3, markersize=8,
            label=f"predicted {'with' if prediction.irreducible else 'without'} E from smaller",
        )  # fmt: skip


def _log_values(axes: Any, form: str = "{:.3g}") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_minor_locator(MaxNLocator(1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _scales(laws: Sequence[Law], path: Path) -> Path:
    from matplotlib import colormaps

    figure, axes = _new(1, 5.0)
    plain = [law for law in laws if not law.irreducible and law.law is not None]
    for number, law in enumerate(plain):
        assert law.law is not None
        colour = colormaps["viridis"](number / max(1, len(plain) - 1) * 0.9)
        x = [VARIABLES["N"](p) for p in law.points]
        axes[0].plot(x, [p.values[law.quantity] for p in law.points], "o", color=colour, markersize=4)
        at = np.geomspace(min(x), max(x), 30)
        label = f"scale {law.quantity.removeprefix('loss/')}: N^−{law.law.exponent:.3f}"
        axes[0].plot(at, law.law(at), color=colour, label=label)
    axes[0].set(xlabel=AXES["N"], ylabel="nats a token")
    _log_values(axes[0])
    axes[0].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, path)


def _parabolas(fit: Fit, path: Path) -> Path:
    from matplotlib import colormaps

    figure, (left, right) = _new(2)
    groups = iso_flop_groups(fit.points)
    for number, curve in enumerate(fit.parabolas):
        colour = colormaps["viridis"](number / max(1, len(fit.parabolas) - 1) * 0.9)
        group: list[Point] = groups[curve.flops]
        sizes = sorted(p.non_embedding for p in group)
        left.plot([p.non_embedding for p in group], [p.values["loss/all"] for p in group], "o", color=colour)
        at = np.geomspace(sizes[0], sizes[-1], 60)
        left.plot(at, [curve(float(size)) for size in at], color=colour, label=f"{curve.flops:.3g} FLOPs")
        if curve.optimum is not None:
            left.plot([curve.optimum], [curve.loss], "*", color=colour, markersize=13, markeredgecolor="k")
            right.plot([curve.flops], [curve.optimum], "*", color=colour, markersize=13, markeredgecolor="k")
    left.set(xlabel=AXES["N"], ylabel="loss, all scales, nats a token")
    _log_values(left)
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel=AXES["C"], ylabel="best " + AXES["N"])
    _log_values(right, "{:.2g}")
    if fit.line is not None:
        budgets = [p.flops for p in fit.parabolas] + [r.flops for r in fit.recommendations]
        at = np.geomspace(min(budgets), max(budgets), 30)
        right.plot(at, [fit.line.size(float(c)) for c in at], color=GREY, label=f"N_opt ∝ C^{fit.line.exponent:.2f}")
        right.legend(frameon=False, fontsize=8)
    else:
        right.text(0.5, 0.5, "fewer than two best sizes\ninside the sizes measured", ha="center", va="center",
                   transform=right.transAxes, color=GREY)  # fmt: skip
    return _save(figure, path)
