"""Stopping and going on: bit for bit on the same layout, to rounding on another, never from what is half-written."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from harness import RanksFailed, run_ranks
from runs import (
    BATCH,
    LAYOUTS,
    TRAIN_SAMPLES,
    Inputs,
    Outcome,
    checkpoint_state,
    largest_difference,
    refusal_rank,
    tiny_config,
    train,
    train_rank,
)
from tables import record

from hmar_mega.checkpoint import saver
from hmar_mega.checkpoint.sources import CheckpointReader, find_checkpoint
from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.metrics import read_metrics

pytestmark = pytest.mark.dist

TOLERANCE = 1e-6

#: Steps of the whole run and of its first part; an epoch ends between the two.
WHOLE, HALF = 6, 3
assert HALF * BATCH < TRAIN_SAMPLES < WHOLE * BATCH

#: Label drop and drop-path too must go on where they stopped.
DROPPING = ("model.drop_path_rate=0.4", "stage.label_drop=0.5")

BF16 = ("precision.compute=bf16", "optim.base_lr=1.0", "optim.warmup_epochs=0", "optim.eps=1e-8", "optim.epochs=4")


def steps(count: int) -> str:
    return f"optim.max_steps={count}"


class Runs:
    """Uninterrupted and half runs of each layout, made when first asked for."""

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        self.folder, self.inputs = folder, inputs

    def run_dir(self, layout: str, count: int, *overrides: str) -> Path:
        folder = self.folder / "-".join([layout, str(count), *overrides])
        if not folder.exists():
            train(self.inputs, folder, layout, *DROPPING, steps(count), *overrides)
        return folder

    def whole(self, layout: str, *overrides: str) -> Outcome:
        return Outcome.of(self.run_dir(layout, WHOLE, *overrides))

    def resumed(self, first: str, second: str, folder: Path, *overrides: str) -> Outcome:
        """Half the run on one layout, the rest on another."""
        shutil.copytree(self.run_dir(first, HALF, *overrides), folder)
        return train(self.inputs, folder, second, *DROPPING, steps(WHOLE), *overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, inputs) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"), inputs)


def assert_bitwise(ours: Outcome, theirs: Outcome) -> None:
    assert ours.tensors.keys() == theirs.tensors.keys()
    different = [key for key, tensor in ours.tensors.items() if not torch.equal(tensor, theirs.tensors[key])]
    assert different == []


@pytest.mark.parametrize(
    "layout",
    [
        "single", "tensor2", "data2", "tensor2_data2", "sequence2_data2_zero3", "data2_zero2", "data2_zero3",
        "pipeline2_tensor2",
    ],
)
def test_resumed_on_the_same_layout_a_run_ends_bit_for_bit_as_if_never_stopped(runs, tmp_path, layout):
    resumed, whole = runs.resumed(layout, layout, tmp_path / "run"), runs.whole(layout)
    assert {kind for _, kind in resumed.tensors} == {"weight", "exp_avg", "exp_avg_sq"}
    assert_bitwise(resumed, whole)
    assert resumed.losses == whole.losses


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tensor2", "single"), ("single", "data2"), ("data2", "tensor2"), ("accumulated", "tensor2_data2"),
        ("data2_zero3", "single"), ("single", "sequence2_data2_zero3"), ("sequence2", "data2_zero3"),
        ("data2_zero3", "tensor2"), ("tensor2_data2_zero2", "data2_zero2"), ("data2_zero2", "sequence4"),
        ("sequence4", "data2"), ("sequence2_data2_zero3", "tensor2_data2_zero2"),
        ("pipeline2_tensor2", "data2_zero3"), ("data2_zero3", "pipeline2"), ("tensor2", "pipeline2_data2"),
        ("pipeline2_data2", "pipeline2_sequence2_recompute"),
    ],
)  # fmt: skip
def test_resumed_on_another_layout_a_run_ends_equal_up_to_rounding(runs, tmp_path, first, second):
    resumed, whole = runs.resumed(first, second, tmp_path / "run"), runs.whole("single")
    losses = max(abs(a - b) for a, b in zip(resumed.losses, whole.losses, strict=True))
    record(
        "resharding", first=first, second=second, losses=losses,
        weights=largest_difference(resumed.weights, whole.weights),
    )  # fmt: skip
    assert largest_difference(resumed.weights, whole.weights) <= TOLERANCE
    assert resumed.losses == pytest.approx(whole.losses, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("first", "second"),
    [("pipeline2_tensor2", "data2_zero3"), ("data2_zero3", "pipeline2_data2"), ("pipeline2", "pipeline2")],
)
def test_the_masked_stage_and_its_average_go_on_on_another_layout(runs, tmp_path, inputs, first, second):
    """Frozen weights, moments of what is trained and the moving average; some stages train only the mask embedding."""
    settings = (
        "stage.name=masked", "model.depth=2", "optim.ema_decay=0.6", f"run.init_from={runs.run_dir('single', HALF)}",
    )  # fmt: skip
    whole = Outcome.of(runs.run_dir("single", WHOLE, *settings))
    resumed = runs.resumed(first, second, tmp_path / "run", *settings)
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert {kind for _, kind in resumed.tensors} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    for kind in ("weight", "ema"):
        ours, theirs = ({n: t for (n, k), t in o.tensors.items() if k == kind} for o in (resumed, whole))
        assert largest_difference(ours, theirs) <= TOLERANCE
    assert not any("ballast" in name for name, _ in resumed.tensors)


def test_the_half_run_is_not_the_whole_one(runs):
    half = Outcome.of(runs.run_dir("single", HALF))
    assert largest_difference(half.weights, runs.whole("single").weights) > 100 * TOLERANCE


def kill_while_saving(config: Config) -> None:
    """Train, and die by SIGKILL when every file of the last checkpoint is written but it has not its name yet."""
    commit = saver.commit

    def die_at_the_end(run: Path, temporary: Path, best: bool) -> Path:
        if str(WHOLE) in temporary.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return commit(run, temporary, best)

    saver.commit = die_at_the_end
    train_rank(config)


def test_killed_while_saving_a_run_goes_on_from_the_checkpoint_before(runs, tmp_path, inputs):
    folder = tmp_path / "run"
    settings = (*DROPPING, steps(WHOLE), f"checkpoint.interval={HALF}")
    with pytest.raises(RanksFailed) as caught:
        run_ranks(1, kill_while_saving, tiny_config(inputs, folder, *settings))
    assert caught.value.exit_codes == [-signal.SIGKILL]
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == [".saving-step-00000006", "latest", "step-00000003"]
    assert find_checkpoint(folder) == folder / "checkpoints" / "step-00000003"
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]

    assert_bitwise(train(inputs, folder, "single", *settings), runs.whole("single"))
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["latest", "step-00000003", "step-00000006"]
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_metrics_have_every_step_once_also_where_the_kill_cut_a_line_short(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs.run_dir("single", HALF), folder)
    with (folder / "metrics.jsonl").open("a") as file:  # what a run killed in step 5 leaves
        file.write('{"kind": "train", "step": 4, "loss": 99.0}\n{"kind": "train", "st')
    outcome = train(runs.inputs, folder, "single", *DROPPING, steps(WHOLE))
    assert [(row["kind"], row["step"]) for row in read_metrics(folder)] == [("train", s) for s in range(1, WHOLE + 1)]
    assert outcome.losses == runs.whole("single").losses


def test_a_finished_run_started_again_changes_nothing(runs, tmp_path):
    folder = tmp_path / "run"
    train(runs.inputs, folder, "single", *DROPPING, steps(HALF))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train(runs.inputs, folder, "single", *DROPPING, steps(HALF))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_model_size_is_refused_by_the_name_of_a_tensor(runs, tmp_path, inputs):
    folder = tmp_path / "run"
    shutil.copytree(runs.run_dir("single", HALF), folder)
    config = tiny_config(inputs, folder, *DROPPING, "parallel.tensor_parallel=2", "model.width=64")
    for message in run_ranks(2, refusal_rank, config):
        assert str(folder) in message
        assert "holds pos_start with shape (1, 1, 32), the model wants (1, 1, 64)" in message


def test_a_deeper_model_is_refused_by_the_name_of_a_tensor_that_is_missing(runs, tmp_path, inputs):
    folder = tmp_path / "run"
    shutil.copytree(runs.run_dir("single", HALF), folder)
    (message,) = run_ranks(1, refusal_rank, tiny_config(inputs, folder, "model.depth=3"))
    assert "the first blocks.2.attn.log_scale" in message


def test_with_resume_off_a_run_directory_in_use_is_refused(runs, tmp_path, inputs):
    folder = tmp_path / "run"
    shutil.copytree(runs.run_dir("single", HALF), folder)
    before = sorted(folder.rglob("*"))
    (message,) = run_ranks(1, refusal_rank, tiny_config(inputs, folder, "run.resume=false"))
    assert f"run.dir={folder} already has checkpoints and run.resume=false; choose another run.dir" in message
    assert sorted(folder.rglob("*")) == before


def test_a_run_directory_of_the_other_stage_is_refused(runs, tmp_path, inputs):
    folder = tmp_path / "run"
    shutil.copytree(runs.run_dir("single", HALF), folder)
    settings = ("stage.name=masked", f"run.init_from={folder}")
    (message,) = run_ranks(1, refusal_rank, tiny_config(inputs, folder, *settings))
    assert "holds a run of stage next_scale, not masked" in message
    assert f"run.init_from={folder}" in message


def test_a_damaged_checkpoint_is_refused_with_the_file_at_fault(runs, tmp_path, inputs):
    folder = tmp_path / "run"
    shutil.copytree(runs.run_dir("single", HALF), folder)
    file = folder / "checkpoints" / "step-00000003" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (message,) = run_ranks(1, refusal_rank, tiny_config(inputs, folder, *DROPPING, steps(WHOLE)))
    assert str(file) in message


def test_processes_that_tensor_parallel_does_not_divide_are_refused_with_what_fits(tmp_path, inputs):
    config = tiny_config(inputs, tmp_path / "run", "parallel.tensor_parallel=2")
    messages = run_ranks(3, refusal_rank, config)
    assert len(set(messages)) == 1
    assert "tensor_parallel=2 does not divide the 3 processes" in messages[0]
    assert not (tmp_path / "run").exists()


def test_pruning_keeps_the_last_checkpoints_and_the_best(tmp_path, inputs):
    """Random tokens at a high rate: what is learnt from one half of them is wrong for the other."""
    folder = tmp_path / "run"
    settings = (
        f"data.val={inputs.val}", "eval.interval=1", "checkpoint.interval=1", "checkpoint.keep_last=2",
        "optim.base_lr=3.0", steps(WHOLE), "stage.loss_weights=uniform",
    )  # fmt: skip
    train(inputs, folder, "single", *settings)
    losses = {row["step"]: row["all_scales"] for row in read_metrics(folder) if row["kind"] == "val"}
    assert len(losses) == WHOLE
    best = min(losses, key=losses.__getitem__)
    assert best < WHOLE - 1, "the best step must be one that pruning alone would remove"
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "best").read_text() == f"step-{best:08d}\n"
    assert (checkpoints / "latest").read_text() == f"step-{WHOLE:08d}\n"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [
        f"step-{step:08d}" for step in (best, WHOLE - 1, WHOLE)
    ]
    assert checkpoint_state(folder, f"step-{WHOLE:08d}")["best_loss"] == losses[best]


def test_the_best_loss_survives_a_resume(tmp_path, inputs):
    """A resumed run does not take its first, worse validation for the best."""
    folder = tmp_path / "run"
    settings = (f"data.val={inputs.val}", "eval.interval=1", "optim.base_lr=3.0", "stage.loss_weights=uniform")
    train(inputs, folder, "single", *settings, steps(4))
    best = (folder / "checkpoints" / "best").read_text()
    train(inputs, folder, "single", *settings, steps(5))
    losses = {row["step"]: row["all_scales"] for row in read_metrics(folder) if row["kind"] == "val"}
    assert losses[5] > min(losses.values())
    assert (folder / "checkpoints" / "best").read_text() == best


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("block_diagonal", "data2"), ("block_causal", "sequence2_data2_zero3"), ("block_diagonal", "data2_zero3"),
        ("block_diagonal", "pipeline2_data2"), ("block_causal", "pipeline2_sequence2_recompute"),
        ("block_causal", "pipeline2_virtual2"),
    ],
)  # fmt: skip
def test_validation_counts_every_sample_once_on_any_layout_and_the_grid_is_drawn(tmp_path, inputs, layout, kind):
    settings = (
        f"data.val={inputs.val}", "eval.grid_count=4", steps(1), f"model.attention.pattern={kind}", "model.depth=4",
        "model.shared_aln=true",
    )  # fmt: skip
    rows = {}
    for name in ("single", layout):
        train(inputs, tmp_path / name, name, *settings)
        (rows[name],) = (row for row in read_metrics(tmp_path / name) if row["kind"] == "val")
    assert rows[layout]["all_scales"] == pytest.approx(rows["single"]["all_scales"], rel=0, abs=TOLERANCE)
    assert rows[layout]["scale_loss"] == pytest.approx(rows["single"]["scale_loss"], rel=0, abs=TOLERANCE)
    assert rows[layout]["scale_error"] == pytest.approx(rows["single"]["scale_error"], rel=0, abs=TOLERANCE)
    grids = [(tmp_path / name / "grids" / "step-00000001.png").read_bytes() for name in ("single", layout)]
    assert grids[0] == grids[1]


def test_the_run_directory_says_what_ran(runs, inputs):
    world, _ = LAYOUTS["tensor2"]
    folder = runs.run_dir("tensor2", HALF)
    config = load_config(folder / "config.yaml")
    expected = tiny_config(inputs, folder, *DROPPING, steps(HALF), "parallel.tensor_parallel=2")
    assert config.model_copy(update={"tokenizer": expected.tokenizer}) == expected
    assert config.tokenizer.codebook_size == inputs.codebook  # as the trained tokenizer has it, not the default
    assert Path(str(config.tokenizer.path)).is_absolute()
    about = json.loads((folder / "versions.json").read_text())
    assert (about["world_size"], about["device"]) == (world, "cpu")
    assert about["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"megatron-core", "deepspeed", "hmar-mega"} <= about["versions"].keys()
    assert about["revision"]
    state = checkpoint_state(folder, "step-00000003")
    assert (state["step"], state["images_seen"], state["finished"]) == (HALF, HALF * BATCH, True)
    assert state["stream"] == {"epoch": 0, "position": HALF * BATCH}
    assert state["config"] == yaml.safe_load((folder / "config.yaml").read_text())


def test_training_leaves_no_shared_memory(tmp_path, inputs):
    world, settings = LAYOUTS["data2"]
    assert run_ranks(world, train_rank, tiny_config(inputs, tmp_path / "run", *settings)) == [[], []]


@pytest.mark.slow
def test_bf16_trains_on_the_cpu_and_resumes_its_float32_masters_exactly(tmp_path, inputs):
    layout = "tensor2_data2"
    whole = train(inputs, tmp_path / "whole", layout, *BF16, steps(10))
    assert all(math.isfinite(loss) for loss in whole.losses)
    assert sum(whole.losses[-3:]) < sum(whole.losses[:3]) - 0.1
    masters = whole.weights["blocks.0.attn.qkv.weight"]
    assert not torch.equal(masters, masters.to(torch.bfloat16).float()), "masters must be finer than bf16"

    train(inputs, tmp_path / "resumed", layout, *BF16, steps(5))
    resumed = train(inputs, tmp_path / "resumed", layout, *BF16, steps(10))
    assert_bitwise(resumed, whole)
    assert resumed.losses == whole.losses


def test_bf16_computes_in_bf16(tmp_path, inputs):
    fp32 = train(inputs, tmp_path / "fp32", "single", *BF16, "precision.compute=fp32", steps(1))
    bf16 = train(inputs, tmp_path / "bf16", "single", *BF16, steps(1))
    difference = abs(bf16.losses[0] - fp32.losses[0])
    assert 0 < difference < 0.02


def test_moments_are_stored_for_every_trained_parameter(runs):
    checkpoint = find_checkpoint(runs.run_dir("tensor2_data2", HALF))
    reader = CheckpointReader(checkpoint)
    assert len(reader.shapes) > 30
    for name in reader.shapes:
        assert reader.kinds(name) == {"weight", "exp_avg", "exp_avg_sq"}


def diverge_rank(config: Config) -> str:
    """How a run ends whose weights explode."""
    from hmar_mega.engine import TrainingError

    try:
        train_rank(config)
    except TrainingError as err:
        return str(err)
    raise AssertionError("training went on")


@pytest.mark.parametrize("layout", ["single", "tensor2"])
def test_a_run_that_diverges_stops_on_every_rank_and_keeps_its_last_good_checkpoint(tmp_path, inputs, layout):
    world, settings = LAYOUTS[layout]
    folder = tmp_path / "run"
    config = tiny_config(inputs, folder, *settings, "optim.base_lr=1e30", "optim.max_bad_steps=1", "checkpoint.interval=1", steps(WHOLE))
    messages = run_ranks(world, diverge_rank, config)
    assert len(set(messages)) == 1
    assert "the last checkpoint is kept" in messages[0]
    rows = read_metrics(folder)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert sorted(path.name for path in (folder / "checkpoints").glob("*")) == ["latest", f"step-{len(rows):08d}"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_directory_that_cannot_be_written_is_refused_by_every_rank(tmp_path, inputs, world):
    (tmp_path / "a_file").write_text("in the way")
    messages = run_ranks(world, refusal_rank, tiny_config(inputs, tmp_path / "a_file" / "run"))
    for message in messages:
        assert f"cannot write {tmp_path / 'a_file' / 'run'}" in message
        assert "choose a folder you can write to" in message
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.global_batch_size=4", "set data.global_batch_size=8"),
        ("run.seed=1", "set run.seed=0"),
    ],
)
def test_what_the_order_of_the_data_depends_on_cannot_change(runs, tmp_path, inputs, override, words):
    folder = shutil.copytree(runs.run_dir("single", HALF), tmp_path / "run")
    (message,) = run_ranks(1, refusal_rank, tiny_config(inputs, folder, *DROPPING, steps(WHOLE), override))
    assert words in message
    assert f"run.init_from={folder}" in message


def test_another_tokenizer_is_refused_to_go_on_with_and_to_start_from(runs, tmp_path, inputs, uneven_inputs):
    folder = shutil.copytree(runs.run_dir("single", HALF), tmp_path / "run")
    (message,) = run_ranks(1, refusal_rank, tiny_config(uneven_inputs, folder, *DROPPING, steps(WHOLE)))
    assert "was trained on tokens of tokenizer" in message
    other = tiny_config(uneven_inputs, tmp_path / "new", f"run.init_from={folder}")
    (message,) = run_ranks(1, refusal_rank, other)
    assert "was trained on tokens of tokenizer" in message
    assert not (tmp_path / "new").exists()


def damaged_run(runs, folder: Path) -> Path:
    """A run with checkpoints of steps 1, 2 and 3, the last of which is gone while `latest` still names it."""
    shutil.copytree(runs.run_dir("single", HALF, "checkpoint.interval=1", "checkpoint.keep_last=9"), folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    return folder


def test_a_run_whose_latest_checkpoint_is_gone_does_not_start_afresh(runs, tmp_path, inputs):
    folder = damaged_run(runs, tmp_path / "run")
    (message,) = run_ranks(1, refusal_rank, tiny_config(inputs, folder, *DROPPING, steps(WHOLE)))
    assert "step-00000001, step-00000002" in message
    assert "run.resume_from=step-00000002" in message
    assert len(read_metrics(folder)) == HALF


def test_a_run_goes_back_to_the_checkpoint_that_is_named(runs, tmp_path, inputs):
    folder = damaged_run(runs, tmp_path / "run")
    outcome = train(inputs, folder, "single", *DROPPING, steps(WHOLE), "run.resume_from=step-00000001")
    assert_bitwise(outcome, runs.whole("single"))
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, WHOLE + 1))


def test_what_lies_beyond_a_step_gone_back_to_is_removed_and_the_new_checkpoint_stays(runs, tmp_path, inputs):
    folder = tmp_path / "run"
    shutil.copytree(runs.run_dir("single", WHOLE, "checkpoint.interval=1", "checkpoint.keep_last=9"), folder)
    going_back = ("run.resume_from=step-00000001", "checkpoint.keep_last=1", steps(2))
    train(inputs, folder, "single", *DROPPING, *going_back)
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["latest", "step-00000002"]
    assert find_checkpoint(folder) == folder / "checkpoints" / "step-00000002"


STILL = ("optim.base_lr=1e-30", "optim.weight_decay=0", "optim.weight_decay_end=null", "precision.compute=bf16")


@pytest.mark.parametrize("layout", ["single", "data2", "data2_zero3", "tensor2"])
def test_bf16_rounds_neither_masters_nor_frozen_weights(runs, tmp_path, inputs, layout):
    first = runs.run_dir("single", HALF)
    exact = Outcome.of(first).weights
    again = train(inputs, tmp_path / "again", layout, *STILL, f"run.init_from={first}", steps(1))
    masked = train(inputs, tmp_path / "m", layout, *STILL, "stage.name=masked", f"run.init_from={first}", steps(1))
    for name, values in exact.items():
        assert torch.equal(again.weights[name], values), name
        assert torch.equal(masked.weights[name], values), name


def test_fine_tuning_on_other_classes_starts_only_their_table_afresh(runs, tmp_path, inputs):
    first = runs.run_dir("single", HALF)
    settings = ("optim.base_lr=1e-30", "model.num_classes=9", f"run.init_from={first}", steps(1))
    (message,) = run_ranks(1, refusal_rank, tiny_config(inputs, tmp_path / "no", *settings))
    assert "class_embed.weight" in message
    tuned = train(inputs, tmp_path / "tuned", "tensor2", *settings, "run.new_classes=true").weights
    before = Outcome.of(first).weights
    assert tuned["class_embed.weight"].shape == (10, 32)
    for name in before.keys() - {"class_embed.weight"}:
        torch.testing.assert_close(tuned[name], before[name], atol=1e-6, rtol=0)


def test_validation_shards_of_other_classes_are_refused(tmp_path, inputs, uneven_inputs):
    names = shutil.copytree(inputs.val, tmp_path / "val")
    index = json.loads((names / "index.json").read_text())
    index["classes"][0] = "someone else"
    (names / "index.json").write_text(json.dumps(index))
    (message,) = run_ranks(1, refusal_rank, tiny_config(inputs, tmp_path / "run", f"data.val={names}"))
    assert "someone else" in message
    assert "same class names" in message


def test_a_finished_run_is_left_as_it_is(runs, tmp_path, inputs):
    folder = shutil.copytree(runs.run_dir("single", HALF), tmp_path / "run")
    before = (folder / "config.yaml").read_text()
    train(inputs, folder, "single", *DROPPING, steps(HALF), "optim.clip=7")
    assert (folder / "config.yaml").read_text() == before
