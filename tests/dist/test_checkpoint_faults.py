"""Kills, damage and full disks around checkpoints: what is good stays, what is not is refused, and training goes on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import RanksFailed, run_ranks
from runs import LAYOUTS, Outcome, checkpoint_state, refusal_rank, tiny_config, train, train_rank

from hmar_mega.checkpoint.sources import CheckpointReader, find_checkpoint
from hmar_mega.config import Config
from hmar_mega.metrics import read_metrics

pytestmark = pytest.mark.dist

DROPPING = ("model.drop_path_rate=0.4", "stage.label_drop=0.5", "optim.epochs=8")


def steps(count: int) -> str:
    return f"optim.max_steps={count}"


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert [key for key, values in ours.tensors.items() if not torch.equal(values, theirs.tensors[key])] == []
    assert ours.losses == theirs.losses


# ------------------------------------------------------------------------------------------------------------- SIGKILL

KILLS, KILL_STEPS, CHUNK = 10, 24, 32 * 1024

#: Things done to the disk in a save of these runs are about forty: a kill falls into the first save or the second.
OPERATIONS = 60


def killed_rank(config: Config, moment: int, victim: int) -> None:
    """Train, and have process `victim` die by SIGKILL just before its `moment`-th operation on the checkpoint folder.

    Operations are chunks of values written, fsyncs, and opening, renaming or removing anything below `checkpoints`.
    """
    from hmar_mega.checkpoint import shards

    if int(os.environ["RANK"]) != victim:
        train_rank(config)
        return
    done = 0

    def operation() -> None:
        nonlocal done
        done += 1
        if done == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    class Hash:
        def __init__(self) -> None:
            self.digest = hashlib.sha256()

        def update(self, chunk: Any) -> None:
            operation()
            self.digest.update(chunk)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    sync = os.fsync

    def noted_sync(handle: int) -> None:
        operation()
        sync(handle)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (event == "open" and args[2] & os.O_CREAT):
            path = str(args[0])
            if "/checkpoints" in path:
                operation()

    os.fsync = noted_sync
    shards.CHUNK, shards.hashlib = CHUNK, SimpleNamespace(sha256=Hash)
    sys.addaudithook(hook)
    train_rank(config)


def test_killed_at_ten_moments_of_saving_a_run_always_goes_on_and_ends_as_if_never_stopped(inputs, tmp_path):
    settings = (*DROPPING, "checkpoint.interval=1", "checkpoint.keep_last=1", steps(KILL_STEPS))
    whole = train(inputs, tmp_path / "whole", "single", *settings)
    folder, moments, reached = tmp_path / "run", random.Random(0), 0
    config = tiny_config(inputs, folder, *settings)
    for _ in range(KILLS):
        with pytest.raises(RanksFailed) as caught:
            run_ranks(1, killed_rank, config, moments.randint(1, OPERATIONS), 0)
        assert caught.value.exit_codes == [-signal.SIGKILL]
        found = find_checkpoint(folder)
        assert found is not None or reached == 0
        if found is not None:
            reader = CheckpointReader(found)
            reader.verify()
            assert reader.state["step"] >= reached
            reached = reader.state["step"]
    assert 0 < reached < KILL_STEPS
    assert_same(train(inputs, folder, "single", *settings), whole)
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["latest", f"step-{KILL_STEPS:08d}"]


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_while_saving_one_process_of_two_leaves_the_last_good_checkpoint(inputs, tmp_path, victim):
    settings = (*DROPPING, "checkpoint.interval=2", steps(6))
    world, layout = LAYOUTS["data2"]
    whole = train(inputs, tmp_path / "whole", "data2", *settings)
    folder = tmp_path / "run"
    with pytest.raises(RanksFailed) as caught:
        # process 1 only writes its part, about ten operations a save
        run_ranks(2, killed_rank, tiny_config(inputs, folder, *layout, *settings), 45 if victim == 0 else 14, victim)
    assert caught.value.exit_codes[victim] == -signal.SIGKILL
    CheckpointReader(find_checkpoint(folder)).verify()
    assert_same(train(inputs, folder, "data2", *settings), whole)


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def three_saves(inputs, tmp_path_factory) -> Path:
    """A run of two processes with the checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    train(inputs, folder, "data2", *DROPPING, "checkpoint.interval=1", "checkpoint.keep_last=9", steps(3))
    return folder


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, damage) for file in ("rank-00001.safetensors", "index.json") for damage in (cut_off, flip_a_bit, remove)),
        *(("state.json", damage) for damage in (cut_off, flip_a_bit)),  # without it, it is no checkpoint: test_resume.py
    ],
)
def test_a_damaged_file_is_refused_by_every_process_and_the_checkpoint_before_is_offered(
    three_saves, inputs, tmp_path, file, damage: Callable[[Path], None]
):
    folder = shutil.copytree(three_saves, tmp_path / "run")
    damaged = folder / "checkpoints" / "step-00000003" / file
    expected = hashlib.sha256(damaged.read_bytes()).hexdigest()
    damage(damaged)
    config = tiny_config(inputs, folder, *DROPPING, steps(4))
    messages = run_ranks(2, refusal_rank, config)
    for message in messages:
        assert str(damaged) in message
        assert f"expected sha256 {expected}" in message
        if damaged.exists():
            assert f"found {hashlib.sha256(damaged.read_bytes()).hexdigest()}" in message
        assert "go on from it with run.resume_from=step-00000002" in message


