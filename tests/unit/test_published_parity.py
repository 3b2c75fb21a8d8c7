"""Imported models compute what their published files mean: SPEC §2, §3 and §5 in float64 under the published names.

The yardstick is written here and uses nothing of the package. Axes: B batch, N sequence, C width, D head dim, Z latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published_makers import Tensors, make_pair, make_transformer, make_vqvae
from torch import Tensor

from hmar_mega.checkpoint.convert import convert
from hmar_mega.inference import ImageModel, load_model
from hmar_mega.inference.sampler import generate_tokens
from hmar_mega.sequence import teacher_input, token_features
from hmar_mega.tokenizer.model import MultiScaleVQVAE

#: Of float32 against float64, relative to the largest value of the compared tensor.
TOLERANCE = 1e-5

#: φ of each scale for three and ten scales (SPEC §2).
PHI = {3: (0, 2, 3), 10: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)}

SCALES = {3: (1, 2, 4), 10: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)}


def relative_error(found: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


class Tokenizer64:
    """The VQ-VAE in float64, from the published names."""

    def __init__(self, tensors: Tensors, patch_nums: tuple[int, ...], levels: int = 3) -> None:
        self.w = {name: t.double() for name, t in tensors.items()}
        self.patch_nums, self.levels = patch_nums, levels

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.w[f"{name}.weight"]
        pad = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride, pad)

    def norm(self, x: Tensor, name: str) -> Tensor:
        groups = x.unflatten(1, (32, -1)).flatten(2)
        mean, var = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
        flat = ((groups - mean) / (var + 1e-6).sqrt()).view_as(x)
        return flat * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def silu_norm(self, x: Tensor, name: str) -> Tensor:
        x = self.norm(x, name)
        return x / (1 + torch.exp(-x))

    def residual(self, x: Tensor, name: str) -> Tensor:
        h = self.conv(self.silu_norm(x, f"{name}.norm1"), f"{name}.conv1")
        h = self.conv(self.silu_norm(h, f"{name}.norm2"), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.w else x)

    def attention(self, x: Tensor, name: str) -> Tensor:
        q, k, v = self.conv(self.norm(x, f"{name}.norm"), f"{name}.qkv").flatten(2).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
        return x + self.conv((v @ weights.transpose(1, 2)).view_as(x), f"{name}.proj_out")

    def middle(self, x: Tensor, name: str) -> Tensor:
        x = self.residual(x, f"{name}.mid.block_1")
        return self.residual(self.attention(x, f"{name}.mid.attn_1"), f"{name}.mid.block_2")

    def latent(self, images: Tensor) -> Tensor:
        x, last = self.conv(images.double(), "encoder.conv_in"), self.levels - 1
        for i in range(self.levels):
            for j in range(2):
                x = self.residual(x, f"encoder.down.{i}.block.{j}")
                if i == last:
                    x = self.attention(x, f"encoder.down.{i}.attn.{j}")
            if i < last:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{i}.downsample.conv", stride=2, padding=0)
        x = self.silu_norm(self.middle(x, "encoder"), "encoder.norm_out")
        return self.conv(self.conv(x, "encoder.conv_out"), "quant_conv")

    def decode(self, f_hat: Tensor) -> Tensor:
        x, last = self.conv(self.conv(f_hat, "post_quant_conv"), "decoder.conv_in"), self.levels - 1
        x = self.middle(x, "decoder")
        for i in reversed(range(self.levels)):
            for j in range(3):
                x = self.residual(x, f"decoder.up.{i}.block.{j}")
                if i == last:
                    x = self.attention(x, f"decoder.up.{i}.attn.{j}")
            if i > 0:
                doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(doubled, f"decoder.up.{i}.upsample.conv")
        return self.conv(self.silu_norm(x, "decoder.norm_out"), "decoder.conv_out").clamp(-1, 1)

    def features(self, scale: int, tokens: Tensor) -> Tensor:
        """φ_k(up(e_k)) of (B, p²) tokens: (B, Z, h, w)."""
        side, grid = self.patch_nums[scale], self.patch_nums[-1]
        h = self.w["quantize.embedding.weight"][tokens].transpose(1, 2).unflatten(2, (side, side))
        if side < grid:
            h = F.interpolate(h, size=(grid, grid), mode="bicubic")
        name = f"quantize.quant_resi.qresi_ls.{PHI[len(self.patch_nums)][scale]}"
        return 0.5 * h + 0.5 * self.conv(h, name)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) and f̂."""
        rest = self.latent(images)
        f_hat, out = torch.zeros_like(rest), []
        for k, side in enumerate(self.patch_nums):
            z = F.interpolate(rest, size=(side, side), mode="area") if side < self.patch_nums[-1] else rest
            rows = z.flatten(2).transpose(1, 2)
            distance = ((rows[:, :, None] - self.w["quantize.embedding.weight"]) ** 2).sum(-1)
            out.append(distance.argmin(-1))
            own = self.features(k, out[-1])
            f_hat, rest = f_hat + own, rest - own
        return torch.cat(out, dim=1), f_hat

    def by_scale(self, tokens: Tensor) -> list[Tensor]:
        return list(tokens.split([p * p for p in self.patch_nums], dim=1))

    def down(self, x: Tensor, side: int) -> Tensor:
        if side < self.patch_nums[-1]:
            x = F.interpolate(x, size=(side, side), mode="area")
        return x.flatten(2).transpose(1, 2)

    def inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """f̂ of the scales before, and φ_k(e_k) of the tokens themselves, at positions 1 … N−1: (B, N−1, Z) each."""
        own = [self.features(k, t) for k, t in enumerate(self.by_scale(tokens))]
        before, sides = torch.zeros_like(own[0]), self.patch_nums
        given = []
        for k in range(1, len(own)):
            before = before + own[k - 1]
            given.append(self.down(before, sides[k]))
        return torch.cat(given, 1), torch.cat([self.down(own[k], sides[k]) for k in range(1, len(own))], 1)


