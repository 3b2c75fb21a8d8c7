"""Tokenizer training over two processes under DeepSpeed ZeRO is that of one process in plain torch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from harness import run_ranks
from PIL import Image
from runs import Outcome, largest_difference

from hmar_mega.config import Config
from hmar_mega.config_io import parse_config
from hmar_mega.data.shard import image_fields
from hmar_mega.data.writer import open_shards
from hmar_mega.metrics import read_metrics
from hmar_mega.tokenizer.model import MultiScaleVQVAE

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 5


def config(folder: Path, out: str, zero_stage: int, steps: int = STEPS, **changes: object) -> Config:
    """Everything that has a state, and Adam's eps so large that rounding noise is no full step."""
    train = {
        "steps": steps, "batch_size": 8, "micro_batch_size": 2, "warmup_steps": 2, "lr": 1e-2, "log_interval": 1,
        "dead_code_steps": 0, "ema_decay": 0.9, "truncate_prob": 0.3,
        "adversarial": {"weight": 0.1, "adaptive": False, "channels": 8, "layers": 1, "start": 2},
        **changes,
    }  # fmt: skip
    tokenizer = {
        "base_channels": 8, "channel_mult": [1, 1, 1], "encoder_res_blocks": 1, "decoder_res_blocks": 1,
        "latent_channels": 4, "norm_groups": 4, "attention": False, "codebook_size": 16, "train": train,
    }  # fmt: skip
    return parse_config(
        {
            "tokenizer": tokenizer,
            "schedule": {"resolution": 8, "patch_nums": [1, 2]},
            "data": {"images": str(folder / "images"), "images_val": str(folder / "images"), "augment": "none"},
            "optim": {"eps": 1e-4},
            "parallel": {"zero_stage": zero_stage},
            "precision": {"compute": "fp32"},
            "logging": {"tensorboard": False},
            "run": {"dir": str(folder / out)},
        }
    )


def train_rank(settings: Config) -> dict[str, object] | None:
    """What every process of a run does."""
    from hmar_mega.tokenizer.train import train_tokenizer

    return train_tokenizer(settings, Path(str(settings.run.dir)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    noise = np.random.RandomState(0)
    with open_shards(folder / "images", "images", ["only"], 64) as writer:
        for number in range(20):
            file = io.BytesIO()
            Image.fromarray(noise.randint(0, 256, (8, 8, 3)).astype(np.uint8)).save(file, format="PNG")
            writer.write(f"{number:06d}", 0, image_fields("png", file.getvalue(), f"{number}", (8, 8)))
    run_ranks(1, train_rank, config(folder, "alone", 1))
    return folder


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_two_processes_train_the_tokenizer_of_one(folder: Path, zero_stage: int):
    """Without restarts of codes: of several processes, the residuals of the first count."""
    name = f"zero{zero_stage}"
    metrics = run_ranks(2, train_rank, config(folder, name, zero_stage))
    assert metrics[1] is None
    ours, alone = Outcome.of(folder / name), Outcome.of(folder / "alone")
    assert ours.losses == pytest.approx(alone.losses, rel=1e-4)
    assert largest_difference(ours.weights, alone.weights) < 2e-4
    averages = [{n: t for (n, kind), t in run.tensors.items() if kind == "ema"} for run in (ours, alone)]
    assert averages[0]
    assert largest_difference(*averages) < 2e-4
    assert MultiScaleVQVAE.load(folder / name).fingerprint == metrics[0]["fingerprint"]


def test_one_process_goes_on_where_two_stopped(folder: Path):
    run_ranks(2, train_rank, config(folder, "two", 2))
    run_ranks(1, train_rank, config(folder, "two", 1, steps=STEPS + 2))
    run_ranks(1, train_rank, config(folder, "alone", 1, steps=STEPS + 2))
    rows = [[r for r in read_metrics(folder / name) if r["kind"] == "train"] for name in ("two", "alone")]
    assert [row["step"] for row in rows[0]] == list(range(1, STEPS + 3))
    for key in ("loss", "discriminator", "l2"):
        two, one = ([row[key] for row in part[-2:]] for part in rows)
        assert two == pytest.approx(one, rel=1e-3), key


def test_restarted_codes_reach_the_float32_masters_of_both_processes(folder: Path):
    """At a learning rate of next to nothing, codes can only have changed by a restart that the optimizer kept."""
    codes = {}
    for name, patience in (("kept", 0), ("restarted", 1)):
        still = {"lr": 1e-9, "dead_code_steps": patience, "restart_until": 1, "adversarial": {"weight": 0}}
        run_ranks(2, train_rank, config(folder, name, 1, **still))
        codes[name] = Outcome.of(folder / name).tensors["quantizer.embedding.weight", "weight"]
    rows = [r for r in read_metrics(folder / "restarted") if r["kind"] == "train"]
    assert sum(r["renewed_codes"] for r in rows) > 0
    changed = (codes["kept"] - codes["restarted"]).abs().amax(1) > 1e-4
    assert 0 < int(changed.sum()) <= sum(r["renewed_codes"] for r in rows)