def test_what_is_offered_is_itself_whole(three_saves, inputs, tmp_path):
    folder = shutil.copytree(three_saves, tmp_path / "run")
    for step in (2, 3):
        flip_a_bit(folder / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")
    for message in run_ranks(2, refusal_rank, tiny_config(inputs, folder, *DROPPING, steps(4))):
        assert "run.resume_from=step-00000001" in message
    whole = train(inputs, tmp_path / "whole", "data2", *DROPPING, steps(4))
    assert_same(train(inputs, folder, "data2", *DROPPING, steps(4), "run.resume_from=step-00000001"), whole)


def test_damage_is_not_looked_for_when_verification_is_off(three_saves, inputs, tmp_path):
    folder = shutil.copytree(three_saves, tmp_path / "run")
    flip_a_bit(folder / "checkpoints" / "step-00000003" / "rank-00000.safetensors")
    train(inputs, folder, "data2", *DROPPING, steps(4), "checkpoint.verify=false")


def test_a_damaged_checkpoint_is_no_start_for_another_run(three_saves, inputs, tmp_path):
    first = shutil.copytree(three_saves, tmp_path / "first")
    damaged = first / "checkpoints" / "step-00000003" / "rank-00000.safetensors"
    flip_a_bit(damaged)
    for message in run_ranks(2, refusal_rank, tiny_config(inputs, tmp_path / "run", f"run.init_from={first}")):
        assert str(damaged) in message


# ----------------------------------------------------------------------------------------------------------- full disk


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A real disk of 4 MB mounted on `folder`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk_rank(config: Config, disk: Path, full: range) -> str:
    """Train with a disk that is full from the save of one step to that of another; how it ends."""
    from hmar_mega.checkpoint import saver
    from hmar_mega.engine import TrainingError

    ballast, save = disk / "ballast", saver.CheckpointSaver.save

    def save_somewhere(self: Any, state: dict[str, Any], best: bool = False) -> None:
        self.wait()
        if self.engine.step == full.start and self.engine.dims.is_main:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass
        if self.engine.step == full.stop and self.engine.dims.is_main:
            ballast.unlink(missing_ok=True)
        torch.distributed.barrier()
        save(self, state, best)

    saver.CheckpointSaver.save = save_somewhere
    try:
        train_rank(config)
    except TrainingError as err:
        return str(err)
    return "finished"


@pytest.mark.parametrize("layout", ["single", "data2"])
def test_on_a_full_disk_training_goes_on_and_saves_again_when_there_is_room(inputs, tmp_path, layout, capfd):
    world, settings = LAYOUTS[layout]
    common = (*DROPPING, *settings, "checkpoint.interval=1", "checkpoint.keep_last=1")
    whole = train(inputs, tmp_path / "whole", layout, *common, steps(6))
    disk = tmp_path / "disk"
    with small_disk(disk):
        config = tiny_config(inputs, disk / "run", *common, steps(6))
        assert run_ranks(world, full_disk_rank, config, disk, range(3, 5)) == ["finished"] * world
        assert_same(Outcome.of(disk / "run"), whole)
        assert checkpoint_state(disk / "run", "step-00000006")["failed_saves"] == 2
        rows = read_metrics(disk / "run")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        left = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert left == ["latest", "step-00000006"]


@pytest.mark.parametrize("layout", ["single", "data2"])
def test_a_run_whose_last_checkpoint_cannot_be_written_is_not_finished(inputs, tmp_path, layout):
    world, settings = LAYOUTS[layout]
    common = (*DROPPING, *settings, "checkpoint.interval=1", "checkpoint.keep_last=2")
    whole = train(inputs, tmp_path / "whole", layout, *common, steps(4))
    disk = tmp_path / "disk"
    with small_disk(disk):
        config = tiny_config(inputs, disk / "run", *common, steps(4))
        messages = run_ranks(world, full_disk_rank, config, disk, range(3, 9))
        assert len(set(messages)) == 1
        assert "training reached step 4, but its checkpoint could not be written" in messages[0]
        assert "No space left on device" in messages[0]
        found = find_checkpoint(disk / "run")
        assert found.name == "step-00000002"
        CheckpointReader(found).verify()
        (disk / "ballast").unlink()
        train(inputs, disk / "run", layout, *common, steps(4))
        assert_same(Outcome.of(disk / "run"), whole)


def limited_rank(config: Config, failing: int) -> tuple[str, list[str]]:
    """Train while process 1 cannot write files of more than 64 kB in the save of one step; its errors' texts."""
    import logging

    from hmar_mega.checkpoint import saver

    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    listener = Listener(logging.WARNING)
    saver.log.addHandler(listener)
    write = saver.write_shard

    def limited_write(path: Path, *args: Any) -> str:
        if os.environ["RANK"] != "1" or f"{failing:08d}" not in str(path):
            return write(path, *args)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
        try:
            return write(path, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    saver.write_shard = limited_write
    train_rank(config)
    return told


def test_where_one_process_cannot_write_nobodys_part_counts_and_the_error_names_it(inputs, tmp_path):
    world, settings = LAYOUTS["data2"]
    folder = tmp_path / "run"
    config = tiny_config(inputs, folder, *DROPPING, *settings, "checkpoint.interval=2", "checkpoint.keep_last=9", steps(6))
    told = run_ranks(world, limited_rank, config, 4)
    (error,) = told[0]
    assert "step 4 | checkpoint NOT saved: process 1" in error
    assert "rank-00001.safetensors cannot be written: File too large" in error
    assert "Training goes on; the last good checkpoint is step-00000002" in error
    assert len(told[1]) == 1
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "step-00000002", "step-00000006"]


def judged_rank(config: Config, disk: Path, full: range, losses: list[float]) -> str:
    """`full_disk_rank` with these validation losses of steps 1, 2, 3 …"""
    from hmar_mega import loop

    following = iter(losses)
    loop.validation_losses = lambda *args: {"all_scales": next(following), "last_scale": 0.0, "scale_loss": []}
    return full_disk_rank(config, disk, full)


def test_a_best_checkpoint_that_could_not_be_written_is_not_the_best(inputs, tmp_path):
    """Step 2 would be the best of all, but the disk is full; so step 3, better than step 1, is."""
    disk = tmp_path / "disk"
    settings = (*DROPPING, f"data.val={inputs.val}", "eval.interval=1", "checkpoint.interval=99", steps(4))
    with small_disk(disk):
        config = tiny_config(inputs, disk / "run", *settings)
        assert run_ranks(1, judged_rank, config, disk, range(2, 3), [4.0, 2.0, 3.0, 5.0]) == ["finished"]
        assert (disk / "run" / "checkpoints" / "best").read_text() == "step-00000003\n"
        state = checkpoint_state(disk / "run", "step-00000004")
        assert state["best_loss"] == 3.0
        assert state["failed_saves"] == 1


def test_a_best_checkpoint_of_a_due_step_is_written_once_and_training_does_not_wait_for_it(inputs, tmp_path):
    settings = (f"data.val={inputs.val}", "eval.interval=2", "checkpoint.interval=2", steps(4))
    (saves,) = run_ranks(1, counted_rank, tiny_config(inputs, tmp_path / "run", *DROPPING, *settings))
    assert saves == [2, 4]


def counted_rank(config: Config) -> list[int]:
    """Train with ever better validations; the steps that are saved, none of which is waited for in its own step."""
    from hmar_mega import loop
    from hmar_mega.checkpoint import saver

    losses = iter([4.0, 2.0])
    loop.validation_losses = lambda *args: {"all_scales": next(losses), "last_scale": 0.0, "scale_loss": []}
    saves: list[int] = []
    save, wait = saver.CheckpointSaver.save, saver.CheckpointSaver.wait

    def noted_save(self: Any, state: dict[str, Any], best: bool = False) -> None:
        save(self, state, best)
        saves.append(self.engine.step)

    def noted_wait(self: Any) -> Any:
        assert self.engine.step == 4 or self.engine.step not in saves
        return wait(self)

    saver.CheckpointSaver.save, saver.CheckpointSaver.wait = noted_save, noted_wait
    train_rank(config)
    return saves
