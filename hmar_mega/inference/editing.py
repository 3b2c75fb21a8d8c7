"""Zero-shot editing: inpainting, outpainting and class-conditional edits by forcing the tokens of the kept region."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hmar_mega.errors import UserError
from hmar_mega.inference.pipeline import ImageModel, image_seeds
from hmar_mega.inference.sampler import SampleSettings, generate_tokens
from hmar_mega.scales import ScaleSchedule


@dataclass(frozen=True)
class Edit:
    """Edited images and how well the kept region survived the tokenizer.

    Attributes:
        images: (B, 3, H, W) float32 in [0, 1], the result.
        decoded: (B, 3, H, W), the decoder's pixels everywhere, before anything is pasted.
        tokens: (B, N) int64, of which those of `kept` (B, N) bool were forced.
        kept_psnr: (B,) dB of `decoded` against the originals over the kept pixels; NaN where nothing is kept.
        kept_error: (B,) largest absolute difference there, in [0, 1]; NaN where nothing is kept.
    """

    images: Tensor
    decoded: Tensor
    tokens: Tensor
    kept: Tensor
    kept_psnr: Tensor
    kept_error: Tensor


def edit_images(
    model: ImageModel,
    images: Tensor,
    edit_mask: Tensor,
    labels: Tensor | list[int],
    seed: int | list[int] | Tensor = 0,
    settings: SampleSettings | None = None,
    paste: bool = True,
    feather: int = 0,
) -> Tensor:
    """The images of `edit`."""
    return edit(model, images, edit_mask, labels, seed, settings, paste, feather).images


def edit(
    model: ImageModel,
    images: Tensor,
    edit_mask: Tensor,
    labels: Tensor | list[int],
    seed: int | list[int] | Tensor = 0,
    settings: SampleSettings | None = None,
    paste: bool = True,
    feather: int = 0,
    after_scale: Callable[[], None] | None = None,
) -> Edit:
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
        feather: pixels over which pasting fades from the result into the original, outwards from the edited region;
            see `feather_weights`.
        after_scale: called after each scale; what it raises ends the edit.

    Raises:
        UserError: when sizes do not fit the model, or feathering is asked for without pasting.
    """
    resolution = model.schedule.grid * model.tokenizer.config.downsample
    for name, given in (("image", images), ("mask", edit_mask)):
        if tuple(given.shape[-2:]) != (resolution, resolution):
            raise UserError(
                f"the {name} is {given.shape[-1]}×{given.shape[-2]} px, the model makes {resolution}×{resolution} px; "
                f"resize the {name}"
            )
    check_feather(paste, feather)
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
    model.sampler.say_plain("an edit forces tokens, which no graph takes")
    tokens, f_hat = generate_tokens(
        model.model, model.tokenizer.quantizer, classes, seeds, chosen, original, kept, after_scale
    )
    decoded = model.to_images(f_hat)
    result = decoded
    if paste and feather:
        result = torch.lerp(images, decoded, feather_weights(edit_mask, feather))
    elif paste:
        result = torch.where(edit_mask, decoded, images)
    return Edit(result, decoded, tokens, kept, *kept_difference(decoded, images, edit_mask))


def check_feather(paste: bool, feather: int) -> None:
    """Raise UserError for a width that cannot be, or would do nothing."""
    if feather < 0:
        raise UserError(f"feather={feather}: give a number of pixels, 0 for hard edges")
    if feather and not paste:
        raise UserError(
            f"feather={feather} would do nothing: it fades into the pasted pixels, and none are pasted (--no-paste, "
            "paste=False); leave one of the two out"
        )


def feather_weights(edit_mask: Tensor, width: int) -> Tensor:
    """How much of the result shows: 1 in the edited region, 1 − d/(width + 1) at d pixels from it, at least 0.

    The distance d is the larger of the horizontal and the vertical one to the nearest edited pixel.

    Args:
        edit_mask: (B, 1, H, W) bool.

    Returns:
        (B, 1, H, W) float32.
    """
    grown = edit_mask.float()
    total = grown
    for _ in range(width):
        grown = F.max_pool2d(grown, 3, stride=1, padding=1)
        total = total + grown
    return total / (width + 1)


def kept_difference(decoded: Tensor, images: Tensor, edit_mask: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB (peak 1) and largest absolute difference over the pixels that are not edited; NaN without any.

    Args:
        decoded, images: (B, 3, H, W) in [0, 1].
        edit_mask: (B, 1, H, W) bool.

    Returns:
        (B,) and (B,) float32.
    """
    difference = (decoded - images).abs().masked_fill(edit_mask, 0.0).flatten(1)
    count = 3.0 * (~edit_mask).flatten(1).sum(1)
    psnr = -10 * (difference.square().sum(1) / count).log10()
    return psnr, torch.where(count > 0, difference.amax(1), float("nan"))


def kept_tokens(edit_mask: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Which tokens are kept: those of whose cell no pixel is edited.

    Args:
        edit_mask: (B, 1, H, W) bool.

    Returns:
        (B, N) bool.
    """
    touched = edit_mask.float()
    return torch.cat([F.adaptive_max_pool2d(touched, p).flatten(1) == 0 for p in schedule.patch_nums], dim=1)
