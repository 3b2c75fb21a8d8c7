"""A rank that is killed, hangs or fails alone: the others name it and end in time, and a restart undoes the harm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from harness import RanksFailed, run_ranks
from runs import BATCH, LAYOUTS, Command, Inputs, Outcome, config_file, largest_difference, tiny_config, train, train_rank
from tables import record

from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.metrics import read_metrics
from hmar_mega.parallel.liveness import LOST_RANK_STATUS, STOPPED_STATUS

pytestmark = pytest.mark.dist

WHOLE, FAULTY_STEP = 5, 4
SETTINGS = (f"optim.max_steps={WHOLE}", "checkpoint.interval=2", "run.peer_timeout=3", "model.drop_path_rate=0.4")

#: run.peer_timeout, and what noticing, telling and leaving may add.
PROMISED_SECONDS = 3 + 3


def faulty_rank(file: str, culprit: int, fault: signal.Signals | None, moment: str) -> int:
    """Run the command line, in which the forward of a step is one rank's last deed; its own error is fault None."""
    from hmar_mega.cli import main
    from hmar_mega.objective import Objective

    honest = Objective.inputs

    def inputs_of(self, batch, *, training, stage=None):
        if int(batch.positions.min()) // BATCH == FAULTY_STEP - 1 and int(os.environ["RANK"]) == culprit:
            Path(moment).touch()
            if fault is None:
                raise UserError("shard 7 is damaged")
            os.kill(os.getpid(), fault)
        return honest(self, batch, training=training, stage=stage)

    def leave(status: int) -> None:
        Path(f"{moment}-{os.environ['RANK']}").touch()
        exit_process(status)

    exit_process, os._exit = os._exit, leave
    Objective.inputs = inputs_of
    return main(["train", file])


def run_faulty(inputs: Inputs, folder: Path, layout: str, culprit: int, fault: signal.Signals) -> RanksFailed:
    """What the test process sees, after the time promised at most."""
    world, settings = LAYOUTS[layout]
    file = config_file(tiny_config(inputs, folder, *settings, *SETTINGS))
    moment = folder.parent / "moment"
    # a process that hangs is the last to go, and only killed by the harness
    grace = 3.0 if fault is signal.SIGSTOP else PROMISED_SECONDS + 2
    with pytest.raises(RanksFailed) as caught:
        run_ranks(world, faulty_rank, file, culprit, fault, str(moment), grace=grace, timeout=60)
    others = [code for rank, code in enumerate(caught.value.exit_codes) if rank != culprit]
    assert others == [LOST_RANK_STATUS] * (world - 1), caught.value
    ends = [Path(f"{moment}-{rank}").stat().st_mtime for rank in range(world) if rank != culprit]
    seconds = max(ends) - moment.stat().st_mtime
    record("faults", fault=f"{fault.name} of rank {culprit}", layout=layout, seconds=seconds, peer_timeout=3)
    assert seconds < PROMISED_SECONDS
    return caught.value


def assert_named(report: str, layout: str, culprit: int) -> None:
    """Every other rank says which rank was lost, where it was, and from where the run goes on."""
    lines = re.findall(r"(?:\[rank \d\] )?lost rank .*", report)
    assert len(lines) == LAYOUTS[layout][0] - 1, report
    for line in lines:
        assert re.search(rf"lost rank {culprit} \(host {re.escape(socket.gethostname())}, process \d+\)", line), line
        assert "last checkpoint: step-00000002; start the same command again to go on from it" in line


