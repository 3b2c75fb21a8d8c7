"""Opening what a person names as a model: an exported one, or a run directory whose checkpoint is read as it is."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from hmar_mega.checkpoint.export import export_settings
from hmar_mega.checkpoint.layout import Box
from hmar_mega.checkpoint.sources import EMA, LATEST, CheckpointReader, find_checkpoint
from hmar_mega.config_io import parse_config
from hmar_mega.devices import pick_device
from hmar_mega.errors import UserError
from hmar_mega.inference.pipeline import ImageModel, build_model, load_model

log = logging.getLogger(__name__)


class _RunWeights:
    """`WeightSource` of a checkpoint: its weights, or their moving average where there is one."""

    def __init__(self, reader: CheckpointReader, ema: bool) -> None:
        self._reader = reader
        self.shapes, self.tokenizer_fingerprint = reader.shapes, reader.tokenizer_fingerprint
        self.averaged = reader.averaged() if ema else set()

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """The float32 values of `box` of one tensor."""
        return self._reader.read(name, box, kind=EMA if name in self.averaged else "weight")


def open_model(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    checkpoint: str = LATEST,
    tokenizer_folder: Path | None = None,
    decoder_dtype: torch.dtype = torch.float32,
) -> ImageModel:
    """An exported model, or the model of a run directory, also of one that still trains.

    Args:
        path: exported model, or run directory.
        device, dtype, decoder_dtype: as in `load_model`.
        ema: take the moving average of the weights. An export was made with it or without, and says so.
        checkpoint: of a run: `latest`, `best`, or a name.
        tokenizer_folder: of a run's tokenizer, if it has moved.

    Raises:
        UserError: when it is neither, has no moving average, or its parts do not fit each other.
    """
    path = Path(path)
    if not (path / "checkpoints").is_dir():
        model = load_model(path, device, dtype, decoder_dtype)
        if checkpoint != LATEST or tokenizer_folder is not None:
            raise UserError(f"{path} is an exported model, with one checkpoint and its own tokenizer; name neither")
        if ema and not model.settings.get("trained", {}).get("ema"):
            raise UserError(
                f"{path} was exported without its moving average; export it again with hmar-mega export RUN {path} "
                "--ema, or name the run directory instead"
            )
        return model
    folder = find_checkpoint(path, checkpoint)
    if folder is None:
        raise UserError(f"run {path} has no checkpoint {checkpoint!r}; see hmar-mega checkpoint list {path}")
    reader = CheckpointReader(folder)
    reader.verify()
    weights = _RunWeights(reader, ema)
    config = parse_config(reader.state["config"])
    settings = export_settings(config, reader.state)
    settings["trained"]["ema"] = ema
    log.info(
        "%s of step %s of %s%s", "moving average" if ema else "weights", reader.state["step"], path,
        "" if reader.state.get("finished", True) else ", which is unfinished",
    )  # fmt: skip
    tokenizer = tokenizer_folder or Path(str(config.tokenizer.path))
    return build_model(settings, weights, path, tokenizer, pick_device(device), dtype, decoder_dtype)
