"""Two runs never work in one run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from harness import RanksFailed, run_ranks
from runs import LAYOUTS, refusal_rank, tiny_config, train, train_rank

from hmar_mega import run_lock
from hmar_mega.checkpoint.sources import find_checkpoint
from hmar_mega.config import Config
from hmar_mega.errors import UserError

pytestmark = pytest.mark.dist


def waiting_rank(config: Config, gate: str) -> int:
    """Train, and wait in the first step until the gate is there."""
    from hmar_mega.objective import Objective

    honest = Objective.training

    def training(self, forward, batch):
        Path(f"{gate}-reached").touch()
        while not Path(gate).exists():
            time.sleep(0.05)
        return honest(self, forward, batch)

    Objective.training = training
    train_rank(config)
    return os.getpid()


def test_the_second_of_two_runs_refuses_and_the_first_is_not_disturbed(inputs, tmp_path, monkeypatch):
    folder, gate = tmp_path / "run", tmp_path / "gate"
    world, settings = LAYOUTS["data2"]
    config = tiny_config(inputs, folder, *settings)
    pids: list[int] = []
    first = threading.Thread(target=lambda: pids.extend(run_ranks(world, waiting_rank, config, str(gate))))
    first.start()
    try:
        while not Path(f"{gate}-reached").exists() and first.is_alive():
            time.sleep(0.05)
        before = sorted(folder.rglob("*"))
        messages = run_ranks(world, refusal_rank, config)
        assert sorted(folder.rglob("*")) == before
    finally:
        gate.touch()
        first.join()
    (message,) = set(messages)
    assert f"run.dir={folder} is in use by process {pids[0]} on {socket.gethostname()} since 20" in message
    assert "choose another run.dir" in message
    assert find_checkpoint(folder).name == "step-00000003"
    assert not (folder / ".lock").exists()


def killed_rank(config: Config) -> None:
    from hmar_mega.objective import Objective

    Objective.training = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    train_rank(config)


def test_a_killed_run_leaves_no_lock_that_holds(inputs, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(RanksFailed):
        run_ranks(1, killed_rank, tiny_config(inputs, folder))
    assert (folder / ".lock").exists()
    train(inputs, folder, "single")
    assert not (folder / ".lock").exists()


def test_the_refusal_names_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with run_lock._lock(tmp_path / "run"), pytest.raises(UserError, match=r"in use by process \d+ \(SLURM job 4711\)"):
        run_lock._take(tmp_path / "run")


def test_a_lock_file_without_a_word_in_it_still_holds(tmp_path):
    with run_lock._lock(tmp_path / "run"):
        (tmp_path / "run" / ".lock").write_text("")
        with pytest.raises(UserError, match="in use by another process;"):
            run_lock._take(tmp_path / "run")


def test_a_lock_whose_file_its_holder_just_removed_is_not_taken_for_one(tmp_path, monkeypatch):
    """Between opening and locking: the lock would be on a file that the next run does not see."""
    honest, calls = fcntl.flock, []

    def flock(handle: int, kind: int) -> None:
        honest(handle, kind)
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    handle = run_lock._take(tmp_path)
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(handle), (tmp_path / ".lock").stat())
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    os.close(handle)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog, code):
    def flock(handle: int, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_lock._lock(tmp_path / "run"):
        pass
    assert "without locks: a second run there would not be noticed" in caplog.text


def test_a_run_that_comes_to_nothing_leaves_no_folder(tmp_path):
    with run_lock._lock(tmp_path / "a"):
        assert (tmp_path / "a" / ".lock").exists()
    assert not (tmp_path / "a").exists()
