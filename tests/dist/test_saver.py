"""Saving behind the back of training: it overlaps, waits, keeps what was asked, and holds only a process's own part."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from runs import LAYOUTS, Inputs, Outcome, checkpoint_state, refusal_rank, tiny_config, train, train_rank
from tables import record
from test_faults import poisoned_rank

from hmar_mega.checkpoint.rewrite import rewrite_checkpoint
from hmar_mega.checkpoint.sources import CheckpointReader, find_checkpoint
from hmar_mega.config import Config
from hmar_mega.metrics import read_metrics

pytestmark = pytest.mark.dist


def steps(count: int) -> str:
    return f"optim.max_steps={count}"


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert [key for key, values in ours.tensors.items() if not torch.equal(values, theirs.tensors[key])] == []
    assert ours.losses == theirs.losses


# -------------------------------------------------------------------------------------------------- what goes on when


def slow_writer_rank(config: Config) -> list[str]:
    """Train while the checkpoint of step 2 takes until a moment after step 4 was computed; what happened, in order."""
    from hmar_mega.checkpoint import saver
    from hmar_mega.engine import Engine

    events: list[str] = []
    computed = threading.Event()
    write, snapshot, step = saver.write_shard, saver.CheckpointSaver._snapshot, Engine.train_step

    def slow_write(path: Path, *args: Any) -> str:
        (number,) = re.findall(r"step-0*(\d+)", str(path))
        if number == "2" and config.checkpoint.asynchronous:
            assert computed.wait(60), "training did not go on"
            time.sleep(0.3)
        digest = write(path, *args)
        events.append(f"written {number}")
        return digest

    def noted_snapshot(self: Any, file: str) -> Any:
        events.append(f"copied {self.engine.step}")
        return snapshot(self, file)

    def noted_step(self: Engine, *args: Any) -> float:
        norm = step(self, *args)
        events.append(f"step {self.step}")
        if self.step == 4:
            computed.set()
        return norm

    saver.write_shard, saver.CheckpointSaver._snapshot, Engine.train_step = slow_write, noted_snapshot, noted_step
    train_rank(config)
    return events


@pytest.mark.parametrize("layout", ["single", "data2"])
def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_save_waits(inputs, tmp_path, layout):
    world, settings = LAYOUTS[layout]
    config = tiny_config(inputs, tmp_path / "run", *settings, "checkpoint.interval=2", "optim.epochs=4", steps(4))
    for events in run_ranks(world, slow_writer_rank, config):
        assert events == [
            "step 1", "step 2", "copied 2", "step 3", "step 4", "written 2", "copied 4", "written 4",
        ]  # fmt: skip
    train(inputs, tmp_path / "plain", layout, "checkpoint.interval=2", "optim.epochs=4", steps(4))
    assert_same(Outcome.of(tmp_path / "run"), Outcome.of(tmp_path / "plain"))
    two, plain = (tmp_path / run / "checkpoints" / "step-00000002" for run in ("run", "plain"))
    assert {p.name: p.read_bytes() for p in two.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in plain.glob("*.safetensors")
    }


def test_a_synchronous_save_is_written_before_training_goes_on(inputs, tmp_path):
    settings = ("checkpoint.asynchronous=false", "checkpoint.interval=2", "optim.epochs=4", steps(4))
    (events,) = run_ranks(1, slow_writer_rank, tiny_config(inputs, tmp_path / "run", *settings))
    assert events == ["step 1", "step 2", "copied 2", "written 2", "step 3", "step 4", "copied 4", "written 4"]


# ------------------------------------------------------------------------------------------------ what is kept of it


def test_keep_every_keeps_multiples_for_good(inputs, tmp_path):
    folder = tmp_path / "run"
    settings = ("checkpoint.interval=1", "checkpoint.keep_last=1", "checkpoint.keep_every=2", steps(5))
    train(inputs, folder, "data2", *settings)
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["latest", "step-00000002", "step-00000004", "step-00000005"]


def test_checksums_cover_every_file_and_the_state_says_who_wrote_it(inputs, tmp_path):
    folder = tmp_path / "run"
    train(inputs, folder, "tensor2_data2", steps(1))
    checkpoint = find_checkpoint(folder)
    reader = CheckpointReader(checkpoint)
    assert set(reader.sums) == {p.name for p in checkpoint.iterdir()} - {"SHA256SUMS"}
    reader.verify()
    assert reader.format == 2
    assert reader.state["layout"]["processes"] == 4
    assert reader.state["layout"]["tensor_parallel"] == 2


def test_a_checkpoint_of_the_first_format_is_still_read(inputs, tmp_path):
    whole, folder = train(inputs, tmp_path / "whole", "single", steps(4)), tmp_path / "run"
    train(inputs, folder, "single", steps(2))
    checkpoint = find_checkpoint(folder)
    (checkpoint / "SHA256SUMS").unlink()
    index = json.loads((checkpoint / "index.json").read_text())
    (checkpoint / "index.json").write_text(json.dumps({**index, "format": 1}))
    assert_same(train(inputs, folder, "single", steps(4)), whole)


@pytest.mark.parametrize("second", ["data2_zero3", "tensor2"])
def test_a_converted_checkpoint_trains_on_on_any_layout(inputs, tmp_path, second):
    settings = ("checkpoint.interval=2", "checkpoint.keep_last=9", steps(4))
    train(inputs, tmp_path / "first", "tensor2_data2", *settings)
    name = "step-00000002"
    first, folder = tmp_path / "first" / "checkpoints" / name, tmp_path / "run"
    rewrite_checkpoint(CheckpointReader(first), folder / "checkpoints" / name, 3)
    plain = shutil.copytree(tmp_path / "first", tmp_path / "plain")
    for run in (folder, plain):
        train(inputs, run, second, *settings, f"run.resume_from={name}")
    ours, theirs = Outcome.of(folder), Outcome.of(plain)
    assert all(torch.equal(ours.tensors[key], values) for key, values in theirs.tensors.items())


def test_a_run_does_not_go_on_from_weights_alone_but_can_start_from_them(inputs, tmp_path):
    first, folder = tmp_path / "first", tmp_path / "run"
    train(inputs, first, "single", steps(1))
    checkpoint = find_checkpoint(first)
    rewrite_checkpoint(CheckpointReader(checkpoint), folder / "checkpoints" / checkpoint.name, 1, weights_only=True)
    going_on = tiny_config(inputs, folder, f"run.resume_from={checkpoint.name}", steps(2))
    (message,) = run_ranks(1, refusal_rank, going_on)
    assert "holds weights alone" in message
    weights = folder / "checkpoints" / checkpoint.name
    for origin in (weights, first):
        train(inputs, tmp_path / f"from-{origin.name}", "single", f"run.init_from={origin}", steps(1))
    ours, theirs = (Outcome.of(tmp_path / f"from-{origin.name}") for origin in (weights, first))
    assert_same(ours, theirs)


# --------------------------------------------------------------------------------------------- float16's loss scaling

FP16 = ("precision.compute=fp16", "optim.eps=1e-6")


def fp16_rank(config: Config) -> str:
    """Train in float16, which DeepSpeed does not want to on a CPU, with a second step that is not finite."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return poisoned_rank(config, [2])


