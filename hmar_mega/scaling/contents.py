"""Fingerprints of what a cell reads, so that data encoded anew in the same folder make another cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmar_mega.data.index import INDEX_NAME, read_index
from hmar_mega.errors import UserError

#: Names of contents in a cell's identity, by the setting that holds the folder.
CONTENTS = {
    "data.train": "contents of data.train",
    "data.val": "contents of data.val",
    "tokenizer.path": "contents of tokenizer.path",
}


def contents_of(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """16 hexadecimal digits for each of CONTENTS; None for what is not here.

    Shards: of their index, which has the checksum of every shard. Tokenizer: its own fingerprint.

    Args:
        settings: a configuration as a tree.

    Raises:
        UserError: for a folder whose description is damaged.
    """
    found: dict[str, str | None] = {}
    for setting, name in CONTENTS.items():
        section, key = setting.split(".")
        folder = (settings.get(section) or {}).get(key)
        fingerprint = _tokenizer if section == "tokenizer" else _shards
        found[name] = None if folder is None else fingerprint(Path(folder))
    return found


def missing_contents(settings: Mapping[str, Any], contents: Mapping[str, str | None]) -> list[str]:
    """`setting=folder` of what could not be looked at."""
    names = [setting for setting, name in CONTENTS.items() if contents[name] is None]
    return [f"{name}={(settings.get(name.split('.')[0]) or {}).get(name.split('.')[1])}" for name in names]


def _shards(folder: Path) -> str | None:
    if not (folder / INDEX_NAME).is_file():
        return None
    described = read_index(folder).model_dump_json(exclude={"skipped"})
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _tokenizer(folder: Path) -> str | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"{path} is not the description of a tokenizer ({err}); train or copy it again") from None
