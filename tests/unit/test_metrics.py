"""Where a run's figures go: metrics.jsonl that survives kills and resumes, TensorBoard, Weights & Biases offline."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.devices import peak_memory
from hmar_mega.errors import UserError
from hmar_mega.metrics import MetricsLog, read_metrics

PLAIN = ("logging.tensorboard=false",)
BOARD = ("logging.tensorboard=true",)
OFFLINE = ("logging.tensorboard=false", "logging.wandb=offline", "logging.wandb_project=tests")


def config(*settings: str) -> Config:
    return load_config(None, settings)


@contextmanager
def metrics_log(run: Path, *settings: str, resumed_step: int = 0) -> Iterator[MetricsLog]:
    run.mkdir(exist_ok=True)
    log = MetricsLog(run, config(*settings), resumed_step)
    try:
        yield log
    finally:
        log.close()


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a TensorBoard curve."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


# metrics.jsonl


def test_a_row_is_one_json_line_with_kind_step_and_values(tmp_path):
    with metrics_log(tmp_path, *PLAIN) as log:
        log.write("train", 10, {"loss": 4.5, "scale_loss": [4.0, 5.0], "images": 80})
        log.write("val", 10, {"all_scales": 4.25, "last_scale": None})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"kind": "train", "step": 10, "loss": 4.5, "scale_loss": [4.0, 5.0], "images": 80}\n'
        '{"kind": "val", "step": 10, "all_scales": 4.25, "last_scale": null}\n'
    )


def test_rows_are_on_disk_before_the_log_is_closed(tmp_path):
    with metrics_log(tmp_path, *PLAIN) as log:
        log.write("train", 1, {"loss": 1.0})
        assert read_metrics(tmp_path) == [{"kind": "train", "step": 1, "loss": 1.0}]


def test_without_tensorboard_and_wandb_there_is_one_file(tmp_path):
    with metrics_log(tmp_path, *PLAIN) as log:
        log.write("train", 1, {"loss": 1.0})
    assert [path.name for path in tmp_path.rglob("*")] == ["metrics.jsonl"]


def test_a_last_line_cut_short_by_a_kill_is_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n{"kind": "train", "st')
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1, "loss": 1.0}]
    assert "has a line cut short" in caplog.text
    assert str(tmp_path) in caplog.text


def test_a_resumed_run_drops_the_steps_it_runs_again_and_the_line_cut_short(tmp_path):
    with metrics_log(tmp_path, *PLAIN) as log:
        for step in range(1, 6):
            log.write("train", step, {"loss": float(step)})
        log.write("val", 5, {"all_scales": 9.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    with metrics_log(tmp_path, *PLAIN, resumed_step=3) as log:
        log.write("train", 4, {"loss": 40.0})
    rows = [(row["kind"], row["step"], row["loss"]) for row in read_metrics(tmp_path)]
    assert rows == [("train", 1, 1.0), ("train", 2, 2.0), ("train", 3, 3.0), ("train", 4, 40.0)]


def test_a_run_started_from_nothing_drops_the_rows_of_a_run_without_checkpoint(tmp_path):
    with metrics_log(tmp_path, *PLAIN) as log:
        log.write("train", 1, {"loss": 1.0})
    with metrics_log(tmp_path, *PLAIN, resumed_step=0):
        assert read_metrics(tmp_path) == []


def test_a_figure_that_is_not_finite_is_still_a_row(tmp_path):
    """JSON has no NaN; Python writes and reads it, so that a diverging run shows where it went wrong."""
    with metrics_log(tmp_path, *PLAIN) as log:
        log.write("train", 1, {"loss": float("nan")})
    (row,) = read_metrics(tmp_path)
    assert row["loss"] != row["loss"]


def test_peak_memory_of_a_cpu_run_is_what_this_process_held():
    before = peak_memory(torch.device("cpu"))
    held = np.ones(max(1, before + 2**26 - psutil.Process().memory_info().rss), np.uint8)
    after = peak_memory(torch.device("cpu"))
    assert before + 2**25 < after < before + 2**28
    assert held.all()


# TensorBoard


def test_numbers_and_lists_of_numbers_become_curves(tmp_path):
    with metrics_log(tmp_path, *BOARD) as log:
        log.write("train", 1, {"loss": 4.5, "scale_loss": [4.0, 5.0], "images": 80})
        log.write("train", 2, {"loss": 4.25, "scale_loss": [3.0, 4.0], "images": 160})
        log.write("val", 2, {"all_scales": 4.0, "last_scale": None, "note": "text", "flag": True})
    assert scalars(tmp_path, "train/loss") == [(1, 4.5), (2, 4.25)]
    assert scalars(tmp_path, "train/scale_loss/2") == [(1, 5.0), (2, 4.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert b"pattern: block_diagonal" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/images", "train/scale_loss/1", "train/scale_loss/2", "val/all_scales",
    }  # fmt: skip


def test_sample_grids_are_shown_in_tensorboard_and_a_missing_one_is_told(tmp_path, caplog):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "grid.png")
    with metrics_log(tmp_path, *BOARD) as log:
        log.picture("samples", 7, tmp_path / "grid.png")
        log.picture("samples", 8, tmp_path / "absent.png")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (shown,) = events.Images("samples")
    assert (shown.step, shown.width, shown.height) == (7, 6, 4)
    assert "absent.png is not shown in TensorBoard" in caplog.text


def test_after_a_resume_the_curves_show_no_step_twice(tmp_path):
    with metrics_log(tmp_path, *BOARD) as log:
        for step in (1, 2, 3, 4):
            log.write("train", step, {"loss": float(step)})
    with metrics_log(tmp_path, *BOARD, resumed_step=2) as log:
        for step in (3, 4, 5):
            log.write("train", step, {"loss": 10.0 * step})
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


# Weights & Biases


@pytest.fixture
def clean_wandb(monkeypatch) -> Iterator[ModuleType]:
    """Nothing of the user's wandb settings reaches the test, and its helper process does not outlive it."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield wandb
    wandb.teardown()


