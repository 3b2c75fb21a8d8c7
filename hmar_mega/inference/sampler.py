"""Sampling: scale by scale, with classifier-free guidance, truncation and mask passes (SPEC §6). Plain PyTorch.

Works on any HMAR, plain or tensor-parallel (then every rank of the group calls it and draws the same). Nothing here
waits for the device. Axes: B images, n tokens of a scale, V codebook, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hmar_mega.inference.smooth import Smoothing, SoftCodes, gumbel_codes
from hmar_mega.model.attention import ScaleAttention
from hmar_mega.model.hmar import HMAR, Branch
from hmar_mega.rng import Purpose, uniform
from hmar_mega.sequence import Codes, MaskInput, to_positions


@dataclass(frozen=True)
class SampleSettings:
    """How to sample.

    Attributes:
        cfg_scale: guidance, logits (1+t)·cond − t·uncond. One number cfg makes the strength t = cfg·(k−1)/(K−1) at
            scale k of K; K numbers are the strengths themselves.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: then keep the most likely tokens until their probability reaches p; 1 keeps all.
        mask_schedule: tokens that each pass keeps, one tuple a scale, each summing to p_k².
        mask_cfg: guidance of the mask passes, one number or K as cfg_scale; 0 skips their unconditional half.
        mask_input: how the mask branch was trained, see `sequence.token_features`.
        negative_class: class that takes the place of the unconditional one in guidance; None: the unconditional one.
        more_smooth: mix codes instead of taking one, for visualisation; see `smooth.gumbel_codes`. None: do not.
    """

    cfg_scale: float | tuple[float, ...]
    top_k: int
    top_p: float
    mask_schedule: tuple[tuple[int, ...], ...]
    mask_cfg: float | tuple[float, ...] = 0.0
    mask_input: MaskInput = "leak_free"
    negative_class: int | None = None
    more_smooth: Smoothing | None = None

    def strengths(self, num_scales: int) -> tuple[float, ...]:
        """The guidance strength t of each scale's next-scale pass."""
        return guidance_strengths(self.cfg_scale, num_scales)

    def mask_strengths(self, num_scales: int) -> tuple[float, ...]:
        """The guidance strength t of each scale's mask passes."""
        return guidance_strengths(self.mask_cfg, num_scales)


def guidance_strengths(cfg_scale: float | tuple[float, ...], num_scales: int) -> tuple[float, ...]:
    """t_k = cfg·(k−1)/(K−1) of one number (VAR, arXiv 2404.02905); K numbers are taken as they are."""
    if isinstance(cfg_scale, tuple):
        return cfg_scale
    return tuple(cfg_scale * k / (num_scales - 1) for k in range(num_scales))


