"""What damage does to shards and to making them: everything is told, named and counted (benchmarks/data_damage.py)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import data_damage
import pytest

#: Scenario → the problems told, samples lost.
EXPECTED = {
    "garbage_header": (["checksum", "headers", "count"], 5),
    "changed_bytes": (["checksum", "content"], 1),
    "wrong_checksum": (["checksum"], 0),
    "missing_shard": (["missing"], 8),
    "shard_twice_in_index": (["twice"], 0),
    "shard_copied": (["unknown"], 0),
    "copy_in_index": (["twice"], 0),
    "empty_shard": (["size", "count"], 8),
    "zero_bytes": (["size", "headers", "count"], 8),
    "stale_offsets": (["offsets"], 0),
    "token_out_of_range": (["content", "content", "content"], 24),
    "other_tokenizer": (["tokenizer", "tokenizer", "tokenizer"], 0),
    "index_cut": (["error"], 24),
    "bad_images": (["skipped", "skipped", "skipped"], 3),
    "full_while_sharding": (["error"], 0),
    "full_while_encoding": (["error"], 0),
    "read_only": (["error"], 0),
}

#: What names the damaged thing, where it is not the second shard.
NAMED = {
    "shard_copied": "shard-000009.tar",
    "copy_in_index": "shard-000009.tar",
    "index_cut": "images/index.json",
    "bad_images": "b/half.jpg",
    "full_while_sharding": "images.partial/shard-",
    "full_while_encoding": "tokens.partial/",
    "read_only": "place/images",
}


def can_mount(folder: Path) -> bool:
    """Whether this process may mount file systems."""
    place = folder / "mounted"
    place.mkdir()
    mounted = data_damage._mount(place, "ro")
    if mounted:
        subprocess.run(["umount", str(place)], check=True)
    return mounted


def test_every_scenario_has_its_expectation():
    assert {scenario.__name__ for scenario in data_damage.SCENARIOS} == set(EXPECTED)


@pytest.mark.parametrize("scenario", data_damage.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_damage_is_told_named_and_counted(scenario, tmp_path):
    if scenario is data_damage.read_only and os.geteuid() == 0 and not can_mount(tmp_path):
        pytest.skip("root may write anywhere, and cannot mount a read-only file system here")
    row = scenario(tmp_path)
    assert (list(row.kinds), row.lost) == EXPECTED[scenario.__name__]
    assert NAMED.get(scenario.__name__, "shard-000001.tar") in row.said


def test_a_tar_cut_anywhere_is_told_and_what_is_lost_is_exact(tmp_path):
    """The scenario itself compares the samples lost with the places of the samples."""
    rows = list(data_damage.truncations(tmp_path))
    assert len(rows) == 20
    assert all(row.kinds[0] == "size" and "shard-000001.tar: truncated" in row.said for row in rows)
    assert {row.lost for row in rows} > {1, 8}


def test_a_source_tar_cut_anywhere_stops_or_is_counted(tmp_path):
    rows = list(data_damage.source_truncations(tmp_path))
    assert len(rows) == 20
    assert all(row.kinds and "shard-000001.tar" in row.said for row in rows if row.lost)
    assert {row.lost for row in rows} > {1, 8}


def test_the_table_has_a_line_a_row(tmp_path: Path):
    row = data_damage.Row("cut", ("size", "size"), "a | b", 3, 8)
    assert data_damage.table([row]).splitlines()[-1] == "| cut | size | a / b | 3 of 8 |"
