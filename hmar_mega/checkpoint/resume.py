"""May this run go on from that checkpoint, or start from those weights: checked before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hmar_mega.checkpoint.sources import LATEST, CheckpointReader, find_checkpoint, open_weights
from hmar_mega.config import Config
from hmar_mega.errors import UserError


def resumable(config: Config, folder: Path, fingerprint: str) -> CheckpointReader | None:
    """The checkpoint a run goes on from; None when it starts.

    Args:
        fingerprint: of the tokenizer that is given now.

    Raises:
        UserError: when the run directory holds another run: another stage, tokenizer, seed or batch size, on which
            the order and the draws of the data depend.
    """
    checkpoint = find_checkpoint(folder, config.run.resume_from or LATEST)
    if checkpoint is None:
        if config.run.resume_from is not None:
            raise UserError(f"run.resume_from={config.run.resume_from}: {folder} has no such complete checkpoint")
        return None
    if not config.run.resume:
        raise UserError(f"run.dir={folder} already has checkpoints and run.resume=false; choose another run.dir")
    reader = CheckpointReader(checkpoint)
    _check_tokenizer(reader.tokenizer_fingerprint, fingerprint, folder)
    stored = reader.state["config"]
    if stored["stage"]["name"] != config.stage.name:
        raise UserError(
            f"run.dir={folder} holds a run of stage {stored['stage']['name']}, not {config.stage.name}; choose another "
            f"run.dir and give this one as run.init_from={folder}"
        )
    now = config.model_dump(mode="json")
    for section, key in (
        ("run", "seed"),
        ("data", "global_batch_size"),
        ("data", "batch_ramp"),
        ("stage", "mask_input"),
    ):
        _check_same(section, key, stored[section].get(key), now[section][key], folder)
    return reader


def last_checkpoint_name(folder: Path) -> str:
    """Of the checkpoint a run would go on from; `none` when it would start."""
    checkpoint = find_checkpoint(folder, LATEST)
    return "none" if checkpoint is None else checkpoint.name


def check_origin(config: Config, fingerprint: str) -> None:
    """Refuse a `run.init_from` that is missing or was trained on another tokenizer's tokens."""
    if config.run.init_from is None:
        return
    source = open_weights(config.run.init_from)
    _check_tokenizer(source.tokenizer_fingerprint, fingerprint, config.run.init_from)


def _check_tokenizer(stored: str, given: str, where: str | Path) -> None:
    if stored != given:
        raise UserError(
            f"{where} was trained on tokens of tokenizer {stored}, the one given is {given}; set tokenizer.path to "
            "that one, or train from scratch in another run.dir"
        )


def _check_same(section: str, key: str, stored: Any, given: Any, folder: Path) -> None:
    if stored != given:
        raise UserError(
            f"{section}.{key}={given}, but the run in {folder} was started with {stored}, on which the order and the "
            f"draws of its data depend; set {section}.{key}={stored}, or start a new run.dir from its weights with "
            f"run.init_from={folder}"
        )
