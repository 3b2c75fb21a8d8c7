"""The figures of `attention.py` as text: a line while it runs, ratios, and the tables of its page."""

from __future__ import annotations

from typing import Any

from common import Limits, Timing, describe, markdown_table

#: What is timed of every contender.
PARTS = ("forward", "backward", "both")


def live_line(found: dict[str, Any]) -> str:
    """One contender: times with their spread, errors, or why there are none."""
    text = f"  {found['name']:12} {found['kind']:6}"
    for kind in ("alone", "whole"):
        if kind in found:
            text += f" {kind} {' / '.join(_spread(found[kind][part]) for part in PARTS)}"
    if "error" in found:
        text += f" error {' '.join(f'{name} {value:.1e}' for name, value in found['error'].items())}"
    return text + (f" {found['failed']}" if "failed" in found else "")


def ratios(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of the backend of ours that is fastest forward and backward together, for each part.

    Returns:
        `limit`: its time over the floor; `alone`, `whole`: its time over that of
        the rival which is fastest in that part. Below 1 is faster. Missing where there is nothing to compare with.
    """
    best = best_of_ours(row)
    if best is None:
        return {}
    compared = {"limit": {part: best["whole"][part].median / row["floor"][part]["ms"] for part in PARTS}}
    for kind in ("alone", "whole"):
        fastest = best_rivals(row, kind)
        if fastest:
            compared[kind] = {part: best["whole"][part].median / fastest[part][1] for part in PARTS}
    return compared


def best_of_ours(row: dict[str, Any]) -> dict[str, Any] | None:
    """The backend of ours with the least time forward and backward together."""
    timed = [found for found in row["contenders"] if found["kind"] == "ours" and "whole" in found]
    return min(timed, key=lambda found: found["whole"]["both"].median, default=None)


def best_rivals(row: dict[str, Any], kind: str) -> dict[str, tuple[str, float]]:
    """Name and milliseconds of the fastest rival of each part, by `alone` or `whole` times; empty without rivals."""
    timed = [found for found in row["contenders"] if found["kind"] == "rival" and kind in found]
    if not timed:
        return {}
    return {part: min((f[kind][part].median, f["name"]) for f in timed)[::-1] for part in PARTS}


def page(results: dict[str, Any]) -> str:
    """All tables as Markdown."""
    about = describe(results["machine"], Limits(**results["limits"]))
    names = list(dict.fromkeys(found["name"] for row in results["rows"] for found in row["contenders"]))
    sections = [
        f"{about}; {results['dtype']}. Medians in ms with a cold cache.",
        "Ours, with QK normalisation and scale, and how it compares (ratios of forward / backward / both; below 1 is "
        "faster; `limit` is the least time that the bytes or FLOPs can take here). The last column is the published "
        "implementation's autotuned Triton kernels in fp16, alone, measured on another H100.",
        _summary(results["rows"]),
        "Attention alone, forward / backward (ours as above, with normalisation):",
        _times_table(results["rows"], names, "alone"),
        "Whole, from the packed projection to the block's output, forward / backward / both:",
        _times_table(results["rows"], names, "whole"),
        "Relative errors against float32 (output, gradient of the projection, of the scales):",
        _errors_table(results["rows"], names),
    ]
    failures = [
        f"- {_label(row)}: {found['name']} {found['failed']}"
        for row in results["rows"]
        for found in row["contenders"]
        if "failed" in found
    ]
    if failures:
        sections += ["Not timed:", "\n".join(failures)]
    launched = [
        f"- {_label(row)}: {found['name']}: {found['launched']}"
        for row in results["rows"]
        for found in row["contenders"]
        if "launched" in found
    ]
    if launched:
        sections += [
            "Launched from the host, whose time counts; the others are replayed CUDA graphs:",
            "\n".join(launched),
        ]
    return "\n\n".join(sections)


def _summary(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        best, compared = best_of_ours(row), ratios(row)
        bound = row["floor"]["forward"]["bound"]
        floor = f"{row['floor']['forward']['ms']:.3f} / {row['floor']['backward']['ms']:.3f} ({bound})"
        own = "–" if best is None else f"{best['name']} {_medians(best['whole'], PARTS)}"
        fastest = best_rivals(row, "alone")
        rival = " / ".join("{} {:.3f}".format(*fastest[part]) for part in PARTS[:2]) if fastest else "–"
        published = " / ".join(f"{ms:.3f}" for ms in row["published"]) if row["published"] else "–"
        given = [" / ".join(f"{r:.2f}" for r in compared[k].values()) if k in compared else "–"
                 for k in ("limit", "alone", "whole")]  # fmt: skip
        cells.append([_label(row), floor, own, given[0], rival, given[1], given[2], published])
    return markdown_table(
        ["N, B, H", "limit", "ours", "ours / limit", "best rival alone", "ours / best alone", "ours / best whole",
         "published"], cells,
    )  # fmt: skip


def _times_table(rows: list[dict[str, Any]], names: list[str], kind: str) -> str:
    parts = PARTS[:2] if kind == "alone" else PARTS

    def cell(row: dict[str, Any], name: str) -> str:
        found = next((f for f in row["contenders"] if f["name"] == name), {})
        shown = found.get("whole" if found.get("kind") == "ours" else kind)
        return "–" if shown is None else _medians(shown, parts)

    return markdown_table(["N, B, H", *names], [[_label(row), *(cell(row, name) for name in names)] for row in rows])


def _errors_table(rows: list[dict[str, Any]], names: list[str]) -> str:
    def cell(row: dict[str, Any], name: str) -> str:
        error = next((f.get("error") for f in row["contenders"] if f["name"] == name), None)
        return "–" if error is None else " / ".join(f"{value:.1e}" for value in error.values())

    return markdown_table(["N, B, H", *names], [[_label(row), *(cell(row, name) for name in names)] for row in rows])


def _label(row: dict[str, Any]) -> str:
    return f"{row['pattern']} {row['tokens']}, {row['batch']}, {row['heads']}"


def _medians(times: dict[str, Timing], parts: tuple[str, ...]) -> str:
    return " / ".join(f"{times[part].median:.3f}" for part in parts)


def _spread(timing: Timing) -> str:
    return f"{timing.median:.3f} [{timing.low:.3f}–{timing.high:.3f}]"
