"""`more_smooth` sampling, for pictures to look at: mixtures of codes under Gumbel noise in place of single codes.

VAR's idea (arXiv 2404.02905, its published `more_smooth`): where sampling would add the embedding of one drawn token,
add the expected embedding under a Gumbel-softmax whose temperature falls with scale. Images lose some detail and most
of their artefacts; figures such as FID are not to be measured on them. Axes: B images, n tokens, V codebook, Z latent
channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hmar_mega.rng import Purpose, uniform
from hmar_mega.sequence import Codes

#: Random numbers made at once; each takes some 80 bytes on the way.
NUMBERS_AT_ONCE = 1 << 22


class SoftCodes(Codes, Protocol):
    """What mixing needs of a tokenizer beyond `Codes`."""

    @property
    def codebook(self) -> Tensor:
        """(V, Z)."""

    def code_features(self, scale: int, codes: Tensor) -> Tensor:
        """φ_k(up(·)) of mixed codes: (B, p_k², Z) → (B, Z, h, w)."""


@dataclass(frozen=True)
class Smoothing:
    """How codes are mixed; with r = (k−1)/(K−1) at scale k of K, the defaults are VAR's.

    Attributes:
        temperature: τ = max(temperature · (1 − 0.95·r), floor).
        floor: the least τ.
        sharpen: truncated logits are multiplied by 1 + sharpen·r before drawing and mixing.
    """

    temperature: float = 0.27
    floor: float = 0.005
    sharpen: float = 1.0

    def tau(self, scale: int, num_scales: int) -> float:
        """τ at the 0-based `scale`."""
        return max(self.temperature * (1 - 0.95 * scale / (num_scales - 1)), self.floor)

    def gain(self, scale: int, num_scales: int) -> float:
        """What truncated logits are multiplied by at the 0-based `scale`."""
        return 1 + self.sharpen * scale / (num_scales - 1)


def gumbel_codes(logits: Tensor, tokens: Tensor, codebook: Tensor, tau: float, seeds_B: Tensor, purpose: int) -> Tensor:
    """Σ_i w_i·code_i with Gumbel-softmax weights w = softmax((a + g)/τ), given that a + g is largest at `tokens`.

    The tokens being drawn from softmax(a), the noise g is drawn from what is left of Gumbel(0, 1) once the winner t is
    known (Maddison et al., "A* sampling", arXiv 1411.0030): with p = softmax(a) and exponential numbers E_i = −log u_i,
    (a + g)_i − (a + g)_t = −log(1 + E_i / (p_i·E_t)). Together the two draws are a plain Gumbel-softmax, and as τ → 0
    the mixture becomes the code of the drawn token: hard sampling with the same seeds.

    Args:
        logits: a, (B, n, V) float32, −inf where truncated.
        tokens: t, (B, n) int64.
        codebook: (V, Z).
        seeds_B: (B,) int64; the noise is Philox of (seed, token's place, `purpose`).

    Returns:
        (B, n, Z) float32.
    """
    batch, count, vocabulary = logits.shape
    step = max(1, NUMBERS_AT_ONCE // (batch * vocabulary))
    codes = []
    for start in range(0, count, step):
        places = torch.arange(start, min(start + step, count), device=logits.device)
        rows = seeds_B.repeat_interleave(len(places)), places.repeat(batch)
        numbers = uniform(*rows, Purpose.SMOOTH + purpose, vocabulary).clamp_min(2.0**-25)
        exponential = -numbers.log().view(batch, len(places), vocabulary)
        probability = logits[:, places].softmax(-1)
        winner = tokens[:, places, None]
        ratio = exponential / (probability * exponential.gather(-1, winner))
        behind = (-ratio.log1p()).scatter(-1, winner, 0.0)
        codes.append((behind / tau).softmax(-1) @ codebook.float())
    return torch.cat(codes, dim=1)
