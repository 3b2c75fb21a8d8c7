"""Measures of reconstructions: PSNR, SSIM, the Fréchet distance of features, bits. Pure functions of tensors.

Axes: B images, R image side, D features, K scales, V codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hmar_mega.errors import UserError
from hmar_mega.scales import ScaleSchedule

#: SSIM's Gaussian window and its constants (Wang et al. 2004), for values in [0, 1].
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def psnr_of_each(images: Tensor, others: Tensor) -> Tensor:
    """PSNR of each pair of (B, 3, R, R) in [−1, 1], (B,) float64 in dB."""
    mse = (images.double() - others.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


def ssim_of_each(images: Tensor, others: Tensor) -> Tensor:
    """Mean SSIM of each pair of (B, 3, R, R) in [−1, 1], (B,) float32.

    Over all places where the window (11 × 11, or the largest odd one that fits) lies wholly inside, and over channels.
    """
    x, y = ((t.float() + 1) / 2 for t in (images, others))
    size = min(SSIM_WINDOW, x.shape[-1] - 1 + x.shape[-1] % 2)
    at = torch.arange(size, device=x.device) - size // 2
    line = torch.exp(-at.float().square() / (2 * SSIM_SIGMA**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, size, size)

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(t, window, groups=3)

    mx, my = mean(x), mean(y)
    vx, vy, covariance = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    top = (2 * mx * my + SSIM_C1) * (2 * covariance + SSIM_C2)
    return (top / ((mx * mx + my * my + SSIM_C1) * (vx + vy + SSIM_C2))).mean((1, 2, 3))


class FeatureMoments:
    """Mean and covariance of features, summed up batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._outer: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Count features (B, D)."""
        rows = features.double()
        self.count += len(rows)
        total, outer = rows.sum(0), rows.T @ rows
        self._sum = total if self._sum is None else self._sum + total
        self._outer = outer if self._outer is None else self._outer + outer

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and unbiased covariance (D, D); UserError for fewer than two images."""
        if self._sum is None or self._outer is None or self.count < 2:
            raise UserError(f"a Fréchet distance needs at least two images, there are {self.count}")
        mean = self._sum / self.count
        return mean, (self._outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½) of two Gaussians (mean (D,), covariance (D, D)), float64."""
    (m1, s1), (m2, s2) = ours, theirs
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # (Σ₁Σ₂)^½ has the trace of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric
    trace = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * trace))


def bits_per_pixel(schedule: ScaleSchedule, codes: int, resolution: int) -> float:
    """log₂ V bits a token, over the pixels of an image."""
    return schedule.num_tokens * math.log2(codes) / resolution**2


def entropy_bits_per_pixel(schedule: ScaleSchedule, counts: Tensor, resolution: int) -> float:
    """Bits a pixel if every scale's tokens were coded by how often they come; counts (K, V)."""
    share = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    bits = torch.special.entr(share).sum(1).cpu() / math.log(2)
    return float((bits * torch.tensor(schedule.scale_lengths, dtype=torch.float64)).sum()) / resolution**2
