"""What parity and fault tests measured, for those who want to read it: rows in $HMAR_TABLES/NAME.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def record(table: str, **row: Any) -> None:
    """Append a row to a table, where the environment names a folder for them; else do nothing."""
    folder = os.environ.get("HMAR_TABLES")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with (Path(folder) / f"{table}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
