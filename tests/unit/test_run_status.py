"""`hmar-mega status`: the state of a run out of its notes, the queue, figures, checkpoints and logs."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path

import pytest

from hmar_mega.cli import main
from hmar_mega.launchers import status as status_module
from hmar_mega.launchers.cli import duration, find_runs
from hmar_mega.launchers.events import add_event, read_events
from hmar_mega.launchers.outcome import find_reason
from hmar_mega.launchers.status import QueuedJob, ask_queue, busy, read_status

RUNNING, PENDING = QueuedJob("RUNNING", "None"), QueuedJob("PENDING", "BeginTime")
NOW = 1000.0


class MadeRun:
    """A run directory with what the test puts there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "launch" / "logs").mkdir(parents=True)

    def notes(self, *events: tuple[str, dict[str, object]]) -> MadeRun:
        rows = [{"time": NOW, "event": kind, "job": "5", "attempt": 0, **about} for kind, about in events]
        (self.folder / "launch" / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self

    def log(self, text: str, attempt: int = 0) -> MadeRun:
        (self.folder / "launch" / "logs" / f"5-{attempt}-node1.log").write_text(text)
        return self

    def metrics(self, *steps: int) -> MadeRun:
        rows = [{"kind": "train", "step": s, "images": 8 * s, "images_per_second": 4.0} for s in steps]
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self

    def checkpoint(self, step: int, last_step: int) -> MadeRun:
        folder = self.folder / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        state = {"step": step, "last_step": last_step, "finished": step == last_step}
        (folder / "state.json").write_text(json.dumps(state))
        (folder.parent / "latest").write_text(folder.name + "\n")
        return self


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "d16")


SUBMITTED, STARTED = ("submitted", {}), ("started", {"nodes": "node1 node2"})
PREEMPTED = ("preempted", {"reason": "asked to save and start again", "excluded": ""})
STEPS = "12:00:00 step  9/20 | images 72 | loss 3.2\n"


@pytest.mark.parametrize(
    ("events", "queued", "log", "state"),
    [
        ([SUBMITTED], PENDING, "", "queued"),
        ([SUBMITTED], RUNNING, "", "starting"),
        ([SUBMITTED, STARTED], RUNNING, "", "starting"),
        ([SUBMITTED, STARTED], RUNNING, STEPS, "running"),
        ([SUBMITTED, STARTED, ("preempting", {})], RUNNING, STEPS, "running"),
        ([SUBMITTED, STARTED, PREEMPTED], None, STEPS, "preempted"),
        ([SUBMITTED, STARTED, PREEMPTED], QueuedJob("COMPLETING", "None"), STEPS, "preempted"),
        ([SUBMITTED, STARTED, PREEMPTED], PENDING, STEPS, "requeued"),
        ([SUBMITTED, STARTED], PENDING, STEPS, "requeued"),
        ([SUBMITTED, STARTED, ("requeued", {"reason": "lost node2"})], PENDING, STEPS, "requeued"),
        ([SUBMITTED, STARTED, ("chained", {"reason": "time limit", "next": "5"})], PENDING, STEPS, "requeued"),
        ([SUBMITTED, STARTED, ("completed", {})], None, STEPS, "completed"),
        ([SUBMITTED, STARTED, ("cancelled", {"reason": "as asked"})], None, STEPS, "cancelled"),
        ([SUBMITTED, STARTED, ("failed", {"reason": "training failed"})], None, STEPS, "failed"),
        ([SUBMITTED, STARTED], None, STEPS, "failed"),
    ],
)
def test_states(run: MadeRun, events: list, queued: QueuedJob | None, log: str, state: str) -> None:
    run.notes(*events).log(log)
    queue = {} if queued is None else {"5": queued}
    assert read_status(run.folder, queue, NOW + 5).state == state


