"""What the tests of the model core share: tiny models, and SPEC §1–6 derived again in numpy, one formula at a time.

The numpy half is the yardstick: float64, no function of the package but `ScaleSchedule` (whose own tests stand in
test_scales.py). Axes: B batch, N sequence, C width, H heads, D head dim, Z latent channels, V codebook.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hmar_mega.checkpoint.export import export_settings
from hmar_mega.config import Config
from hmar_mega.config_io import parse_config
from hmar_mega.files import write_atomic
from hmar_mega.model.hmar import HMAR
from hmar_mega.scales import ScaleSchedule
from hmar_mega.sequence import Codes
from hmar_mega.tokenizer.model import MultiScaleVQVAE

#: Scales of the tiny models: 21 tokens, images of 16 × 16 px.
PATCH_NUMS = (1, 2, 4)
SCHEDULE = ScaleSchedule(PATCH_NUMS)
N, V, Z, CLASSES = SCHEDULE.num_tokens, 32, 8, 5
PASSES = ((1,), (1, 3), (4, 5, 7))


def tiny_config(stage: str = "masked", pattern: str = "block_diagonal", **model: object) -> Config:
    """A whole configuration of a two-layer model, one of them in the mask branch."""
    tree = {
        "model": {
            "depth": 2, "width": 32, "heads": 2, "num_classes": CLASSES, "mask_layers": 1,
            "attention": {"pattern": pattern}, **model,
        },
        "schedule": {"resolution": 16, "patch_nums": PATCH_NUMS, "mask_schedule": PASSES},
        "tokenizer": {
            "base_channels": 8, "channel_mult": (1, 1, 1), "encoder_res_blocks": 1, "decoder_res_blocks": 1,
            "latent_channels": Z, "norm_groups": 4, "attention": False, "codebook_size": V,
        },
        "stage": {"name": stage},
        "eval": {"cfg_scale": 1.5, "top_k": 0, "top_p": 0.9},
        "precision": {"compute": "fp32"},
    }  # fmt: skip
    return parse_config(tree)


def randomise(module: nn.Module, std: float = 0.3, seed: int = 0) -> None:
    """Fill every parameter with normal numbers, so that nothing is hidden behind a zero bias or a small γ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, std, generator=generator)


def tiny_hmar(config: Config, seed: int = 0, random: bool = True, mask_branch: bool | None = None) -> HMAR:
    """The transformer of `config`, in evaluation mode; with the mask branch in stage 2, or as asked."""
    if mask_branch is None:
        mask_branch = config.stage.name == "masked"
    model = HMAR(
        config.model, config.schedule.scales, config.tokenizer.codebook_size, config.tokenizer.latent_channels,
        mask_branch=mask_branch, seed=seed,
    )  # fmt: skip
    if random:
        randomise(model, seed=seed)
    return model.eval()


def tiny_tokenizer(config: Config, seed: int = 0) -> MultiScaleVQVAE:
    """An untrained tokenizer."""
    torch.manual_seed(seed)
    return MultiScaleVQVAE(config.tokenizer, config.schedule.scales).eval().requires_grad_(False)


def write_export(folder: Path, config: Config, model: HMAR, tokenizer: MultiScaleVQVAE) -> Path:
    """An exported model, written as `export_run` does, from weights in memory."""
    folder.mkdir(parents=True)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    tokenizer.save(folder / "tokenizer")
    settings = export_settings(config, {"tokenizer_fingerprint": tokenizer.fingerprint, "step": 1})
    write_atomic(folder / "config.json", json.dumps(settings))
    return folder


def tiny_export(folder: Path, stage: str = "masked", pattern: str = "block_diagonal") -> Path:
    """A tiny random model and tokenizer as an exported model."""
    config = tiny_config(stage, pattern)
    return write_export(folder, config, tiny_hmar(config), tiny_tokenizer(config))


