"""`hmar-mega checkpoint list|verify|show|convert` on a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hmar_mega.checkpoint.checksums import sha256_of, write_sums
from hmar_mega.checkpoint.folders import point_to
from hmar_mega.checkpoint.rewrite import rewrite_checkpoint
from hmar_mega.checkpoint.shards import ShardFile, write_shard
from hmar_mega.checkpoint.sources import CheckpointReader
from hmar_mega.cli import main
from hmar_mega.errors import UserError

#: Of the checkpoints here; a table cut over two processes in its second dimension, a vector, a scalar, one not trained.
SHAPES = {"table": (30, 8), "vector": (5,), "temperature": (), "frozen": (1, 4, 3)}


def values(name: str, kind: str) -> Tensor:
    torch.manual_seed(sum(map(ord, name + kind)))
    return torch.randn(SHAPES[name])


def write_checkpoint(run: Path, step: int, kinds: tuple[str, ...] = ("weight", "exp_avg")) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    entries, sums = [], {}
    for rank in range(2):
        file, pieces, parts = f"rank-{rank:05d}.safetensors", [], []
        for name, shape in SHAPES.items():
            if name != "table" and rank == 1:
                continue
            for kind in kinds if name != "frozen" else ("weight",):
                cut = name == "table"
                part = values(name, kind)[:, 4 * rank : 4 * rank + 4] if cut else values(name, kind)
                key = f"{kind}/{name}/{rank}"
                pieces.append((key, part.numel()))
                parts.append(part.flatten().contiguous())
                entries.append(
                    {"name": name, "kind": kind, "file": file, "key": key, "global_shape": shape,
                     "offset": (0, 4 * rank) if cut else [0] * len(shape), "shape": tuple(part.shape),
                     "start": 0, "stop": part.numel()}
                )  # fmt: skip
        sums[file] = write_shard(folder / file, pieces, parts)
    state = {
        "step": step, "last_step": 20, "images_seen": step * 8, "skipped_steps": 1, "best_loss": 3.5,
        "stream": {"epoch": 0, "position": step * 8}, "config": {"run": {"seed": 7}}, "revision": "abc",
        "layout": {"processes": 2, "tensor_parallel": 2, "pipeline_parallel": 1, "zero_stage": 1},
    }  # fmt: skip
    for name, tree in (("index.json", {"format": 2, "entries": entries}), ("state.json", state)):
        (folder / name).write_text(json.dumps(tree))
        sums[name] = sha256_of(folder / name)
    write_sums(folder, sums)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints 10 and 20, of which 10 is the best."""
    run = tmp_path / "run"
    point_to(run, "best", write_checkpoint(run, 10))
    point_to(run, "latest", write_checkpoint(run, 20))
    return run


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_list_shows_each_checkpoint_with_its_marks(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["checkpoint", "list", str(run)]) == 0
    head, ten, twenty = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "step", "images", "size", "written", "by", "age", "complete"]
    assert ten.split()[:3] == ["step-00000010", "10", "80"]
    assert ten.endswith("yes       best")
    assert "2 processes tp2 zero1" in twenty
    assert twenty.endswith("yes       latest")


def test_list_shows_what_is_incomplete(run: Path, capsys: pytest.CaptureFixture[str]):
    shard = run / "checkpoints" / "step-00000020" / "rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    (run / "checkpoints" / ".saving-step-00000030").mkdir()
    (run / "checkpoints" / "best").write_text("step-00000001\n")
    assert main(["checkpoint", "list", str(run)]) == 0
    _, _, twenty, *notes = capsys.readouterr().out.splitlines()
    assert twenty.endswith("NO        latest")
    assert notes == [
        "best names step-00000001, which is not there",
        "1 being written or cut short; the next save removes what is left of it",
    ]


def test_verify_hashes_everything_and_lists_damage(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "step-00000010: whole", "step-00000020: whole",
    ]  # fmt: skip
    flip_a_bit(run / "checkpoints" / "step-00000020" / "rank-00000.safetensors")
    (run / "checkpoints" / "step-00000020" / "rank-00001.safetensors").unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    ten, twenty, first, second = capsys.readouterr().out.splitlines()
    assert "whole" in ten
    assert twenty == "step-00000020: DAMAGED"
    assert first.startswith("  rank-00000.safetensors: expected sha256 ")
    assert second.endswith("found nothing (No such file or directory)")
    assert main(["checkpoint", "verify", str(run / "checkpoints" / "step-00000010")]) == 0


