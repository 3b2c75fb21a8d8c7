"""A tokenizer run's checkpoints: may it go on from one, going on, and the finished tokenizer out of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmar_mega.checkpoint.canonical import read_beside
from hmar_mega.checkpoint.resume import found_in
from hmar_mega.checkpoint.sources import EMA, CheckpointReader
from hmar_mega.config import Config
from hmar_mega.config_tokenizer import TokenizerConfig
from hmar_mega.errors import UserError
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.model import MultiScaleVQVAE

#: What `state.json` says a run trains.
KIND = "tokenizer"


def resumable_tokenizer(config: Config, folder: Path) -> CheckpointReader | None:
    """The checkpoint a tokenizer run goes on from; None when it starts.

    Raises:
        UserError: when the folder holds something else: a transformer's run, another architecture, seed or batch size.
    """
    reader = found_in(config, folder, "--out")
    if reader is None:
        return None
    if reader.state.get("kind") != KIND:
        raise UserError(f"{folder} holds the run of a transformer, not of a tokenizer; choose another folder")
    stored: dict[str, Any] = reader.state["config"]
    before = _decisive(stored, tuple(reader.state["patch_nums"]))
    now = _decisive(config.model_dump(mode="json"), config.schedule.scales.patch_nums)
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        key = different[0]
        raise UserError(
            f"{folder} was started with {key}={before.get(key)}, this configuration has {now[key]}"
            + (f" (different too: {', '.join(different[1:])})" if different[1:] else "")
            + f": that is another run. Set {key}={before.get(key)} to go on, choose another folder, or give --overwrite"
        )
    return reader


def restore(reader: CheckpointReader, beside: dict[str, Tensor], folder: Path) -> None:
    """Fill what is no parameter: usage of the codebook, the discriminator and its optimizer."""
    with torch.no_grad():
        read_beside(reader, beside, folder)


def finished_tokenizer(checkpoint: Path) -> MultiScaleVQVAE:
    """The tokenizer of a checkpoint: the moving average of its weights where one was kept, else the weights.

    Returns:
        On the CPU, in evaluation mode, frozen.
    """
    reader = CheckpointReader(checkpoint)
    config: dict[str, Any] = reader.state["config"]
    section = TokenizerConfig.model_validate(config["tokenizer"])
    with torch.random.fork_rng(devices=[]):  # the first weights, drawn and thrown away
        model = MultiScaleVQVAE(section, ScaleSchedule(tuple(reader.state["patch_nums"])))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = EMA if EMA in reader.kinds(name) else "weight"
            parameter.copy_(reader.read(name, kind=kind))
        read_beside(reader, {"usage.hits": model.quantizer.ema_vocab_hit}, checkpoint)
    return model.eval().requires_grad_(False)


def _decisive(config: dict[str, Any], patch_nums: tuple[int, ...]) -> dict[str, Any]:
    """The settings that decide what the weights are and which images come when, by dotted key."""
    train = config["tokenizer"]["train"]
    flat = {f"tokenizer.{key}": value for key, value in config["tokenizer"].items() if key not in ("train", "path")}
    flat |= {"schedule.resolution": config["schedule"]["resolution"], "schedule.patch_nums": list(patch_nums)}
    flat |= {"tokenizer.train.batch_size": train["batch_size"], "run.seed": config["run"]["seed"]}
    adversarial = train["adversarial"]
    flat["tokenizer.train.adversarial.weight"] = "more than 0" if adversarial["weight"] else 0
    flat |= {f"tokenizer.train.adversarial.{key}": adversarial[key] for key in ("channels", "layers")}
    return flat
