"""Sampling as published, and what can be chosen: negative class, guidance by scale, mixed codes, views of scales."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import CLASSES, PASSES, SCHEDULE, N, NumpyHMAR, V, Z, random_normal, tiny_config, tiny_hmar, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hmar_mega.errors import UserError
from hmar_mega.inference import ImageModel, edit_images
from hmar_mega.inference.sampler import SampleSettings, generate_tokens, guidance_strengths, sample_truncated, truncate
from hmar_mega.inference.smooth import Smoothing, gumbel_codes
from hmar_mega.rng import Purpose, uniform
from hmar_mega.scales import PATCH_NUMS
from hmar_mega.sequence import teacher_input

SINGLE = tuple((n,) for n in SCHEDULE.scale_lengths)
SETTINGS = SampleSettings(1.5, 0, 0.9, PASSES)
HARD = Smoothing(temperature=1e-6, floor=1e-9, sharpen=0.0)


@pytest.fixture(scope="module")
def model() -> ImageModel:
    config = tiny_config()
    sampling = {"cfg_scale": 1.5, "top_k": 0, "top_p": 0.9, "mask_cfg": 0.0, "mask_schedule": PASSES}
    settings = {"sampling": sampling, "mask_input": "leak_free"}
    return ImageModel(tiny_hmar(config), tiny_tokenizer(config), settings)


def sampled(model: ImageModel, settings: SampleSettings, labels: list[int], seeds: list[int]) -> tuple[Tensor, Tensor]:
    return generate_tokens(model.model, model.tokenizer.quantizer, torch.tensor(labels), torch.tensor(seeds), settings)


# ---------------------------------------------------------------------------------------------- truncation as published


def published_truncation(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """VAR's published order of steps: drop what is below the k-th; sort ascending; drop while the sum is ≤ 1 − p."""
    kept = np.full(len(logits), True)
    if top_k:
        kept = logits >= np.sort(logits)[-top_k]
    values = np.where(kept, logits, -np.inf).astype(np.float64)
    probability = np.exp(values - values.max())
    probability /= probability.sum()
    rising = np.argsort(values, kind="stable")
    dropped = np.cumsum(probability[rising]) <= 1 - top_p
    dropped[-1] = False
    return {int(token) for token in rising[~dropped] if kept[token]}


@given(
    logits=st.lists(st.integers(-60, 60), min_size=2, max_size=30, unique=True),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.05, 0.999),
)
def test_truncation_keeps_what_the_published_code_keeps(logits: list[int], top_k: int, top_p: float):
    values = np.array(logits) / 10
    top_k = min(top_k, len(logits))
    found = truncate(torch.from_numpy(values).float().view(1, 1, -1), top_k, top_p)[0, 0]
    kept = set(torch.nonzero(found.isfinite()).flatten().tolist())
    borders = [published_truncation(values, top_k, p) for p in (top_p - 1e-5, top_p, top_p + 1e-5)]
    assert kept in borders  # float32 may put the border one token off where the sum meets p within rounding


# ------------------------------------------------------------------------------------------------------------ guidance


@pytest.mark.parametrize("patch_nums", [(1, 2, 4), PATCH_NUMS[256]])
def test_a_list_equal_to_the_rising_strengths_is_the_number(patch_nums: tuple[int, ...]):
    count = len(patch_nums)
    assert guidance_strengths(1.7, count) == tuple(1.7 * k / (count - 1) for k in range(count))
    assert guidance_strengths(tuple(range(count)), count) == tuple(range(count))
    assert guidance_strengths(1.7, count)[0] == 0
    assert guidance_strengths(1.7, count)[-1] == 1.7


def test_guidance_by_scale_equal_to_the_schedule_gives_the_same_images(model: ImageModel):
    one = model.generate([0, 1, 2], seed=3, cfg_scale=2.5)
    assert torch.equal(model.generate([0, 1, 2], seed=3, cfg_scale=[0.0, 1.25, 2.5]), one)
    assert not torch.equal(model.generate([0, 1, 2], seed=3, cfg_scale=[0.0, 2.5, 2.5]), one)
    assert not torch.equal(model.generate([0, 1, 2], seed=3, cfg_scale=[2.5, 1.25, 2.5]), one)


