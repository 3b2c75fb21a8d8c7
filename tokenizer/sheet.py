"""Pictures of what a tokenizer does: originals, reconstructions, errors, and what the first scales alone give.

Axes: B images, K scales, R image side.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hmar_mega.tokenizer.model import MultiScaleVQVAE

#: The side in pixels to which smaller images are enlarged in a PNG.
SHOWN_SIDE = 64

#: Images in a row of a sheet.
SHOWN_IMAGES = 12


@torch.no_grad()
def partial_reconstructions(model: MultiScaleVQVAE, tokens: Tensor) -> Tensor:
    """Images decoded from the first 1, 2, … K scales of tokens (B, N): (K, B, 3, R, R) in [−1, 1]."""
    f_hat, images = None, []
    for k in range(model.schedule.num_scales):
        features = model.quantizer.scale_features(k, tokens[:, model.schedule.span(k)])
        f_hat = features if f_hat is None else f_hat + features
        images.append(model.decode(f_hat))
    return torch.stack(images)


@torch.no_grad()
def reconstruction_sheet(model: MultiScaleVQVAE, images: Tensor, error: bool = False) -> Tensor:
    """A row of originals, one of reconstructions, then those of scales 1, 1–2, … K−1 alone.

    Args:
        images: (B, 3, R, R) in [−1, 1].
        error: a row of absolute differences, black where there is none, between the second row and the third.

    Returns:
        (rows·R, B·R, 3) uint8 on the CPU.
    """
    images = images.to(model.quantizer.embedding.weight.device)
    partial = partial_reconstructions(model, model.encode(images))
    middle = [(partial[-1] - images).abs().clamp(0, 2)[None] - 1] if error else []
    rows = torch.cat([images[None], partial[-1:], *middle, partial[:-1]])
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return ((sheet + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def png(sheet: Tensor, side: int) -> bytes:
    """A sheet (H, W, 3) uint8 as PNG, enlarged where its images are smaller than `SHOWN_SIDE`.

    Args:
        side: of its images, in pixels.
    """
    picture = Image.fromarray(np.asarray(sheet))
    zoom = max(1, SHOWN_SIDE // side)
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
