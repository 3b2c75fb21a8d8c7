"""The health of the codebook: which codes each scale uses, how it starts, and the renewal of dead codes.

Early-scale codebook collapse is the known failure of this tokenizer, so usage is counted per scale. Everything here is
the same on all data-parallel processes: counts are summed over them, and new codes are those of the first. Axes: B
batch, K scales, N tokens a sample, V codes, Z latent channels, d numbers of a stored code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hmar_mega import rng
from hmar_mega.parallel.partition import MOMENTS, Partition
from hmar_mega.resample import area_down
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.quantizer import MultiScaleQuantizer

#: Weight of the past in the moving average of code hits.
HITS_DECAY = 0.99

#: Steps over which "the share of codes used" is counted.
USAGE_WINDOW = 100

#: Rounds of Lloyd's algorithm, and rows a centre that it looks at: more change little.
KMEANS_ROUNDS, KMEANS_ROWS = 10, 64


class CodebookUsage:
    """Which codes each scale uses, and when it last did.

    Args:
        hits: (K, V) float32, hits a step averaged over the past, updated in place (the quantizer's `ema_vocab_hit`).
        schedule: the K scales.

    Attributes:
        last_used: (K, V) float32, the step that last used a code at a scale, −1 before any. Whole numbers, exact
            below 2²⁴.
        renewed: (V,) float32, the step that last replaced a code, −1 before any.
    """

    def __init__(self, hits: Tensor, schedule: ScaleSchedule) -> None:
        self.hits = hits
        self.schedule = schedule
        self.last_used = torch.full_like(hits, -1)
        self.renewed = torch.full_like(hits[0], -1)
        self._first = schedule.level_ids(hits.device) * hits.shape[1]  # of each position's scale in a flat (K, V)

    @torch.no_grad()
    def update(self, tokens: Sequence[Tensor], step: int) -> None:
        """Count the tokens of `step`, (B, N) int64 each, over all processes; nothing waits for the GPU."""
        counts = torch.zeros_like(self.hits).flatten()
        for part in tokens:
            at = (part + self._first).flatten()
            counts.scatter_add_(0, at, torch.ones_like(at, dtype=counts.dtype))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        counts = counts.view_as(self.hits)
        self.hits.lerp_(counts, 1 - HITS_DECAY)
        self.last_used[counts > 0] = step

    def perplexity(self) -> Tensor:
        """exp(entropy) of each scale's averaged hits, (K,): how many codes it would use if it used them evenly."""
        share = self.hits / self.hits.sum(1, keepdim=True).clamp_min(torch.finfo(self.hits.dtype).tiny)
        return torch.special.entr(share).sum(1).exp()

    def fraction_used(self, step: int, window: int) -> Tensor:
        """The share of codes each scale used in the last `window` steps up to `step`, (K,)."""
        return self._used(step, window).float().mean(1)

    def fraction_used_by_any(self, step: int, window: int) -> float:
        """The share of codes that some scale used in the last `window` steps up to `step`."""
        return float(self._used(step, window).any(0).float().mean())

    def dead(self, step: int, patience: int) -> Tensor:
        """Indices of the codes that no scale has used, nor anyone renewed, for `patience` steps, (n,) int64."""
        alive = torch.maximum(self.last_used.amax(0), self.renewed)
        return (step - alive >= patience).nonzero().flatten()

    def collapsed(self) -> list[int]:
        """0-based scales that use next to nothing: perplexity below 1 % of the codes, or below 2."""
        floor = max(2.0, 0.01 * self.hits.shape[1])
        return (self.perplexity() < floor).nonzero().flatten().tolist()

    def figures(self, step: int) -> dict[str, list[float]]:
        """What a line of metrics says: `usage` in the last steps and `perplexity`, a number a scale."""
        return {
            "usage": [round(u, 4) for u in self.fraction_used(step, USAGE_WINDOW).tolist()],
            "perplexity": [round(p, 2) for p in self.perplexity().tolist()],
        }

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        return {"usage.hits": self.hits, "usage.last_used": self.last_used, "usage.renewed": self.renewed}

    def _used(self, step: int, window: int) -> Tensor:
        return (self.last_used >= 0) & (self.last_used > step - window)


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
def kmeans(rows: Tensor, centres: Tensor, rounds: int = KMEANS_ROUNDS) -> Tensor:
    """Lloyd's algorithm: rows (R, Z) and first centres (C, Z) → centres (C, Z); one that no row is nearest to stays."""
    squared = rows.square().sum(1, keepdim=True)
    for _ in range(rounds):
        nearest = (squared - 2 * rows @ centres.T + centres.square().sum(1)).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        counts = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


@torch.no_grad()
def seed_codebook(quantizer: MultiScaleQuantizer, f: Tensor, seed: int, use_kmeans: bool = False) -> None:
    """Start the codebook from images, each scale's share of codes from that scale's own residuals, and φ at identity.

    Random codes lie far from the latents of a new encoder, so that a handful takes all of them; and the early scales,
    of few tokens a batch, would win codes last.

    Args:
        quantizer: changed in place.
        f: (B, Z, h, w) latents. Codes beyond their rows start as copies of the first one and are dead until renewed.
        use_kmeans: take the centres of the residuals in place of some of them.
    """
    for conv in quantizer.phi:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    codes, num_scales, filled = quantizer.embedding.weight, quantizer.schedule.num_scales, 0
    residual = f.float()
    for k, side in enumerate(quantizer.schedule.patch_nums):
        rows = area_down(residual, side).flatten(2).transpose(1, 2).flatten(0, 1)
        share = -(-(len(codes) - filled) // (num_scales - k))
        looked_at = draw_rows([rows], share * (KMEANS_ROWS if use_kmeans else 1), seed, k, rng.Purpose.CODEBOOK_START)
        fresh = looked_at[:share]
        if use_kmeans:
            fresh = kmeans(looked_at, fresh)
        codes[filled : filled + len(fresh)] = quantizer.stored(fresh)
        filled += len(fresh)
        codes[filled:] = codes[0]  # equal distances go to the lower index: codes not yet given are never chosen
        residual = residual - quantizer.scale_features(k, quantizer.nearest(rows).view(len(f), side * side))


@torch.no_grad()
def renew_codes(
    quantizer: MultiScaleQuantizer,
    owned: Partition | None,
    usage: CodebookUsage,
    rows: Sequence[Tensor],
    patience: int,
    seed: int,
    step: int,
) -> int:
    """Replace dead codes by encoder residuals of the current batch and forget the optimizer's moments of them.

    Args:
        owned: this process's part of `quantizer.embedding.weight` and of its optimizer's state; None: no part.
        rows: the batch's `QuantizerOutput.rows`; of several processes, those of the first count.
        patience: steps without use that make a code dead.

    Returns:
        How many codes were replaced.
    """
    dead = usage.dead(step, patience)
    if len(dead) == 0:
        return 0
    fresh = quantizer.stored(draw_rows(rows, len(dead), seed, step, rng.Purpose.CODEBOOK_RENEWAL)).contiguous()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(fresh, src=0)
    dead = dead[: len(fresh)]
    weight = quantizer.embedding.weight
    weight[dead] = fresh.to(weight.dtype)
    if owned is not None:
        _write_owned(owned, dead, fresh)
    usage.renewed[dead] = step
    return len(dead)


def _write_owned(owned: Partition, codes: Tensor, values: Tensor) -> None:
    """Write values (n, d) of `codes` (n,) into the part of the flat codebook that is owned; their moments become 0."""
    channels = values.shape[1]
    at = (codes[:, None] * channels + torch.arange(channels, device=codes.device)).flatten()
    mine = (at >= owned.start) & (at < owned.stop)
    place, new = at[mine] - owned.start, values.flatten()[mine]
    for kind, target in {"weight": owned.weight, **owned.moments}.items():
        target[place] = torch.zeros_like(new) if kind in MOMENTS else new.to(target.dtype)
