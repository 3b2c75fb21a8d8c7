"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One line of the report.

    Attributes:
        status: `ok`, `warning` (something will be slow, small or untested) or `missing`.
        advice: what it means and what to do; empty when all is well.
    """

    name: str
    value: str
    status: str = "ok"
    advice: str = ""
