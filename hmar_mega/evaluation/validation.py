"""Validation loss and accuracy of a model at every scale, by the code that training validates with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hmar_mega.config_io import parse_config
from hmar_mega.data.reader import ShardReader, check_fingerprint
from hmar_mega.data.stream import eval_batches
from hmar_mega.errors import UserError
from hmar_mega.inference.pipeline import ImageModel
from hmar_mega.objective import Objective


def validate(
    model: ImageModel, folder: Path, batch_size: int, limit: int | None, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """Figures of each branch of a model: `next_scale`, and `masked` where it has a mask branch. Collective.

    Masks are functions of seed 0 and the sample's number; a training run with another `run.seed` draws others.

    Args:
        folder: token shards of the model's tokenizer.
        limit: samples; None: all.

    Returns:
        By branch: all_scales, last_scale (nats per token), scale_loss (K), all_scales_accuracy, last_scale_accuracy,
        scale_accuracy (K), samples.

    Raises:
        UserError: when the shards do not go with the model.
    """
    from hmar_mega.loop import validation_losses  # pulls in DeepSpeed and Megatron-core

    reader = ShardReader(folder, "tokens")
    check_fingerprint(reader.index, model.tokenizer.fingerprint, model.schedule.patch_nums)
    if len(reader.index.classes) > model.num_classes:
        raise UserError(f"{folder} has {len(reader.index.classes)} classes, the model only {model.num_classes}")
    samples = min(limit or len(reader), len(reader))
    if samples < world:
        raise UserError(f"{samples} validation samples are fewer than the {world} processes; start fewer")
    share = -(-samples // world)
    rounds = -(-share // batch_size)
    branches = ("next_scale", "masked") if model.model.has_mask_branch else ("next_scale",)
    figures = {}
    for branch in branches:
        objective = Objective(_config(model, branch), model.tokenizer.quantizer, model.device)
        batches = eval_batches(reader, batch_size, rank, world, samples)
        found = validation_losses(
            objective, model.model, batches, model.device, rounds, padded=False, after_batch=lambda: None
        )
        figures[branch] = {
            **{key: found[key] for key in ("all_scales", "last_scale", "scale_loss")},
            **{f"{key}_accuracy": 1 - found[f"{key}_error"] for key in ("all_scales", "last_scale")},
            "scale_accuracy": [None if error is None else 1 - error for error in found["scale_error"]],
            "samples": samples,
        }
    return figures


def _config(model: ImageModel, branch: str) -> Any:
    """As much of a training configuration as an objective reads."""
    settings = model.settings
    return parse_config(
        {
            "model": settings["model"],
            "schedule": {
                "resolution": model.schedule.grid * model.tokenizer.config.downsample,
                "patch_nums": settings["patch_nums"],
            },
            "tokenizer": model.tokenizer.config.model_dump(mode="json"),
            "stage": {"name": branch, "mask_input": settings["mask_input"]},
        }
    )
