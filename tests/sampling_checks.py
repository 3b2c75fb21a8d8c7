"""What the fused sampling kernel is held to: the plain draw from the same numbers, and the distribution by hand."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor

from hmar_mega.inference.sampler import sample_truncated
from hmar_mega.kernels.sampling import sample_tokens

#: Truncations: none, each alone, both, and their ends.
TRUNCATIONS = [(0, 1.0), (1, 1.0), (5, 1.0), (10**6, 1.0), (0, 0.9), (0, 1e-6), (0, 1 - 2**-24), (9, 0.7)]

#: How far sums of float32 probabilities in two orders may lie apart.
ROUNDING = 2e-6


def guided_logits(logits: Tensor, batch: int, strength: float) -> Tensor:
    """(n, B or 2B, V) as the plain sampler makes them: (B, n, V) float32."""
    both = logits.float().transpose(0, 1)
    return both if len(both) == batch else (1 + strength) * both[:batch] - strength * both[batch:]


def check_same_tokens(logits: Tensor, numbers: Tensor, strength: float, top_k: int, top_p: float) -> int:
    """Tokens and confidences of the plain path for the same numbers; returns how many tokens differ.

    They, and confidences, may only where the number lies within rounding of a step of the distribution function, or
    where the mass above a logit lies within rounding of top_p, so that it is kept by one and not by the other.
    """
    found, sure = sample_tokens(logits, numbers, strength, top_k, top_p)
    plain = guided_logits(logits, len(numbers), strength)
    wanted, confidence = sample_truncated(plain, numbers, top_k, top_p)
    assert found.dtype == torch.int64
    assert found.shape == sure.shape == numbers.shape
    alike = (found == wanted) & torch.isclose(sure, confidence, rtol=1e-4, atol=1e-6)
    for image, place in (~alike).nonzero().tolist():
        row, number = plain[image, place].double().cpu(), float(numbers[image, place])
        assert distance_to_a_step(row, number, top_k, top_p) < ROUNDING, (image, place, found[image, place])
    return int((found != wanted).sum())


def distance_to_a_step(row: Tensor, number: float, top_k: int, top_p: float) -> float:
    """How near a float64 row's draw is to a decision: of the number to a step, or of a mass to top_p."""
    if 0 < top_k < len(row):
        row = row.masked_fill(row < row.topk(top_k).values[-1], float("-inf"))
    ordered = row.sort(descending=True).values.softmax(0)
    above = ordered.cumsum(0) - ordered
    near = float((above - top_p).abs().min()) if top_p < 1 else 1.0
    if top_p < 1:
        least = row.sort(descending=True).values[int((above < top_p).sum()) - 1]
        row = row.masked_fill(row < least, float("-inf"))
    return min(near, float((row.softmax(0).cumsum(0) - number).abs().min()))


def check_distribution(row: Tensor, numbers: Tensor, probability: np.ndarray, top_k: int, top_p: float) -> None:
    """Chi-square of draws from one row (V,) with `numbers` (draws,) against exact probabilities, at 99.9 %."""
    rows = row.expand(len(numbers), 1, -1).contiguous()
    tokens, _ = sample_tokens(rows, numbers[None], 0.0, top_k, top_p)
    counts = np.bincount(tokens[0].cpu().numpy(), minlength=len(row))
    possible = probability > 0
    assert counts[~possible].sum() == 0
    expected = probability[possible] * len(numbers)
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert statistic <= chi2.ppf(0.999, max(1, possible.sum() - 1))