@torch.inference_mode()
def generate_tokens(
    model: HMAR,
    codes: Codes,
    labels_B: Tensor,
    seeds_B: Tensor,
    settings: SampleSettings,
    forced_tokens_BN: Tensor | None = None,
    forced_BN: Tensor | None = None,
    after_scale: Callable[[], None] | None = None,
    on_features: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample token maps.

    Args:
        labels_B: (B,) int64 classes on the model's device.
        seeds_B: (B,) int64; an image's random numbers depend on its seed alone.
        forced_tokens_BN, forced_BN: (B, N) tokens, and True where they are forced instead of sampled.
        after_scale: called after each scale; what it raises ends the sampling.
        on_features: called after each scale with f̂ so far, (B, Z, h, w) float32.

    Returns:
        tokens (B, N) int64 and f̂ (B, Z, h, w) float32; with `more_smooth`, f̂ of mixed codes and the likeliest of each
        mixture as token.
    """
    state = SamplingState(model, codes, labels_B, seeds_B, settings)
    return sample_scales(state, forced_tokens_BN, forced_BN, after_scale, on_features)


def sample_scales(
    state: SamplingState,
    forced_tokens_BN: Tensor | None = None,
    forced_BN: Tensor | None = None,
    after_scale: Callable[[], None] | None = None,
    on_features: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """All scales of a state that has none yet; see `generate_tokens`."""
    tokens = []
    for scale, passes in enumerate(state.settings.mask_schedule):
        span = state.model.schedule.span(scale)
        forced = forced_BN[:, span] if forced_BN is not None else None
        given = forced_tokens_BN[:, span] if forced_tokens_BN is not None else None
        tokens.append(_sample_scale(state, scale, passes, given, forced))
        state.add(scale, tokens[-1])
        if after_scale is not None:
            after_scale()
        if on_features is not None:
            assert state.f_hat is not None
            on_features(state.f_hat)
    assert state.f_hat is not None
    return torch.cat(tokens, dim=1), state.f_hat


def sample_truncated(logits: Tensor, numbers: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits) truncated to top-k, then top-p, by inverting its distribution function.

    The function runs over the codebook in its own order, not in that of probability: a rounding error then moves its
    steps a little, instead of swapping tokens of almost equal probability.

    Args:
        logits: (B, n, V) float32.
        numbers: (B, n) uniform in [0, 1).
        top_k: 0 keeps all; tokens as likely as the k-th are all kept.
        top_p: the most likely tokens up to this probability are kept, with all that are as likely as the last of them.

    Returns:
        tokens (B, n) int64 and their probability after truncation (B, n) float32.
    """
    logits = truncate(logits, top_k, top_p)
    probability = logits.softmax(-1)
    total = probability.cumsum(-1)
    possible = probability > 0
    # a number of exactly 0 would draw the first possible token however unlikely it is
    least_number = 2.0**-25
    hit = possible & (total > numbers[..., None].clamp_min(least_number) * total[..., -1:])
    # rounding of the sum may leave the very end of [0, 1) to nobody: it belongs to the last possible token
    last = possible.shape[-1] - 1 - possible.flip(-1).int().argmax(-1, keepdim=True)
    token = torch.where(hit.any(-1, keepdim=True), hit.int().argmax(-1, keepdim=True), last)
    drawn = probability.gather(-1, token) / total[..., -1:]
    return token[..., 0], drawn[..., 0]


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (…, V) with −inf where top-k, then top-p, removes a token; see `sample_truncated`."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        mass = ordered.softmax(-1)
        count = (mass.cumsum(-1) - mass < top_p).sum(-1, keepdim=True)
        logits = logits.masked_fill(logits < ordered.gather(-1, count - 1), float("-inf"))
    return logits


class SamplingState:
    """What sampling carries from scale to scale, and how it asks the model: plainly. `packed` has the fast way."""

    def __init__(self, model: HMAR, codes: Codes, labels_B: Tensor, seeds_B: Tensor, settings: SampleSettings) -> None:
        self.model, self.codes, self.settings, self.seeds = model, codes, settings, seeds_B
        pattern = model.config.attention.pattern
        self.cached = pattern == "block_causal"
        self.strengths = settings.strengths(model.schedule.num_scales)
        self.mask_strengths = settings.mask_strengths(model.schedule.num_scales)
        self.attend = ScaleAttention(pattern)
        negative = model.config.num_classes if settings.negative_class is None else settings.negative_class
        self.cond = model.condition(torch.cat([labels_B, torch.full_like(labels_B, negative)]))
        self.f_hat: Tensor | None = None
        self.mixed: Tensor | None = None  #: (B, n, Z) codes of the current scale, where codes are mixed

    @property
    def batch(self) -> int:
        """Images."""
        return self.seeds.shape[0]

    def add(self, scale: int, tokens: Tensor) -> None:
        """f̂ += φ_k(up(e_k))."""
        if self.mixed is not None:
            features = cast(SoftCodes, self.codes).code_features(scale, self.mixed)
        else:
            features = self.codes.scale_features(scale, tokens)
        self.f_hat = features if self.f_hat is None else self.f_hat + features

    def logits(
        self, scale: int, branch: Branch, strength: float, features: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Guided logits (B, n, V) of one scale; without guidance the unconditional half is not run."""
        halves = 2 if strength > 0 or (self.cached and max(self.strengths) > 0) else 1
        cond = self.cond[: halves * self.batch]

        def repeat(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat(halves, *[1] * (x.ndim - 1))

        given = None
        if self.f_hat is not None:
            given = repeat(to_positions(self.f_hat, self.model.schedule.patch_nums[scale]))
        x = self.model.embed(self.model.schedule.span(scale), cond, given, repeat(features), repeat(mask))
        local = self.model.run(x, cond, branch, self.attend)
        logits = self.model.layers.gather_vocabulary(local)[..., : self.model.codebook_size].transpose(0, 1)
        if halves == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return (1 + strength) * conditional - strength * unconditional

    def sample(
        self,
        scale: int,
        branch: Branch,
        strength: float,
        attempt: int,
        features: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One pass of a scale: `draw` from its `logits`."""
        return self.draw(self.logits(scale, branch, strength, features, mask), scale, attempt)

    def draw(self, logits: Tensor, scale: int, attempt: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens (B, n), their confidences, and mixed codes (B, n, Z) if asked for, from (seed, scale, pass)."""
        settings, purpose = self.settings, Purpose.SAMPLE * (scale + 1) + attempt
        numbers = uniform(self.seeds, torch.zeros_like(self.seeds), purpose, logits.shape[1])
        if settings.more_smooth is None:
            return *sample_truncated(logits, numbers, settings.top_k, settings.top_p), None
        num_scales = self.model.schedule.num_scales
        logits = truncate(logits, settings.top_k, settings.top_p) * settings.more_smooth.gain(scale, num_scales)
        tokens, confidence = sample_truncated(logits, numbers, 0, 1.0)
        tau = settings.more_smooth.tau(scale, num_scales)
        codebook = cast(SoftCodes, self.codes).codebook
        return tokens, confidence, gumbel_codes(logits, tokens, codebook, tau, self.seeds, purpose)


def _sample_scale(
    state: SamplingState, scale: int, passes: Sequence[int], given: Tensor | None, forced: Tensor | None
) -> Tensor:
    """One scale: a next-scale pass, then mask passes on what was not confident enough; (B, n) int64."""
    tokens, confidence, mixed = state.sample(scale, "next_scale", state.strengths[scale], 0)
    if forced is not None and given is not None:
        tokens = torch.where(forced, given, tokens)
        confidence = confidence.masked_fill(forced, float("inf"))
        if mixed is not None:
            mixed = torch.where(forced[..., None], cast(SoftCodes, state.codes).codebook[given].float(), mixed)
    target = 0
    for attempt, count in enumerate(passes[:-1], 1):
        target += count
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # everything kept before ranks first; forced tokens stay even beyond the count
        kept = (rank < target) | confidence.isinf()
        features = _token_features(state, scale, tokens, kept)
        again, sure, new = state.sample(scale, "masked", state.mask_strengths[scale], attempt, features, ~kept)
        tokens = torch.where(kept, tokens, again)
        confidence = torch.where(kept, float("inf"), sure)
        if mixed is not None and new is not None:
            mixed = torch.where(kept[..., None], mixed, new)
    state.mixed = mixed
    return tokens


def _token_features(state: SamplingState, scale: int, tokens: Tensor, kept: Tensor) -> Tensor:
    """φ_k(e_k)↓ of the kept tokens, (B, n, Z); rejected codes are zeroed first unless training let them through."""
    keep = kept if state.settings.mask_input == "leak_free" else None
    features = state.codes.scale_features(scale, tokens, keep)
    return to_positions(features, state.model.schedule.patch_nums[scale])
