"""The fast sampling path on a GPU: kernels beside the plain path, and whole images as CUDA graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("truncation", range(8))
@pytest.mark.parametrize("strength", [0.0, 1.3])
def test_same_numbers_draw_the_plain_paths_tokens(dtype: torch.dtype, truncation: int, strength: float) -> None:
    """Rows of 4096 and of 100 tokens; where a token differs its number lies within rounding of a step."""
    from sampling_checks import TRUNCATIONS, check_same_tokens

    torch.manual_seed(0)
    for vocabulary in (4096, 100):
        halves = 2 if strength else 1
        logits = (3 * torch.randn(64, halves * 5, vocabulary, device="cuda")).to(dtype)
        differing = check_same_tokens(logits, torch.rand(5, 64, device="cuda"), strength, *TRUNCATIONS[truncation])
        assert differing <= 3


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (900, 0.99), (40, 0.5)])
def test_chi_square_of_100_000_draws_from_4096_tokens(top_k: int, top_p: float) -> None:
    from sampling_checks import check_distribution

    from hmar_mega.inference.sampler import truncate
    from hmar_mega.rng import uniform

    torch.manual_seed(1)
    row = 0.5 * torch.randn(4096, device="cuda")
    numbers = uniform(torch.tensor(5, device="cuda"), torch.arange(1, device="cuda"), 99, 100_000)[0]
    exact = truncate(row.double(), top_k, top_p).softmax(0).cpu().numpy()
    check_distribution(row, numbers, exact, top_k, top_p)


def test_q_and_k_are_normalised_in_place() -> None:
    from hmar_mega.kernels.qk_norm import normalise_qk_
    from hmar_mega.model.attention import split_normalised

    qkv = torch.randn(9, 4, 3, 6, 64, device="cuda", dtype=torch.bfloat16)
    scale = torch.rand(6, device="cuda") * 20
    wanted = split_normalised(qkv, scale)
    found = normalise_qk_(qkv.clone(), scale).permute(2, 1, 3, 0, 4)
    torch.testing.assert_close(tuple(found), wanted, rtol=8e-3, atol=1e-3)


def test_images_as_graphs_are_the_plain_paths_and_their_seeds_alone(caplog: pytest.LogCaptureFixture) -> None:
    """float32: tokens of graphs are the plain path's at any batch size and position; the pool is shared."""
    from helpers import PASSES, tiny_config, tiny_hmar, tiny_tokenizer

    from hmar_mega.inference.decoding import ImageDecoder
    from hmar_mega.inference.graphs import ImageSampler
    from hmar_mega.inference.sampler import SampleSettings, generate_tokens

    config = tiny_config()
    model, tokenizer = tiny_hmar(config).cuda().eval(), tiny_tokenizer(config).cuda()
    sampler = ImageSampler(model, ImageDecoder(tokenizer))
    labels = torch.tensor([0, 3, 4, 1], device="cuda")
    seeds = torch.tensor([7, 0, 2**40, 5], device="cuda")
    for settings in (SampleSettings(1.5, 0, 0.9, PASSES, 0.7), SampleSettings(1.5, 20, 0.95, PASSES)):
        tokens, images = sampler(labels, seeds, settings)
        assert sampler.why_not(4, settings) is None
        wanted, f_hat = generate_tokens(model, tokenizer.quantizer, labels, seeds, settings)
        assert torch.equal(tokens, wanted)
        torch.testing.assert_close(images, sampler.decoder(f_hat), rtol=1e-3, atol=1e-3)
        assert torch.equal(sampler(labels.flip(0), seeds.flip(0), settings)[0], tokens.flip(0))
        for i in range(4):
            assert torch.equal(sampler(labels[i : i + 1], seeds[i : i + 1], settings)[0][0], tokens[i])
        again = sampler(labels, seeds, settings)
        assert torch.equal(again[0], tokens)
        assert torch.equal(again[1], images)
    low = ImageSampler(tiny_hmar(config).cuda().bfloat16().eval(), ImageDecoder(tokenizer, torch.bfloat16))
    low_images = low(labels, seeds, dataclasses.replace(settings, top_k=0))[1]
    assert low.why_not(4, dataclasses.replace(settings, top_k=0)) is None
    assert low_images.dtype == torch.float32
    assert low_images.isfinite().all()


def test_nothing_waits_for_the_device_while_a_graph_is_replayed() -> None:
    from helpers import PASSES, tiny_config, tiny_hmar, tiny_tokenizer

    from hmar_mega.inference.decoding import ImageDecoder
    from hmar_mega.inference.graphs import ImageSampler
    from hmar_mega.inference.sampler import SampleSettings

    config = tiny_config()
    sampler = ImageSampler(tiny_hmar(config).cuda().eval(), ImageDecoder(tiny_tokenizer(config).cuda()))
    labels, settings = torch.tensor([0, 3], device="cuda"), SampleSettings(1.5, 0, 0.9, PASSES)
    tokens, images = sampler(labels, labels, settings)
    assert sampler.why_not(len(labels), settings) is None, "nothing was captured"
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, same = sampler(labels, labels, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, tokens)
    assert torch.equal(same, images)
