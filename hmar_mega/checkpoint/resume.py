"""May this run go on from that checkpoint, or start from those weights: checked before anything is built."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hmar_mega.checkpoint.checksums import Damage, describe, find_damage, read_sums, sha256_of
from hmar_mega.checkpoint.sources import LATEST, CheckpointReader, earlier_whole, find_checkpoint, open_weights
from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.parallel.dims import ParallelDims

log = logging.getLogger(__name__)


def resumable(config: Config, folder: Path, fingerprint: str) -> CheckpointReader | None:
    """The checkpoint a run goes on from; None when it starts.

    Args:
        fingerprint: of the tokenizer that is given now.

    Raises:
        UserError: when the run directory holds another run: another stage, tokenizer, seed or batch size, on which
            the order and the draws of the data depend.
    """
    reader = found_in(config, folder, "run.dir")
    if reader is None:
        return None
    if reader.state.get("kind") is not None:
        raise UserError(f"run.dir={folder} holds the run of a {reader.state['kind']}; choose another run.dir")
    if reader.state.get("weights_only"):
        raise UserError(
            f"{reader.folder} holds weights alone, with which a run cannot go on; start a new one from them: another "
            f"run.dir with run.init_from={reader.folder}"
        )
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
    _check_order(stored["data"], now["data"], folder)
    return reader


def found_in(config: Config, folder: Path, option: str) -> CheckpointReader | None:
    """The checkpoint that `run.resume_from` names, or the last one; None when there is none yet.

    Args:
        option: by which the folder was given, for messages.

    Raises:
        UserError: when there is not the one asked for, one though `run.resume` is false, or one that cannot be read.
    """
    checkpoint = find_checkpoint(folder, config.run.resume_from or LATEST)
    if checkpoint is None:
        if config.run.resume_from is not None:
            raise UserError(f"run.resume_from={config.run.resume_from}: {folder} has no such complete checkpoint")
        return None
    if not config.run.resume:
        raise UserError(f"{option}={folder} already has checkpoints and run.resume=false; choose another {option}")
    try:
        return CheckpointReader(checkpoint)
    except UserError as err:
        raise UserError(f"{err}{_offer(earlier_whole(checkpoint))}") from None


def _check_order(stored: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse another order of the samples; checkpoints of before there was a choice have none to compare."""
    if "shuffle" not in stored:
        stored = {**stored, "shuffle": "global", "mix": [], "reader": "index"}
    for key in ("shuffle", "reader", *(("group_shards",) if now["shuffle"] == "groups" else ())):
        _check_same("data", key, stored[key], now[key], folder)
    weights = ([part["weight"] for part in data["mix"]] for data in (stored, now))
    _check_same("data", "mix (its weights)", *weights, folder)


def resumable_together(config: Config, folder: Path, fingerprint: str, dims: ParallelDims) -> CheckpointReader | None:
    """`resumable` as the first process sees it, in every process; see `found_together`."""
    return found_together(lambda: resumable(config, folder, fingerprint), dims)


def found_together(find: Callable[[], CheckpointReader | None], dims: ParallelDims) -> CheckpointReader | None:
    """What `find` gives in the first process, in every process: a shared disk may show others an older `latest`.

    Raises:
        UserError: in every process, what `find` raises in the first; and where a process sees other files.
    """
    said: list[Any] = [None, None, None]
    if dims.is_main:
        try:
            reader = find()
            said = [reader and str(reader.folder), reader and sha256_of(reader.folder / "state.json"), None]
        except UserError as err:
            said[2] = str(err)
    dist.broadcast_object_list(said, src=0)
    path, digest, refusal = said
    if refusal is not None:
        raise UserError(refusal)
    if path is None:
        return None
    if not (Path(path) / "state.json").is_file() or sha256_of(Path(path) / "state.json") != digest:
        raise UserError(
            f"{path} is not the same on every node: run.dir must be on a disk that all nodes share; if it is, wait a "
            "moment until they all see it and start again"
        )
    return CheckpointReader(Path(path))


def last_checkpoint_name(folder: Path) -> str:
    """Of the checkpoint a run would go on from; `none` when it would start."""
    checkpoint = find_checkpoint(folder, LATEST)
    return "none" if checkpoint is None else checkpoint.name


def check_origin(config: Config, fingerprint: str) -> None:
    """Refuse a `run.init_from` that is missing or was trained on another tokenizer's tokens."""
    if config.run.init_from is None:
        return
    source = open_weights(config.run.init_from, verify=False)  # hashed later, by all processes together
    _check_tokenizer(source.tokenizer_fingerprint, fingerprint, config.run.init_from)


def verify_together(checkpoint: Path, dims: ParallelDims) -> None:
    """Hash every file of a checkpoint, each in one process; collective.

    Raises:
        UserError: in every process, when a file is not as it was written; the newest earlier checkpoint of the run
            whose files are all right is offered.
    """
    sums = read_sums(checkpoint)
    if sums is None:
        if dims.is_main:
            log.warning("checkpoint %s has no checksums (format 1): it is read as it is", checkpoint)
        return
    damage = _damage_together(checkpoint, sums, dims)
    if not damage:
        return
    earlier = earlier_whole(checkpoint)
    while earlier is not None and (known := read_sums(earlier)) and _damage_together(earlier, known, dims):
        earlier = earlier_whole(earlier)
    raise UserError(f"{describe(checkpoint, damage)}{_offer(earlier)}")


def _damage_together(checkpoint: Path, sums: dict[str, str], dims: ParallelDims) -> list[Damage]:
    """What is damaged, in every process; the files are dealt out by size."""
    by_size = sorted(sums, key=lambda name: (-_size(checkpoint / name), name))
    parts: list[Any] = [None] * dims.world_size
    dist.all_gather_object(parts, find_damage(checkpoint, sums, by_size[dims.rank :: dims.world_size]))
    return sorted((damage for part in parts for damage in part), key=lambda damage: damage.file)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _offer(earlier: Path | None) -> str:
    if earlier is None:
        return "; no earlier checkpoint of the run is whole"
    return (
        f"; the newest earlier one that is whole is {earlier.name}: go on from it with run.resume_from={earlier.name}"
    )


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
