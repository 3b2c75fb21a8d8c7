"""Tiny training runs for the process tests: inputs, configurations, what a rank runs, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from harness import run_ranks, shared_memory_names
from torch import Tensor

from hmar_mega.checkpoint.sources import CheckpointReader, find_checkpoint
from hmar_mega.config import Config, TokenizerConfig
from hmar_mega.config_io import config_to_yaml, load_config
from hmar_mega.data.index import TokenFormat
from hmar_mega.data.reader import TOKEN_FIELD, npy_bytes
from hmar_mega.data.writer import open_shards
from hmar_mega.errors import UserError
from hmar_mega.metrics import read_metrics
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.model import MultiScaleVQVAE

SCHEDULE = ScaleSchedule((1, 2, 4))

#: With batches of 8, the first epoch ends inside the fifth batch.
TRAIN_SAMPLES, BATCH = 36, 8

#: Neither two data-parallel ranks nor batches of 4 divide it.
VAL_SAMPLES = 15

#: Processes and settings of each way to spread a run.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "accumulated": (1, ("data.micro_batch_size=2",)),
    "tensor2": (2, ("parallel.tensor_parallel=2",)),
    "data2": (2, ()),
    "tensor2_data2": (4, ("parallel.tensor_parallel=2", "data.micro_batch_size=2")),
    "tensor4": (4, ("parallel.tensor_parallel=4",)),
    "sequence2": (2, ("parallel.tensor_parallel=2", "parallel.sequence_parallel=true")),
    "sequence4": (4, ("parallel.tensor_parallel=4", "parallel.sequence_parallel=true")),
    "sequence2_data2_zero3": (
        4,
        ("parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "parallel.zero_stage=3"),
    ),
    "data2_zero2": (2, ("parallel.zero_stage=2",)),
    "data2_zero3": (2, ("parallel.zero_stage=3",)),
    "data3_zero3": (3, ("parallel.zero_stage=3", "data.global_batch_size=6")),
    "tensor2_data2_zero2": (
        4,
        ("parallel.tensor_parallel=2", "parallel.zero_stage=2", "data.micro_batch_size=2"),
    ),
    "recompute": (1, ("parallel.recompute=full", "data.micro_batch_size=4")),
    "sequence2_selective": (
        2,
        ("parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "parallel.recompute=selective"),
    ),
    "pipeline2": (2, ("parallel.pipeline_parallel=2", "data.micro_batch_size=2")),
    "pipeline4": (4, ("parallel.pipeline_parallel=4", "data.micro_batch_size=1")),
    "pipeline2_virtual2": (
        2,
        ("parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=2", "data.micro_batch_size=2"),
    ),
    "pipeline2_tensor2": (
        4,
        ("parallel.pipeline_parallel=2", "parallel.tensor_parallel=2", "data.micro_batch_size=2"),
    ),
    "pipeline2_sequence2_recompute": (
        4,
        (
            "parallel.pipeline_parallel=2", "parallel.tensor_parallel=2", "parallel.sequence_parallel=true",
            "parallel.recompute=full", "data.micro_batch_size=4",
        ),
    ),
    "pipeline2_data2": (4, ("parallel.pipeline_parallel=2", "data.micro_batch_size=2")),
    "pipeline2_virtual2_sequence2_data2": (
        8,
        (
            "parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=2", "parallel.tensor_parallel=2",
            "parallel.sequence_parallel=true", "parallel.recompute=selective", "data.micro_batch_size=2",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What a run reads: folders of a tokenizer and of token shards, and what they hold."""

    tokenizer: Path
    train: Path
    val: Path
    codebook: int
    classes: int


def make_inputs(folder: Path, codebook: int, classes: int) -> Inputs:
    """A random tokenizer of 16 px images, and shards of random tokens."""
    torch.manual_seed(codebook)
    config = TokenizerConfig(
        base_channels=8, channel_mult=(1, 1, 1), encoder_res_blocks=1, decoder_res_blocks=1, latent_channels=8,
        norm_groups=4, attention=False, codebook_size=codebook,
    )  # fmt: skip
    tokenizer = MultiScaleVQVAE(config, SCHEDULE)
    tokenizer.save(folder / "tokenizer")
    tokens = TokenFormat(
        patch_nums=SCHEDULE.patch_nums,
        codebook_size=codebook,
        fingerprint=tokenizer.fingerprint,
        resolution=tokenizer.resolution,
    )
    noise = np.random.RandomState(0)
    names = [f"class {number}" for number in range(classes)]
    for part, count in (("train", TRAIN_SAMPLES), ("val", VAL_SAMPLES)):
        with open_shards(folder / part, "tokens", names, 10, tokens) as writer:
            for number in range(count):
                ids = noise.randint(0, codebook, SCHEDULE.num_tokens).astype("<u2")
                writer.write(f"{number:08d}", number % classes, {TOKEN_FIELD: npy_bytes(ids)})
    return Inputs(folder / "tokenizer", folder / "train", folder / "val", codebook, classes)