class Transformer64:
    """A published transformer in float64, one sample at a time, from the published names."""

    def __init__(self, tensors: Tensors, depth: int) -> None:
        self.w = {name: t.double().numpy() for name, t in tensors.items()}
        self.heads = depth
        self.bias = self.w.get("word_embed_bias", self.w.get("word_embed.bias"))
        self.level = tensors["lvl_1L"][0].numpy()

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def modulation(self, cond: np.ndarray, name: str) -> np.ndarray:
        silu = cond / (1 + np.exp(-cond))
        if "shared_ada_lin.1.weight" in self.w:
            return self.linear(silu, "shared_ada_lin.1").reshape(6, -1) + self.w[f"{name}.ada_gss"][0, 0]
        return self.linear(silu, f"{name}.ada_lin.1").reshape(6, -1)

    def norm(self, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

    def attention(self, x: np.ndarray, name: str) -> np.ndarray:
        bias = np.concatenate([self.w[f"{name}.{b}"] for b in ("q_bias", "zero_k_bias", "v_bias")])
        q, k, v = (
            (x @ self.w[f"{name}.mat_qkv.weight"].T + bias).reshape(len(x), 3, self.heads, 64).transpose(1, 2, 0, 3)
        )
        scale = np.exp(np.minimum(self.w[f"{name}.scale_mul_1H11"][0], math.log(100)))
        q = scale * q / np.linalg.norm(q, axis=-1, keepdims=True)
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
        scores = q @ k.transpose(0, 2, 1) + self.w["attn_bias_for_masking"][0, 0]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        return self.linear((weights @ v).transpose(1, 0, 2).reshape(len(x), -1), f"{name}.proj")

    def block(self, x: np.ndarray, cond: np.ndarray, name: str) -> np.ndarray:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation(cond, name)
        x = x + gamma1 * self.attention(self.norm(x) * (1 + scale1) + shift1, f"{name}.attn")
        h = self.linear(self.norm(x) * (1 + scale2) + shift2, f"{name}.ffn.fc1")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return x + gamma2 * self.linear(h, f"{name}.ffn.fc2")

    def logits(
        self,
        label: int,
        given: np.ndarray,
        blocks: list[str],
        head: str,
        own: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """(N, V); with the tokens' own features and a mask, of masked positions."""
        cond, embed = self.w["class_emb.weight"][label], self.w["word_embed.weight"]
        x = given @ embed.T + self.bias
        if own is not None and mask is not None:
            x = x + np.where(mask[:, None], self.w["mask_embed.weight"], own @ embed.T)
        x = np.concatenate([(cond + self.w["pos_start"][0, 0])[None], x])
        x = x + self.w["lvl_embed.weight"][self.level] + self.w["pos_1LC"][0]
        for name in blocks:
            x = self.block(x, cond, name)
        silu = cond / (1 + np.exp(-cond))
        scale, shift = self.linear(silu, f"{head}_nm.ada_lin.1").reshape(2, -1)
        return self.linear(self.norm(x) * (1 + scale) + shift, head)


def imported(folder: Path, tensors: Tensors, vae: Tensors, masked: Tensors | None = None) -> ImageModel:
    paths = {"model": tensors, "vae": vae, "masked": masked}
    for name, values in paths.items():
        if values is not None:
            torch.save(values, folder / f"{name}.pth")
    with_masks = folder / "masked.pth" if masked is not None else None
    convert(folder / "model.pth", folder / "ours", tokenizer=folder / "vae.pth", masked=with_masks)
    return load_model(folder / "ours", "cpu")


def draws(model: ImageModel) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, one of them unconditional; tokens; masks."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(model.model.codebook_size, (3, model.schedule.num_tokens), generator=generator)
    mask = torch.rand(3, model.schedule.num_tokens - 1, generator=generator) < 0.5
    return torch.tensor([0, 3, model.num_classes]), tokens, mask


@dataclass(frozen=True)
class Case:
    """A transformer file, the VQ-VAE beside it, and which of its blocks make up a branch."""

    kind: str
    shared: bool = False
    scales: int = 3
    depth: int = 4
    mask_layers: int = 2
    sizes: dict[str, Any] = field(default_factory=dict)  #: of both files: codes, channels
    transformer: dict[str, Any] = field(default_factory=dict)  #: other sizes of `make_transformer`
    vqvae: dict[str, Any] = field(default_factory=dict)  #: of `make_vqvae`

    def make_transformer(self) -> Tensors:
        return make_transformer(
            self.kind, self.depth, patch_nums=SCALES[self.scales], shared=self.shared, mask_layers=self.mask_layers,
            **self.sizes, **self.transformer,
        )  # fmt: skip

    def make_vqvae(self) -> Tensors:
        return make_vqvae(scales=self.scales, **self.sizes, **self.vqvae)

    @property
    def head(self) -> str:
        return "ns_head" if self.kind == "nvlabs-hmar" else "head"

    def blocks(self, own: str) -> list[str]:
        if self.kind != "nvlabs-hmar":
            return [f"blocks.{i}" for i in range(self.depth)]
        base = [f"base_blocks.{i}" for i in range(self.depth - self.mask_layers)]
        return base + [f"{own}.{i}" for i in range(self.mask_layers)]


BRANCHES = {
    "hmar": Case("nvlabs-hmar"),
    "hmar_shared": Case("nvlabs-hmar", shared=True),
    "next_scale": Case("nvlabs-next-scale"),
    "next_scale_256": Case("nvlabs-next-scale", scales=10),
    "var": Case("var"),
    "var_256_shared": Case("var", shared=True, scales=10),
}


def logit_errors(case: Case, folder: Path) -> dict[str, float]:
    """Of an imported model, against the yardstick, teacher-forced: relative errors by what is compared."""
    tensors, vae = case.make_transformer(), case.make_vqvae()
    model = imported(folder, tensors, vae)
    labels, tokens, mask = draws(model)
    codes, exact = model.tokenizer.quantizer, Tokenizer64(vae, SCALES[case.scales])
    given, own = (x.numpy() for x in exact.inputs(tokens))
    yardstick = Transformer64(tensors, case.depth)

    teacher = teacher_input(tokens, codes, model.schedule)
    errors = {"teacher-forced input": relative_error(teacher, given)}
    found, blocks = model.next_scale_logits(labels, teacher), case.blocks("ns_blocks")
    expected = [yardstick.logits(int(c), given[b], blocks, case.head) for b, c in enumerate(labels)]
    errors["next-scale logits"] = relative_error(found, np.array(expected))
    if case.kind == "nvlabs-hmar":
        features = token_features(tokens, mask, codes, model.schedule, model.settings["mask_input"])
        found, blocks = model.masked_logits(labels, teacher, features, mask), case.blocks("mask_blocks")
        flags = mask.numpy()
        expected = [
            yardstick.logits(int(c), given[b], blocks, "mask_head", own[b], flags[b]) for b, c in enumerate(labels)
        ]
        errors["masked logits"] = relative_error(found, np.array(expected))
    return errors


@pytest.mark.parametrize("case", BRANCHES)
def test_logits_are_those_of_the_published_file(case: str, tmp_path: Path):
    errors = logit_errors(BRANCHES[case], tmp_path)
    assert len(errors) == (3 if case.startswith("hmar") else 2)
    for name, error in errors.items():
        assert error < TOLERANCE, name


def test_a_merged_model_has_the_logits_of_its_two_checkpoints(tmp_path: Path):
    first, second = make_pair()
    vae = make_vqvae()
    model = imported(tmp_path, first, vae, second)
    labels, tokens, mask = draws(model)
    given, own = (x.numpy() for x in Tokenizer64(vae, SCALES[3]).inputs(tokens))
    codes, blocks = model.tokenizer.quantizer, [f"blocks.{i}" for i in range(4)]
    teacher = teacher_input(tokens, codes, model.schedule)
    expected = [Transformer64(first, 4).logits(int(c), given[b], blocks, "head") for b, c in enumerate(labels)]
    assert relative_error(model.next_scale_logits(labels, teacher), np.array(expected)) < TOLERANCE
    features = token_features(tokens, mask, codes, model.schedule, "reference")
    flags = mask.numpy()
    expected = [
        Transformer64(second, 4).logits(int(c), given[b], blocks, "head", own[b], flags[b])
        for b, c in enumerate(labels)
    ]
    assert relative_error(model.masked_logits(labels, teacher, features, mask), np.array(expected)) < TOLERANCE


@pytest.mark.parametrize("case", ["hmar", "next_scale", "var", "var_256_shared"])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_the_likeliest_tokens_are_drawn_scale_by_scale_under_guidance(case: str, cfg: float, tmp_path: Path):
    """Sampling, with a cache where there is one, against the uncached yardstick: t = cfg·(k − 1)/(K − 1)."""
    given_case = BRANCHES[case]
    tensors, head, scales = given_case.make_transformer(), given_case.head, given_case.scales
    for name in tensors:  # else the class alone decides on the token
        tensors[name] *= 0.1 if "ada_" in name or name == f"{head}.bias" else 5 if name == "pos_1LC" else 1
    vae = given_case.make_vqvae()
    model = imported(tmp_path, tensors, vae)
    settings = model.sample_settings(cfg_scale=cfg, top_k=1, mask_schedule=[[1]])
    label, none = torch.tensor([2]), model.num_classes
    tokens, _ = generate_tokens(model.model, model.tokenizer.quantizer, label, torch.tensor([5]), settings)
    given, _ = (x[0].numpy() for x in Tokenizer64(vae, SCALES[scales]).inputs(tokens))
    yardstick = Transformer64(tensors, 4)
    strength = cfg * yardstick.level[:, None] / (scales - 1)
    blocks = given_case.blocks("ns_blocks")
    wanted, without = (yardstick.logits(c, given, blocks, head) for c in (2, none))
    guided = (1 + strength) * wanted - strength * without
    assert tokens[0].tolist() == guided.argmax(-1).tolist()
    assert len(tokens.unique()) > 3


def tokenizer_errors(case: Case, folder: Path, count: int = 2) -> dict[str, float]:
    """Of the imported VQ-VAE, against the yardstick, on random images: by what is compared.

    Indices: the share that differs. Image: relative in the 2-norm, and the largest difference of a pixel in [−1, 1].
    """
    vae, scales = case.make_vqvae(), SCALES[case.scales]
    torch.save(vae, folder / "vae.pth")
    convert(folder / "vae.pth", folder / "vae", patch_nums=scales)
    levels = len(case.vqvae.get("mult", (1, 1, 2)))
    ours, exact = MultiScaleVQVAE.load(folder / "vae"), Tokenizer64(vae, scales, levels)
    side = 2 ** (levels - 1) * scales[-1]
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        tokens, f_hat = exact.encode(images)
        found, expected = ours.decode_tokens(tokens).double(), exact.decode(f_hat)
        assert len(tokens.unique()) > 8
        assert (expected.abs() < 1).double().mean() > 0.5
        return {
            "latent": relative_error(ours.latent(images), exact.latent(images)),
            "encode indices": float((ours.encode(images) != tokens).double().mean()),
            "f̂": relative_error(ours.quantizer.f_hat(tokens), f_hat),
            "decoded image": float((found - expected).norm() / expected.norm()),
            "decoded image, worst pixel": float((found - expected).abs().max()),
        }


@pytest.mark.parametrize("scales", [3, 10])
def test_the_tokenizer_is_that_of_the_published_file(scales: int, tmp_path: Path):
    errors = tokenizer_errors(Case("nvlabs-hmar", scales=scales), tmp_path)
    assert errors.pop("encode indices") == 0
    # thirty convolutions and normalisations of random weights: single pixels are off by up to 1.2e-5 in any float32
    assert errors.pop("decoded image, worst pixel") < 3 * TOLERANCE
    for name, error in errors.items():
        assert error < TOLERANCE, name
