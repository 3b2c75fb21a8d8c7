"""The functions of job scripts, with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hmar_mega.launchers.prepare import templates

SINFO = 'case "$*" in *-p*) printf "node1\\nnode2\\nnode3\\n";; esac'


def call(folder: Path, body: str, **variables: str) -> tuple[str, str]:
    """Run lines after job.sh in a job on node1 and node2 of three; (events, SLURM's commands)."""
    tools, launch = folder / "bin", folder / "run" / "launch"
    for path in (tools, launch / "logs"):
        path.mkdir(parents=True, exist_ok=True)
    log = f'echo "$(basename "$0") $*" >>{folder}/calls\n'
    hosts = '[ "$2" != hostnames ] || printf "node1\\nnode2\\n"'
    for name, text in (("scontrol", hosts), ("scancel", ""), ("sinfo", SINFO), ("sbatch", "echo 9")):
        (tools / name).write_text(f"#!/bin/bash\n{log}{text}\n")
        (tools / name).chmod(0o755)
    head = (
        f"run_dir={folder}/run launch_dir={launch} scripts={launch} max_restarts=5\n. {templates()}/job.sh\nbegin\n"
        "log=$launch_dir/logs/$SLURM_JOB_ID-$attempt-node1.log\n"
    )
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_PARTITION": "main", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment = {"PATH": f"{tools}{os.pathsep}/usr/bin:/bin", **job, **variables}
    subprocess.run(["bash", "-c", head + body], env=environment, capture_output=True, timeout=60)
    return (launch / "events.jsonl").read_text(), (folder / "calls").read_text()


def ended(status: int) -> str:
    return f"echo {status} >$statuses/0.node1; step_status={status}; decide\n"


def test_slurm_is_asked_about_one_task_of_an_array(tmp_path: Path) -> None:
    calls = call(tmp_path, ended(76), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")[1]
    assert "scontrol show job 7_2\n" in calls
    assert "scontrol requeue 7_2\n" in calls


@pytest.mark.parametrize(("status", "kind"), [(0, "completed"), (1, "failed"), (2, "failed"), (76, "requeued")])
def test_a_finished_checkpoint_of_before_hides_no_failure(tmp_path: Path, status: int, kind: str) -> None:
    step = tmp_path / "run" / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    (step / "state.json").write_text('{"finished": true}')
    (step.parent / "latest").write_text("step-1\n")
    assert f'"event": "{kind}"' in call(tmp_path, ended(status))[0].splitlines()[-1]


def test_a_requeue_by_slurm_has_statuses_of_its_own_and_counts(tmp_path: Path) -> None:
    call(tmp_path, "exit\n")
    assert '"attempt": 1' in call(tmp_path, "exit\n")[0].splitlines()[-1]
    assert (tmp_path / "run" / "launch" / "restarts").read_text() == "1\n"


def test_the_oldest_excluded_node_comes_back_when_too_few_are_left(tmp_path: Path) -> None:
    assert '"event": "readmitted"' not in call(tmp_path, "exclude node3\n")[0]
    assert '"event": "readmitted", "job": "7"' in call(tmp_path, "exclude node1\n")[0]
    assert (tmp_path / "run" / "launch" / "excluded_nodes").read_text() == "node1\n"


@pytest.mark.parametrize(("line", "kind"), [("ncclRemoteError: gone", "requeued"), ("free(): invalid", "failed")])
def test_an_abort_by_nccl_starts_again(tmp_path: Path, line: str, kind: str) -> None:
    assert f'"event": "{kind}"' in call(tmp_path, f"echo '{line}' >$log\n{ended(134)}")[0].splitlines()[-1]