@pytest.mark.slow
def test_wandb_offline_writes_a_run_below_the_run_directory(tmp_path, clean_wandb):
    run = tmp_path / "my-run"
    Image.new("RGB", (6, 4), "red").save(tmp_path / "grid.png")
    with metrics_log(run, *OFFLINE) as log:
        log.write("train", 1, {"loss": 4.5625, "scale_loss": [4.0, 5.0]})
        log.write("train", 2, {"loss": 4.25, "scale_loss": [3.0, 6.0625]})
        log.picture("samples", 2, tmp_path / "grid.png")
    clean_wandb.teardown()  # waits for wandb's own process, as the end of a program does
    (folder,) = run.glob("wandb/offline-run-*")
    (stored,) = folder.glob("run-*.wandb")
    assert len(list(folder.glob("files/media/images/samples_*.png"))) == 1
    data = stored.read_bytes()  # protocol buffers, not compressed
    for expected in (b"train/loss", b"4.5625", b"train/scale_loss/2", b"6.0625", b"my-run", b"block_diagonal"):
        assert expected in data, expected
    assert [row["loss"] for row in read_metrics(run)] == [4.5625, 4.25]


def test_wandb_that_is_not_installed_is_a_clear_error(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_wandb(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "wandb":
            raise ImportError("no module named wandb")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(UserError) as caught:
        MetricsLog(tmp_path, config(*OFFLINE), 0)
    message = str(caught.value)
    assert "logging.wandb=offline needs the wandb package" in message
    assert "pip install 'hmar-mega[wandb]'" in message
    assert "or set logging.wandb=off" in message


@pytest.mark.parametrize("settings", [(), ("logging.wandb=off",)], ids=["by default", "as the message says"])
def test_wandb_off_does_not_import_it(tmp_path, monkeypatch, settings):
    real = builtins.__import__

    def without_wandb(name: str, *args: object, **kwargs: object) -> object:
        assert name.split(".")[0] != "wandb"
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with metrics_log(tmp_path, *PLAIN, *settings) as log:
        log.write("train", 1, {"loss": 1.0})
