"""The comparison on paper: tables, plots and samples of all variants and seeds that are measured so far."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import describe, markdown_table
from comparison_variants import MASKED_SHARE, VARIANTS
from matplotlib.figure import Figure
from PIL import Image

from hmar_mega.files import write_atomic

Result = dict[str, Any]

#: Measures of the table, how many digits they have and what they are multiplied by.
MEASURES = {"FID": (2, 1), "KID": (2, 1000), "IS": (3, 1), "precision": (3, 1), "recall": (3, 1)}


def write_pages(out: Path, results: Path, others: Sequence[Path] = ()) -> None:
    """table.md, comparison.json, comparison.png and grids.png of all that is measured; nothing without any.

    Args:
        results: folder of results of this machine: BUDGET-seedSEED/VARIANT.json and .png.
        others: comparison.json of other machines; that of `out` itself is taken too.
    """
    found = read_results(results, [*others, out / "comparison.json"])
    if not found:
        return
    write_atomic(out / "comparison.json", json.dumps(found, indent=1) + "\n")
    write_atomic(out / "table.md", page(found))
    plot(found, out / "comparison.png")
    grids(out, results)


def read_results(results: Path, others: Sequence[Path]) -> dict[str, dict[str, list[Result]]]:
    """Budget → variant, in the order of `VARIANTS` → results, a seed each; what is here wins over other machines'."""
    rows = [
        row
        for path in others
        if path.is_file()
        for variants in json.loads(path.read_text()).values()
        for seeds in variants.values()
        for row in seeds
    ]
    rows += [json.loads(path.read_text()) for path in sorted(results.glob("*-seed*/*.json"))]
    one = {(row["budget"], row["variant"], row["seed"]): row for row in rows}
    found: dict[str, dict[str, list[Result]]] = {}
    for budget in sorted({key[0] for key in one}, reverse=True):  # steps before minutes
        for name in VARIANTS:
            own = [row for key, row in sorted(one.items()) if key[:2] == (budget, name)]
            if own:
                found.setdefault(budget, {})[name] = own
    return found


def page(found: dict[str, dict[str, list[Result]]]) -> str:
    """The tables of every budget."""
    parts = []
    for budget, variants in found.items():
        seeds = sorted({row["seed"] for rows in variants.values() for row in rows})
        first = next(iter(variants.values()))[0]
        parts += [
            f"## The same {budget}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}",
            f"{describe(first['machine'])}. {first['count']:,} images a variant beside the held-out ones; features of "
            f"{first['network']}, so that the figures are not to be compared with published ones. Guidance is the best "
            "of the sweep for each variant, chosen on other images. In brackets the 95 % interval of one seed "
            "(bootstrap over images: it says nothing of another training), or the least and largest of several seeds.",
            f"A masked variant spends {1 - MASKED_SHARE:.0%} of the budget on stage 1 and the rest on stage 2; `on "
            f"top` is stage 2 after a whole stage 1: {1 + MASKED_SHARE:.2f} budgets.",
            quality_table(variants), cost_table(variants), "### FID by guidance", guidance_table(variants),
        ]  # fmt: skip
        if any("mask_sweep" in row for rows in variants.values() for row in rows):
            parts += ["### FID by mask schedule and guidance of mask passes", mask_table(variants)]
    return "\n\n".join(parts) + "\n"


def quality_table(variants: dict[str, list[Result]]) -> str:
    """A variant a row, a measure a column."""
    measures = [name for name in MEASURES if any(name in row["figures"] for rows in variants.values() for row in rows)]
    heads = ["variant", *(f"{name}{' × 1000' if MEASURES[name][1] > 1 else ''}" for name in measures), "guidance",
             "validation loss"]  # fmt: skip
    lines = [
        [
            rows[0]["label"], *(interval(rows, name) for name in measures),
            ", ".join(sorted({f"{row['cfg']:g}" for row in rows})),
            spread(rows, lambda row: row["training"]["validation"]["all_scales"], 4)
            + (" (masked tokens)" if VARIANTS[name].masked else ""),
        ]
        for name, rows in variants.items()
    ]  # fmt: skip
    return markdown_table(heads, lines)


def cost_table(variants: dict[str, list[Result]]) -> str:
    """What training and sampling cost."""
    heads = ["variant", "parameters", "steps", "images", "training s", "images/s", "peak GB", "passes",
             "sampling ms/image", "kernel by kernel"]  # fmt: skip
    lines = []
    for rows in variants.values():
        timed = [row["sampling"] for row in rows]
        lines.append(
            [
                rows[0]["label"], f"{rows[0]['parameters']:,}", f"{rows[0]['training']['steps']:,}",
                f"{rows[0]['training']['images']:,}", spread(rows, lambda row: row["training"]["seconds"], 0),
                spread(rows, lambda row: row["training"]["images_per_second"], 0),
                spread(rows, lambda row: row["training"]["peak_memory_bytes"] / 1e9, 2), str(rows[0]["passes"]),
                f"{statistics.mean(t['default_ms'] for t in timed):.3f}"
                + (" (graph)" if timed[0]["graphs"] else ""),
                f"{statistics.mean(t['plain_ms'] for t in timed):.3f}",
            ]
        )  # fmt: skip
    batch = next(iter(variants.values()))[0]["sampling"]["batch"]
    return (
        f"{markdown_table(heads, lines)}\n\nTraining s is images by the median rate, stage 1 counted in; images/s and "
        f"memory are of the last stage. Sampling in batches of {batch}."
    )


