"""What tokenizer training watches and mends: the reconstruction loss, and which codes each scale uses.

Early-scale codebook collapse is the known failure of this tokenizer, so usage is counted per scale. Axes: B batch,
K scales, N tokens a sample, V codes, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmar_mega import rng
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.quantizer import MultiScaleQuantizer, area_down

#: Weight of the past in the moving average of code hits.
HITS_DECAY = 0.99


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


class CodebookUsage:
    """Which codes each scale uses, and when it last did.

    Args:
        hits: (K, V) float32, hits a step averaged over the past, updated in place (the quantizer's `ema_vocab_hit`).
        schedule: the K scales.

    Attributes:
        last_used: (K, V) int64, the step that last used a code at a scale, −1 before any.
        renewed: (V,) int64, the step that last replaced a code, −1 before any.
    """

    def __init__(self, hits: Tensor, schedule: ScaleSchedule) -> None:
        self.hits = hits
        self.schedule = schedule
        self.last_used = torch.full(hits.shape, -1, dtype=torch.int64, device=hits.device)
        self.renewed = torch.full(hits.shape[1:], -1, dtype=torch.int64, device=hits.device)

    @torch.no_grad()
    def update(self, tokens: Tensor, step: int) -> None:
        """Count the (B, N) tokens of `step`."""
        for k in range(self.schedule.num_scales):
            counts = torch.bincount(tokens[:, self.schedule.span(k)].flatten(), minlength=self.hits.shape[1])
            self.hits[k].lerp_(counts.to(self.hits.dtype), 1 - HITS_DECAY)
            self.last_used[k, counts > 0] = step

    def perplexity(self) -> Tensor:
        """exp(entropy) of each scale's averaged hits, (K,): how many codes it would use if it used them evenly."""
        share = self.hits / self.hits.sum(1, keepdim=True).clamp_min(torch.finfo(self.hits.dtype).tiny)
        return torch.special.entr(share).sum(1).exp()

    def fraction_used(self, step: int, window: int) -> Tensor:
        """The share of codes each scale used in the last `window` steps up to `step`, (K,)."""
        return ((self.last_used >= 0) & (self.last_used > step - window)).float().mean(1)

    def dead(self, step: int, patience: int) -> Tensor:
        """Indices of the codes that no scale has used, nor anyone renewed, for `patience` steps, (n,) int64."""
        alive = torch.maximum(self.last_used.amax(0), self.renewed)
        return (step - alive >= patience).nonzero().flatten()

    def collapsed(self) -> list[int]:
        """0-based scales that use next to nothing: perplexity below 1 % of the codes, or below 2."""
        floor = max(2.0, 0.01 * self.hits.shape[1])
        return (self.perplexity() < floor).nonzero().flatten().tolist()


@torch.no_grad()
def draw_rows(rows: Sequence[Tensor], count: int, seed: int, position: int, purpose: int) -> Tensor:
    """At most `count` rows, without repetition, each scale as likely as another.

    Args:
        rows: for each scale the (R_k, Z) vectors that were looked up (`QuantizerOutput.rows`).
        seed, position, purpose: what the draw is a function of, see `rng.uniform`.

    Returns:
        (min(count, Σ R_k), Z).
    """
    pool = torch.cat(list(rows))
    lengths = torch.tensor([len(r) for r in rows])
    scale_length = torch.repeat_interleave(lengths, lengths)
    draws = rng.uniform(torch.tensor([seed]), torch.tensor([position]), purpose, len(pool))[0].double()
    # Weighted sampling without repetition: the smallest of −log(u)/weight, with weight 1/R_k (Efraimidis & Spirakis).
    arrival = -torch.log(draws + 2.0**-25) * scale_length
    return pool[arrival.argsort(stable=True)[:count].to(pool.device)]


@torch.no_grad()
def seed_codebook(quantizer: MultiScaleQuantizer, f: Tensor, seed: int) -> None:
    """Start the codebook from a batch, each scale's share of codes from that scale's own residuals, and φ at identity.

    Random codes lie far from the latents of a new encoder, so that a handful takes all of them; and the early scales,
    of few tokens a batch, would win codes last.

    Args:
        quantizer: changed in place.
        f: (B, Z, h, w) latents. Codes beyond their rows start as copies of the first one and are dead until renewed.
    """
    for conv in quantizer.phi:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    codes, num_scales, filled = quantizer.embedding.weight, quantizer.schedule.num_scales, 0
    residual = f.float()
    for k, side in enumerate(quantizer.schedule.patch_nums):
        rows = area_down(residual, side).flatten(2).transpose(1, 2).flatten(0, 1)
        share = -(-(len(codes) - filled) // (num_scales - k))
        fresh = draw_rows([rows], share, seed, k, rng.Purpose.CODEBOOK_START)
        codes[filled : filled + len(fresh)] = fresh
        filled += len(fresh)
        codes[filled:] = codes[0]  # equal distances go to the lower index: codes not yet given are never chosen
        residual = residual - quantizer.scale_features(k, quantizer.nearest(rows).view(len(f), side * side))


@torch.no_grad()
def renew_codes(
    embedding: nn.Embedding,
    optimizer: torch.optim.Optimizer,
    usage: CodebookUsage,
    rows: Sequence[Tensor],
    patience: int,
    seed: int,
    step: int,
) -> int:
    """Replace dead codes by encoder residuals of the current batch and forget the optimizer's moments of them.

    Args:
        rows: the batch's `QuantizerOutput.rows`.
        patience: steps without use that make a code dead.

    Returns:
        How many codes were replaced.
    """
    dead = usage.dead(step, patience)
    if len(dead) == 0:
        return 0
    fresh = draw_rows(rows, len(dead), seed, step, rng.Purpose.CODEBOOK_RENEWAL)
    dead = dead[: len(fresh)]
    embedding.weight[dead] = fresh.to(embedding.weight.dtype)
    for moment in optimizer.state.get(embedding.weight, {}).values():
        if isinstance(moment, Tensor) and moment.shape == embedding.weight.shape:
            moment[dead] = 0
    usage.renewed[dead] = step
    return len(dead)
