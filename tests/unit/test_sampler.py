"""Sampling against SPEC §6: truncation as a distribution, and whole token maps against a float64 loop by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    PASSES,
    SCHEDULE,
    MixingCodes,
    N,
    NumpyHMAR,
    V,
    Z,
    area,
    random_normal,
    random_tokens,
    tiny_config,
    tiny_hmar,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import chdtri
from torch import Tensor

from hmar_mega.config_io import parse_config
from hmar_mega.errors import UserError
from hmar_mega.inference import sampler
from hmar_mega.inference.sampler import SampleSettings, generate_tokens, sample_truncated
from hmar_mega.model.hmar import HMAR
from hmar_mega.rng import Purpose, uniform

SINGLE = tuple((n,) for n in SCHEDULE.scale_lengths)
SETTINGS = SampleSettings(1.5, 0, 0.9, PASSES)
LAST_NUMBER = 1 - 2.0**-24  # the largest that `uniform` gives


def numbers_of(seed: int, scale: int, attempt: int, count: int) -> Tensor:
    """The uniform numbers an image of `seed` draws a pass from, (1, count)."""
    return uniform(torch.tensor([seed]), torch.tensor([0]), Purpose.SAMPLE * (scale + 1) + attempt, count)


# ------------------------------------------------------------------------------------------------------ truncation


def truncated(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities by hand: the k most likely, renormalised, then the fewest of them that reach p, renormalised."""
    probability = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-logits, kind="stable")
    kept = list(order[:top_k] if top_k else order)
    mass = probability[kept].sum()
    chosen, reached = [], 0.0
    for token in kept:
        if reached >= top_p:
            break
        chosen.append(token)
        reached += probability[token] / mass
    out = np.zeros(len(logits))
    out[chosen] = probability[chosen] / probability[chosen].sum()
    return out


def draw(logits: np.ndarray, numbers: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(logits).float().expand(1, len(numbers), -1)
    tokens, probability = sample_truncated(rows, numbers[None], top_k, top_p)
    assert tokens.dtype == torch.int64
    return tokens[0], probability[0]


LOGITS = np.array([0.3, -1.0, 2.0, 1.1, 0.9, -3.0, 1.5])
TRUNCATIONS = pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8), (5, 0.7), (100, 1.0), (1, 1.0), (4, 0.999)]
)


@TRUNCATIONS
def test_tokens_are_drawn_with_the_truncated_probabilities(top_k: int, top_p: float):
    numbers = uniform(torch.tensor(11), torch.arange(1), 99, 100_000)[0]
    tokens, _ = draw(LOGITS, numbers, top_k, top_p)
    expected = truncated(LOGITS, top_k, top_p) * len(numbers)
    found = np.bincount(tokens.numpy(), minlength=len(LOGITS))
    possible = expected > 0
    assert found[~possible].sum() == 0
    statistic = ((found - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic <= chdtri(max(1, possible.sum() - 1), 0.001)


@TRUNCATIONS
def test_the_returned_probability_is_the_tokens_after_truncation(top_k: int, top_p: float):
    tokens, probability = draw(LOGITS, torch.linspace(0, LAST_NUMBER, 500), top_k, top_p)
    expected = truncated(LOGITS, top_k, top_p)[tokens.numpy()]
    np.testing.assert_allclose(probability.numpy(), expected, rtol=1e-5)


def test_evenly_spread_numbers_give_each_token_its_share():
    """The inverse of the distribution function: shares of evenly spread numbers are exact to one number."""
    count = 10_000
    tokens, _ = draw(LOGITS, (torch.arange(count) + 0.5) / count, 5, 0.9)
    shares = np.bincount(tokens.numpy(), minlength=len(LOGITS))
    assert np.abs(shares - truncated(LOGITS, 5, 0.9) * count).max() <= 1


@given(
    logits=st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=40, unique=True),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1.0),
    number=st.one_of(st.just(0.0), st.just(LAST_NUMBER), st.integers(0, 2**24 - 1).map(lambda i: i * 2.0**-24)),
)
def test_a_removed_token_is_never_drawn(logits: list[float], top_k: int, top_p: float, number: float):
    values = np.array(logits, dtype=np.float32)
    tokens, probability = draw(values, torch.tensor([number]), top_k, top_p)
    # float32 may put the border one token off where the sum meets p within rounding
    assert truncated(values, top_k, min(1.0, top_p + 1e-5))[int(tokens)] > 0
    assert 0 < float(probability) <= 1 + 1e-6


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (900, 0.96), (1000, 0.99)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0, 100.0])
def test_the_largest_number_draws_a_token_that_was_kept(spread: float, top_k: int, top_p: float):
    """Over a whole vocabulary the running sum need not end at 1, and most probabilities may be 0 in float32."""
    rows = random_normal(1, 64, 4096) * spread
    tokens, probability = sample_truncated(rows, torch.full((1, 64), LAST_NUMBER), top_k, top_p)
    assert (probability > 0).all()
    rank = (rows > rows.gather(-1, tokens[..., None])).sum(-1)
    assert (rank < (top_k or 4096)).all()


