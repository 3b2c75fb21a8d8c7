"""The files of a checkpoint: shards, checksums, and the folder in which they come and go."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hmar_mega.checkpoint import folders
from hmar_mega.checkpoint.checksums import find_damage, read_sums, sha256_of, write_sums
from hmar_mega.checkpoint.folders import REMOVING, SAVING, commit, open_folder, prune, step_name
from hmar_mega.checkpoint.layout import Box
from hmar_mega.checkpoint.shards import ShardFile, write_shard
from hmar_mega.checkpoint.sources import REPLACED, find_checkpoint
from hmar_mega.errors import UserError

# -------------------------------------------------------------------------------------------------------------- shards


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), cut=st.integers(0, 240))
def test_a_shard_is_a_safetensors_file_however_its_values_arrive(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], cut: int
):
    values = torch.randn(sum(counts))
    path = tmp_path_factory.mktemp("shard") / "a.safetensors"
    pieces = [(f"key/{number}", count) for number, count in enumerate(counts)]
    digest = write_shard(path, pieces, [values[:cut], values[cut:]])
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert torch.equal(torch.cat([read[key] for key, _ in pieces]), values)
    last_key, last = pieces[-1]
    target = torch.empty(last - last // 2)
    ShardFile(path).read_into(last_key, last // 2, last, target)
    assert torch.equal(target, read[last_key][last // 2 :])


def test_shards_that_the_library_wrote_are_read(tmp_path: Path):
    save_file({"b": torch.arange(5.0), "a": torch.arange(7.0)}, tmp_path / "x")
    target = torch.empty(2)
    ShardFile(tmp_path / "x").read_into("a", 3, 5, target)
    assert target.tolist() == [3, 4]


@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_a_shard_cut_short_is_noticed_when_it_is_opened(tmp_path: Path, keep: int):
    write_shard(tmp_path / "x", [("a", 100)], [torch.zeros(100)])
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"header|bytes instead|utf|Expecting"):
        ShardFile(tmp_path / "x")


def test_values_outside_a_tensor_are_refused(tmp_path: Path):
    write_shard(tmp_path / "x", [("a", 4), ("b", 4)], [torch.zeros(8)])
    with pytest.raises(ValueError, match="no elements 3 to 5"):
        ShardFile(tmp_path / "x").read_into("a", 3, 5, torch.empty(2))
    with pytest.raises(ValueError, match="no tensor c"):
        ShardFile(tmp_path / "x").read_into("c", 0, 1, torch.empty(1))
    with pytest.raises(ValueError, match="was given 28"):
        write_shard(tmp_path / "x", [("a", 8)], [torch.zeros(7)])


shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(shape=shapes, data=st.data())
def test_rows_and_stripes_of_a_block_hold_the_elements_they_say(shape: tuple[int, ...], data: st.DataObject):
    box = Box((0,) * len(shape), shape)
    flat = torch.arange(box.numel)
    first = data.draw(st.integers(0, box.numel - 1))
    last = data.draw(st.integers(first + 1, box.numel))
    part, start = box.rows(first, last)
    assert start <= first < last <= start + part.numel
    assert torch.equal(flat.view(shape)[part.slices_in(box)].flatten(), flat[start : start + part.numel])
    begin, end = box.span_of(part)
    assert (begin, end) == (start, start + part.numel)
    stripes = list(box.stripes(begin, end, data.draw(st.integers(1, 20))))
    assert torch.cat([flat[at : at + s.numel] for s, at in stripes]).tolist() == list(range(begin, end))


# ----------------------------------------------------------------------------------------------------------- checksums


def test_checksums_are_those_of_the_system_s_own_tool(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"a" * 100)
    (tmp_path / "b.json").write_text("{}")
    write_sums(tmp_path, {name: sha256_of(tmp_path / name) for name in ("b.json", "a.bin")})
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, check=True, capture_output=True)
    sums = read_sums(tmp_path)
    assert sums is not None
    assert find_damage(tmp_path, sums) == []
    (tmp_path / "a.bin").write_bytes(b"a" * 99 + b"b")
    (tmp_path / "b.json").unlink()
    one, two = find_damage(tmp_path, sums)
    assert (one.file, one.expected, one.actual) == ("a.bin", sums["a.bin"], sha256_of(tmp_path / "a.bin"))
    assert str(two) == f"b.json: expected sha256 {sums['b.json']}, found nothing (No such file or directory)"


@pytest.mark.parametrize("content", [b"not a sum\n", b"0" * 64 + b"  ../outside\n", b"\xff\xfe"])
def test_a_damaged_list_of_checksums_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "SHA256SUMS").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_sums(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    assert read_sums(tmp_path) is None


# -------------------------------------------------------------------------------------------------------------- folder


def saved(run: Path, step: int, content: str, best: bool = False) -> Path:
    temporary = open_folder(run, step)
    (temporary / "state.json").write_text(json.dumps({"by": content}))
    return commit(run, temporary, best)


def content(run: Path, which: str = "latest") -> str | None:
    found = find_checkpoint(run, which)
    return None if found is None else json.loads((found / "state.json").read_text())["by"]


def test_pointers_move_when_the_checkpoint_is_there(tmp_path: Path):
    saved(tmp_path, 1, "one", best=True)
    saved(tmp_path, 2, "two")
    assert (content(tmp_path), content(tmp_path, "best")) == ("two", "one")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "best", "latest", "step-00000001", "step-00000002",
    ]  # fmt: skip


def test_killed_before_the_first_pointer_was_written_the_newest_checkpoint_is_found(tmp_path: Path, caplog):
    saved(tmp_path, 1, "one")
    saved(tmp_path, 2, "two")
    (tmp_path / "checkpoints" / "latest").unlink()
    assert content(tmp_path) == "two"
    assert "latest is missing" in caplog.text
    (tmp_path / "checkpoints" / "latest").write_text("step-00000009\n")  # somebody removed what it names
    with pytest.raises(UserError, match="names no complete checkpoint"):
        content(tmp_path)


class Killed(BaseException):
    """Stands for a kill: nothing that catches errors may run on it."""


@pytest.mark.parametrize("pointers", ["latest", "latest and best"])
def test_wherever_a_kill_falls_while_a_step_is_saved_again_every_pointer_finds_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pointers: str
):
    both = pointers == "latest and best"
    outcomes, moment = [], 0
    while True:
        moment += 1
        run, left = tmp_path / str(moment), moment
        saved(run, 1, "old", best=both)

        def before(action, left=[left]):  # noqa: B006
            def counted(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return action(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(Path, name, before(getattr(Path, name)))
            for name in ("sync_path", "write_atomic"):
                patch.setattr(folders, name, before(getattr(folders, name)))
            patch.setattr(shutil, "rmtree", before(shutil.rmtree))
            try:
                saved(run, 1, "new", best=both)
            except Killed:
                killed = True
            else:
                killed = False
        outcomes.append(content(run))
        assert content(run) in ("old", "new")
        assert not both or content(run, "best") == content(run)
        assert content(run, step_name(1)) == content(run)
        saved(run, 2, "after")
        assert content(run) == "after"
        assert content(run, step_name(1)) in ("old", "new")
        assert not list((run / "checkpoints").glob(".*")), "the next save sweeps up"
        if not killed:
            break
    assert {"old", "new"} == set(outcomes)
    assert moment > 5


def test_pruning_keeps_the_last_the_best_and_the_multiples(tmp_path: Path):
    for step in range(1, 11):
        saved(tmp_path, step, str(step), best=step == 3)
        prune(tmp_path, tmp_path / "checkpoints" / step_name(step), keep_last=2, keep_every=4)
        (tmp_path / "checkpoints" / "step-00000001-my-copy").mkdir(exist_ok=True)
    left = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert left == ["step-00000001-my-copy", *(step_name(step) for step in (3, 4, 8, 9, 10))]


def test_a_best_that_lies_beyond_a_step_gone_back_to_goes_with_its_pointer(tmp_path: Path):
    for step in (1, 2, 3):
        saved(tmp_path, step, str(step), best=step == 3)
    prune(tmp_path, saved(tmp_path, 2, "again"), keep_last=1, keep_every=3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", step_name(2)]


def test_what_a_kill_left_never_passes_for_a_checkpoint(tmp_path: Path):
    saved(tmp_path, 1, "one")
    folder = tmp_path / "checkpoints"
    for name in (f"{SAVING}{step_name(2)}", f"{REMOVING}{step_name(1)}", f"{REPLACED}{step_name(1)}"):
        (folder / name).mkdir()
        (folder / name / "state.json").write_text('{"by": "nobody"}')
    assert content(tmp_path) == "one"
    assert content(tmp_path, step_name(2)) is None
    saved(tmp_path, 3, "three")
    assert sorted(path.name for path in folder.iterdir()) == ["latest", step_name(1), step_name(3)]
