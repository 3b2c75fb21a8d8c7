"""From token ids to what the model sees and is scored on: teacher forcing, draws, masks, losses (SPEC §3–5).

Pure functions of tensors: no ranks, no configuration objects. Every draw of a sample (label drop, mask, drop-path) is
a function of (seed, stream position), the stream position being the number of images seen before it in the run, so
that a run repeats on any number of processes. Axes: B batch, N sequence, Z latent channels, K scales.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from hmar_mega.resample import area_down
from hmar_mega.rng import Purpose, uniform
from hmar_mega.scales import ScaleSchedule

MaskInput = Literal["leak_free", "reference"]


class Codes(Protocol):
    """What the maths needs of a tokenizer: the φ_k(up(e_k)) of a scale's tokens."""

    def scale_features(self, scale: int, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, p_k²) int64 → (B, Z, h, w); where `keep` (B, p_k²) is False the code is zeroed before upsampling."""


def teacher_input(tokens_BN: Tensor, codes: Codes, schedule: ScaleSchedule) -> Tensor:
    """f̂ after scales 1 … k, area-downsampled to p_{k+1}², at the positions of scale k + 1: (B, N−1, Z) float32."""
    f_hat: Tensor | None = None
    inputs = []
    for scale in range(schedule.num_scales - 1):
        features = codes.scale_features(scale, tokens_BN[:, schedule.span(scale)])
        f_hat = features if f_hat is None else f_hat + features
        inputs.append(to_positions(f_hat, schedule.patch_nums[scale + 1]))
    return torch.cat(inputs, dim=1)


def token_features(
    tokens_BN: Tensor, mask_BN: Tensor, codes: Codes, schedule: ScaleSchedule, mask_input: MaskInput
) -> Tensor:
    """φ_k(e_k)↓ of the tokens at the positions of scales 2 … K: (B, N−1, Z) float32.

    Args:
        mask_BN: (B, N−1) bool, True where a token is masked.
        mask_input: `leak_free` zeroes masked codes before upsampling, so that the features of unmasked positions
            know nothing of them; `reference` lets them through, as the published code does.
    """
    features = []
    for scale in range(1, schedule.num_scales):
        span = schedule.span(scale)
        keep = ~mask_BN[:, span.start - 1 : span.stop - 1] if mask_input == "leak_free" else None
        own = codes.scale_features(scale, tokens_BN[:, span], keep)
        features.append(to_positions(own, schedule.patch_nums[scale]))
    return torch.cat(features, dim=1)


def to_positions(x_BZhw: Tensor, size: int) -> Tensor:
    """Area-downsample a feature map to size², row-major: (B, Z, h, w) → (B, size², Z)."""
    return area_down(x_BZhw, size).flatten(2).transpose(1, 2)


def drop_labels(labels_B: Tensor, positions_B: Tensor, seed: int, rate: float, num_classes: int) -> Tensor:
    """Replace labels by the unconditional class `num_classes` with probability `rate`: (B,) int64."""
    drawn = uniform(_seed(seed, positions_B), positions_B, Purpose.LABEL_DROP, 1)[:, 0]
    return torch.where(drawn < rate, num_classes, labels_B)


def draw_masks(positions_B: Tensor, seed: int, schedule: ScaleSchedule) -> Tensor:
    """Masks of stage 2: r ~ U(0, 1] per sample, ⌈r·p_k²⌉ random tokens of every scale k ≥ 2.

    Returns:
        (B, N−1) bool, True where masked; at least one token of every scale is.
    """
    seeds = _seed(seed, positions_B)
    ratio = 1.0 - uniform(seeds, positions_B, Purpose.MASK_RATIO, 1)[:, 0].double()
    order = uniform(seeds, positions_B, Purpose.MASK_POSITION, schedule.num_tokens)
    masks = []
    for scale in range(1, schedule.num_scales):
        count = (ratio * schedule.scale_lengths[scale]).ceil()
        rank = order[:, schedule.span(scale)].argsort(dim=1, stable=True).argsort(dim=1)
        masks.append(rank < count[:, None])
    return torch.cat(masks, dim=1)


def drop_path_factors(positions_B: Tensor, seed: int, depth: int, last_rate: float) -> Tensor:
    """Residual factor of every layer's two branches: 0 with the layer's rate, else 1/(1 − rate).

    The rate rises linearly from 0 at the first layer to `last_rate` at the last.

    Returns:
        (depth, 2, B) float32.
    """
    rates = torch.linspace(0.0, last_rate, depth, device=positions_B.device)
    drawn = uniform(_seed(seed, positions_B), positions_B, Purpose.DROP_PATH, 2 * depth)
    keep = drawn.view(-1, depth, 2).permute(1, 2, 0) >= rates[:, None, None]
    return keep / (1.0 - rates[:, None, None])


def next_scale_loss(cross_entropy_BN: Tensor, weights_N: Tensor) -> Tensor:
    """Stage-1 loss of each sample: Σ_n w_n · ce_n, (B,) float32."""
    return cross_entropy_BN.float() @ weights_N.to(cross_entropy_BN.device)


def masked_loss(cross_entropy_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Stage-2 loss of each sample: mean cross-entropy over its masked positions, (B,) float32.

    Args:
        cross_entropy_BN: (B, N) of all positions; the first, scale 1, never counts.
        mask_BN: (B, N−1) bool.
    """
    masked = mask_BN.float()
    return (cross_entropy_BN[:, 1:].float() * masked).sum(1) / masked.sum(1)


def _seed(seed: int, positions_B: Tensor) -> Tensor:
    return torch.full_like(positions_B, seed)
