"""A run goes on only in the order it was begun in; checkpoints of before there was a choice had the global one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hmar_mega.checkpoint.resume import _check_order
from hmar_mega.config_io import load_config
from hmar_mega.errors import UserError

MIX = "data.mix=[{path: a, weight: 3}, {path: b, weight: 1}]"


def data_of(*overrides: str) -> dict[str, Any]:
    return load_config(None, list(overrides)).model_dump(mode="json")["data"]


@pytest.mark.parametrize(
    ("stored", "now", "message"),
    [
        ((), ("data.shuffle=groups",), r"data\.shuffle=groups, but .* started with global"),
        (("data.shuffle=groups",), ("data.shuffle=groups", "data.group_shards=3"), r"data\.group_shards=3"),
        ((), (MIX,), r"data\.mix \(its weights\)=\[3, 1\]"),
        ((MIX,), ("data.mix=[{path: a, weight: 1}, {path: b, weight: 1}]",), r"\[1, 1\].*\[3, 1\]"),
        ((), ("data.reader=webdataset",), r"data\.reader=webdataset"),
    ],
)
def test_another_order_is_refused(stored, now, message):
    with pytest.raises(UserError, match=message):
        _check_order(data_of(*stored), data_of(*now), Path("run"))


def test_folders_may_move_and_what_does_not_matter_may_change():
    _check_order(data_of(MIX), data_of(MIX.replace("path: a", "path: elsewhere/a")), Path("run"))
    _check_order(data_of(), data_of("data.group_shards=3", "data.workers=7", "data.cache=/tmp"), Path("run"))
    old = {key: value for key, value in data_of().items() if key in ("train", "global_batch_size")}
    _check_order(old, data_of(), Path("run"))