@pytest.mark.parametrize("strengths", [[1.0], [1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
def test_guidance_needs_a_number_for_every_scale(model: ImageModel, strengths: list[float]):
    with pytest.raises(UserError, match=f"cfg_scale has {len(strengths)} numbers for 3 scales"):
        model.generate([0], cfg_scale=strengths)


@pytest.mark.parametrize("strengths", [[0.0, -1.0, 2.0], [0.0, float("nan"), 1.0]])
def test_guidance_below_0_is_refused(model: ImageModel, strengths: list[float]):
    with pytest.raises(UserError, match="cfg_scale"):
        model.generate([0], cfg_scale=strengths)


@pytest.mark.parametrize("negative", [None, 0, 3])
@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_guidance_leads_away_from_the_negative_class(negative: int | None, pattern: str):
    """(1 + t)·cond − t·negative at every scale, from the float64 model on the sampled tokens' own inputs."""
    config = tiny_config("next_scale", pattern)
    model, tokenizer = tiny_hmar(config), tiny_tokenizer(config)
    strengths = (0.5, 0.0, 2.0)
    settings = SampleSettings(strengths, 1, 1.0, SINGLE, negative_class=negative)  # top-k 1: the likeliest token
    tokens, _ = generate_tokens(model, tokenizer.quantizer, torch.tensor([1]), torch.tensor([7]), settings)
    given = teacher_input(tokens, tokenizer.quantizer, SCHEDULE)[0].double().numpy()
    yardstick = NumpyHMAR(model)
    cond, away = (yardstick.logits(label, given) for label in (1, CLASSES if negative is None else negative))
    for scale, t in enumerate(strengths):
        own = SCHEDULE.span(scale)
        guided = (1 + t) * cond[own] - t * away[own]
        assert tokens[0, own].tolist() == guided.argmax(-1).tolist()


def test_the_unconditional_class_is_the_negative_one_by_default(model: ImageModel):
    plain, _ = sampled(model, SETTINGS, [1, 2], [3, 4])
    given, _ = sampled(model, dataclasses.replace(SETTINGS, negative_class=CLASSES), [1, 2], [3, 4])
    other, _ = sampled(model, dataclasses.replace(SETTINGS, negative_class=0), [1, 2], [3, 4])
    assert torch.equal(plain, given)
    assert not torch.equal(plain, other)


def test_a_negative_class_equal_to_the_class_is_no_guidance(model: ImageModel):
    guided, _ = sampled(model, dataclasses.replace(SETTINGS, cfg_scale=2.0, negative_class=1), [1, 1], [3, 4])
    free, _ = sampled(model, dataclasses.replace(SETTINGS, cfg_scale=0.0), [1, 1], [3, 4])
    assert torch.equal(guided, free)


def test_a_negative_class_that_does_not_exist_is_refused(model: ImageModel):
    with pytest.raises(UserError, match="class 5 is out of range"):
        model.generate([0], negative_class=CLASSES)


# ---------------------------------------------------------------------------------------------------------- more smooth


def test_the_temperature_falls_and_the_logits_sharpen_as_published():
    """VAR's constants at K = 10: τ from 0.27 to 0.0135, logits times 1 to 2; the floor of 0.005 never binds there."""
    chosen = Smoothing()
    assert [chosen.tau(k, 10) for k in (0, 9)] == pytest.approx([0.27, 0.27 * 0.05])
    assert [chosen.gain(k, 10) for k in (0, 9)] == [1.0, 2.0]
    assert Smoothing(temperature=0.05).tau(9, 10) == 0.005


def test_mixed_images_repeat_and_do_not_depend_on_the_batch(model: ImageModel):
    images = model.generate([0, 3, 1], seed=5, more_smooth=True)
    assert torch.equal(model.generate([0, 3, 1], seed=5, more_smooth=True), images)
    assert not torch.equal(model.generate([0, 3, 1], seed=5), images)
    assert not torch.equal(model.generate([0, 3, 1], seed=6, more_smooth=True), images)
    for i, label in enumerate([0, 3, 1]):
        alone = model.generate([label], seed=5 + i, more_smooth=True)[0]
        torch.testing.assert_close(alone, images[i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("passes", [PASSES, SINGLE], ids=["passes", "one_pass"])
def test_at_low_temperature_mixing_is_hard_sampling(model: ImageModel, passes: tuple[tuple[int, ...], ...]):
    hard = dataclasses.replace(SETTINGS, mask_schedule=passes)
    tokens, f_hat = sampled(model, hard, [0, 1, 2, 3], [1, 2, 3, 4])
    mixed_tokens, mixed = sampled(model, dataclasses.replace(hard, more_smooth=HARD), [0, 1, 2, 3], [1, 2, 3, 4])
    assert torch.equal(mixed_tokens, tokens)
    torch.testing.assert_close(mixed, f_hat, rtol=0, atol=1e-5)


def test_mixed_codes_follow_the_formula_and_the_token_has_the_largest_share():
    """w_i ∝ (1 + E_i / (p_i·E_t))^(−1/τ) in float64 from the same numbers; a removed token has none."""
    logits = random_normal(2, 3, V)
    logits[..., 5] = float("-inf")
    tokens, _ = sample_truncated(logits, uniform(torch.arange(2), torch.zeros(2).long(), 9, 3), 0, 1.0)
    book = random_normal(V, Z, seed=1)
    found = gumbel_codes(logits, tokens, book, 0.3, torch.arange(2), 77)
    for b in range(2):
        for n in range(3):
            numbers = uniform(torch.tensor([b]), torch.tensor([n]), Purpose.SMOOTH + 77, V)[0].double().numpy()
            exponential = -np.log(numbers)
            probability = logits[b, n].double().softmax(-1).numpy()
            t = int(tokens[b, n])
            weight = np.zeros(V)
            for i in range(V):
                if probability[i] > 0:
                    behind = 1.0 if i == t else 1 + exponential[i] / (probability[i] * exponential[t])
                    weight[i] = behind ** (-1 / 0.3)
            weight /= weight.sum()
            assert weight.argmax() == t
            assert weight[5] == 0
            np.testing.assert_allclose(found[b, n].numpy(), weight @ book.double().numpy(), rtol=1e-4, atol=1e-5)


def test_token_and_noise_together_are_a_plain_gumbel_softmax():
    """The mean mixture over 20 000 draws equals that of softmax((a + g)/τ) with independent g, within 5 σ."""
    count, tau = 20_000, 0.5
    a = torch.tensor([1.0, 0.0, -1.0, 0.5])
    rows = a.expand(1, count, 4)
    tokens, _ = sample_truncated(rows, uniform(torch.tensor([3]), torch.tensor([0]), 5, count), 0, 1.0)
    ours = gumbel_codes(rows, tokens, torch.eye(4), tau, torch.tensor([3]), 5)[0].double()
    random = np.random.default_rng(0)
    noisy = (a.double().numpy() + random.gumbel(size=(count, 4))) / tau
    plain = torch.from_numpy(noisy).softmax(-1)
    for power in (1, 2):
        error = (ours**power).mean(0) - (plain**power).mean(0)
        sigma = ((ours**power).var(0) / count + (plain**power).var(0) / count).sqrt()
        assert (error.abs() < 5 * sigma).all()


def test_noise_is_made_piece_by_piece_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch):
    logits, seeds = random_normal(2, 7, V), torch.arange(2)
    tokens = logits.argmax(-1)
    whole = gumbel_codes(logits, tokens, random_normal(V, Z), 0.3, seeds, 1)
    monkeypatch.setattr("hmar_mega.inference.smooth.NUMBERS_AT_ONCE", 2 * V * 2)
    torch.testing.assert_close(gumbel_codes(logits, tokens, random_normal(V, Z), 0.3, seeds, 1), whole)


def test_forced_tokens_are_not_mixed(model: ImageModel):
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    settings = model.sample_settings(more_smooth=True)
    plain = edit_images(model, images, nothing, [1], paste=False)
    torch.testing.assert_close(edit_images(model, images, nothing, [1], settings=settings, paste=False), plain)


def test_a_block_causal_model_mixes_too():
    config = tiny_config("next_scale", "block_causal")
    model, tokenizer = tiny_hmar(config), tiny_tokenizer(config)
    settings = SampleSettings(2.0, 0, 0.9, SINGLE, more_smooth=HARD)
    given = torch.tensor([1, 2]), torch.tensor([3, 4])
    mixed, _ = generate_tokens(model, tokenizer.quantizer, *given, settings)
    hard, _ = generate_tokens(model, tokenizer.quantizer, *given, dataclasses.replace(settings, more_smooth=None))
    assert torch.equal(mixed, hard)


# -------------------------------------------------------------------------------------------------- scales and decoding


def test_the_scales_are_decodings_of_f_hat_so_far(model: ImageModel):
    scales = model.generate_scales([0, 1], seed=4)
    assert scales.shape == (3, 2, 3, 16, 16)
    assert torch.equal(scales[-1], model.generate([0, 1], seed=4))
    tokens, _ = sampled(model, SETTINGS, [0, 1], [4, 5])
    quantizer = model.tokenizer.quantizer
    f_hat = torch.zeros(())
    for k in range(3):
        f_hat = f_hat + quantizer.scale_features(k, tokens[:, SCHEDULE.span(k)])
        torch.testing.assert_close(scales[k], model.to_images(f_hat), rtol=0, atol=1e-5)


def test_images_are_the_decoders_output_clamped(model: ImageModel):
    """(x + 1)/2 clamped to [0, 1], with a latent large enough that both ends are reached."""
    f_hat = 1e4 * random_normal(2, Z, 4, 4)
    raw = model.tokenizer.decoder(model.tokenizer.post_quant_conv(f_hat))
    images = model.to_images(f_hat)
    torch.testing.assert_close(images, ((raw + 1) / 2).clamp(0, 1))
    assert images.min() == 0
    assert images.max() == 1


def test_the_last_scale_is_neither_enlarged_nor_followed(model: ImageModel):
    """Its codes go through φ as they are, and f̂ after it is what is decoded: no input for a further scale."""
    calls: list[slice] = []
    embed = model.model.embed

    def watched(positions: slice, *rest: object) -> Tensor:
        calls.append(positions)
        return embed(positions, *rest)

    model.model.embed = watched  # type: ignore[method-assign]
    try:
        tokens, f_hat = sampled(model, dataclasses.replace(SETTINGS, mask_schedule=SINGLE), [0], [4])
    finally:
        del model.model.embed
    assert calls == [SCHEDULE.span(k) for k in range(3)]
    quantizer = model.tokenizer.quantizer
    codes = quantizer.embedding(tokens[:, SCHEDULE.span(2)]).transpose(1, 2).reshape(1, Z, 4, 4)
    weight, bias = quantizer.phi[quantizer.phi_of_scale[2]].parameters()
    last = 0.5 * codes + 0.5 * torch.nn.functional.conv2d(codes, weight, bias, padding=1)
    before = sum(quantizer.scale_features(k, tokens[:, SCHEDULE.span(k)]) for k in range(2))
    torch.testing.assert_close(f_hat, before + last)


def test_a_causal_models_cache_gives_the_uncached_logits():
    """With top-k 1, sampling takes the likeliest tokens of the whole-sequence forward over what it sampled."""
    config = tiny_config("next_scale", "block_causal")
    model, tokenizer = tiny_hmar(config), tiny_tokenizer(config)
    for cfg in (0.0, (0.0, 1.5, 0.0), 3.0):
        settings = SampleSettings(cfg, 1, 1.0, SINGLE)
        tokens, _ = generate_tokens(model, tokenizer.quantizer, torch.tensor([0, 4]), torch.tensor([1, 2]), settings)
        given = teacher_input(tokens, tokenizer.quantizer, SCHEDULE)
        cond = model(torch.tensor([0, 4]), given).transpose(0, 1)
        uncond = model(torch.tensor([CLASSES] * 2), given).transpose(0, 1)
        t = torch.tensor(guidance_strengths(cfg, 3))[SCHEDULE.level_ids()][None, :, None]
        assert tokens.shape == (2, N)
        assert torch.equal(((1 + t) * cond - t * uncond).argmax(-1), tokens)


def test_scales_of_no_images_are_refused(model: ImageModel):
    with pytest.raises(UserError, match="label"):
        model.generate_scales([])