def test_what_has_left_the_queue_for_long_has_failed(run: MadeRun) -> None:
    run.notes(SUBMITTED)
    assert read_status(run.folder, {}, NOW + 5).state == "queued"
    late = read_status(run.folder, {}, NOW + 60)
    assert (late.state, late.reason) == ("failed", "its job left the queue before it started")
    run.notes(SUBMITTED, STARTED, PREEMPTED)
    assert read_status(run.folder, {}, NOW + 60).state == "failed"
    assert read_status(run.folder, None, NOW + 60).state == "preempted"  # without SLURM the notes alone count


def test_a_running_run_tells_its_steps_and_time_left(run: MadeRun) -> None:
    run.notes(SUBMITTED, STARTED).log(STEPS).metrics(7, 8, 9)
    found = read_status(run.folder, {"5": RUNNING}, NOW)
    assert (found.step, found.total, found.nodes) == (9, 20, "node1 node2")
    assert found.seconds_left == pytest.approx(11 * 2)  # 8 images a step at 4 a second


def test_steps_come_from_the_checkpoint_while_a_restart_has_logged_none(run: MadeRun) -> None:
    run.notes(SUBMITTED, STARTED, PREEMPTED, ("started", {"attempt": 1})).log(STEPS).checkpoint(12, 20)
    (run.folder / "launch" / "restarts").write_text("1\n")
    found = read_status(run.folder, {"5": RUNNING}, NOW)
    assert (found.state, found.step, found.total, found.restarts) == ("starting", 12, 20, 1)


def test_a_finished_checkpoint_counts_more_than_a_job_that_vanished(run: MadeRun) -> None:
    run.notes(SUBMITTED, STARTED).checkpoint(20, 20)
    assert read_status(run.folder, {}, NOW + 60).state == "completed"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory: torch.OutOfMemory"),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in step 5.0", "out of memory: slurmstepd"),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", "NCCL timeout: Watchdog"),
        ("hmar-mega: 10 steps in a row up to step 40 had a loss or gradient that is not finite; …", "NaN: hmar-mega"),
        ("OSError: [Errno 28] No space left on device", "disk: OSError"),
        ("NVRM: Xid (PCI:0000:1b:00): 79, GPU has fallen off the bus", "bad node: NVRM"),
        ("12:00:00 lost rank 3 (host node2, process 77): no sign of life for 60 s", "lost rank: 12:00:00 lost rank 3"),
        ("rank 0 reports: no step for 620 s, where the median is 1.2 s: training hangs", "hang: rank 0 reports"),
        ("hmar-mega: data.train is not set: give a folder", "bad input: hmar-mega: data.train is not set"),
        ("Traceback (most recent call last):\nKeyError: 'x'", "error: KeyError: 'x'"),
        ('hmar-mega: {"time": 1, "event": "started"}', ""),
        ("all is well", ""),
    ],
)
def test_reasons_are_found_in_logs(tmp_path: Path, line: str, reason: str) -> None:
    log = tmp_path / "log"
    log.write_text(f"before\n{line}\nafter\n")
    found = find_reason([log, tmp_path / "missing"])
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_the_cause_is_named_before_its_consequence(run: MadeRun) -> None:
    run.notes(SUBMITTED, STARTED, ("failed", {"reason": "training failed"}))
    run.log("lost rank 1 (host node2, process 3): gone\ntorch.OutOfMemoryError: CUDA out of memory.\n")
    assert read_status(run.folder, {}, NOW).reason == (
        "out of memory: torch.OutOfMemoryError: CUDA out of memory.; training failed"
    )


def test_a_run_on_this_machine_is_alive_as_long_as_its_process(run: MadeRun) -> None:
    here = {"job": "local", "nodes": socket.gethostname()}
    run.notes(("started", {**here, "process": str(2**22 + 1)}))
    assert read_status(run.folder, None, NOW).state == "failed"
    add_event(run.folder, "started", "local", nodes="another machine", process="1")
    assert read_status(run.folder, None, NOW).state == "starting"


