"""The tables of parity, resharding, faults and memory as one page.

    HMAR_TABLES=out .venv/bin/python -m pytest -q tests/dist
    .venv/bin/python tests/dist/table_page.py out > benchmarks/results/parallel.md
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

HEAD = """# Parallel training: parity, resharding, faults

Written by `tests/dist/table_page.py` from what the process tests measured (`HMAR_TABLES=FOLDER pytest tests/dist`): tiny
models in float32, gloo processes on 2 CPU cores; and over NCCL on two H100 (`pytest tests/gpu/test_nccl.py`).
"""


def rows(folder: Path, table: str) -> list[dict[str, Any]]:
    path = folder / f"{table}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parity(folder: Path) -> str:
    """Of every layout, the largest differences over its cases."""
    by_layout: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows(folder, "parity"):
        if "layout" in row:
            by_layout[row["layout"]].append(row)
    lines = [
        "## Parity with one process", "",
        "Largest differences after 3 optimizer steps over the cases of a layout: losses in nats, norms and weights absolute,",
        "Adam moments relative to the largest element of their tensor. Allowed: 1e-6, moments 1e-5.", "",
        "| layout | cases | losses | norms | weights | moments |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for layout, found in by_layout.items():
        worst = [max(row[key] for row in found) for key in ("losses", "norms", "weights", "moments")]
        cases = ", ".join(sorted({row["case"] for row in found}))
        lines.append(f"| {layout} | {cases} | " + " | ".join(f"{value:.1e}" for value in worst) + " |")
    return "\n".join(lines)


def table(title: str, text: str, found: list[dict[str, Any]]) -> str:
    """Rows as they are, a column a key."""
    if not found:
        return ""
    keys = list(dict.fromkeys(key for row in found for key in row))
    lines = [f"## {title}", "", text, "", "| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    lines += ["| " + " | ".join(shown(row.get(key, "")) for key in keys) + " |" for row in found]
    return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if abs(value) < 1e-2 else f"{value:.1f}"
    return str(value)


def main(folder: Path) -> None:
    """Print the page."""
    unique = {(row["first"], row["second"]): row for row in rows(folder, "resharding")}
    parts = [
        HEAD, parity(folder),
        table("Parity over NCCL, two H100", "Against one H100, 3 steps of a model of 4 layers, all draws on.",
              rows(folder, "parity_nccl")),
        table("Resharding", "Half a run on the first layout, the rest on the second: differences at the end from a run of one "
              "process that never stopped. On the same layout runs go on bit for bit.", list(unique.values())),
        table("Stopping and losing processes", "Seconds until the last process had left, the save included; all runs then went on "
              "to the weights of an undisturbed run.", rows(folder, "faults")),
        table("Memory of saving and loading, MiB above the start", "66.7 M parameters: 255 MiB of weights, 764 MiB with moments.",
              rows(folder, "memory")),
    ]  # fmt: skip
    print("\n\n".join(part.strip() for part in parts if part))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
