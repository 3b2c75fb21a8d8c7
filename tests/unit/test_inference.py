"""Exported models in use: loading, logits and generation, and what each refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    PASSES,
    SCHEDULE,
    N,
    V,
    Z,
    random_normal,
    random_tokens,
    tiny_config,
    tiny_export,
    tiny_hmar,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from hmar_mega import sequence
from hmar_mega.errors import UserError
from hmar_mega.inference import ImageModel, load_model

SINGLE = tuple((n,) for n in SCHEDULE.scale_lengths)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    return load_model(folder, "cpu")


@pytest.fixture(scope="module")
def without_masks(tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    return load_model(tiny_export(tmp_path_factory.mktemp("exported") / "model", "next_scale"), "cpu")


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the export; keyword arguments change its config.json, where None removes a key."""

    def copy(**changes: Any) -> Path:
        out = tmp_path / "copy"
        for file in folder.rglob("*"):
            if file.is_file():
                target = out / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        settings = {**json.loads((out / "config.json").read_text()), **changes}
        (out / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
        return out

    return copy


# --------------------------------------------------------------------------------------------------------- loading


def test_a_loaded_model_is_the_exported_one(model: ImageModel):
    original = tiny_hmar(tiny_config())
    loaded = dict(model.model.named_parameters())
    assert set(loaded) == {n for n, _ in original.named_parameters()}
    assert all(torch.equal(loaded[n], p) for n, p in original.named_parameters())
    assert torch.equal(model.model.level_ids, original.level_ids)
    assert not any(p.requires_grad or p.is_meta for p in model.model.parameters())
    assert not model.model.training
    assert not model.tokenizer.training
    assert model.num_classes == CLASSES
    assert model.schedule == SCHEDULE
    assert model.device == torch.device("cpu")


def test_bf16_is_of_the_transformer_alone(folder: Path, model: ImageModel):
    half = load_model(folder, "cpu", torch.bfloat16)
    exact = {name for name, p in half.model.named_parameters() if p.dtype == torch.float32}
    assert exact == {name for name, _ in half.model.named_parameters() if name.endswith("log_scale")}
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in half.tokenizer.parameters()} == {torch.float32}
    images = half.generate([0, 1])
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    labels, given = torch.tensor([1]), random_normal(1, N - 1, Z)
    difference = half.next_scale_logits(labels, given) - model.next_scale_logits(labels, given)
    assert 0 < difference.abs().max() < 0.1 * model.next_scale_logits(labels, given).abs().max()


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, damaged: Callable[..., Path]):
    with pytest.raises(UserError, match=r"is not an exported model .*hmar-mega export RUN"):
        load_model(tmp_path / "nowhere")
    broken = damaged()
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not an exported model"):
        load_model(broken)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer/tokenizer.safetensors", "tokenizer/config.json"])
def test_a_missing_or_cut_file_is_refused(damaged: Callable[..., Path], file: str):
    broken = damaged()
    (broken / file).write_bytes((broken / file).read_bytes()[:-10])
    with pytest.raises(UserError):
        load_model(broken, "cpu")
    (broken / file).unlink()
    with pytest.raises(UserError):
        load_model(broken, "cpu")


def test_another_format_is_refused(damaged: Callable[..., Path]):
    with pytest.raises(UserError, match="has format 2; this version reads 1"):
        load_model(damaged(format=2))


