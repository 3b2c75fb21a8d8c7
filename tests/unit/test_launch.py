"""`hmar-mega launch` without a cluster: what job scripts say, what is refused beforehand, what a run folder gets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from hmar_mega.cli import main
from hmar_mega.config_io import load_config
from hmar_mega.errors import UserError
from hmar_mega.launchers import health, limits
from hmar_mega.launchers.events import add_event
from hmar_mega.launchers.job import Job
from hmar_mega.launchers.limits import Limits, check_job, check_shared, parse_sinfo
from hmar_mega.launchers.prepare import settle_start, templates
from hmar_mega.launchers.slurm import job_files, render, run_job, submit
from hmar_mega.planning.cluster import Cluster, load_cluster, packaged_clusters
from hmar_mega.planning.launch_settings import seconds_of

RATES = dict.fromkeys(
    ("memory_gib", "bf16_peak_tflops", "bf16_tflops", "fp32_tflops", "memory_gb_per_s", "intra_node_gb_per_s",
     "inter_node_gb_per_s"), 10,
)  # fmt: skip


def cluster_of(device: str = "cuda", **launch: object) -> Cluster:
    tree = {"name": "ours", "gpu": "some GPU", "device": device, "nodes": 2, "gpus_per_node": 4, **RATES}
    return Cluster.model_validate({**tree, "launch": launch})


def job_of(cluster: Cluster, run: Path = Path("/shared/runs/d16"), **given: object) -> Job:
    named = {"name": "d16", "time": "12:00:00", "partition": None, "max_restarts": 7, **given}
    return run_job(run, cluster, **named)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("30:15", 1815), ("12:00:00", 43_200), ("1-12", 129_600), ("2-00:30", 174_600), ("1-0:0:1", 86_401)],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "two hours", "1:2:3:4", "-5", "1-"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time of SLURM"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{time: 12:00:00}", r"launch.time=43200: .*write times in quotes, such as \"12:00:00\""),
        ("{time: soon}", "'soon' is not a time of SLURM"),
        ("{acount: images}", r"unknown key launch\.acount; did you mean account\?"),
        ("{container: {kind: pyxis}}", r"launch\.container\.image is missing"),
        (
            "{health: {max_clock_skew: 3}}",
            r"unknown key launch\.health\.max_clock_skew; did you mean max_clock_skew_s\?",
        ),
    ],
)
def test_mistakes_in_a_cluster_file_are_named(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text(f"gpu: some GPU\n{yaml.safe_dump(RATES)}launch: {line}\n")
    with pytest.raises(UserError, match=words):
        load_cluster(str(file))


def test_the_script_asks_for_a_task_a_gpu_and_an_early_signal() -> None:
    launch = {"partition": "h100", "account": "images", "qos": "long", "cpus_per_task": 12, "signal_seconds": 200}
    text = render(job_of(cluster_of(**launch), partition="h100"))
    directives = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert directives >= {
        "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=12:00:00", "--signal=B:USR1@200", "--requeue",
        "--open-mode=append", "--partition=h100", "--account=images", "--qos=long", "--cpus-per-task=12",
        "--output=/shared/runs/d16/launch/logs/job-%j.log",
    }  # fmt: skip
    assert "max_restarts=7\n" in text
    assert "srun_options=(--cpu-bind=cores --cpus-per-task=12 --gpu-bind=none)" in text
    assert "check_nodes --gpus 4 " in text


def test_without_gpus_none_are_asked_for() -> None:
    text = render(job_of(cluster_of("cpu", health={"enabled": False})))
    assert "gpus-per-node" not in text
    assert "gpu-bind" not in text
    assert "check_nodes \n" in text


def test_set_up_of_the_cluster_comes_before_the_training_in_its_order() -> None:
    cluster = cluster_of(
        setup=["ulimit -l unlimited"], modules=["cuda/13.0"], virtualenv="/shared/venv", network="infiniband",
        environment={"NCCL_IB_HCA": "mlx5_0,mlx5_1"}, gpu_option="gres",
    )  # fmt: skip
    text = render(job_of(cluster))
    parts = [
        "ulimit -l unlimited", "module load cuda/13.0", ". /shared/venv/bin/activate", "network-infiniband.sh",
        "export NCCL_IB_HCA=mlx5_0,mlx5_1", "begin\n", "hmar_mega train",
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "python=/shared/venv/bin/python" in text
    assert "--gres=gpu:4" in text
    assert "NCCL_IB_TIMEOUT" in job_files(job_of(cluster))["network-infiniband.sh"]


def test_containers_come_through_srun_or_around_the_program() -> None:
    pyxis = {"kind": "pyxis", "image": "/images/hmar.sqsh", "mounts": ["/data:/data"]}
    text = render(job_of(cluster_of(container=pyxis)))
    assert "--container-image=/images/hmar.sqsh" in text
    assert f"--container-mounts=/shared/runs/d16:/shared/runs/d16,{Path.cwd()}:{Path.cwd()},/data:/data" in text
    text = render(job_of(cluster_of(container={**pyxis, "kind": "apptainer", "image": "hmar.sif"})))
    assert "container=(apptainer exec --nv --bind /shared/runs/d16:/shared/runs/d16 " in text
    assert "\npython=python\n" in text


@pytest.mark.parametrize("template", ["srun", "torchrun"])
@pytest.mark.parametrize("cluster", packaged_clusters())
def test_scripts_of_every_packaged_cluster_are_bash_with_nothing_left_to_fill_in(cluster: str, template: str) -> None:
    description = load_cluster(cluster)
    launch = description.launch.model_copy(update={"template": template})
    run = Path("/shared/a run/it's")
    text = render(job_of(description.model_copy(update={"launch": launch}), run))
    for name in ("directives", "run_dir", "health", "container", "environment", "gpus_per_node"):
        assert f"@{name}@" not in text
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", sorted(path.name for path in templates().glob("*.sh")))
def test_the_scripts_that_jobs_read_are_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(templates() / script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


PARTITIONS = {"small": Limits(nodes=1, gpus_per_node=4, time=3600), "large": Limits(nodes=64, gpus_per_node=8)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"partition": "small"}, "2 nodes are asked for, and partition small has 1; use --nodes 1 or fewer"),
        ({"partition": "huge"}, "--partition huge is not one of cluster ours; use large or small"),
        ({"time": "5"}, "--time 5 leaves no time to train: the run is told to save 300 s before the limit"),
    ],
)
def test_a_job_that_can_never_start_or_end_well_is_refused(given: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_job(job_of(cluster_of(), **given), PARTITIONS)
    check_job(job_of(cluster_of(), partition="large"), PARTITIONS)


def test_limits_of_the_cluster_file_count_where_slurm_cannot_be_asked() -> None:
    launch = {"partitions": {"gpu": {"gpus_per_node": 2, "time": "8:00:00"}}}
    with pytest.raises(UserError, match=r"4 GPUs a node are asked for \(8 in all\), and nodes of partition gpu have 2"):
        check_job(job_of(cluster_of(**launch)), {})
    with pytest.raises(UserError, match="--time 12:00:00 is over the limit of partition gpu, 08:00:00"):
        check_job(job_of(cluster_of("cpu", **launch), partition="gpu"), {})


def test_sinfo_is_read_with_unlike_nodes_and_without_limits() -> None:
    text = "gpu|4|gpu:h100:8(S:0-1)|2-00:00:00\ngpu|2|gpu:a100:4,lustre:1|2-00:00:00\ncpu|10|(null)|infinite\n"
    assert parse_sinfo(text) == {"gpu": Limits(6, 8, 172_800), "cpu": Limits(10, 0, None)}


def test_a_run_directory_that_nodes_do_not_share_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not below /shared, the folder that all nodes of this cluster share"):
        check_shared(tmp_path, "/shared", 1)
    check_shared(tmp_path, str(tmp_path.parent), 4)
    monkeypatch.setattr(limits, "file_system", lambda path: "ext4")
    with pytest.raises(UserError, match="lies on ext4, a file system of this machine, and up to 2 nodes write there"):
        check_shared(tmp_path, None, 2)
    with pytest.raises(UserError, match=r"lies on ext4, .* the job may run on another \(gpu-07, say\)"):
        check_shared(tmp_path, None, 1, ["gpu-07", "gpu-08"])
    check_shared(tmp_path, None, 1)
    monkeypatch.setattr(limits, "file_system", lambda path: "lustre")
    check_shared(tmp_path, None, 2, ["gpu-07"])


def test_nodes_other_than_this_machine_are_those_that_slurm_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert limits.other_nodes() == []  # no sinfo
    sinfo = tmp_path / "sinfo"
    sinfo.write_text("#!/bin/sh\necho gpu-07\necho login\necho gpu-07\n")
    sinfo.chmod(0o755)
    monkeypatch.setattr(limits.socket, "gethostname", lambda: "login.cluster.org")
    assert limits.other_nodes() == ["gpu-07"]


def cluster_file(folder: Path, **launch: object) -> str:
    path = folder / "ours.yaml"
    tree = cluster_of("cpu", shared_folder=str(folder), **launch).model_dump(mode="json", exclude={"name"})
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster", "nowhere"], "no cluster 'nowhere'"),
        ([], "say where to train: either --cluster NAME"),
        (["--cluster", "h100", "--local", "2"], "say where to train: either --cluster NAME"),
        (["--cluster", "h100-8x1", "--time", "soon"], "--time: 'soon' is not a time of SLURM"),
        (["--local", "3", "parallel.tensor_parallel=2"], "3 processes are not a multiple of tensor_parallel=2"),
        (["--local", "5"], "data.global_batch_size=768 does not divide by the 5 data-parallel processes; use 770"),
        (["--cluster", "h100-8x1"], "there is no sbatch here, SLURM's command to submit jobs"),
    ],
)
def test_bad_input_leaves_one_message_and_nothing_on_disk(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "train/d16-256", f"run.dir={tmp_path / 'run'}", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_directory_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "train/d16-256", "--cluster", "h100-8x1"]) == 2
    assert "run.dir is not set" in capsys.readouterr().err


def test_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["launch", "train/d16-256", "--cluster", cluster_file(tmp_path), f"run.dir={run}", "--dry-run"]
    assert main([*command, "--nodes", "1", "--gpus-per-node", "2", "--time", "2:00:00"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=2\n#SBATCH --time=2:00:00\n" in printed
    assert not run.exists()


def fake_sbatch(folder: Path, body: str) -> str:
    """A PATH on which sbatch is a script of one line."""
    program = folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\n{body}\n")
    program.chmod(0o755)
    return f"{program.parent}:/usr/bin:/bin"


def test_launch_writes_all_that_says_what_is_run_and_submits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", fake_sbatch(tmp_path, "echo '417;ours'"))
    monkeypatch.setenv("SLURM_NTASKS", "9")
    monkeypatch.setattr(limits, "ask_slurm", dict)
    run = tmp_path / "run"
    command = ["launch", "train/d16-256", "--cluster", cluster_file(tmp_path), f"run.dir={run}", "optim.epochs=3"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("job 417: 2 × 4 processes")
    launch = run / "launch"
    config = yaml.safe_load((launch / "config.yaml").read_text())
    assert (config["optim"]["epochs"], config["run"]["dir"]) == (3, str(run))
    for name in ("revision.txt", "command.txt", "job.sbatch", "job.sh", "task.sh", "await.sh"):
        assert (launch / name).read_text().strip()
    assert (launch / "changes.diff").exists()
    (event,) = [json.loads(line) for line in (launch / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["job"]) == ("submitted", "417")


def test_a_second_launch_leaves_out_the_nodes_that_were_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_sbatch(tmp_path, 'echo "$*" >"$0.asked"; echo 5'))
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "excluded_nodes").write_text("node3\nnode7\n")
    assert submit(job_of(cluster_of(), tmp_path)) == "5"
    assert "--exclude=node3,node7" in (tmp_path / "bin" / "sbatch.asked").read_text()


def test_what_sbatch_says_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_sbatch(tmp_path, "echo invalid account >&2; exit 1"))
    (tmp_path / "launch").mkdir()
    with pytest.raises(UserError, match=r"sbatch refuses the job: invalid account; the script is .*/job\.sbatch"):
        submit(job_of(cluster_of(), tmp_path))


def test_a_node_is_unfit_for_each_thing_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "visible_gpus", lambda: 7)
    assert health.faults(tmp_path, 0, 0, 0, 0.5, 30) == []
    found = health.faults(tmp_path, 8, 1e6, 1e9, -120, 30)
    for words in ("7 of 8 GPUs answer", "GiB of memory are available, 1e+06", "GiB of disk are free in", "is -120 s"):
        assert any(words in fault for fault in found), found
    assert len(found) == 4


def test_a_node_reports_under_the_name_that_slurm_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node9")
    clocks = tmp_path / "clocks"
    clocks.write_text("node8 100.5\nfrom a prolog\nnode9 101.5\nnode7 99\n")
    assert health.main([str(tmp_path), "--clocks", str(clocks)]) == 0
    assert (tmp_path / "node9").read_text() == "ok"
    clocks.write_text("node8 100.5\nnode9 190.5\nnode7 99\n")
    assert health.main([str(tmp_path), "--clocks", str(clocks)]) == 1
    assert "is +90 s from the nodes' middle one, 30 s are allowed" in (tmp_path / "node9").read_text()


def test_available_memory_is_what_programs_can_still_get() -> None:
    assert health.available_memory("MemTotal: 100 kB\nMemAvailable:   64 kB\n") == 65_536
    assert health.available_memory("MemTotal: 100 kB\n") == 0


def saved_run(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")
    (folder / "checkpoints" / "latest").write_text(f"step-{steps[-1]:08d}\n")
    (folder / "checkpoints" / "best").write_text(f"step-{steps[0]:08d}\n")
    return folder


@pytest.mark.parametrize("name", ["step-00000001", "best"])
def test_where_a_run_starts_is_settled_once_and_not_at_every_restart(tmp_path: Path, name: str) -> None:
    run = saved_run(tmp_path / "run", 1, 2)
    config = load_config(None, [f"run.dir={run}", f"run.resume_from={name}"])
    assert settle_start(config).run.resume_from is None
    assert (run / "checkpoints" / "latest").read_text() == "step-00000001\n"


def test_a_start_that_cannot_be_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", 1, 2)
    with pytest.raises(UserError, match=r"run.resume_from=step-00000007: .* has no such complete checkpoint"):
        settle_start(load_config(None, [f"run.dir={run}", "run.resume_from=step-00000007"]))
    with pytest.raises(UserError, match=r"already has checkpoints and run.resume=false"):
        settle_start(load_config(None, [f"run.dir={run}", "run.resume=false"]))
    assert (run / "checkpoints" / "latest").read_text() == "step-00000002\n"
    fresh = load_config(None, [f"run.dir={tmp_path / 'new'}", "run.resume=false"])
    assert settle_start(fresh).run.resume is True  # a requeued job goes on from what the first one saved


def test_a_run_in_use_is_not_launched_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "launch").mkdir(parents=True)
    add_event(run, "started", "local", nodes=socket.gethostname(), process=str(os.getpid()))
    before = sorted(path.name for path in (run / "launch").iterdir())
    assert main(["launch", "demo", "--local", "2", f"run.dir={run}"]) == 2
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "launch").iterdir()) == before
