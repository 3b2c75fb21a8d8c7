"""The loss of a micro-batch of tokenizer training: pixels, codes, perception, adversary; and the scales it is cut to.

Convolutions run in the format of `precision.compute` under autocast, over float32 weights; quantization and losses are
float32. Axes: B batch, R image side, K scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hmar_mega import rng
from hmar_mega.config import Config
from hmar_mega.data.image_loader import ImageBatch
from hmar_mega.errors import UserError
from hmar_mega.tokenizer.adversary import Adversary, adaptive_weight
from hmar_mega.tokenizer.losses import reconstruction_loss, uneven_choice
from hmar_mega.tokenizer.quantizer import MultiScaleQuantizer, QuantizerOutput

#: `forward(images, kept)` of the tokenizer, or of an engine around it.
Forward = Callable[[Tensor, Tensor | None], tuple[Tensor, QuantizerOutput]]


@dataclass(frozen=True)
class TokenizerScores:
    """What a micro-batch gave.

    Attributes:
        loss: scalar, with gradient.
        parts: scalars without gradient by name, unweighted.
        quantized: what the quantizer did.
        images, reconstruction: (B, 3, R, R), without gradient.
    """

    loss: Tensor
    quantized: QuantizerOutput
    images: Tensor
    reconstruction: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def guarded_mean(self) -> Tensor:
        """The loss to go back from: NaN where it is not finite, which must not pass for finite gradients."""
        return self.loss * torch.where(self.loss.detach().isfinite(), 1.0, float("nan"))


class TokenizerObjective:
    """The losses of one configuration.

    Args:
        quantizer: of the tokenizer that is trained.
        perceptual: distance of two batches of images, or None.
        adversary: or None.

    Attributes:
        step: the step that is next; set by the loop.
    """

    def __init__(
        self,
        config: Config,
        quantizer: MultiScaleQuantizer,
        device: torch.device,
        perceptual: nn.Module | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        self.train, self.seed = config.tokenizer.train, config.run.seed
        self.quantizer, self.device = quantizer, device
        self.perceptual, self.adversary = perceptual, adversary
        self.autocast = autocast_dtype(config)
        self.step = 0

    def training(self, forward: Forward, batch: ImageBatch) -> TokenizerScores:
        """The scores of one micro-batch."""
        images = to_device(batch, self.device)
        if self.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            reconstruction, quantized = forward(images, self._kept(batch))
            reconstruction = reconstruction.float()
            loss, parts = reconstruction_loss(reconstruction, images, self.train.l1_weight, self.train.l2_weight)
            if self.perceptual is not None:
                distance = self.perceptual(reconstruction, images).mean()
                loss = loss + self.train.perceptual.weight * distance
                parts["perceptual"] = distance.detach()
            if self.adversary is not None and self.adversary.speaks(self.step):
                against = self.adversary.tokenizer_loss(reconstruction)
                weight = self.train.adversarial.weight
                if self.train.adversarial.adaptive:
                    parts["adaptive_weight"] = adaptive_weight(loss, against, reconstruction)
                    loss = loss + weight * parts["adaptive_weight"] * against
                else:
                    loss = loss + weight * against
                parts["adversarial"] = against.detach()
        loss = loss + self.train.vq_weight * quantized.loss
        parts["vq"] = quantized.loss.detach()
        if self.train.entropy_weight:
            uneven = uneven_choice(quantized.rows, self.quantizer.codebook)
            loss = loss + self.train.entropy_weight * uneven
            parts["uneven_choice"] = uneven.detach()
        parts = {"loss": loss.detach(), **parts}
        return TokenizerScores(loss, quantized, images, reconstruction.detach(), parts)

    def _kept(self, batch: ImageBatch) -> Tensor | None:
        """(B,) how many of the first scales each image is decoded from, a function of (seed, position)."""
        if not self.train.truncate_prob:
            return None
        scales = self.quantizer.schedule.num_scales
        seed = torch.tensor([self.seed])
        whether, which = rng.uniform(seed, batch.positions, rng.Purpose.TRUNCATION, 2).unbind(1)
        kept = torch.where(whether < self.train.truncate_prob, (which * scales).long() + 1, scales)
        return kept.to(self.device)


def to_device(batch: ImageBatch, device: torch.device) -> Tensor:
    """The images on the device, (B, 3, R, R) float32 in [−1, 1]."""
    pixels = batch.pixels
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    return pixels.float() / 127.5 - 1


def autocast_dtype(config: Config) -> torch.dtype | None:
    """What convolutions compute in; None: float32.

    Raises:
        UserError: for a format that a tokenizer is not trained in.
    """
    compute = config.precision.compute
    if compute == "fp16":
        raise UserError(
            "precision.compute=fp16: tokenizers are trained in bf16 or fp32, without loss scaling; set "
            "precision.compute=bf16, or fp32"
        )
    return torch.bfloat16 if compute == "bf16" else None
