"""The fast sampling path on a GPU: kernels beside the plain path, and whole images as CUDA graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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


@pytest.mark.parametrize("graphs", [True, False])
def test_batches_on_two_streams_are_batches_one_at_a_time(graphs: bool, tmp_path: Path) -> None:
    """Bitwise, over more batches than are in flight and a smaller last one; queueing one waits for nothing."""
    import numpy as np
    from helpers import tiny_export

    from hmar_mega.inference import load_model
    from hmar_mega.inference.decoding import to_bytes
    from hmar_mega.inference.overlap import _Streams, sample_batches

    model = load_model(tiny_export(tmp_path / "model"), "cuda", graphs=graphs)
    settings, numbers = model.sample_settings(), np.arange(30)
    batches = [(numbers[i : i + 4] % 5, numbers[i : i + 4] + 7) for i in range(0, 30, 4)]
    for _ in range(3):
        found = list(sample_batches(model, settings, batches))
        for (labels, seeds), images in zip(batches, found, strict=True):
            given = [torch.from_numpy(x).cuda() for x in (labels, seeds)]
            assert np.array_equal(images, to_bytes(model.sampler(*given, settings)[1]))
    if graphs:
        assert model.sampler.why_not(4, settings) is None, "nothing was captured"
        streams = _Streams(model, settings)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            queued = [streams.queue(*batch) for batch in batches[:2]]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for (done, host), images in zip(queued, found, strict=False):
            done.synchronize()
            assert np.array_equal(host.numpy(), images)
