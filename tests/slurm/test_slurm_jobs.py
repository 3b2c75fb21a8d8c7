"""Jobs on a real SLURM cluster, brought up on this machine: preempted, bereft of a node, cancelled while saving.

Every job is launched and looked at with the commands that people type.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from loopback import Loopback, Unavailable, install
from runs import Inputs, Outcome, config_file, make_inputs, tiny_config, train

from hmar_mega.cli import main
from hmar_mega.launchers.events import read_events
from hmar_mega.launchers.prepare import templates
from hmar_mega.scaling.array import queued_cells

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.dist]

#: Rates are only for planning.
CLUSTER = {
    "device": "cpu", "gpu": "CPU core", "memory_gib": 4, "bf16_peak_tflops": 0.1, "bf16_tflops": 0.02,
    "fp32_tflops": 0.05, "memory_gb_per_s": 10, "intra_node_gb_per_s": 2, "inter_node_gb_per_s": 1,
}  # fmt: skip

#: One thread a process, as many processes share two cores; the reference run must compute alike.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with contextlib.ExitStack() as held:
        try:
            install()
            cluster = held.enter_context(Loopback(tmp_path_factory.mktemp("slurm"), nodes=4))
        except Unavailable as err:
            pytest.skip(f"no SLURM cluster here: {err}")
        yield cluster


@pytest.fixture(scope="module")
def slurm_inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), codebook=64, classes=7)


def cluster_file(folder: Path, **environment: str) -> Path:
    """The description of the cluster, for jobs that write below a folder."""
    path = folder / "cluster.yaml"
    settings = {"shared_folder": str(folder), "environment": {**ENVIRONMENT, **environment}}
    settings["health"] = {"collective": False}  # so many more imports of torch; tried with the unfit node
    path.write_text(yaml.safe_dump({**CLUSTER, "launch": settings}))
    return path


def start_soon(slurm: Loopback, job: str) -> None:
    """SLURM lets a job that was requeued wait for two minutes: not here."""
    wait_until(lambda: f"{job} PENDING BeginTime" in slurm.call("squeue", "-h", "-o", "%A %T %r"))
    # not at once: in the second of the requeue the job's credential counts as revoked, which ends the job
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.1)


class LaunchedRun:
    """A run that `hmar-mega launch` started on the cluster, and ways to look at it."""

    def __init__(self, slurm: Loopback, file: str, processes: int) -> None:
        self.slurm, self.folder = slurm, Path(file).with_suffix("")
        described = cluster_file(self.folder.parent)
        size = ("--nodes", "2", "--gpus-per-node", str(processes), "--time", "30")
        printed = self.command("launch", file, "--cluster", str(described), *size)
        self.job = printed.split()[1].rstrip(":")

    def command(self, *arguments: str) -> str:
        return self.slurm.call(sys.executable, "-m", "hmar_mega", *arguments, timeout=60)

    def status(self) -> dict[str, object]:
        (row,) = json.loads(self.command("status", str(self.folder), "--json"))
        return dict(row)

    def log(self, attempt: int) -> str:
        """What the processes of an attempt printed."""
        logs = sorted((self.folder / "launch" / "logs").glob(f"{self.job}-{attempt}-*.log"))
        return "".join(path.read_text() for path in logs)

    def wait(self, what: str, condition: Callable[[], object], seconds: float = 240) -> None:
        """Wait until a condition holds; where it does not in time, or the job failed, show what was printed."""
        until = time.monotonic() + seconds
        while not condition():
            failed = any(event.kind == "failed" for event in read_events(self.folder))
            if failed or time.monotonic() > until:
                logs = (path.read_text()[-3000:] for path in (self.folder / "launch" / "logs").iterdir())
                raise AssertionError(f"no {what}; status {self.status()}\n" + "\n---\n".join(logs))
            time.sleep(0.05)

    def wait_for_event(self, *kinds: str) -> None:
        self.wait(" or ".join(kinds), lambda: any(event.kind in kinds for event in read_events(self.folder)))

    def hasten(self) -> None:
        """Wait for the second start."""
        start_soon(self.slurm, self.job)
        self.wait("second start", lambda: self.events().count("started") == 2)

    def events(self) -> list[str]:
        return [event.kind for event in read_events(self.folder)]


def test_a_node_that_is_unfit_is_left_out_before_training(slurm: Loopback, tmp_path: Path) -> None:
    """The checks alone, with stand-ins for their programs: node3 is well, but cannot talk to the others."""
    launch = tmp_path / "run" / "launch"
    launch.mkdir(parents=True)
    for name in ("await.sh", "job.sh", "task.sh"):
        shutil.copy(templates() / name, launch)
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/bash\n"  # python -m MODULE REPORTS …
        'report=$3/$SLURMD_NODENAME verdict=ok\n[ "$2" = hmar_mega.launchers.health ] || report+=.collective\n'
        '[[ $report != */node3.collective ]] || verdict="processes cannot talk"\necho "$verdict" >"$report"\n'
    )
    program.chmod(0o755)
    (launch / "job.sbatch").write_text(
        f"#!/bin/bash\n#SBATCH --requeue --output={launch}/job.log --open-mode=append\n"
        f"run_dir={launch.parent} launch_dir={launch} scripts={launch} max_restarts=1 python={program}\n"
        "container=() srun_options=()\n. $scripts/await.sh\n. $scripts/job.sh\n"
        "begin\ncheck_nodes --gpus 8 --collective 100\nstop completed '' 0\n"
    )
    job = slurm.call("sbatch", "--parsable", "--nodes=2", "--exclude=node1,node2", f"{launch}/job.sbatch")

    def requeued() -> bool:
        return f"{job} PENDING BeginTime node3" in slurm.call("squeue", "-h", "-o", "%A %T %r %x")

    until = time.monotonic() + 60
    while not requeued() and time.monotonic() < until:
        time.sleep(0.1)
    assert requeued(), (launch / "job.log").read_text()
    events = read_events(launch.parent)
    assert [event.kind for event in events] == ["started", "bad_node", "requeued"]
    assert (events[1].about["node"], events[1].about["reason"]) == ("node3", "processes cannot talk")
    slurm.call("scancel", job)


#: `python` of jobs whose script alone is tried: the first attempt trains until it is told to stop, later ones finish.
STAND_IN = """#!/bin/bash
run=$(dirname "$(dirname "$4")")    # python -m hmar_mega train RUN/launch/config.yaml
if ((attempt)); then
  mkdir -p "$run/checkpoints/step-1"
  echo '{"finished": true}' >"$run/checkpoints/step-1/state.json"
  echo step-1 >"$run/checkpoints/latest"
  exit 0
