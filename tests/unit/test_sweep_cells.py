"""Cells of a sweep: states and their reasons, attempts, processes here, SLURM arrays; with stand-ins for training."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import subprocess

import pytest
import yaml
from sweeps import enter, finish, validation, write_data, write_spec

from hmar_mega.cli import main
from hmar_mega.errors import UserError
from hmar_mega.launchers import limits
from hmar_mega.launchers.events import add_event
from hmar_mega.planning.cluster import load_cluster
from hmar_mega.scaling import array, attempt, local, record, state


def test_states_and_reasons_follow_from_what_attempts_left(tmp_path, capsys):
    names = enter(write_spec(tmp_path))
    folder = tmp_path / "sweep"
    entries = {entry["cell"]: entry for entry in state.read_sweep(folder)}
    finish(folder, names[0], 2.0)
    for _ in range(2):
        record.record(record.cell_folder(folder, names[1]), "start")
        record.record(record.cell_folder(folder, names[1]), "end", outcome="failed", status=1, reason="out of memory")
    record.record(record.cell_folder(folder, names[2]), "start")
    record.record(record.cell_folder(folder, names[3]), "start")
    record.record(record.cell_folder(folder, names[3]), "end", outcome="stopped", status=75)

    def states(limit: int, queued: frozenset[str] = frozenset()) -> list[str]:
        return [state.state_of(folder, entries[name], limit, queued).state for name in names]

    assert states(3) == ["finished", "failed", "failed", "stopped", "new"]
    assert states(2, frozenset(names[4:])) == ["finished", "gave up", "failed", "stopped", "queued"]
    failed = state.state_of(folder, entries[names[1]], 3)
    assert (failed.attempts, failed.reason) == (2, "out of memory")
    assert "killed" in state.state_of(folder, entries[names[2]], 3).reason
    assert main(["sweep", "status", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert "out of memory" in shown
    with record.attempt_lock(record.cell_folder(folder, names[2])):
        assert states(3)[2] == "running"
    assert states(3)[2] == "failed"


@pytest.mark.parametrize(
    ("status", "text", "reason"),
    [
        (1, "x\ntorch.OutOfMemoryError: CUDA out of memory. Tried", "out of memory"),
        (1, "hmar-mega: 10 steps in a row up to step 9 had a loss or gradient that is not finite;", "NaN: "),
        (2, "noise\nhmar-mega: data.train is not set\n", "data.train is not set"),
        (-9, "step 3", "killed by signal 9"),
        (1, "Traceback\nKeyError: 'x'\n", "error: KeyError: 'x'"),
        (3, "first\nlast\n", "exit status 3: last"),
    ],
)
def test_reasons_are_read_from_the_log(tmp_path, status: int, text: str, reason: str):
    (tmp_path / "log").write_text(text)
    assert reason in attempt.failure_reason(status, tmp_path / "log")


class Attempts:
    """Attempts of the first cell, with a stand-in for the training process."""

    def __init__(self, tmp_path, monkeypatch):
        self.name, self.folder, self.patch = enter(write_spec(tmp_path))[0], tmp_path / "sweep", monkeypatch
        self.path = record.cell_folder(self.folder, self.name)
        (self.entry,) = [entry for entry in state.read_sweep(self.folder) if entry["cell"] == self.name]

    def run(
        self, status: int, asked: list[int], text: str = "", finished: bool = False, processes: int = 1,
        validated: bool = True,
    ) -> int:  # fmt: skip
        def train(path, processes, output):
            output.write_text(text)
            if finished:
                checkpoint = path / "run" / "checkpoints" / "step-00000100"
                checkpoint.mkdir(parents=True)
                (checkpoint / "state.json").write_text('{"finished": true, "step": 100}')
                (checkpoint.parent / "latest").write_text(checkpoint.name)
            if (path / "run").exists():
                (path / "run" / "metrics.jsonl").write_text(json.dumps(validation(100, 2.0)) if validated else "")
            return status, asked

        self.patch.setattr(attempt, "_train", train)
        return attempt.run_cell(self.folder, self.name, processes)

    @property
    def ends(self) -> list[tuple[str, str | None]]:
        return [(r["outcome"], r.get("reason")) for r in record.attempts_of(self.path) if r["event"] == "end"]


def test_an_attempt_records_how_it_ended(tmp_path, monkeypatch):
    cell = Attempts(tmp_path, monkeypatch)
    assert cell.run(1, [], "hmar-mega: 3 steps in a row up to step 9 had a loss or gradient that is not finite") == 1
    assert cell.run(75, [signal.SIGUSR1]) == 75
    assert cell.run(0, [signal.SIGTERM]) == 0
    assert cell.run(0, [], finished=True) == 0
    assert [outcome for outcome, _ in cell.ends] == ["failed", "stopped", "stopped", "finished"]
    assert "not finite" in str(cell.ends[0][1])
    result = record.read_result(cell.folder, cell.name)
    assert (result["values"]["loss/2"], result["identity"]["optim.base_lr"]) == (1.0, 2.0e-3)
    monkeypatch.setattr(attempt, "_train", None)  # a finished cell is not trained again
    assert attempt.run_cell(cell.folder, cell.name, 1) == 0
    with pytest.raises(UserError, match="has no cell d9"):
        attempt.run_cell(cell.folder, "d9", 1)


def test_a_cell_that_was_stopped_in_its_last_validation_is_not_finished(tmp_path, monkeypatch):
    cell = Attempts(tmp_path, monkeypatch)
    assert cell.run(75, [signal.SIGUSR1], finished=True, validated=False) == 75
    assert state.state_of(cell.folder, cell.entry, 3).state == "stopped"
    assert cell.run(0, [], validated=False) == 1  # where it is missing for another reason
    assert cell.run(0, []) == 0
    assert state.state_of(cell.folder, cell.entry, 3).state == "finished"


def test_a_cell_whose_result_was_lost_gets_it_from_its_run(tmp_path, monkeypatch):
    cell = Attempts(tmp_path, monkeypatch)
    cell.run(0, [], finished=True)
    record.result_path(cell.folder, cell.name).unlink()
    assert state.state_of(cell.folder, cell.entry, 3).state == "stopped"
    monkeypatch.setattr(attempt, "_train", None)
    assert attempt.run_cell(cell.folder, cell.name, 1) == 0
    assert state.state_of(cell.folder, cell.entry, 3).state == "finished"


@pytest.mark.parametrize(("status", "processes", "text"), [(2, 1, ""), (1, 2, "  exitcode  : 2 (pid: 7)\n")])
def test_a_wrong_configuration_is_refused_and_not_tried_again_until_it_changes(
    tmp_path, monkeypatch, capsys, status, processes, text
):
    cell = Attempts(tmp_path, monkeypatch)
    assert cell.run(status, [], f"hmar-mega: optim.clip=-1 must be above 0\n{text}", processes=processes) == 2
    found = state.state_of(cell.folder, cell.entry, 3)
    assert (found.state, found.attempts) == ("refused", 0)
    assert found.reason.endswith("optim.clip=-1 must be above 0")
    assert main(["sweep", "submit", str(tmp_path / "SWEEP.yaml"), "--dry-run", "--max-attempts", "9"]) == 0
    assert cell.name not in capsys.readouterr().out
    assert main(["sweep", "submit", str(write_spec(tmp_path, learning_rate={"base_lr": 0.1})), "--dry-run"]) == 0
    assert cell.entry["cell"].rsplit("-", 1)[0] in capsys.readouterr().out


def test_data_that_changed_after_submission_are_not_trained_on(tmp_path, monkeypatch):
    cell = Attempts(tmp_path, monkeypatch)
    write_data(tmp_path, version="b")
    assert cell.run(0, [], finished=True) == 2
    ((outcome, reason),) = cell.ends
    assert outcome == "refused"
    assert "contents of data.train" in str(reason)


def test_local_processes_retry_what_fails_up_to_the_limit_and_train_the_rest(tmp_path, monkeypatch):
    """A stand-in for the cells: the first fails every time, the second once, the others never."""
    names, folder = enter(write_spec(tmp_path)), tmp_path / "sweep"
    stand_in = tmp_path / "cell.sh"
    stand_in.write_text(f"""#!/bin/sh
