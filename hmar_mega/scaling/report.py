"""What `sweep fit` shows and writes: tables on the terminal, fit.json, and a page with everything in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hmar_mega import report_page
from hmar_mega.files import write_atomic
from hmar_mega.scaling.fitting import Fit, Law, Prediction
from hmar_mega.scaling.laws import COVERAGE
from hmar_mega.scaling.plots import NO_FLOOR, draw_all

LAW_COLUMNS = ("quantity", "in", "runs", "exponent", "95 % interval", "scale at 1", "irreducible", "spread", "Pearson")


def write_fit(fit: Fit, name: str, out: Path) -> Path:
    """Write fit.json, the PNGs and index.html into a folder; returns the page."""
    pictures = draw_all(fit, out)
    write_atomic(out / "fit.json", json.dumps(fit_json(fit), indent=1))
    page = out / "index.html"
    write_atomic(page, _page(fit, name, pictures))
    return page


def show_fit(fit: Fit, name: str, console: Console) -> None:
    """Tables of laws and predictions, and notes."""
    table = Table(title=f"sweep {name}: power laws", box=None)
    for column in LAW_COLUMNS:
        table.add_column(column, justify="left" if column in ("quantity", "in") else "right", no_wrap=True)
    for law in fit.laws:
        if law.law is not None:
            table.add_row(*_law_cells(law))
    console.print(table)
    for text in [*_sentences(fit), *fit.notes, *_missing(fit)]:
        console.print(f"· {text}", highlight=False)


def fit_json(fit: Fit) -> dict[str, Any]:
    """Everything for programs; intervals cover `coverage`."""
    return {
        "coverage": COVERAGE,
        "points": [asdict(point) for point in fit.points],
        "laws": [_law_json(law) for law in fit.laws],
        "predictions": [{**asdict(p), "relative_error": p.error} for p in fit.predictions],
        "iso_flop": [asdict(parabola) for parabola in fit.parabolas],
        "frontier": None if fit.line is None else asdict(fit.line),
        "recommendations": [asdict(r) for r in fit.recommendations],
        "notes": [*fit.notes, *_missing(fit)],
    }


def _law_json(law: Law) -> dict[str, Any]:
    about: dict[str, Any] = {
        "quantity": law.quantity, "variable": law.variable, "with_irreducible": law.irreducible,
        "cells": [point.cell for point in law.points], "why_not": law.why_not,
    }  # fmt: skip
    if law.law is not None:
        values = asdict(law.law)
        values.pop("bootstrap")
        about |= values
    return about


def _law_cells(law: Law) -> list[str]:
    found = law.law
    assert found is not None
    low, high = found.exponent_interval
    floor = "–"
    if law.irreducible:
        lowest, highest = found.irreducible_interval
        floor = f"{_floor(found.irreducible)} [{_floor(lowest)}, {_floor(highest)}]"
    return [
        law.quantity, law.variable, str(found.points), f"{found.exponent:.4f}", f"[{low:.4f}, {high:.4f}]",
        f"{found.scale:.3g}", floor, f"{found.spread:.2%}", f"{found.correlation:.3f}",
    ]  # fmt: skip


def _floor(value: float) -> str:
    return "0" if value < NO_FLOOR else f"{value:.3g}"


def _sentences(fit: Fit) -> list[str]:
    said = [_prediction_words(p) for p in fit.predictions]
    if fit.line is not None:
        said.append(f"compute-optimal frontier: N_opt = {fit.line.scale:.3g} · C^{fit.line.exponent:.3f}")
    for r in fit.recommendations:
        beyond = "" if r.extrapolated <= 1.001 else f", {r.extrapolated:.3g} × beyond the largest budget measured"
        said.append(
            f"with {r.flops:.3g} FLOPs train depth {r.depth} ({r.non_embedding / 1e6:,.2f} M in blocks, wanted "
            f"{r.wanted / 1e6:,.2f} M) on {r.images:,.0f} images{beyond}"
        )
    return said


def _prediction_words(p: Prediction) -> str:
    kind = "with" if p.irreducible else "without"
    when = f"before it was measured ({p.made})" if p.before else "leaving its own runs out"
    text = (
        f"{p.quantity} of the largest size ({p.size / 1e6:,.2f} M in blocks, {p.images:,} images), predicted from "
        f"{len(p.from_cells)} smaller runs {kind} irreducible term, {when}: {p.predicted:.4f} "
        f"[{p.low:.4f}, {p.high:.4f}]"
    )
    if p.measured is None or p.error is None:
        return f"{text}; not measured yet"
    return f"{text}; measured {p.measured:.4f}, so that the prediction is off by {p.error:+.2%}"


def _missing(fit: Fit) -> list[str]:
    """Laws that could not be fitted, with one line for each reason."""
    reasons: dict[tuple[str, str], int] = {}
    for law in fit.laws:
        if law.law is None:
            key = (law.variable, law.why_not)
            reasons[key] = reasons.get(key, 0) + 1
    return [f"{count} laws in {variable} not fitted: {why}" for (variable, why), count in reasons.items()]


def _page(fit: Fit, name: str, pictures: Mapping[str, Path]) -> str:
    laws = {
        f"{law.quantity} in {law.variable}{', with E' if law.irreducible else ''}": _law_cells(law)[2:]
        for law in fit.laws
        if law.law is not None
    }
    runs = {
        point.cell: [
            f"{point.non_embedding:,}", f"{point.images:,}", f"{point.flops:.3g}",
            *(_value(point.values.get(q)) for q in ("loss/last", "loss/all", "error/last", "error/all")),
        ]
        for point in fit.points
    }  # fmt: skip
    parts = [
        report_page.element("h1", f"Scaling laws of {name}"),
        report_page.element(
            "p",
            f"{len(fit.points)} finished runs. Losses in nats a token on validation data; errors are how often the "
            "most likely token is not the right one. Laws are A·x^−α, with E added where said; fitted to logarithms "
            "under Huber's loss, intervals from resampled residuals.",
            "lead",
        ),
        *(report_page.element("p", text) for text in [*_sentences(fit), *fit.notes, *_missing(fit)]),
        *(report_page.picture(path, caption) for caption, path in pictures.items()),
        report_page.element("h2", "Laws"),
        report_page.comparison(LAW_COLUMNS[2:], laws),
        report_page.element("h2", "Runs"),
        report_page.comparison(("blocks", "images", "FLOPs", "loss last", "loss all", "error last", "error all"), runs),
    ]
    return report_page.page(f"Scaling laws of {name}", parts)


def _value(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"
