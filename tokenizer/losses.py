"""The losses of tokenizer training that need no network: pixels, evenly chosen codes. Pure functions of tensors.

Axes: B batch, R image side, K scales, V codes, Z latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Rows of a scale that its entropy is estimated from: bounds the (rows, V) matrix that its gradient keeps.
ENTROPY_ROWS = 1024


def reconstruction_loss(
    reconstruction: Tensor, images: Tensor, l1_weight: float, l2_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """`l1_weight`·|difference| + `l2_weight`·difference², means over all values.

    Args:
        reconstruction, images: (B, 3, R, R).

    Returns:
        The scalar loss, and its parts `l1` and `l2`, unweighted and without gradient.
    """
    l1, l2 = F.l1_loss(reconstruction, images), F.mse_loss(reconstruction, images)
    return l1_weight * l1 + l2_weight * l2, {"l1": l1.detach(), "l2": l2.detach()}


def psnr(reconstruction: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio of values in [−1, 1] in dB, 10·log10(4 / mse), over all images as one."""
    mse = F.mse_loss(reconstruction.clamp(-1, 1).float(), images.float())
    return float(10 * torch.log10(4 / mse))


def uneven_choice(rows: Sequence[Tensor], codebook: Tensor) -> Tensor:
    """1 − H(p̄)/log V, averaged over scales: 0 when a scale's rows choose all codes evenly, 1 when all choose one.

    p̄ is the mean over rows of softmax(−|z − e|²/τ), a soft choice whose τ is the scale's mean squared distance to the
    nearest code. Its gradient moves the codebook alone: codes that nothing chooses towards the rows. The entropy bonus
    of lookup-free quantization (arXiv 2310.05737, equation 4), for a codebook that is learned.

    Args:
        rows: for each scale the (R_k, Z) vectors that were looked up, without gradient; evenly spread ones of them
            are taken where there are more than `ENTROPY_ROWS`.
        codebook: (V, Z).
    """
    total = codebook.new_zeros(())
    for scale in rows:
        some = scale[:: -(-len(scale) // ENTROPY_ROWS)]
        squared = (some.square().sum(1, keepdim=True) - 2 * some @ codebook.T + codebook.square().sum(1)).clamp_min(0)
        temperature = squared.detach().amin(1).mean().clamp_min(1e-6)
        mean = F.softmax(-squared / temperature, dim=1).mean(0)
        # the slope of entropy is infinite at 0, where the far codes are
        total = total + 1 - torch.special.entr(mean + 1e-12).sum() / math.log(len(codebook))
    return total / len(rows)