def guidance_table(variants: dict[str, list[Result]]) -> str:
    """FID of the sweep's images, means over seeds."""
    grid = list(next(iter(variants.values()))[0]["fid_by_cfg"])
    lines = [
        [rows[0]["label"], *(f"{statistics.mean(row['fid_by_cfg'][cfg] for row in rows):.2f}" for cfg in grid)]
        for rows in variants.values()
    ]
    return markdown_table(["variant", *(f"cfg {cfg}" for cfg in grid)], lines)


def mask_table(variants: dict[str, list[Result]]) -> str:
    """A schedule a row, FID and ms of each masked variant, means over seeds."""
    swept = {name: [row for row in rows if "mask_sweep" in row] for name, rows in variants.items()}
    swept = {name: rows for name, rows in swept.items() if rows}
    trials = next(iter(swept.values()))[0]["mask_sweep"]
    lines = []
    for number, trial in enumerate(trials):
        cells = []
        for rows in swept.values():
            own = [row["mask_sweep"][number] for row in rows]
            cells += [
                f"{statistics.mean(t[key] for t in own):.{digits}f}" for key, digits in (("fid", 2), ("plain_ms", 3))
            ]
        lines.append([trial["schedule"], str(trial["passes"]), f"{trial['mask_cfg']:g}", *cells])
    names = [cell for rows in swept.values() for cell in (rows[0]["label"], "ms")]
    return markdown_table(["schedule", "passes", "mask_cfg", *names], lines)


def interval(rows: list[Result], name: str) -> str:
    """Value with its interval of one seed; mean with the extremes of several."""
    digits, times = MEASURES[name]
    own = [row["figures"][name] for row in rows if name in row["figures"]]
    if not own:
        return "–"
    if len(own) > 1:
        return spread(own, lambda figure: times * figure["value"], digits)
    figure = own[0]
    if figure["low"] is None:
        return f"{times * figure['value']:.{digits}f}"
    return (
        f"{times * figure['value']:.{digits}f} ({times * figure['low']:.{digits}f}–{times * figure['high']:.{digits}f})"
    )


def spread(rows: list[Any], of: Callable[[Any], float], digits: int) -> str:
    """Mean, with the least and largest of several."""
    values = [of(row) for row in rows]
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def plot(found: dict[str, dict[str, list[Result]]], path: Path) -> None:
    """FID of every variant with its interval, and FID against the time of sampling; a row a budget."""
    figure = Figure(figsize=(13, 4.6 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), (budget, variants) in zip(axes, found.items(), strict=True):
        _intervals(left, variants)
        left.set_title(f"FID, the same {budget} (95 % of each seed)", loc="left")
        _against_time(right, variants)
    temporary = path.with_suffix(".part.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)


def _intervals(axes: Any, variants: dict[str, list[Result]]) -> None:
    for place, rows in enumerate(variants.values()):
        for number, row in enumerate(rows):
            fid = row["figures"]["FID"]
            reach = 0.0 if fid["low"] is None else fid["value"] - fid["low"]
            shift = 0.12 * (number - (len(rows) - 1) / 2)
            axes.errorbar(fid["value"], place + shift, xerr=reach, fmt="o", color=f"C{place}", capsize=3)
    axes.set_yticks(range(len(variants)), [rows[0]["label"] for rows in variants.values()])
    axes.set_ylim(len(variants) - 0.5, -0.5)
    network = next(iter(variants.values()))[0]["network"].partition(" ")[0]
    axes.set_xlabel(f"FID on features of {network}, lower is better")
    axes.grid(axis="x", alpha=0.3)


def _against_time(axes: Any, variants: dict[str, list[Result]]) -> None:
    """Kernel by kernel, so that all are timed alike; masked variants under every schedule of the sweep."""
    for place, rows in enumerate(variants.values()):
        colour, label = f"C{place}", rows[0]["label"]
        points = [(t["plain_ms"], t["fid"]) for row in rows for t in row.get("mask_sweep", []) if not t["mask_cfg"]]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, marker="x", label=f"{label}, schedules")
        else:
            own = [(row["sampling"]["plain_ms"], min(row["fid_by_cfg"].values())) for row in rows]
            axes.scatter(*zip(*own, strict=True), color=colour, label=label)
    axes.set_title("FID of the sweep's images against time", loc="left")
    axes.set(xlabel="sampling, ms an image, kernel by kernel", ylabel="FID")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def grids(out: Path, results: Path) -> None:
    """The same classes and seeds from every variant of this machine's first seed, a row each."""
    folder = min((path.parent for path in results.glob("*-seed*/*.png")), default=None)
    if folder is None:
        return
    strips = {
        variant.label: folder / f"{name}.png"
        for name, variant in VARIANTS.items()
        if (folder / f"{name}.png").is_file()
    }
    figure = Figure(figsize=(14, 0.8 * len(strips) + 0.4), layout="constrained")
    for axes, (label, path) in zip(np.atleast_1d(figure.subplots(len(strips), 1)), strips.items(), strict=True):
        with Image.open(path) as image:
            axes.imshow(np.asarray(image), interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(label.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(f"Classes in turn, the same seeds, guidance 1.5 ({folder.name})", fontsize=10)
    temporary = out / "grids.part.png"
    figure.savefig(temporary, dpi=110)
    temporary.replace(out / "grids.png")
