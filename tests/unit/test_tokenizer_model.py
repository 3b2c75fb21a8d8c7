"""The VQGAN pair as published (parameters, names, padding), and the folder a tokenizer is kept in."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from hmar_mega.config import TokenizerConfig, TokenizerTrainConfig
from hmar_mega.errors import UserError
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule
from hmar_mega.tokenizer.model import AttnBlock, Downsample, MultiScaleVQVAE

SCHEDULE = ScaleSchedule((1, 2, 4))
SMALL = {
    "base_channels": 8,
    "channel_mult": (1, 2, 2),
    "encoder_res_blocks": 1,
    "decoder_res_blocks": 1,
    "latent_channels": 6,
    "norm_groups": 4,
    "codebook_size": 32,
}


def tokenizer(seed: int = 0, schedule: ScaleSchedule = SCHEDULE, **changes) -> MultiScaleVQVAE:
    torch.manual_seed(seed)
    return MultiScaleVQVAE(TokenizerConfig(**{**SMALL, **changes}), schedule)


def images(batch: int = 2, side: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.fixture(scope="module")
def published() -> MultiScaleVQVAE:
    with torch.device("meta"):
        return MultiScaleVQVAE(TokenizerConfig(), ScaleSchedule(PATCH_NUMS[256]))


def test_the_default_model_has_the_published_number_of_parameters(published):
    assert sum(p.numel() for p in published.parameters()) == 108_948_355


def test_the_convolutional_pair_has_the_published_names_and_shapes(published):
    shapes = {name: tuple(t.shape) for name, t in published.state_dict().items()}
    assert shapes["encoder.conv_in.weight"] == (160, 3, 3, 3)
    assert shapes["encoder.down.0.block.1.norm1.weight"] == (160,)
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (320, 160, 1, 1)
    assert shapes["encoder.down.3.downsample.conv.weight"] == (320, 320, 3, 3)
    assert shapes["encoder.down.4.attn.1.qkv.weight"] == (1920, 640, 1, 1)
    assert shapes["encoder.mid.attn_1.proj_out.bias"] == (640,)
    assert shapes["encoder.conv_out.weight"] == (32, 640, 3, 3)
    assert shapes["decoder.mid.block_2.conv2.weight"] == (640, 640, 3, 3)
    assert shapes["decoder.up.4.attn.2.norm.bias"] == (640,)
    assert shapes["decoder.up.1.upsample.conv.weight"] == (160, 160, 3, 3)
    assert shapes["decoder.up.3.block.0.nin_shortcut.weight"] == (320, 640, 1, 1)
    assert shapes["decoder.norm_out.weight"] == (160,)
    assert shapes["quant_conv.weight"] == shapes["post_quant_conv.weight"] == (32, 32, 3, 3)
    assert shapes["quantizer.embedding.weight"] == (4096, 32)
    assert shapes["quantizer.ema_vocab_hit"] == (10, 4096)
    assert "encoder.down.4.downsample.conv.weight" not in shapes
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert {name.split(".")[2] for name in shapes if ".attn." in name} == {"4"}


def test_attention_can_be_left_out():
    def attention(model: MultiScaleVQVAE) -> list[str]:
        return [name for name, _ in model.named_parameters() if ".attn" in name]

    assert attention(tokenizer(attention=True))
    assert attention(tokenizer(attention=False)) == []


def test_attention_is_one_head_of_softmax_over_positions():
    torch.manual_seed(0)
    block, x = AttnBlock(8, 4), torch.randn(2, 8, 3, 3)
    q, k, v = block.qkv(block.norm(x)).flatten(2).split(8, dim=1)
    weights = (torch.einsum("bci,bcj->bij", q, k) / 8**0.5).softmax(-1)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed))


@torch.no_grad()
def test_downsampling_pads_right_and_bottom():
    layer = Downsample(1)
    layer.conv.weight.fill_(1)
    layer.conv.bias.zero_()
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    # 3×3 sums from the corners (0,0), (0,2), (2,0), (2,2): the last two windows of each axis reach one past the edge.
    expected = [[x[..., 0:3, 0:3].sum(), x[..., 0:3, 2:4].sum()], [x[..., 2:4, 0:3].sum(), x[..., 2:4, 2:4].sum()]]
    assert layer(x)[0, 0].tolist() == [[float(s) for s in row] for row in expected]


@pytest.mark.parametrize("levels", [3, 4, 5])
@torch.no_grad()
def test_images_go_to_tokens_and_back_at_every_downsampling(levels: int):
    model = tokenizer(channel_mult=(1,) * levels).eval()
    x = images(side=4 * 2 ** (levels - 1))
    tokens = model.encode(x)
    assert model.latent(x).shape == (2, 6, 4, 4)
    assert tokens.shape == (2, 21)
    assert model.decode_tokens(tokens).shape == x.shape
    assert torch.equal(model.decode_tokens(tokens), model.decode(model.quantizer.f_hat(tokens)))


@torch.no_grad()
def test_decoded_images_are_clamped_and_training_reconstructions_are_not():
    model = tokenizer()
    model.decoder.conv_out.bias.fill_(7)
    reconstruction, quantized = model(images())
    assert reconstruction.min() > 1
    assert torch.equal(model.decode(quantized.f_hat), torch.ones(2, 3, 16, 16))


def test_training_reaches_every_parameter():
    model = tokenizer()
    reconstruction, quantized = model(images())
    ((reconstruction - images()).square().mean() + quantized.loss).backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None}
    assert unreached == {"quantizer.phi.1.weight", "quantizer.phi.1.bias"}  # K = 3 scales use φ 0, 2 and 3


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"takes \(B, 3, 16, 16\)"):
        tokenizer().encode(images(side=32))


def test_a_saved_tokenizer_comes_back_frozen_and_the_same(tmp_path: Path):
    model = tokenizer()
    model.quantizer.ema_vocab_hit[1, 3] = 2.5
    model.save(tmp_path / "deep" / "tok")
    loaded = MultiScaleVQVAE.load(tmp_path / "deep" / "tok")
    assert loaded.fingerprint == model.fingerprint
    assert loaded.config == model.config
    assert loaded.schedule == model.schedule
    assert torch.equal(loaded.encode(images()), model.encode(images()))
    assert torch.equal(loaded.quantizer.ema_vocab_hit, model.quantizer.ema_vocab_hit)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_saved_folder_holds_two_files_anyone_may_read(tmp_path: Path):
    tokenizer().save(tmp_path / "tok")
    assert sorted(p.name for p in (tmp_path / "tok").iterdir()) == ["config.json", "tokenizer.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["tok"]
    for path in (tmp_path / "tok").iterdir():
        assert path.stat().st_mode & stat.S_IROTH
    described = json.loads((tmp_path / "tok" / "config.json").read_text())
    assert described["format"] == 1
    assert described["patch_nums"] == [1, 2, 4]
    assert described["fingerprint"] == tokenizer().fingerprint


def test_saving_again_replaces_the_tokenizer_and_keeps_what_lies_beside_it(tmp_path: Path):
    tokenizer(seed=0).save(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("kept")
    tokenizer(seed=1).save(tmp_path)
    assert MultiScaleVQVAE.load(tmp_path).fingerprint == tokenizer(seed=1).fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "tokenizer.safetensors"]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch):
    import hmar_mega.tokenizer.model as module

    real = module.write_atomic

    def full_disk(path: Path, data: bytes | str) -> None:
        if path.name == module.CONFIG_FILE:
            raise UserError("no space left")
        real(path, data)

    monkeypatch.setattr(module, "write_atomic", full_disk)
    with pytest.raises(UserError, match="no space"):
        tokenizer().save(tmp_path / "tok")
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_names_architecture_scales_and_weights():
    model = tokenizer()
    seen = {model.fingerprint, tokenizer(seed=1).fingerprint}
    seen.add(tokenizer(schedule=ScaleSchedule((1, 4))).fingerprint)
    seen.add(tokenizer(using_znorm=True).fingerprint)
    with torch.no_grad():
        model.quantizer.phi[3].bias[0] += 1e-3
    seen.add(model.fingerprint)
    assert len(seen) == 5
    assert all(len(f) == 16 and set(f) <= set("0123456789abcdef") for f in seen)


def test_the_fingerprint_is_blind_to_how_it_was_trained_where_it_lies_and_usage():
    other = tokenizer(path="elsewhere", train=TokenizerTrainConfig(lr=1.0))
    other.quantizer.ema_vocab_hit += 1
    assert other.fingerprint == tokenizer().fingerprint


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no tokenizer"),
        (lambda f: (f / "tokenizer.safetensors").unlink(), "has no tokenizer.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda f: (f / "tokenizer.safetensors").write_bytes(b"short"), "is damaged or of another architecture"),
        (lambda f: _edit(f, format=2), "format 2"),
        (lambda f: _edit(f, patch_nums=[2, 4]), "config.json is damaged"),
        (lambda f: _edit(f, patch_nums=[1, 4]), "is damaged or of another architecture"),
        (lambda f: _edit(f, tokenizer={"base_channels": 3}), "config.json is damaged"),
        (lambda f: _edit(f, fingerprint="0" * 16), "not of the same tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_reason(tmp_path: Path, damage, says: str):
    tokenizer().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=says):
        MultiScaleVQVAE.load(tmp_path)


def test_weights_of_another_tokenizer_are_refused(tmp_path: Path):
    tokenizer(seed=0).save(tmp_path / "a")
    tokenizer(seed=1).save(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.safetensors").replace(tmp_path / "a" / "tokenizer.safetensors")
    with pytest.raises(UserError, match="not of the same tokenizer"):
        MultiScaleVQVAE.load(tmp_path / "a")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        MultiScaleVQVAE.load(tmp_path / "nowhere")


def test_group_norm_has_the_published_epsilon():
    assert {m.eps for m in tokenizer().modules() if isinstance(m, nn.GroupNorm)} == {1e-6}


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
