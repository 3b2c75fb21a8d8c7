"""From an export's config.json and a source of weights to a transformer that samples."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hmar_mega.checkpoint.export import portable
from hmar_mega.checkpoint.sources import WeightSource, check_shapes
from hmar_mega.config import ModelConfig
from hmar_mega.errors import UserError
from hmar_mega.model.hmar import HMAR
from hmar_mega.model.layers_quantized import replace_linears
from hmar_mega.scales import ScaleSchedule

log = logging.getLogger(__name__)

#: Attention backends of training that not every machine has; exports of before `portable` name them.
GPU_BACKENDS = ("triton", "te")


def new_model(settings: dict[str, Any], folder: Path) -> HMAR:
    """The transformer that `settings`, an export's config.json, describes, on the meta device.

    Args:
        folder: where it came from, for messages.

    Raises:
        UserError: when the settings describe none.
    """
    try:
        config = ModelConfig.model_validate(settings["model"])
        if config.attention.backend in GPU_BACKENDS:
            log.info(
                "%s says attention.backend=%s, with which it was trained; sampling takes auto, which runs anywhere",
                folder, config.attention.backend,
            )  # fmt: skip
            config = portable(config)
        with torch.device("meta"):
            model = HMAR(
                config,
                ScaleSchedule(tuple(settings["patch_nums"])),
                settings["codebook_size"],
                settings["latent_channels"],
                mask_branch=settings["mask_branch"],
            )
        if "quantization" in settings:
            replace_linears(model, settings["quantization"]["to"], tuple(settings["quantization"]["parts"]))
    except (TypeError, ValueError, KeyError) as err:
        raise UserError(f"{folder}/config.json is damaged ({err}); export the model again") from None
    return model


def fill_model(model: HMAR, source: WeightSource, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Put the source's tensors in place of meta ones; what is computed from others is computed on the device.

    Args:
        dtype: of parameters; 8-bit weights and their scales, which are buffers, stay as they are.

    Raises:
        UserError: when the source lacks a tensor, or has one of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(source, wanted, folder)
    parameters = {name for name, _ in model.named_parameters()}
    for name in wanted:
        owner_name, _, leaf = name.rpartition(".")
        values = source.read(name).to(device)
        if name in parameters:
            # bf16 steps near ln 100 would change a head's temperature by more than 1 %
            kept = torch.float32 if leaf == "log_scale" else dtype
            values = nn.Parameter(values.to(kept), requires_grad=False)
        setattr(model.get_submodule(owner_name), leaf, values)
    model.register_buffer("level_ids", model.schedule.level_ids(device), persistent=False)