@pytest.mark.parametrize("layout", ["single", "data2_zero3", "tensor2_data2_zero2"])
def test_a_resumed_fp16_run_goes_on_with_its_loss_scale(inputs, tmp_path, layout):
    """The scale has been halved by a step that was not finite, and counts its iterations."""
    world, settings = LAYOUTS[layout]

    def train_some(folder: Path, count: int) -> Outcome:
        config = tiny_config(inputs, folder, *settings, *FP16, steps(count))
        assert run_ranks(world, fp16_rank, config) == ["finished"] * world
        return Outcome.of(folder)

    whole = train_some(tmp_path / "whole", 6)
    train_some(tmp_path / "halves", 3)
    scaler = checkpoint_state(tmp_path / "halves", "step-00000003")["loss_scaler"]
    assert scaler["cur_iter"] == 3
    assert scaler["cur_scale"] < 2**16
    assert scaler["last_overflow_iter"] >= 1
    assert_same(train_some(tmp_path / "halves", 6), whole)
    states = [checkpoint_state(tmp_path / run, "step-00000006")["loss_scaler"] for run in ("whole", "halves")]
    assert states[0] == states[1]
    assert states[0]["cur_iter"] == 6
    rows = [[r["loss_scale"] for r in read_metrics(tmp_path / run)] for run in ("whole", "halves")]
    assert rows[0] == rows[1]


# ------------------------------------------------------------------------------------------------------------- memory

#: 60 million parameters and more: blocks of 18·width² weights.
LARGE = (
    "model.depth=14", "model.width=512", "model.heads=8", "data.global_batch_size=4", "optim.base_lr=1e-4",
    "checkpoint.interval=1", "eval.interval=100", steps(1),
)  # fmt: skip