file=$5/cells/$6/attempts.jsonl
echo '{{"event": "start"}}' >> "$file"
if [ "$6" = {names[0]} ] || {{ [ "$6" = {names[1]} ] && [ "$(wc -l < "$file")" = 1 ]; }}; then
    echo '{{"event": "end", "outcome": "failed", "reason": "on purpose"}}' >> "$file"; exit 1
fi
mkdir -p "$5/results"
echo '{{"cell": "'"$6"'", "values": {{"loss/all": 2.5}}}}' > "$5/results/$6.json"
""")
    stand_in.chmod(stat.S_IRWXU)
    monkeypatch.setattr(local.sys, "executable", str(stand_in))
    monkeypatch.setattr(local, "POLL_SECONDS", 0.01)
    outcome = local.run_local(folder, names, 1, concurrency=2, max_attempts=2)
    assert outcome.gave_up == [names[0]]
    assert set(outcome.finished) == set(names[1:])
    assert [record.count_attempts(record.cell_folder(folder, n)) for n in names] == [2, 2, 1, 1, 1]


def test_an_array_has_a_task_a_cell_and_what_slurm_still_holds_is_not_submitted_again(tmp_path, monkeypatch, capsys):
    names, path, folder = enter(write_spec(tmp_path)), tmp_path / "SWEEP.yaml", tmp_path / "sweep"
    command = ["sweep", "submit", str(path), "--slurm", "2", "--time", "2:00:00"]
    assert main([*command, "--partition=gpu", "--option=--exclusive", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for option in ("--array=0-4%2", "--partition=gpu", "--exclusive", "--time=2:00:00", "--ntasks-per-node=1"):
        assert f"#SBATCH {option}\n" in shown
    assert re.findall(r"@\w+@", shown.split("hmar_mega sweep run")[0].replace("between @ signs", "")) == []
    done = subprocess.run(["bash", "-n"], input=shown, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (folder / "arrays").exists()
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("sbatch", "echo 77"), ("squeue", "echo '77 1'; echo '77 3'; echo '9 0'"), ("sinfo", "exit 1")):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(limits, "file_system", lambda path: "lustre")
    assert main([*command, "--dependency", "afterok:5"]) == 0
    first = folder / "arrays" / "001"
    assert "#SBATCH --dependency=afterok:5\n" in (first / "job.sbatch").read_text()
    assert (first / "cells").read_text().split() == names
    for name in ("revision.txt", "command.txt", "job.sh", "task.sh", "await.sh"):
        assert (first / name).read_text().strip()
    assert array.queued_cells(folder) == {names[1], names[3]}
    with pytest.raises(UserError, match=rf"waiting in the queue, with other settings: {names[1]} "):
        enter(write_spec(tmp_path, learning_rate={"base_lr": 7.0e-3}))
    write_spec(tmp_path)
    assert main(command) == 0
    assert (folder / "arrays" / "002" / "cells").read_text().split() == [names[0], names[2], names[4]]


def test_a_cell_is_looked_at_where_locks_are_missing_or_want_to_be_read(tmp_path, monkeypatch):
    """NFS refuses a shared lock of what is open for writing alone; some file systems have no locks."""
    assert not record.is_running(tmp_path)
    with record.attempt_lock(tmp_path):
        assert record.is_running(tmp_path)
    flock = record.fcntl.flock

    def nfs(file, operation):
        if operation & record.fcntl.LOCK_SH and not file.readable():
            raise OSError(errno.EBADF, "Bad file descriptor")
        return flock(file, operation)

    monkeypatch.setattr(record.fcntl, "flock", nfs)
    assert not record.is_running(tmp_path)

    def without(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(record.fcntl, "flock", without)
    with record.attempt_lock(tmp_path):
        assert not record.is_running(tmp_path)


def test_cells_are_planned_for_the_cluster_they_are_submitted_to(tmp_path, capsys):
    write_data(tmp_path)
    small = {"gpu": "none", "memory_gib": 0.01, "bf16_peak_tflops": 1, "bf16_tflops": 1, "fp32_tflops": 1,
             "memory_gb_per_s": 10, "intra_node_gb_per_s": 10, "inter_node_gb_per_s": 10, "nodes": 1,
             "gpus_per_node": 1}  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    command = ["sweep", "submit", str(write_spec(tmp_path)), "--slurm", "1", "--dry-run"]
    assert main(command) == 0
    assert main([*command, "--cluster", str(tmp_path / "small.yaml")]) == 2
    assert "fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--time", "1:00:00"], "--time would do nothing"),
        (["--slurm", "2", "--minutes", "3"], "--minutes would do nothing"),
        (["--slurm", "2", "--time", "soon"], "--time: 'soon' is not a time of SLURM"),
        (["--slurm", "2", "--time", "4"], "--time 4 leaves no time to train"),
        (["--slurm", "2", "--cluster", "nowhere"], "no cluster 'nowhere'"),
        (["--slurm", "2"], "there is no sbatch here"),
    ],
)
def test_an_array_is_checked_as_a_launched_run_is(tmp_path, monkeypatch, capsys, arguments, words):
    enter(write_spec(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["sweep", "submit", str(tmp_path / "SWEEP.yaml"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "sweep" / "arrays").exists()


def test_the_tasks_of_an_array_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "file_system", lambda path: "ext4")
    monkeypatch.setattr(limits, "require_sbatch", lambda: None)
    job = array.array_job(tmp_path, load_cluster("h100"), "s", "1:00:00", None, max_restarts=3, cells=6, concurrency=4)
    with pytest.raises(UserError, match="lies on ext4, a file system of this machine, and up to 4 nodes write there"):
        limits.check(job, dry_run=False)


def test_a_cell_whose_job_ended_before_it_could_try_says_why(tmp_path):
    name, folder = enter(write_spec(tmp_path))[0], tmp_path / "sweep"
    (record.cell_folder(folder, name) / "run" / "launch").mkdir(parents=True)
    add_event(record.cell_folder(folder, name) / "run", "failed", "7", reason="all nodes are unfit; see health")
    (entry,) = [entry for entry in state.read_sweep(folder) if entry["cell"] == name]
    found = state.state_of(folder, entry, 3)
    assert (found.state, found.reason) == ("new", "its job 7 ended: all nodes are unfit; see health")


def test_a_cell_of_several_nodes_is_no_task_of_an_array(tmp_path):
    cluster = load_cluster("h100-8x8")
    with pytest.raises(UserError, match="a cell of 64 processes needs 8 nodes, and a task of an array has one"):
        array.array_job(tmp_path, cluster, "s", "1:00:00", None, max_restarts=3, cells=1, concurrency=1)