@pytest.fixture(scope="module")
def whole(tmp_path_factory, inputs) -> Iterator[dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("whole")
    return {layout: train(inputs, folder / layout, layout, *SETTINGS) for layout in ("data2", "tensor2")}


@pytest.mark.parametrize(("layout", "culprit"), [("data2", 1), ("tensor2", 0), ("pipeline2", 1)])
def test_after_a_kill_the_others_name_the_rank_and_the_run_goes_on_as_if_undisturbed(
    inputs, tmp_path, whole, layout, culprit
):
    folder = tmp_path / "run"
    failed = run_faulty(inputs, folder, layout, culprit, signal.SIGKILL)
    assert failed.exit_codes[culprit] == -signal.SIGKILL
    assert_named(str(failed), layout, culprit)
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")

    resumed = train(inputs, folder, layout, *SETTINGS)
    assert resumed.tensors.keys() == whole[layout].tensors.keys()
    different = [k for k, tensor in resumed.tensors.items() if not torch.equal(tensor, whole[layout].tensors[k])]
    assert different == []
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, WHOLE + 1))
    assert resumed.losses == whole[layout].losses

    with_one = train(inputs, elsewhere, "single", *SETTINGS)
    assert largest_difference(with_one.weights, whole[layout].weights) <= 1e-6


@pytest.mark.parametrize(("layout", "culprit"), [("tensor2_data2", 2), ("data2", 0)])
def test_a_rank_that_hangs_is_named_too(inputs, tmp_path, layout, culprit):
    """A stopped process keeps its connections, as one on a host that lost its power or its network does."""
    failed = run_faulty(inputs, tmp_path / "run", layout, culprit, signal.SIGSTOP)
    assert_named(str(failed), layout, culprit)
    assert "no sign of life for" in str(failed)


def test_a_rank_that_fails_alone_gives_its_reason_to_the_others(inputs, tmp_path):
    world, settings = LAYOUTS["data2"]
    file = config_file(tiny_config(inputs, tmp_path / "run", *settings, *SETTINGS))
    with pytest.raises(RanksFailed) as caught:
        run_ranks(world, faulty_rank, file, 1, None, str(tmp_path / "moment"), grace=20)
    report = str(caught.value)
    assert caught.value.exit_codes == [STOPPED_STATUS, 0]  # the harness got rank 1's status from its call: 2
    assert "hmar-mega: [rank 1] shard 7 is damaged" in report
    assert "rank 1 stopped: shard 7 is damaged" in report
    assert "lost rank" not in report


def elsewhere_rank(config: Config) -> None:
    """Train on a host of another name, whose clock is a year behind."""
    now = time.time
    with (
        mock.patch("socket.gethostname", return_value="another"),
        mock.patch("platform.node", return_value="another"),
        mock.patch("time.time", side_effect=lambda: now() - 365 * 86400),
    ):
        train_rank(config)


def test_another_clock_host_and_number_of_processes_do_not_disturb_a_restart(inputs, tmp_path, whole):
    folder = tmp_path / "run"
    train(inputs, folder, "data2", *SETTINGS, "optim.max_steps=3")
    alone = shutil.copytree(folder, tmp_path / "alone")
    for path in sorted(alone.rglob("*")):
        os.utime(path, (2e9, 2e9))  # files from the future
    run_ranks(2, elsewhere_rank, tiny_config(inputs, folder, *SETTINGS))
    assert [k for k, v in Outcome.of(folder).tensors.items() if not torch.equal(v, whole["data2"].tensors[k])] == []
    run_ranks(1, elsewhere_rank, tiny_config(inputs, alone, *SETTINGS))
    assert largest_difference(Outcome.of(alone).weights, whole["data2"].weights) <= 1e-6


def test_under_torchrun_the_survivor_names_the_killed_process(inputs, tmp_path):
    """torchrun sends SIGTERM to the others as soon as one has died; that must not pass for a wish to stop."""
    endless = ("optim.max_steps=100000", "optim.epochs=100000", "checkpoint.interval=20", "run.peer_timeout=3")
    file = config_file(tiny_config(inputs, tmp_path / "run", *endless))
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    with Command(*torchrun, "hmar_mega", "train", file) as run:
        run.wait_for("saved step-00000020")
        victim = next(p for p in psutil.Process(run.process.pid).children() if p.environ().get("RANK") == "1")
        victim.kill()
        assert run.end(within=PROMISED_SECONDS + 2) == 1  # torchrun has one status for all that fails
    assert re.search(rf"lost rank 1 \(host .*, process {victim.pid}\).*last checkpoint: step-0000", run.text), run.text
    assert "RuntimeError" not in run.text