def test_a_checkpoint_of_an_earlier_shorter_run_hides_no_failure(run: MadeRun) -> None:
    run.checkpoint(20, 20).notes(SUBMITTED, STARTED, ("failed", {"reason": "training failed"}))
    state = run.folder / "checkpoints" / "step-00000020" / "state.json"
    for saved, name in ((NOW - 10, "failed"), (NOW + 10, "completed")):
        os.utime(state, (saved, saved))
        assert read_status(run.folder, {}, NOW).state == name


def test_a_run_started_by_hand_runs_while_its_lock_is_held(run: MadeRun) -> None:
    run.metrics(8, 9)
    lock = run.folder / ".lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_status(run.folder, None, NOW).state == "running"
    killed = read_status(run.folder, None, NOW)
    assert killed.state != "running"
    assert "it was killed" in killed.reason


@pytest.mark.parametrize(
    ("events", "queue", "who"),
    [
        ([], {"5": RUNNING}, ""),
        ([SUBMITTED, STARTED], {"5": RUNNING}, "job 5 (RUNNING)"),
        ([SUBMITTED], {"5": PENDING}, "job 5 (PENDING)"),
        ([SUBMITTED, STARTED], {}, ""),
        ([SUBMITTED, STARTED], None, ""),
        ([SUBMITTED, STARTED, ("chained", {"next": "6"})], {"6": PENDING}, "job 6 (PENDING)"),
        ([SUBMITTED, STARTED, ("completed", {})], {"5": RUNNING}, ""),
        ([("started", {"job": "local", "nodes": socket.gethostname(), "process": os.getpid()})], None,
         f"process {os.getpid()} on {socket.gethostname()}"),
    ],
    ids=["new", "running", "waiting", "gone", "no SLURM", "chained", "completed", "here"],
)  # fmt: skip
def test_what_works_on_a_run_is_known_before_another_is_launched(run: MadeRun, events: list, queue, who: str) -> None:
    assert busy(run.notes(*events).folder, queue) == who


def test_notes_that_were_cut_short_are_left_out(run: MadeRun) -> None:
    run.notes(SUBMITTED)
    with (run.folder / "launch" / "events.jsonl").open("a") as file:
        file.write('{"time": 5, "event": "sta\n[1]\n')
    assert [event.kind for event in read_events(run.folder)] == ["submitted"]


def test_without_slurm_there_is_no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert ask_queue() is None


def test_the_command_prints_a_table_or_json(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status_module, "ask_queue", lambda: {"5": RUNNING})
    run.notes(SUBMITTED, STARTED).log(STEPS).metrics(8, 9)
    assert main(["status", str(run.folder), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["step"], row["total"], row["job"]) == ("running", 9, 20, "5")
    assert main(["status", str(run.folder)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("d16", "running", "9/20", "22 s", "node1 node2"))


def test_a_cell_of_a_sweep_has_the_name_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status_module, "ask_queue", dict)
    cell = MadeRun(tmp_path / "d4-w256-n512-s0-0a1b2c3d" / "run").notes(SUBMITTED, STARTED, ("completed", {}))
    assert main(["status", str(cell.folder)]) == 0
    assert "d4-w256-n512-s0-0a1b2c3d" in capsys.readouterr().out


def test_watching_ends_when_all_have_ended(run: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.notes(SUBMITTED, STARTED, ("completed", {}))
    assert main(["status", str(run.folder), "--watch"]) == 0
    assert "completed" in capsys.readouterr().out


def test_runs_are_found_below_a_folder(run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.folder / "launch" / "config.yaml").touch()
    (tmp_path / "sweep" / "a" / "checkpoints").mkdir(parents=True)
    assert find_runs(tmp_path) == [run.folder, tmp_path / "sweep" / "a"]
    monkeypatch.chdir(run.folder)
    assert main(["status"]) == 2
    assert main(["status", str(tmp_path / "missing")]) == 2


def test_durations_have_two_units_at_most() -> None:
    assert [duration(s) for s in (40, 150, 7500, 273_600)] == ["40 s", "2 min", "2 h 5 min", "3 d 4 h"]