def _write_step(run: Path, step: int, config: Config, weights: HMAR, average: HMAR | None, **state: Any) -> None:
    """A checkpoint of one process; the average, where there is one, is that of the mask branch, as in stage 2."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    tensors, entries = {}, []
    stored = [("weight", name, p) for name, p in weights.named_parameters()]
    if average is not None:
        stored += [("ema", name, p) for name, p in average.named_parameters() if name.startswith("mask_")]
    for kind, name, parameter in stored:
        shape, key = list(parameter.shape), f"{kind}/{name}/0"
        tensors[key] = parameter.detach().flatten().contiguous()
        entries.append(
            {"name": name, "kind": kind, "file": "rank-00000.safetensors", "key": key, "global_shape": shape,
             "offset": [0] * len(shape), "shape": shape, "start": 0, "stop": parameter.numel()}
        )  # fmt: skip
    save_file(tensors, folder / "rank-00000.safetensors")
    (folder / "index.json").write_text(json.dumps({"format": 1, "entries": entries}))
    about = {"step": step, "last_step": 20, "config": config.model_dump(mode="json"), **state}
    (folder / "state.json").write_text(json.dumps(about))
    (run / "checkpoints" / "latest").write_text(f"{folder.name}\n")


def write_run(folder: Path, **model: object) -> Path:
    """A run of stage 2: step 10 without a moving average, `best`; step 20, finished, with one; and its tokenizer."""
    config = tiny_config(**model)
    tokenizer = tiny_tokenizer(config)
    tokenizer.save(folder / "vae")
    own = config.tokenizer.model_copy(update={"path": str(folder / "vae")})
    config = config.model_copy(update={"tokenizer": own})
    state = {"tokenizer_fingerprint": tokenizer.fingerprint, "classes": ["ant", "bee", "cow", "dog", "wasp"]}
    run = folder / "run"
    _write_step(run, 10, config, tiny_hmar(config, seed=1), None, finished=False, **state)
    _write_step(run, 20, config, tiny_hmar(config), tiny_hmar(config, seed=2), finished=True, **state)
    (run / "checkpoints" / "best").write_text("step-00000010\n")
    return run


def random_tokens(batch: int, seed: int = 0, schedule: ScaleSchedule = SCHEDULE, vocabulary: int = V) -> Tensor:
    """(B, N) int64 tokens."""
    return torch.randint(vocabulary, (batch, schedule.num_tokens), generator=torch.Generator().manual_seed(seed))


def random_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class MixingCodes(Codes):
    """A tokenizer's `scale_features` with a random codebook and one φ a scale, derived in numpy (SPEC §2)."""

    def __init__(self, schedule: ScaleSchedule = SCHEDULE, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.schedule = schedule
        self.codebook = random.normal(size=(V, Z))
        self.weight = random.normal(size=(schedule.num_scales, Z, Z, 3, 3)) / 9
        self.bias = random.normal(size=(schedule.num_scales, Z))

    def scale_features(self, scale: int, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        out = [
            self.numpy_features(scale, row.numpy(), None if keep is None else keep[b].numpy())
            for b, row in enumerate(tokens)
        ]
        return torch.from_numpy(np.stack(out)).float()

    def numpy_features(self, scale: int, tokens: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
        """φ_k(up(e_k)) of one sample: (p_k²,) → (Z, h, w)."""
        side, grid = self.schedule.patch_nums[scale], self.schedule.grid
        codes = self.codebook[tokens]
        if keep is not None:
            codes = codes * keep[:, None]
        up = bicubic(codes.T.reshape(Z, side, side), grid)
        return 0.5 * up + 0.5 * convolve3(up, self.weight[scale], self.bias[scale])


def bicubic(image: np.ndarray, size: int) -> np.ndarray:
    """Cubic convolution (a = −0.75) with half-pixel centres and repeated borders: (Z, p, p) → (Z, size, size)."""
    old = image.shape[-1]
    if old == size:
        return image
    matrix = np.zeros((size, old))
    for target in range(size):
        source = (target + 0.5) * old / size - 0.5
        first = math.floor(source) - 1
        for tap in range(first, first + 4):
            x = abs(source - tap)
            inner = 1.25 * x**3 - 2.25 * x**2 + 1
            outer = -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
            matrix[target, min(max(tap, 0), old - 1)] += inner if x <= 1 else outer if x < 2 else 0.0
    return np.einsum("ia,zab,jb->zij", matrix, image, matrix)


def area(image: np.ndarray, size: int) -> np.ndarray:
    """Mean over the cells ⌊i·h/size⌋ … ⌈(i+1)·h/size⌉: (Z, h, w) → (Z, size, size)."""
    side = image.shape[-1]
    edges = [(i * side // size, -(-(i + 1) * side // size)) for i in range(size)]
    return np.array([[[plane[a:b, c:d].mean() for c, d in edges] for a, b in edges] for plane in image])


def convolve3(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3×3 convolution, zero padding 1: (Z, h, w) → (Z, h, w)."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    side = image.shape[-1]
    out = np.zeros_like(image) + bias[:, None, None]
    for i in range(3):
        for j in range(3):
            out += np.einsum("oz,zij->oij", weight[:, :, i, j], padded[:, i : i + side, j : j + side])
    return out


class NumpyHMAR:
    """SPEC §3–5 in float64, one sample at a time: teacher-forced logits from a model's weights by name."""

    def __init__(self, model: HMAR) -> None:
        self.w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
        self.config, self.schedule = model.config, model.schedule
        self.level = [k for k, p in enumerate(model.schedule.patch_nums) for _ in range(p * p)]

    def logits(
        self,
        label: int,
        given: np.ndarray,
        features: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        drop_path: np.ndarray | None = None,
    ) -> np.ndarray:
        """(N, V) of one sample; with `features` and `mask`, of the mask branch. `drop_path` is (depth, 2)."""
        masked = mask is not None
        cond = self.w["class_embed.weight"][label]
        rows = [cond + self.w["pos_start"][0, 0]]
        for i in range(len(self.level) - 1):
            x = self.w["word_embed.weight"] @ given[i] + self.w["word_embed.bias"]
            if masked:
                x = x + (self.w["mask_embed"][0] if mask[i] else self.w["word_embed.weight"] @ features[i])
            rows.append(x)
        x = np.array(rows) + self.w["level_embed"][self.level] + self.w["pos_embed"][0]
        depth, mask_layers = self.config.depth, self.config.resolved_mask_layers
        for layer in range(depth):
            own = masked and layer >= depth - mask_layers
            factors = np.ones(2) if drop_path is None else drop_path[layer]
            x = self._block(x, cond, f"{'mask_' if own else ''}blocks.{layer}", factors)
        head = "mask_head" if masked else "head"
        scale, shift = np.split(self._linear(_silu(cond), f"{head}.ada_lin"), 2)
        return self._linear(_norm(x) * (1 + scale) + shift, f"{head}.linear")

    def _block(self, x: np.ndarray, cond: np.ndarray, name: str, factors: np.ndarray) -> np.ndarray:
        if self.config.shared_aln:
            six = self._linear(_silu(cond), "shared_ada_lin").reshape(6, -1) + self.w[f"{name}.ada_gss"][0, 0]
        else:
            six = self._linear(_silu(cond), f"{name}.ada_lin").reshape(6, -1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six
        x = x + factors[0] * gamma1 * self._attention(_norm(x) * (1 + scale1) + shift1, f"{name}.attn")
        hidden = _gelu(self._linear(_norm(x) * (1 + scale2) + shift2, f"{name}.ffn.fc1"))
        return x + factors[1] * gamma2 * self._linear(hidden, f"{name}.ffn.fc2")

    def _attention(self, x: np.ndarray, name: str) -> np.ndarray:
        heads, causal = self.config.resolved_heads, self.config.attention.pattern == "block_causal"
        q, k, v = np.split(x @ self.w[f"{name}.qkv.weight"].T, 3, axis=1)
        q, v = q + self.w[f"{name}.q_bias"], v + self.w[f"{name}.v_bias"]
        level = np.array(self.level)
        seen = level[:, None] >= level if causal else level[:, None] == level
        out = []
        for h, (qh, kh, vh) in enumerate(zip(*(np.split(part, heads, axis=1) for part in (q, k, v)), strict=True)):
            qh = (
                qh
                / np.linalg.norm(qh, axis=1, keepdims=True)
                * math.exp(min(self.w[f"{name}.log_scale"][h], math.log(100)))
            )
            kh = kh / np.linalg.norm(kh, axis=1, keepdims=True)
            weights = np.exp(qh @ kh.T) * seen
            out.append(weights / weights.sum(1, keepdims=True) @ vh)
        return self._linear(np.concatenate(out, axis=1), f"{name}.proj")

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]


def _norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