def test_another_tokenizer_is_refused(damaged: Callable[..., Path]):
    broken = damaged()
    tiny_tokenizer(tiny_config(), seed=5).save(broken / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer has fingerprint .* put the tokenizer it was trained with back"):
        load_model(broken)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mask_embed", lambda t: t[:, :16].contiguous(), r"mask_embed with shape \(1, 16\), the model wants \(1, 32\)"),
        ("head.linear.weight", None, r"lacks 1 of the model's \d+ tensors, the first head\.linear\.weight"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(
    damaged: Callable[..., Path], name: str, change: Callable[[Tensor], Tensor] | None, message: str
):
    broken = damaged()
    tensors = load_file(broken / "model.safetensors")
    values = tensors.pop(name)
    if change is not None:
        tensors[name] = change(values)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(broken, "cpu")


def test_a_config_of_another_depth_is_refused(folder: Path, damaged: Callable[..., Path]):
    sizes = json.loads((folder / "config.json").read_text())["model"]
    with pytest.raises(UserError, match=r"lacks \d+ of the model's"):
        load_model(damaged(model={**sizes, "depth": 3}), "cpu")


@pytest.mark.parametrize(
    "key", ["model", "patch_nums", "codebook_size", "mask_branch", "tokenizer_fingerprint", "sampling"]
)
def test_a_config_without_a_key_is_refused(damaged: Callable[..., Path], key: str):
    with pytest.raises(UserError, match=key):
        load_model(damaged(**{key: None}), "cpu")


@pytest.mark.parametrize("change", [{"patch_nums": [1, 4, 2]}, {"model": {"depth": 0}}, {"model": {"width": 3.5}}])
def test_a_config_with_an_impossible_value_is_refused(damaged: Callable[..., Path], change: dict[str, Any]):
    with pytest.raises(UserError):
        load_model(damaged(**change), "cpu")


# ---------------------------------------------------------------------------------------------------------- logits


def test_logits_are_batch_first_float32(model: ImageModel):
    labels, given = torch.tensor([0, CLASSES]), random_normal(2, N - 1, Z)
    logits = model.next_scale_logits(labels, given)
    assert logits.shape == (2, N, V)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.model(labels, given).transpose(0, 1))
    mask = sequence.draw_masks(torch.arange(2), 0, SCHEDULE)
    features = random_normal(2, N - 1, Z, seed=2)
    masked = model.masked_logits(labels, given, features, mask)
    assert masked.shape == (2, N, V)
    assert masked.dtype == torch.float32
    torch.testing.assert_close(masked, model.model(labels, given, features, mask, branch="masked").transpose(0, 1))


def test_masked_logits_need_the_mask_branch(without_masks: ImageModel):
    given = random_normal(1, N - 1, Z)
    with pytest.raises(UserError, match="no mask branch"):
        without_masks.masked_logits(torch.tensor([0]), given, given, torch.ones(1, N - 1, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------------ generation


def test_images_are_float32_in_0_to_1_and_differ(model: ImageModel):
    images = model.generate([0, 1, 2, 3], seed=3)
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert all(not torch.equal(images[i], images[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("labels", [[0, 3, 3, 1, 4], torch.tensor([0, 3, 3, 1, 4])])
def test_an_image_does_not_depend_on_its_batch(model: ImageModel, labels: Any):
    images = model.generate(labels, seed=10)
    torch.testing.assert_close(model.generate(labels, seed=10), images, rtol=0, atol=0)
    reverse = model.generate([4, 1, 3, 3, 0], seed=[14, 13, 12, 11, 10])
    torch.testing.assert_close(reverse.flip(0), images, rtol=0, atol=1e-4)
    for i, label in enumerate([0, 3, 3, 1, 4]):
        torch.testing.assert_close(model.generate([label], seed=10 + i)[0], images[i], rtol=0, atol=1e-4)
    assert not torch.equal(images[1], images[2])  # one class, two seeds


def test_batch_invariant_is_exact(model: ImageModel):
    images = model.generate([0, 1, 2], seed=10, batch_invariant=True)
    for i in range(3):
        assert torch.equal(model.generate([i], seed=10 + i)[0], images[i])
        assert torch.equal(model.generate([i], seed=10 + i, batch_invariant=True)[0], images[i])


def test_settings_given_are_settings_used(model: ImageModel):
    """None takes the model's own; what is given changes the result."""
    plain = model.generate([1, 2], seed=1)
    own = model.generate([1, 2], seed=1, cfg_scale=1.5, top_k=0, top_p=0.9, mask_schedule=PASSES, mask_cfg=0.0)
    assert torch.equal(own, plain)
    for change in (
        {"cfg_scale": 4.0}, {"top_k": 1}, {"top_p": 0.2}, {"mask_schedule": SINGLE}, {"mask_cfg": 3.0},
        {"mask_cfg": [0, 0, 3]},
    ):  # fmt: skip
        assert not torch.equal(model.generate([1, 2], seed=1, **change), plain), change
    assert torch.equal(model.generate([1, 2], seed=1, mask_schedule=[[1], [1, 3], [4, 5, 7]]), plain)
    shorter = model.generate([1, 2], seed=1, mask_schedule=[[1], [1, 3]])
    assert torch.equal(shorter, model.generate([1, 2], seed=1, mask_schedule=[[1], [1, 3], [16]]))


def test_the_guidance_of_mask_passes_follows_the_guidance_given(damaged: Callable[..., Path]):
    own = {"cfg_scale": 1.5, "top_k": 0, "top_p": 0.9, "mask_schedule": [list(e) for e in PASSES]}

    def loaded(**mask_cfg: float) -> ImageModel:
        return load_model(damaged(sampling={**own, **mask_cfg}), "cpu")

    imported = loaded(mask_cfg_ratio=1e-6)
    assert imported.sample_settings().mask_cfg == pytest.approx(1.5e-6)
    assert imported.sample_settings(4.0).mask_cfg == pytest.approx(4e-6)
    assert imported.sample_settings([0, 1, 2]).mask_cfg == pytest.approx((0, 1e-6, 2e-6))
    assert imported.sample_settings(4.0, mask_cfg=[0, 0, 0.5]).mask_cfg == (0, 0, 0.5)
    assert loaded(mask_cfg=1.5e-6).sample_settings(4.0).mask_cfg == pytest.approx(4e-6)  # exports without the ratio
    for new in (loaded(mask_cfg=0.0), loaded(mask_cfg_ratio=0.0)):
        assert new.sample_settings(4.0).mask_cfg == 0.0


def test_settings_are_handed_on_to_the_sampler(model: ImageModel):
    settings = model.sample_settings(2.0, 10, 0.5, [[1], [2, 2]], 0.25)
    assert (settings.cfg_scale, settings.top_k, settings.top_p, settings.mask_cfg) == (2.0, 10, 0.5, 0.25)
    assert settings.mask_schedule == ((1,), (2, 2), (16,))
    assert settings.mask_input == "leak_free"


def test_a_reference_model_samples_as_it_was_trained(damaged: Callable[..., Path]):
    loaded = load_model(damaged(mask_input="reference"), "cpu")
    assert loaded.sample_settings().mask_input == "reference"
    leak_free = load_model(damaged(), "cpu")
    labels = [0, 1, 2, 3, 4] * 4
    assert not torch.equal(loaded.generate(labels), leak_free.generate(labels))


def test_a_model_without_masks_takes_one_pass_a_scale(without_masks: ImageModel):
    assert without_masks.sample_settings().mask_schedule == SINGLE
    assert without_masks.generate([0]).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="no mask branch"):
        without_masks.generate([0], mask_schedule=[[1], [1, 3]])
    with pytest.raises(UserError, match=r"mask_cfg=0\.5 guides nothing"):
        without_masks.generate([0], mask_cfg=0.5)


def test_a_block_causal_model_generates_whatever_the_batch(tmp_path: Path):
    var = load_model(tiny_export(tmp_path / "var", "next_scale", "block_causal"), "cpu")
    images = var.generate([0, 1, 2], seed=4)
    assert torch.equal(var.generate([0, 1, 2], seed=4), images)
    for i in range(3):
        torch.testing.assert_close(var.generate([i], seed=4 + i)[0], images[i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("labels", [[5], [-1], [0, 17, 3]])
def test_classes_that_do_not_exist_are_refused(model: ImageModel, labels: list[int]):
    with pytest.raises(UserError, match=r"out of range: this model has 5 classes, 0 to 4"):
        model.generate(labels)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3], torch.tensor([1])])
def test_as_many_seeds_as_images(model: ImageModel, seeds: Any):
    with pytest.raises(UserError, match=r"\d seeds for 2 images"):
        model.generate([0, 1], seed=seeds)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": -1}, {"top_k": -1}, {"cfg_scale": -0.5}, {"mask_cfg": -0.5},
        {"cfg_scale": float("nan")}, {"top_p": float("nan")}, {"mask_cfg": float("nan")}, {"cfg_scale": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(model: ImageModel, settings: dict[str, float]):
    with pytest.raises(UserError, match=next(iter(settings))):
        model.generate([0], **settings)


@pytest.mark.parametrize("passes", [[[1], [1, 2]], [[1], [0, 4]], [[1], [4], [16], [25]], [[1], []]], ids=str)
def test_mask_schedules_that_do_not_add_up_are_refused(model: ImageModel, passes: list[list[int]]):
    with pytest.raises(UserError, match="mask_schedule"):
        model.generate([0], mask_schedule=passes)


def test_no_labels_are_refused(model: ImageModel):
    with pytest.raises(UserError, match="label"):
        model.generate([])


def test_generated_tokens_are_what_the_images_decode(model: ImageModel):
    tokens = random_tokens(1)
    f_hat = model.tokenizer.quantizer.f_hat(tokens)
    torch.testing.assert_close(model.to_images(f_hat), model.tokenizer.decode_tokens(tokens) / 2 + 0.5)


def test_transformer_and_decoder_in_16_bits_give_float32_images(folder: Path):
    low = load_model(folder, "cpu", torch.bfloat16, torch.bfloat16)
    images = low.generate([0, 3], seed=4)
    assert low.decoder.dtype == low.model.pos_start.dtype == torch.bfloat16
    assert next(low.tokenizer.parameters()).dtype == images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    mixed = load_model(folder, "cpu", torch.bfloat16)  # the same tokens through the decoder in float32
    difference = (mixed.generate([0, 3], seed=4) - images).abs().max()
    assert 0 < difference < 0.05