def test_top_k_comes_before_top_p():
    """0.4 0.3 0.2 0.1: of the two best, renormalised to 0.57 0.43, the first alone reaches 0.5; of all four two do."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    numbers = torch.linspace(0, LAST_NUMBER, 1000)
    assert set(draw(logits, numbers, 2, 0.5)[0].tolist()) == {0}
    assert set(draw(logits, numbers, 0, 0.5)[0].tolist()) == {0, 1}
    assert set(draw(logits, numbers, 0, 0.39)[0].tolist()) == {0}
    assert set(draw(logits, numbers, 0, 0.71)[0].tolist()) == {0, 1, 2}


def test_every_row_is_truncated_by_itself():
    rows = torch.stack([torch.tensor([0.0, 9.0, 0.0]), torch.tensor([0.0, 0.0, 9.0])]).view(2, 1, 3)
    tokens, _ = sample_truncated(rows, torch.full((2, 1), 0.5), 1, 1.0)
    assert tokens.tolist() == [[1], [2]]


# --------------------------------------------------------------------------------------------- whole maps, by hand


@dataclasses.dataclass
class SamplerByHand:
    """SPEC §6, one image, one token at a time, from whole teacher-forced forwards: no cache, no batch, float64."""

    model: HMAR
    codes: MixingCodes
    settings: SampleSettings

    def tokens(self, label: int, seed: int, forced: dict[int, int] | None = None) -> list[int]:
        """All N tokens; `forced` gives position → token."""
        self.label, self.f_hat, out = label, np.zeros((Z, SCHEDULE.grid, SCHEDULE.grid)), []
        self.yardstick, self.given = NumpyHMAR(self.model), np.zeros((N - 1, Z))
        for scale, passes in enumerate(self.settings.mask_schedule):
            own = SCHEDULE.span(scale)
            if scale:
                self.given[own.start - 1 : own.stop - 1] = _rows(area(self.f_hat, SCHEDULE.patch_nums[scale]))
            fixed = {i - own.start: t for i, t in (forced or {}).items() if own.start <= i < own.stop}
            out += self._scale(scale, passes, seed, fixed)
            self.f_hat = self.f_hat + self.codes.numpy_features(scale, np.array(out[own.start :]))
        return out

    def _scale(self, scale: int, passes: tuple[int, ...], seed: int, fixed: dict[int, int]) -> list[int]:
        tokens, sure = self._draw(self._guided(scale, self.settings.cfg_scale), scale, 0, seed)
        tokens = [fixed.get(i, t) for i, t in enumerate(tokens)]
        kept = set(fixed)
        for attempt in range(1, len(passes)):
            target = sum(passes[:attempt])
            candidates = sorted((i for i in range(len(tokens)) if i not in kept), key=lambda i: -sure[i])
            kept |= set(candidates[: max(0, target - len(kept))])
            again, sure = self._draw(self._guided(scale, self.settings.mask_cfg, tokens, kept), scale, attempt, seed)
            tokens = [t if i in kept else a for i, (t, a) in enumerate(zip(tokens, again, strict=True))]
        return tokens

    def _guided(
        self, scale: int, cfg: float, tokens: list[int] | None = None, kept: set[int] | None = None
    ) -> np.ndarray:
        t = cfg * scale / (SCHEDULE.num_scales - 1)
        own = SCHEDULE.span(scale)
        features = mask = None
        if tokens is not None and kept is not None:
            features, mask = np.zeros((N - 1, Z)), np.zeros(N - 1, dtype=bool)
            keep = np.array([i in kept for i in range(len(tokens))])
            zeroed = keep if self.settings.mask_input == "leak_free" else None
            latent = self.codes.numpy_features(scale, np.array(tokens), zeroed)
            features[own.start - 1 : own.stop - 1] = _rows(area(latent, SCHEDULE.patch_nums[scale]))
            mask[own.start - 1 : own.stop - 1] = ~keep
        cond, uncond = (
            self.yardstick.logits(label, self.given, features, mask)[own] for label in (self.label, CLASSES)
        )
        return (1 + t) * cond - t * uncond

    def _draw(self, logits: np.ndarray, scale: int, attempt: int, seed: int) -> tuple[list[int], list[float]]:
        numbers = numbers_of(seed, scale, attempt, len(logits))[0].tolist()
        tokens, sure = [], []
        for row, number in zip(logits, numbers, strict=True):
            probability = truncated(row, self.settings.top_k, self.settings.top_p)
            token = int(np.searchsorted(np.cumsum(probability), number, side="right"))
            tokens.append(token)
            sure.append(float(probability[token]))
        return tokens, sure


def _rows(latent: np.ndarray) -> np.ndarray:
    return latent.reshape(Z, -1).T


def sampled(model: HMAR, settings: SampleSettings, labels: list[int], seeds: list[int], **forced: Tensor) -> Tensor:
    tokens, f_hat = generate_tokens(model, MixingCodes(), torch.tensor(labels), torch.tensor(seeds), settings, **forced)
    assert tokens.shape == (len(labels), N)
    assert tokens.dtype == torch.int64
    assert f_hat.shape == (len(labels), Z, 4, 4)
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        dataclasses.replace(SETTINGS, mask_cfg=0.7),
        dataclasses.replace(SETTINGS, mask_input="reference", mask_cfg=1.5e-6),
        dataclasses.replace(SETTINGS, cfg_scale=0.0, top_k=5, top_p=1.0),
        dataclasses.replace(SETTINGS, mask_schedule=SINGLE),
        dataclasses.replace(SETTINGS, mask_schedule=((1,), (1, 1, 1, 1), (16,)), top_k=20),
    ],
    ids=["default", "mask_cfg", "reference", "unguided", "one_pass", "four_passes"],
)
def test_token_maps_are_those_of_the_loop_by_hand(settings: SampleSettings):
    model = tiny_hmar(tiny_config())
    found = sampled(model, settings, [0, 3, 4], [7, 0, 2**40])
    by_hand = SamplerByHand(model, MixingCodes(), settings)
    for row, label, seed in zip(found.tolist(), [0, 3, 4], [7, 0, 2**40], strict=True):
        assert row == by_hand.tokens(label, seed)


@pytest.mark.parametrize("cfg_scale", [0.0, 2.0])
def test_a_block_causal_model_samples_with_its_cache_as_without(cfg_scale: float):
    model = tiny_hmar(tiny_config("next_scale", "block_causal"))
    settings = dataclasses.replace(SETTINGS, cfg_scale=cfg_scale, mask_schedule=SINGLE)
    found = sampled(model, settings, [1, 2], [5, 6])
    by_hand = SamplerByHand(model, MixingCodes(), settings)
    assert found.tolist() == [by_hand.tokens(1, 5), by_hand.tokens(2, 6)]


def test_forced_tokens_stay_and_steer_the_rest():
    model, tokens = tiny_hmar(tiny_config()), random_tokens(2, seed=5)
    forced = random_normal(2, N, seed=6) > 0
    found = sampled(model, SETTINGS, [1, 2], [5, 6], forced_tokens_BN=tokens, forced_BN=forced)
    free = sampled(model, SETTINGS, [1, 2], [5, 6])
    assert torch.equal(found[forced], tokens[forced])
    assert not torch.equal(found[~forced], free[~forced])
    by_hand = SamplerByHand(model, MixingCodes(), SETTINGS)
    for b, (label, seed) in enumerate([(1, 5), (2, 6)]):
        fixed = {i: int(tokens[b, i]) for i in range(N) if forced[b, i]}
        assert found[b].tolist() == by_hand.tokens(label, seed, fixed)


def test_everything_forced_is_everything_kept():
    tokens = random_tokens(1, seed=5)
    forced = torch.ones(1, N, dtype=torch.bool)
    found = sampled(tiny_hmar(tiny_config()), SETTINGS, [1], [5], forced_tokens_BN=tokens, forced_BN=forced)
    assert torch.equal(found, tokens)


def test_f_hat_is_the_sum_over_scales_of_the_final_tokens():
    codes = MixingCodes()
    tokens, f_hat = generate_tokens(tiny_hmar(tiny_config()), codes, torch.tensor([1]), torch.tensor([2]), SETTINGS)
    expected = sum(codes.numpy_features(k, tokens[0, SCHEDULE.span(k)].numpy()) for k in range(3))
    np.testing.assert_allclose(f_hat[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_an_image_is_its_seeds_and_labels_alone():
    model = tiny_hmar(tiny_config())
    labels, seeds = [0, 1, 2, 3, 4, 0], [3, 1, 4, 1, 5, 9]
    whole = sampled(model, SETTINGS, labels, seeds)
    order = [4, 2, 0, 5, 3, 1]
    mixed = sampled(model, SETTINGS, [labels[i] for i in order], [seeds[i] for i in order])
    assert torch.equal(mixed, whole[order])
    for i in range(6):
        assert torch.equal(sampled(model, SETTINGS, [labels[i]], [seeds[i]])[0], whole[i])
    assert not torch.equal(whole[0], whole[5])


# ------------------------------------------------------------------------------------------- what the model is run on


@dataclasses.dataclass
class Spy:
    """Records what a model's embed and run are asked, and the logits that are sampled from."""

    branches: list[str] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    masks: list[Tensor | None] = dataclasses.field(default_factory=list)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    sampled_from: list[Tensor] = dataclasses.field(default_factory=list)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Callable[[HMAR], Spy]:
    def watch(model: HMAR) -> Spy:
        spy, run, embed, draw = Spy(), model.run, model.embed, sample_truncated

        def watched_run(x: Tensor, cond: Tensor, branch: str, *rest: object) -> Tensor:
            spy.branches.append(branch)
            spy.rows.append(x.shape[1])
            spy.outputs.append(run(x, cond, branch, *rest))
            return spy.outputs[-1]

        def watched_embed(
            positions: slice, cond: Tensor, given: object, features: object, mask: Tensor | None
        ) -> Tensor:
            spy.masks.append(mask)
            return embed(positions, cond, given, features, mask)

        def watched_draw(logits: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
            spy.sampled_from.append(logits)
            return draw(logits, *rest)

        monkeypatch.setattr(model, "run", watched_run)
        monkeypatch.setattr(model, "embed", watched_embed)
        monkeypatch.setattr(sampler, "sample_truncated", watched_draw)
        return spy

    return watch


def test_passes_keep_as_many_tokens_as_the_schedule_says(spied: Callable[[HMAR], Spy]):
    model = tiny_hmar(tiny_config())
    spy = spied(model)
    sampled(model, SETTINGS, [0, 1, 2], [1, 2, 3])
    assert spy.branches == ["next_scale", "next_scale", "masked", "next_scale", "masked", "masked"]
    kept = [None if m is None else (~m).sum(1).tolist() for m in spy.masks]
    assert kept == [None, None, [1] * 3, None, [4] * 3, [9] * 3]


def test_single_passes_use_the_next_scale_branch_only(spied: Callable[[HMAR], Spy]):
    model = tiny_hmar(tiny_config())
    spy = spied(model)
    sampled(model, dataclasses.replace(SETTINGS, mask_schedule=SINGLE), [0], [1])
    assert spy.branches == ["next_scale"] * 3


def test_what_was_kept_stays_kept_and_is_the_most_confident(spied: Callable[[HMAR], Spy]):
    """Kept after the first pass: the tokens whose probability is highest; each later pass only adds to them."""
    model = tiny_hmar(tiny_config())
    spy = spied(model)
    sampled(model, dataclasses.replace(SETTINGS, top_p=1.0), [0], [1])
    first, second = spy.masks[4], spy.masks[5]
    assert not (second & ~first).any()
    _, confidence = sample_truncated(spy.sampled_from[3], numbers_of(1, 2, 0, 16), 0, 1.0)
    assert confidence[~first].min() >= confidence[first].max()


@pytest.mark.parametrize(
    ("pattern", "cfg_scale", "mask_cfg", "rows"),
    [
        ("block_diagonal", 1.5, 0.0, [3, 6, 3, 6, 3, 3]),  # no guidance at the first scale, nor in mask passes
        ("block_diagonal", 1.5, 0.5, [3, 6, 6, 6, 6, 6]),
        ("block_diagonal", 1.5, (0.0, 0.0, 0.5), [3, 6, 3, 6, 6, 6]),
        ("block_diagonal", 0.0, 0.5, [3, 3, 6, 3, 6, 6]),
        ("block_diagonal", 0.0, 0.0, [3, 3, 3, 3, 3, 3]),
        ("block_causal", 1.5, 0.0, [6, 6, 6]),  # the cache needs both halves from the first scale on
        ("block_causal", 0.0, 0.0, [3, 3, 3]),
    ],
)
def test_the_unconditional_half_is_run_only_where_it_counts(
    spied: Callable[[HMAR], Spy], pattern: str, cfg_scale: float, mask_cfg: float | tuple[float, ...], rows: list[int]
):
    stage = "masked" if len(rows) == 6 else "next_scale"
    model = tiny_hmar(tiny_config(stage, pattern))
    spy = spied(model)
    passes = PASSES if stage == "masked" else SINGLE
    sampled(model, SampleSettings(cfg_scale, 0, 0.9, passes, mask_cfg), [0, 1, 2], [1, 2, 3])
    assert spy.rows == rows


def test_guidance_grows_linearly_from_0_at_the_first_scale_to_cfg_at_the_last(spied: Callable[[HMAR], Spy]):
    model = tiny_hmar(tiny_config())
    spy = spied(model)
    sampled(model, dataclasses.replace(SETTINGS, cfg_scale=3.0, mask_cfg=0.8), [0, 1], [1, 2])
    scales = [0, 1, 1, 2, 2, 2]
    for scale, branch, output, logits in zip(scales, spy.branches, spy.outputs, spy.sampled_from, strict=True):
        strength = (3.0 if branch == "next_scale" else 0.8) * scale / 2
        both = output.transpose(0, 1)
        expected = both if strength == 0 else (1 + strength) * both[:2] - strength * both[2:]
        assert logits.shape == (2, SCHEDULE.scale_lengths[scale], V)
        torch.testing.assert_close(logits, expected)


def test_every_pass_of_every_scale_has_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """Even with one token a pass at a scale of 81 tokens; and none of them are those of another purpose."""
    purposes: list[int] = []

    def watched(seeds: Tensor, positions: Tensor, purpose: int, count: int) -> Tensor:
        purposes.append(int(purpose))
        return uniform(seeds, positions, purpose, count)

    monkeypatch.setattr(sampler, "uniform", watched)
    config = tiny_config(depth=1)
    schedule = config.schedule.model_copy(update={"patch_nums": (1, 2, 9, 10), "mask_schedule": None})
    config = config.model_copy(update={"schedule": schedule})
    model, codes = tiny_hmar(config), MixingCodes(config.schedule.scales)
    passes = ((1,), (1, 1, 1, 1), (1,) * 81, (100,))
    generate_tokens(model, codes, torch.tensor([0]), torch.tensor([1]), SampleSettings(0.0, 0, 1.0, passes))
    assert len(purposes) == 1 + 4 + 81 + 1
    assert len(set(purposes)) == len(purposes)
    assert not set(purposes) & (set(Purpose) - {Purpose.SAMPLE})


def test_confidence_counts_after_guidance_and_truncation():
    """Of two tokens drawn with certainty after top-k 1, both have confidence 1, however flat their logits were."""
    rows = torch.tensor([[[0.01, 0.0, -0.01], [9.0, 0.0, 0.0]]])
    _, sure = sample_truncated(rows, torch.tensor([[0.5, 0.5]]), 1, 1.0)
    assert sure.tolist() == [[1.0, 1.0]]
    _, sure = sample_truncated(rows, torch.tensor([[0.0, 0.0]]), 0, 1.0)
    assert sure[0, 0] == pytest.approx(math.exp(0.01) / (math.exp(0.01) + 1 + math.exp(-0.01)))


def test_a_mask_branch_on_block_causal_attention_is_refused():
    """SPEC §5's mask branch sees one scale; over VAR's cache its passes would be cached as scales of their own."""
    tree = {"model": {"attention": {"pattern": "block_causal"}}, "stage": {"name": "masked"}}
    with pytest.raises(UserError, match="block_diagonal"):
        parse_config(tree)