MEBI = 2**20

#: What Python, gloo and a stripe of a tensor may take besides the values themselves.
SLACK = 48 * MEBI


def high_water_of(action: Any) -> tuple[int, Any]:
    """By how many bytes the process's resident memory rose above where it was, at the highest, and the result."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = action()
    return _status("VmHWM") - before, result


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def memory_rank(config: Config) -> dict[str, int]:
    """Train a step, save and load it again; bytes that each took at the highest, and what this process owns."""
    from hmar_mega import train as training
    from hmar_mega.checkpoint import canonical, saver

    figures: dict[str, int] = {}
    write = saver.CheckpointSaver.save
    load_weights, load_optimizer = training.load_weights, training.load_optimizer

    def measured_save(self: Any, state: dict[str, Any], best: bool = False) -> None:
        self.wait()
        owned = canonical.own_tensors(self.engine, "")[0]
        figures["own"] = sum(values.numel() * 4 for values in owned.values())
        figures["local weights"] = sum(p.numel() * 4 for p in self.engine.model.parameters())

        def save_and_wait() -> None:
            write(self, state, best)
            self.wait()

        figures["saving"], _ = high_water_of(save_and_wait)

    def measured(name: str, action: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            figures[name], _ = high_water_of(lambda: action(*args, **kwargs))

        return run

    saver.CheckpointSaver.save = measured_save
    training.load_weights = measured("loading weights", load_weights)
    training.load_optimizer = measured("loading moments", load_optimizer)
    train_rank(config)
    return figures


@pytest.fixture(scope="module")
def large(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, int]]]:
    """A run of one step of a large model on tensor 2 × data 2, and the figures of each process."""
    world, settings = LAYOUTS["tensor2_data2"]
    folder = tmp_path_factory.mktemp("large") / "run"
    config = tiny_config(inputs, folder, *settings, *LARGE, "data.micro_batch_size=1")
    return folder, run_ranks(world, memory_rank, config, timeout=240)


def show(capsys: Any, title: str, all_figures: list[dict[str, int]]) -> None:
    for rank, figures in enumerate(all_figures):
        record("memory", what=title, rank=rank, **{name: round(size / MEBI) for name, size in figures.items()})
    with capsys.disabled():
        print(f"\n{title}")
        for rank, figures in enumerate(all_figures):
            print(f"  rank {rank}:", ", ".join(f"{name} {size / MEBI:.0f} MiB" for name, size in figures.items()))


@pytest.mark.slow
def test_saving_takes_a_copy_of_a_process_s_own_part_and_no_more(large, capsys):
    folder, saved = large
    reader = CheckpointReader(find_checkpoint(folder))
    parameters = sum(torch.Size(shape).numel() for shape in reader.shapes.values())
    everything = 12 * parameters
    show(capsys, f"{parameters / 1e6:.1f} M parameters, {everything / MEBI:.0f} MiB with moments, saved:", saved)
    assert parameters >= 60e6
    assert sum(figures["own"] for figures in saved) == everything
    for figures in saved:
        assert figures["saving"] <= figures["own"] + SLACK
        assert figures["saving"] < 0.4 * everything


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "files"), [("tensor2_data2", None), ("tensor4", 1)])
def test_loading_takes_what_a_process_keeps_and_no_more(inputs, large, tmp_path, capsys, layout, files):
    """Also from one file that holds everything, where each process needs a part of every matrix."""
    folder, checkpoint = tmp_path / "run", find_checkpoint(large[0])
    target = folder / "checkpoints" / checkpoint.name
    if files is None:
        target.parent.mkdir(parents=True)
        target.symlink_to(checkpoint)
    else:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        rewrite_checkpoint(CheckpointReader(checkpoint), target, files)
        grown = _status("VmHWM") - before
        show(capsys, f"rewritten into {files} file:", [{"converting": grown}])
        assert grown <= 2 * SLACK
    world, settings = LAYOUTS[layout]
    going_on = (steps(2), f"run.resume_from={checkpoint.name}")
    config = tiny_config(inputs, folder, *settings, *LARGE, "data.micro_batch_size=1", *going_on)
    loaded = run_ranks(world, memory_rank, config, timeout=240)
    show(capsys, f"loaded on {layout}:", loaded)
    for figures in loaded:
        assert figures["loading weights"] <= SLACK  # into parameters that are there
        assert figures["loading moments"] <= figures["own"] * 2 / 3 + SLACK  # the moments, laid down here
