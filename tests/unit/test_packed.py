"""The fast path's pieces on a CPU beside the plain path: packed weights, modulation, numbers, whole images."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from helpers import CLASSES, PASSES, SCHEDULE, Z, random_normal, tiny_config, tiny_hmar, tiny_tokenizer
from torch import Tensor

from hmar_mega.inference import decoding, graphs
from hmar_mega.inference.decoding import ImageDecoder
from hmar_mega.inference.graphs import ImageProgram, ImageSampler, why_not_graphs
from hmar_mega.inference.packed import PackedHMAR, PackedState, all_numbers, why_not_packed
from hmar_mega.inference.sampler import SampleSettings, SamplingState, generate_tokens
from hmar_mega.inference.smooth import Smoothing
from hmar_mega.model.hmar import HMAR
from hmar_mega.rng import Purpose, uniform
from hmar_mega.tokenizer.model import MultiScaleVQVAE

SETTINGS = SampleSettings(1.5, 0, 0.9, PASSES, 0.7)
LABELS, SEEDS = torch.tensor([0, 3, 4]), torch.tensor([7, 0, 2**40])


@pytest.fixture(scope="module")
def model() -> HMAR:
    return tiny_hmar(tiny_config()).eval()


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleVQVAE:
    return tiny_tokenizer(tiny_config())


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("branch", ["next_scale", "masked"])
@torch.inference_mode()
def test_packed_logits_are_the_models(tokenizer: MultiScaleVQVAE, branch: str, shared_aln: bool):
    """Of the first scale, and of a later one with f̂, token features and a mask; both halves of guidance."""
    model = tiny_hmar(tiny_config(shared_aln=shared_aln)).eval()
    given = (tokenizer.quantizer, LABELS, SEEDS, SETTINGS)
    plain, fast = SamplingState(model, *given), PackedState(PackedHMAR(model, kernels=False), *given)
    for state in (plain, fast):
        state.mask_strengths = state.strengths = (0.5, 0.5, 0.5)
    for scale in (0, 2):
        features = mask = None
        if scale:
            plain.f_hat = fast.f_hat = random_normal(3, Z, 4, 4, seed=1)
            if branch == "masked":
                features, mask = random_normal(3, 16, Z, seed=2), random_normal(3, 16, seed=3) > 0
        for strength in (0.5, 0.0):
            found = fast.logits(scale, branch, strength, features, mask)
            torch.testing.assert_close(
                found, plain.logits(scale, branch, strength, features, mask), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        dataclasses.replace(SETTINGS, mask_cfg=0.0, mask_input="reference", top_k=20),
        dataclasses.replace(SETTINGS, cfg_scale=0.0, mask_cfg=0.0, top_p=1.0),
        dataclasses.replace(SETTINGS, negative_class=2),
        dataclasses.replace(SETTINGS, more_smooth=Smoothing()),
    ],
    ids=["guided", "reference", "unguided", "negative", "smooth"],
)
def test_images_are_the_plain_paths(model: HMAR, tokenizer: MultiScaleVQVAE, settings: SampleSettings):
    decoder = ImageDecoder(tokenizer)
    program = ImageProgram(model, decoder, kernels=False)
    tokens, images = program(LABELS, SEEDS, settings)
    assert torch.equal(decoder(program.features(LABELS, SEEDS, settings)[1]), images)
    wanted, f_hat = generate_tokens(model, tokenizer.quantizer, LABELS, SEEDS, settings)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(images, decoder(f_hat), rtol=1e-4, atol=1e-4)


def test_images_through_the_interpreted_kernels(model: HMAR, tokenizer: MultiScaleVQVAE):
    pytest.importorskip("triton", reason="the kernels need Triton")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu has this for GPUs")
    import kernel_checks  # noqa: F401 (mends the interpreter)

    settings = dataclasses.replace(SETTINGS, mask_schedule=((1,), (1, 3), (16,)), top_k=20)
    tokens, _ = ImageProgram(model, ImageDecoder(tokenizer), kernels=True)(LABELS, SEEDS, settings)
    wanted, _ = generate_tokens(model, tokenizer.quantizer, LABELS, SEEDS, settings)
    assert torch.equal(tokens, wanted)


def test_an_image_is_its_seeds_and_labels_alone(model: HMAR, tokenizer: MultiScaleVQVAE):
    program = ImageProgram(model, ImageDecoder(tokenizer), kernels=False)
    whole, pixels = program(LABELS, SEEDS, SETTINGS)
    mixed, _ = program(LABELS.flip(0), SEEDS.flip(0), SETTINGS)
    assert torch.equal(mixed, whole.flip(0))
    for i in range(3):
        alone, image = program(LABELS[i : i + 1], SEEDS[i : i + 1], SETTINGS)
        assert torch.equal(alone[0], whole[i])
        torch.testing.assert_close(image[0], pixels[i], rtol=1e-4, atol=1e-5)


def test_modulation_is_computed_once_and_once_for_the_negative_class(
    model: HMAR, tokenizer: MultiScaleVQVAE, monkeypatch: pytest.MonkeyPatch
):
    packed, rows = PackedHMAR(model, kernels=False), []

    def watch(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        rows.append(len(given[0]))

    blocks = [*model.blocks.values(), *model.mask_blocks.values(), model.head, model.mask_head]
    handles = [part.ada_lin.register_forward_pre_hook(watch) for part in blocks]
    program = ImageProgram(model, ImageDecoder(tokenizer), kernels=False)
    program(LABELS, SEEDS, SETTINGS)
    for handle in handles:
        handle.remove()
    assert rows == [4] * len(blocks)
    both = packed.modulation(LABELS, CLASSES, 2).blocks[0, False][0]
    assert torch.equal(both[3], both[5])
    assert not torch.equal(both[0], both[1])


def test_numbers_made_together_are_those_made_apart():
    numbers = all_numbers(SEEDS, PASSES)
    assert set(numbers) == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}
    for (scale, attempt), found in numbers.items():
        count = SCHEDULE.scale_lengths[scale]
        wanted = uniform(SEEDS, torch.zeros_like(SEEDS), Purpose.SAMPLE * (scale + 1) + attempt, count)
        assert torch.equal(found[:, :count], wanted)


def test_the_decoder_in_chunks_and_in_16_bits(tokenizer: MultiScaleVQVAE, monkeypatch: pytest.MonkeyPatch):
    f_hat = random_normal(5, Z, 4, 4)
    whole = ImageDecoder(tokenizer)(f_hat)
    torch.testing.assert_close(whole, tokenizer.decode(f_hat).add(1).mul(0.5))
    monkeypatch.setattr(decoding, "MAP_BYTES", 1)
    calls = []
    chunked = ImageDecoder(tokenizer)
    assert chunked.chunk == 1
    run = chunked._run
    monkeypatch.setattr(chunked, "_run", lambda part: calls.append(len(part)) or run(part))
    torch.testing.assert_close(chunked(f_hat), whole, rtol=1e-4, atol=1e-5)
    assert calls == [1] * 5
    low = ImageDecoder(tokenizer, torch.bfloat16)(f_hat)
    assert low.dtype == torch.float32
    assert 0 < (low - whole).abs().max() < 0.05
    assert next(tokenizer.decoder.parameters()).dtype == torch.float32


def test_what_cannot_be_a_graph_says_why_and_is_sampled(
    model: HMAR, tokenizer: MultiScaleVQVAE, caplog: pytest.LogCaptureFixture
):
    sampler = ImageSampler(model, ImageDecoder(tokenizer))
    with caplog.at_level(logging.INFO, logger=graphs.__name__):
        tokens, images = sampler(LABELS, SEEDS, SETTINGS)
        sampler(LABELS, SEEDS, SETTINGS)
    assert [r.message for r in caplog.records] == [
        "images are sampled kernel by kernel, not as a CUDA graph: CUDA graphs need a CUDA GPU, not cpu"
    ]
    wanted, _ = generate_tokens(model, tokenizer.quantizer, LABELS, SEEDS, SETTINGS)
    assert torch.equal(tokens, wanted)
    assert images.shape == (3, 3, tokenizer.resolution, tokenizer.resolution)
    assert ImageSampler(model, ImageDecoder(tokenizer), graphs=False).why_not(3, SETTINGS) == "graphs=False"
    causal = tiny_hmar(tiny_config("next_scale", "block_causal"))
    assert "cache" in str(why_not_packed(causal))
    assert why_not_packed(model) is None
    with pytest.raises(ValueError, match="generate_tokens"):
        PackedHMAR(causal)
    assert "cpu" in str(why_not_graphs(model, SETTINGS))


def test_a_capture_that_fails_is_not_tried_again(
    model: HMAR, tokenizer: MultiScaleVQVAE, monkeypatch: pytest.MonkeyPatch
):
    """Without a GPU a capture fails by itself: the plain path takes over, with the reason."""
    if torch.cuda.is_available():
        pytest.skip("the capture would succeed")
    monkeypatch.setattr(graphs, "why_not_graphs", lambda model, settings: None)
    sampler, tries = ImageSampler(model, ImageDecoder(tokenizer)), []

    def fail(batch: int, settings: SampleSettings, decode: bool) -> None:
        tries.append(batch)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(sampler, "_capture", fail)
    for _ in range(2):
        tokens, _ = sampler(LABELS, SEEDS, SETTINGS)
    assert tries == [3]
    assert sampler.why_not(3, SETTINGS) == (
        "capturing a batch of 3 failed (operation not permitted when stream is capturing)"
    )
    assert torch.equal(tokens, generate_tokens(model, tokenizer.quantizer, LABELS, SEEDS, SETTINGS)[0])