def tiny_config(inputs: Inputs, folder: Path, *overrides: str) -> Config:
    """A run of 3 steps in float32 whose every part matters within 3 steps.

    Steps are large, clipping is active, learning rate and weight decay change with every step, and the residual
    branches are open (gamma_init). eps = 1e-4: with Adam's usual 1e-8, rounding noise on a gradient that is zero would
    become a full step.
    """
    settings = [
        "model.depth=2", "model.width=32", "model.heads=4", "model.mask_layers=1", "model.gamma_init=1",
        "model.drop_path_rate=0", f"model.num_classes={inputs.classes}",
        "schedule.resolution=16", "schedule.patch_nums=[1, 2, 4]",
        f"tokenizer.path={inputs.tokenizer}", "tokenizer.channel_mult=[1, 1, 1]",
        f"data.train={inputs.train}", f"data.global_batch_size={BATCH}", "data.workers=0",
        "optim.base_lr=0.3", "optim.eps=1e-4", "optim.clip=0.25", "optim.weight_decay=0.5",
        "optim.weight_decay_end=0.8", "optim.epochs=2", "optim.max_steps=3", "optim.warmup_epochs=0.5",
        "optim.warmup_start=0.5", "precision.compute=fp32",
        "eval.grid_count=0", "eval.batch_size=4", "logging.interval=1", "logging.tensorboard=false",
        f"run.dir={folder}",
    ]  # fmt: skip
    return load_config(None, [*settings, *overrides])


def config_file(config: Config) -> str:
    """A file beside the run directory that the command line can be given for a configuration."""
    file = Path(f"{config.run.dir}.yaml")
    file.write_text(config_to_yaml(config))
    return str(file)


def train(inputs: Inputs, folder: Path, layout: str, *overrides: str) -> Outcome:
    """Run `tiny_config` with `overrides` in the processes of a layout."""
    world, settings = LAYOUTS[layout]
    run_ranks(world, train_rank, tiny_config(inputs, folder, *settings, *overrides))
    return Outcome.of(folder)


def train_rank(config: Config) -> list[str]:
    """What every rank of a run does; gives the shared memory that training left."""
    from hmar_mega.train import train_from_config

    train_from_config(config)
    return shared_memory_names(int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"]))


def refusal_rank(config: Config) -> str:
    """The message with which this rank refuses the configuration."""
    from hmar_mega.train import train_from_config

    try:
        train_from_config(config)
    except UserError as err:
        return str(err)
    raise AssertionError("the configuration was accepted")


@dataclass(frozen=True)
class Outcome:
    """What a run left: figures of every logged step, and the last checkpoint's tensors by (name, kind)."""

    losses: list[float]
    norms: list[float]
    tensors: dict[tuple[str, str], Tensor]

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        """Read a run directory."""
        rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
        checkpoint = find_checkpoint(folder)
        assert checkpoint is not None, f"{folder} has no checkpoint"
        reader = CheckpointReader(checkpoint)
        tensors = {
            (name, kind): reader.read(name, kind=kind) for name in reader.shapes for kind in sorted(reader.kinds(name))
        }
        return cls([row["loss"] for row in rows], [row["grad_norm"] for row in rows], tensors)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return {name: tensor for (name, kind), tensor in self.tensors.items() if kind == "weight"}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Over all elements of equally named tensors; the names must be the same."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def checkpoint_state(folder: Path, name: str) -> dict[str, object]:
    """`state.json` of one checkpoint of a run."""
    state: dict[str, object] = json.loads((folder / "checkpoints" / name / "state.json").read_text())
    return state


class Command:
    """A training started as a person would start it, and what it prints."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.printed: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for child in psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []:
            child.kill()
        self.process.kill()
        self.process.wait()

    def wait_for(self, pattern: str) -> None:
        """Read on until a line matches."""
        for line in self.process.stderr:
            self.printed.append(line)
            if re.search(pattern, line):
                return
        raise AssertionError(f"no line like {pattern}:\n{''.join(self.printed)}")

    def end(self, within: float) -> int:
        """The exit status, after so many seconds at most."""
        started = time.monotonic()
        self.printed += self.process.stderr.readlines()
        status = self.process.wait()
        assert time.monotonic() - started < within, "".join(self.printed)
        return status

    @property
    def text(self) -> str:
        return "".join(self.printed)