@pytest.mark.parametrize("file", ["SHA256SUMS", "index.json", "state.json"])
def test_verify_finds_damage_of_the_small_files_too(run: Path, capsys: pytest.CaptureFixture[str], file: str):
    flip_a_bit(run / "checkpoints" / "step-00000010" / file)
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert "step-00000010: DAMAGED" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["rank-00001.safetensors", "index.json"])
def test_a_file_that_no_checksum_covers_is_damage(run: Path, line: str):
    path = run / "checkpoints" / "step-00000020" / "SHA256SUMS"
    path.write_text("".join(one for one in path.read_text().splitlines(keepends=True) if line not in one))
    with pytest.raises(UserError, match=line):
        CheckpointReader(path.parent)
    assert main(["checkpoint", "verify", str(run)]) == 1


def test_verify_says_that_the_first_format_has_nothing_to_compare_with(run: Path, capsys: pytest.CaptureFixture[str]):
    folder = run / "checkpoints" / "step-00000020"
    (folder / "SHA256SUMS").unlink()
    assert main(["checkpoint", "verify", str(folder)]) == 1  # of format 2, where checksums belong to it
    assert "no SHA256SUMS" in capsys.readouterr().out
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": 1}))
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert "no checksums (format 1)" in capsys.readouterr().out


def test_show_says_where_training_stood_and_what_is_stored(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["checkpoint", "show", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "step         20 of 20" in lines
    assert "parameters   258" in lines
    assert "values       weight 258, exp_avg 246" in lines
    assert "  seed: 7" in lines
    assert main(["checkpoint", "show", str(run / "checkpoints" / "best"), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "step         10 of 20" in out
    assert "table        30×8                  exp_avg, weight" in out
    assert main(["checkpoint", "show", str(run), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["state"]["step"] == 20
    assert tree["parameters"] == 258
    assert {"name": "frozen", "shape": [1, 4, 3], "kinds": ["weight"]} in tree["tensors"]


@pytest.mark.parametrize("files", [1, 2, 3, 7])
def test_convert_keeps_every_value_in_files_of_one_size(
    run: Path, tmp_path: Path, files: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hmar_mega.checkpoint.rewrite.STEP", 5)  # tensors longer than what is held at a time
    out = tmp_path / "new" / "checkpoints" / "step-00000020"
    assert main(["checkpoint", "convert", str(run), str(out), "--files", str(files)]) == 0
    reader, before = CheckpointReader(out), CheckpointReader(run / "checkpoints" / "step-00000020")
    reader.verify()
    assert reader.state == before.state
    assert reader.tensors() == before.tensors()
    for name, kind, _ in before.tensors():
        assert torch.equal(reader.read(name, kind=kind), values(name, kind)), (name, kind)
    assert len(reader.files) == files
    sizes = [sum(b - a for a, b in ShardFile(out / file)._spans.values()) // 4 for file in reader.files]
    assert max(sizes) - min(sizes) <= 1


def test_convert_to_weights_alone(run: Path, tmp_path: Path):
    assert main(["checkpoint", "convert", str(run), str(tmp_path / "out"), "--weights-only"]) == 0
    reader = CheckpointReader(tmp_path / "out")
    assert {kind for _, kind, _ in reader.tensors()} == {"weight"}
    assert reader.state["weights_only"] is True
    assert all(torch.equal(reader.read(name), values(name, "weight")) for name in SHAPES)


def test_averages_become_the_weights_where_they_were_kept(tmp_path: Path):
    reader = CheckpointReader(write_checkpoint(tmp_path / "run", 5, ("weight", "ema")))
    rewrite_checkpoint(reader, tmp_path / "out", 2, weights_only=True, kind="ema")
    result = CheckpointReader(tmp_path / "out")
    for name in SHAPES:
        kind = "weight" if name == "frozen" else "ema"  # what is not trained has no average
        assert torch.equal(result.read(name), values(name, kind)), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("list", "nowhere"), "holds no checkpoint: give a run directory"),
        (("verify", "nowhere"), "holds no checkpoint"),
        (("show", "nowhere"), "holds no checkpoint"),
        (("convert", "nowhere", "out"), "holds no checkpoint"),
        (("convert", "run", "run"), "exists and is not an empty folder"),
        (("convert", "run", "out", "--files", "0"), "choose 1 to 504 files"),
        (("convert", "run", "out", "--files", "505"), "choose 1 to 504 files"),
        (("convert", "run", "out", "--kind", "ema"), "add --weights-only"),
        (("convert", "run", "out", "--kind", "ema", "--weights-only"), "holds no ema values, only exp_avg, weight"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
):
    monkeypatch.chdir(run.parent)
    assert main(["checkpoint", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]


def test_convert_refuses_a_damaged_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flip_a_bit(run / "checkpoints" / "step-00000020" / "rank-00000.safetensors")
    assert main(["checkpoint", "convert", str(run), str(tmp_path / "out")]) == 2
    assert "rank-00000.safetensors: expected sha256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
