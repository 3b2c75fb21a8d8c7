"""The sample grid of a training run: the same classes and seeds at every evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch

from hmar_mega.config import Config
from hmar_mega.data.images import image_grid
from hmar_mega.errors import UserError
from hmar_mega.inference.sampler import SampleSettings, generate_tokens
from hmar_mega.model.hmar import HMAR
from hmar_mega.tokenizer.model import MultiScaleVQVAE

log = logging.getLogger(__name__)


class GridSampler:
    """Draws `eval.grid_count` images with the model being trained.

    Args:
        writes: whether this process writes the file; under tensor parallelism every rank of the group samples.
    """

    def __init__(self, model: HMAR, tokenizer: MultiScaleVQVAE, config: Config, writes: bool) -> None:
        self.model, self.tokenizer, self.writes = model, tokenizer, writes
        device = next(tokenizer.parameters()).device
        count = config.eval.grid_count
        self.labels = torch.arange(count, device=device) % config.model.num_classes
        self.seeds = config.run.seed + torch.arange(count, device=device)
        passes = config.schedule.resolved_mask_schedule
        if not model.has_mask_branch:
            passes = tuple((n,) for n in model.schedule.scale_lengths)
        self.settings = SampleSettings(
            config.eval.cfg_scale, config.eval.top_k, config.eval.top_p, passes, 0.0, config.stage.mask_input
        )

    def __call__(self, path: Path, after_scale: Callable[[], None] | None = None) -> None:
        """Sample and write the grid as a PNG; what `after_scale` raises ends it before anything is written."""
        _, f_hat = generate_tokens(
            self.model, self.tokenizer.quantizer, self.labels, self.seeds, self.settings, after_scale=after_scale
        )
        if self.writes:
            with torch.inference_mode():
                images = self.tokenizer.decode(f_hat)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                image_grid(images, math.ceil(math.sqrt(len(images))), path, value_range=(-1.0, 1.0))
            except (OSError, UserError) as err:  # a picture is not worth a run
                log.warning("the sample grid %s is not written: %s", path, err)