fi
trap 'exit 0' TERM
echo "step 1"
while sleep 0.1; do :; done
"""


def launch_stand_in(slurm: Loopback, folder: Path, nodes: int, monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    """Launch STAND_IN on so many nodes; its run directory once it works."""
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").touch()
    (programs / "python").write_text(STAND_IN)
    (programs / "python").chmod(0o755)
    described = folder / "cluster.yaml"
    settings = {"shared_folder": str(folder), "virtualenv": str(folder / "venv"), "health": {"enabled": False}}
    described.write_text(yaml.safe_dump({**CLUSTER, "nodes": nodes, "gpus_per_node": 1, "launch": settings}))
    settings_of_run = ("parallel.tensor_parallel=1", f"run.dir={folder / 'run'}")
    assert main(["launch", "demo", "--cluster", str(described), "--time", "30", *options, *settings_of_run]) == 0
    logs = folder / "run" / "launch" / "logs"
    wait_until(lambda: sum("step 1" in path.read_text() for path in logs.glob("*-0-*.log")) == nodes)
    return folder / "run"


def last_event(run: Path) -> str:
    """What happened last to the jobs of a run."""
    return read_events(run)[-1].kind


def test_a_job_that_stops_with_steps_left_is_followed_by_another(
    slurm: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a time limit that no signal preceded: the processes are told to end, and save."""
    run = launch_stand_in(slurm, tmp_path, 1, monkeypatch)
    first = read_events(run)[0].job
    slurm.call("scancel", "--signal=TERM", first)
    wait_until(lambda: last_event(run) == "completed")
    events = read_events(run)
    assert [event.kind for event in events] == ["submitted", "started", "chained", "started", "completed"]
    assert events[2].about["next"] == events[3].job != first
    assert (events[3].attempt, (run / "launch" / "restarts").read_text()) == (1, "1\n")


