"""Zero-shot editing: inpainting, outpainting and class-conditional edits by forcing the tokens of the kept region."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hmar_mega.errors import UserError
from hmar_mega.inference.pipeline import ImageModel, image_seeds
from hmar_mega.inference.sampler import SampleSettings, generate_tokens
from hmar_mega.scales import ScaleSchedule


def edit_images(
    model: ImageModel,
    images: Tensor,
    edit_mask: Tensor,
    labels: Tensor | list[int],
    seed: int | list[int] | Tensor = 0,
    settings: SampleSettings | None = None,
    paste: bool = True,
) -> Tensor:
    """Generate anew where the mask says so, keep the rest.

    At every scale the tokens whose cell lies wholly in the kept region are those of the encoded image; all others are
    sampled (SPEC §6).

    Args:
        images: (B, 3, H, W) in [0, 1].
        edit_mask: (B, 1, H, W) or (1, 1, H, W) bool, True where to generate.
        labels: class of each result.
        seed: as in `ImageModel.generate`.
        settings: default the model's own.
        paste: put the original pixels back where they are kept, since the tokenizer blurs them; False shows the
            decoder's own.

    Returns:
        (B, 3, H, W) float32 in [0, 1].

    Raises:
        UserError: when sizes do not fit the model.
    """
    resolution = model.schedule.grid * model.tokenizer.config.downsample
    for name, given in (("image", images), ("mask", edit_mask)):
        if tuple(given.shape[-2:]) != (resolution, resolution):
            raise UserError(
                f"the {name} is {given.shape[-1]}×{given.shape[-2]} px, the model makes {resolution}×{resolution} px; "
                f"resize the {name}"
            )
    count = len(images)
    if len(edit_mask) not in (1, count) or len(labels) != count:
        raise UserError(
            f"{count} images, {len(edit_mask)} masks, {len(labels)} labels: give one label an image, and one mask for "
            "all or one an image"
        )
    images = images.to(model.device, torch.float32)
    edit_mask = edit_mask.to(model.device).expand(len(images), 1, -1, -1)
    with torch.inference_mode():
        original = model.tokenizer.encode(images * 2 - 1)
    kept = kept_tokens(edit_mask, model.schedule)
    classes, seeds = model.check_labels(labels), image_seeds(seed, len(images)).to(model.device)
    chosen = settings if settings is not None else model.sample_settings()
    _, f_hat = generate_tokens(model.model, model.tokenizer.quantizer, classes, seeds, chosen, original, kept)
    result = model.to_images(f_hat)
    return torch.where(edit_mask, result, images) if paste else result


def kept_tokens(edit_mask: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Which tokens are kept: those of whose cell no pixel is edited.

    Args:
        edit_mask: (B, 1, H, W) bool.

    Returns:
        (B, N) bool.
    """
    touched = edit_mask.float()
    return torch.cat([F.adaptive_max_pool2d(touched, p).flatten(1) == 0 for p in schedule.patch_nums], dim=1)