def test_a_job_that_has_used_its_restarts_ends(
    slurm: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = launch_stand_in(slurm, tmp_path, 1, monkeypatch, "--max-restarts", "0")
    slurm.call("scancel", "--signal=TERM", read_events(run)[0].job)
    wait_until(lambda: last_event(run) == "failed")
    assert "all 0 restarts are used (--max-restarts)" in read_events(run)[-1].about["reason"]


def test_a_job_survives_the_node_that_its_script_runs_on(
    slurm: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = launch_stand_in(slurm, tmp_path, 2, monkeypatch)
    lost = read_events(run)[-1].about["nodes"].split()[0]
    slurm.kill_node(lost)
    slurm.call("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=power")  # SLURM notices after 30 s
    start_soon(slurm, read_events(run)[0].job)
    wait_until(lambda: last_event(run) == "completed")
    events = read_events(run)
    assert [event.kind for event in events] == ["submitted", "started", "started", "completed"]
    assert events[2].job == events[1].job
    assert lost not in events[2].about["nodes"].split()
    assert events[2].attempt == 1
    slurm.start_node(lost)
    slurm.wait_for_idle(4)


def test_a_preempted_job_is_requeued_and_ends_with_the_very_weights(
    slurm: Loopback, slurm_inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of two processes each, tensor parallel in a node, data parallel between them, to completion."""
    settings = ("parallel.tensor_parallel=2", "optim.max_steps=80", "optim.epochs=20", "model.drop_path_rate=0.4")
    run = LaunchedRun(slurm, config_file(tiny_config(slurm_inputs, tmp_path / "run", *settings)), processes=2)
    run.wait("step 5", lambda: "step  5/80" in run.log(0))
    slurm.call("scancel", "--batch", "--signal=USR1", run.job)  # as SLURM does before the time limit
    run.wait_for_event("preempted")
    run.hasten()

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    train(slurm_inputs, tmp_path / "whole", "tensor2_data2", *settings[1:], "data.micro_batch_size=4")
    whole = Outcome.of(tmp_path / "whole")

    run.wait_for_event("completed")
    assert run.events() == ["submitted", "started", "preempting", "preempted", "started", "completed"]
    found = run.status()
    assert (found["state"], found["step"], found["total"], found["restarts"]) == ("completed", 80, 80, 1)
    resumed = Outcome.of(run.folder)
    assert "resumed" in run.log(1)
    assert resumed.losses == whole.losses
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert [k for k, tensor in resumed.tensors.items() if not torch.equal(tensor, whole.tensors[k])] == []


def test_an_array_trains_a_sweep_and_tries_the_cell_that_failed_once_more(
    slurm: Loopback,
    slurm_inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Six cells, of which the third has no disk at first; commands run in this process, to import torch once."""
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    settings = ("model.depth=1", f"data.val={slurm_inputs.val}")
    base = config_file(tiny_config(slurm_inputs, tmp_path / "base", *settings))
    sizes = [{"depth": 1, "width": width, "heads": 2} for width in (16, 32, 48, 64, 80, 96)]
    tree = {"dir": str(tmp_path / "sweep"), "base": base, "sizes": sizes, "budgets": {"iso_data": {"images": [16]}}}
    tree["cluster"] = str(cluster_file(tmp_path, PYTHONPATH=str(tmp_path)))
    file = tmp_path / "SWEEP.yaml"
    file.write_text(yaml.safe_dump(tree))
    full = tmp_path / "full"
    full.touch()
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if 'train' in sys.orig_argv and 'd1-w48-' in str(sys.orig_argv) and os.path.exists({str(full)!r}):\n"
        "    print('OSError: [Errno 28] No space left on device', flush=True)\n"
        "    os._exit(1)\n"
    )

    def submitted(array: str) -> list[str]:
        """Submit, wait until SLURM holds no cell any more, and give the cells of the array."""
        assert main(["sweep", "submit", str(file), "--slurm", "3", "--time", "30"]) == 0
        until = time.monotonic() + 240
        while queued_cells(tmp_path / "sweep") and time.monotonic() < until:
            time.sleep(0.2)
        return (tmp_path / "sweep" / "arrays" / array / "cells").read_text().split()

    def states() -> dict[str, tuple[str, str]]:
        capsys.readouterr()
        assert main(["sweep", "status", str(file), "--json", "-"]) == 0
        return {row["name"]: (row["state"], row["reason"]) for row in json.loads(capsys.readouterr().out)}

    cells = submitted("001")
    (bad,) = [cell for cell in cells if "-w48-" in cell]
    reason = "disk: OSError: [Errno 28] No space left on device"
    logs = "".join(path.read_text() for path in (tmp_path / "sweep" / "arrays" / "001").glob("task-*.log"))
    assert states() == {cell: ("failed", reason) if cell == bad else ("finished", "") for cell in cells}, logs
    (row,) = json.loads(slurm_status(capsys, str(tmp_path / "sweep" / "cells" / bad / "run")))
    assert (row["state"], "No space left on device" in row["reason"]) == ("failed", True)
    full.unlink()
    assert submitted("002") == [bad]
    assert set(states().values()) == {("finished", "")}
    assert main(["sweep", "submit", str(file), "--slurm", "3"]) == 0
    assert not (tmp_path / "sweep" / "arrays" / "003").exists()

    runs = [str(tmp_path / "sweep" / "cells" / cell / "run") for cell in cells]
    assert {row["state"] for row in json.loads(slurm_status(capsys, *runs))} == {"completed"}
    assert main(["sweep", "fit", str(file)]) == 0
    fit = json.loads((tmp_path / "sweep" / "fit" / "fit.json").read_text())
    assert len(fit["points"]) == 6
    assert [law["points"] for law in fit["laws"] if (law["quantity"], law["variable"]) == ("loss/all", "N")] == [6, 6]


def slurm_status(capsys: pytest.CaptureFixture[str], *runs: str) -> str:
    """What `hmar-mega status --json` prints of runs."""
    capsys.readouterr()
    assert main(["status", *runs, "--json"]) == 0
    return capsys.readouterr().out


def test_a_job_that_loses_a_node_goes_on_without_it_and_a_cancelled_save_is_whole(
    slurm: Loopback, slurm_inputs: Inputs, tmp_path: Path
) -> None:
    """A checkpoint in every step: the power fails, and the job is cancelled, while one is written."""
    settings = ("optim.max_steps=100000", "optim.epochs=100000", "checkpoint.interval=1", "run.peer_timeout=3")
    file = config_file(tiny_config(slurm_inputs, tmp_path / "run", *settings, "checkpoint.asynchronous=false"))
    run = LaunchedRun(slurm, file, processes=1)
    run.wait("step 10", lambda: re.search(r"step +10/", run.log(0)))
    other = read_events(run.folder)[1].about["nodes"].split()[1]  # the script runs on the first
    slurm.kill_node(other)
    run.wait_for_event("requeued")
    run.hasten()
    assert f"lost rank 1 (host {other}, process " in run.log(0)
    assert (run.folder / "launch" / "excluded_nodes").read_text().split() == [other]

    run.wait("resumed training", lambda: "step " in run.log(1) and "resumed" in run.log(1))
    last = read_events(run.folder)[-1]
    assert (last.kind, last.attempt) == ("started", 1)
    assert other not in last.about["nodes"].split()
    saving = run.folder / "checkpoints"
    run.wait("a save", lambda: any(saving.glob(".saving-*")))
    slurm.call("scancel", run.job)
    run.wait_for_event("cancelled")
    assert run.status()["state"] == "cancelled"
    assert run.events() == ["submitted", "started", "requeued", "started", "cancelled"]
    statuses = [path.read_text() for path in (run.folder / "launch" / "statuses" / f"{run.job}-1").iterdir()]
    assert statuses == ["0\n", "0\n"]
    verified = run.command("checkpoint", "verify", str(run.folder))
    assert str(run.status()["step"]) in verified
