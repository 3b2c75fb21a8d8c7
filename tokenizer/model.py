"""The tokenizer: a VQGAN encoder and decoder around the multi-scale residual quantizer, and the folder it is kept in.

Taming transformers (arXiv 2012.09841) drew the convolutional pair; the latent-diffusion names of its modules
(`down.{i}.block.{j}.norm1`, `mid.attn_1`, `up.{i}` with `up.0` the finest level) are kept because published weights use
them. Axes: B batch, C channels of a level, R image side, Z latent channels, h × w the latent grid, N tokens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hmar_mega.config import TokenizerConfig
from hmar_mega.errors import UserError
from hmar_mega.files import new_folder, write_atomic
from hmar_mega.precision import exact_float32
from hmar_mega.scales import ScaleSchedule
from hmar_mega.tokenizer.quantizer import MultiScaleQuantizer, QuantizerOutput

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "tokenizer.safetensors"
FORMAT = 1


class ResnetBlock(nn.Module):
    """Two GroupNorm–SiLU–3×3 convolutions and a skip, which is a 1×1 convolution where the width changes."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut: nn.Module = nn.Conv2d(channels_in, channels_out, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, side, side) to (B, C_out, side, side)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Self-attention with one head over the positions of a map, with a skip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, side, side) to the same shape."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1)
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halve the side: one row and column of zeros on the right and bottom, then a 3×3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, side, side) to (B, C, side/2, side/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, side, side) to (B, C, 2·side, 2·side)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The modules of one resolution: residual blocks, an attention after each where there is any, a change of size."""

    def __init__(
        self, channels_in: int, channels_out: int, blocks: int, groups: int, attention: bool, resize: nn.Module | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels_in if j == 0 else channels_out, channels_out, groups) for j in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(channels_out, groups) for _ in range(blocks if attention else 0))
        if isinstance(resize, Downsample):
            self.downsample = resize
        elif isinstance(resize, Upsample):
            self.upsample = resize

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, side, side) to (B, C_out, …) at the size the level ends with."""
        for j, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[j](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1: nn.Module = AttnBlock(channels, groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images to latents, before `quant_conv`."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_mult]
        groups, last = config.norm_groups, len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                channels_in,
                width,
                config.encoder_res_blocks,
                groups,
                attention=config.attention and i == last,
                resize=Downsample(width) if i < last else None,
            )
            for i, (channels_in, width) in enumerate(zip([config.base_channels, *widths], widths, strict=False))
        )
        self.mid = Middle(widths[-1], groups, config.attention)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) to (B, Z, h, w)."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents, after `post_quant_conv`, to images."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_mult]
        groups, last = config.norm_groups, len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups, config.attention)
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                width,
                config.decoder_res_blocks,
                groups,
                attention=config.attention and i == last,
                resize=Upsample(width) if i > 0 else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, Z, h, w) to (B, 3, R, R), not clamped."""
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MultiScaleVQVAE(nn.Module):
    """Images in [−1, 1] to N tokens and back.

    Args:
        config: the architecture.
        schedule: the scales; images have the side p_K · `config.downsample`.
    """

    def __init__(self, config: TokenizerConfig, schedule: ScaleSchedule) -> None:
        super().__init__()
        self.config = config
        self.schedule = schedule
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(
            config.codebook_size,
            config.latent_channels,
            schedule,
            num_phi=config.num_phi,
            phi_ratio=config.phi_ratio,
            using_znorm=config.using_znorm,
            beta=config.beta,
            code_channels=config.code_channels,
        )

    @property
    def resolution(self) -> int:
        """R, the side of the images in pixels."""
        return self.schedule.grid * self.config.downsample

    def latent(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [−1, 1] to f (B, Z, h, w), not quantized.

        Raises:
            UserError: when the images have another shape.
        """
        if images.shape[1:] != (3, self.resolution, self.resolution):
            raise UserError(
                f"images of shape {tuple(images.shape)} do not fit this tokenizer: it takes (B, 3, {self.resolution}, "
                f"{self.resolution}); resize the images or use a tokenizer of their resolution"
            )
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [−1, 1] to tokens (B, N) int64, outside autocast; raises as `latent`."""
        with torch.autocast(images.device.type, enabled=False), exact_float32():
            return self.quantizer.encode(self.latent(images))

    def decode(self, f_hat: Tensor) -> Tensor:
        """A quantized latent (B, Z, h, w) to images (B, 3, R, R), clamped to [−1, 1]."""
        with exact_float32():
            return self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) int64 to images (B, 3, R, R) in [−1, 1]; UserError when there are not N of them."""
        return self.decode(self.quantizer.f_hat(tokens))

    def forward(self, images: Tensor, kept: Tensor | None = None) -> tuple[Tensor, QuantizerOutput]:
        """Images (B, 3, R, R) to their reconstruction, not clamped, and what the quantizer did: for training.

        Args:
            kept: (B,) int64, how many of the first scales an image is decoded from; default all.
        """
        quantized = self.quantizer(self.latent(images), kept)
        return self.decoder(self.post_quant_conv(quantized.f_hat)), quantized

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name this tokenizer: two with the same one give the same tokens.

        A sha256 over the architecture (neither `train` nor `path`), patch_nums and the name, dtype, shape and bytes of
        every parameter. It reads all weights at each call (about half a second for the published 109 M).
        """
        described = {"tokenizer": self.config.architecture, "patch_nums": self.schedule.patch_nums}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name, weight in sorted(self.named_parameters()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def save(self, folder: Path | str) -> None:
        """Write `config.json` and `tokenizer.safetensors` into `folder`.

        A new folder appears at once, complete. In a folder that exists (other files in it stay) the two files are
        replaced, each at once; cut off between the two, their fingerprints disagree and `load` refuses them.

        Raises:
            UserError: when the folder cannot be written.
        """
        folder = Path(folder)
        described = {
            "format": FORMAT,
            "tokenizer": self.config.model_dump(mode="json", exclude={"path"}),
            "patch_nums": list(self.schedule.patch_nums),
            "fingerprint": self.fingerprint,
        }
        state = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        weights, description = save(state), json.dumps(described, indent=2) + "\n"
        if folder.is_dir() and any(folder.iterdir()):
            write_atomic(folder / WEIGHTS_FILE, weights)
            write_atomic(folder / CONFIG_FILE, description)
        else:
            with new_folder(folder) as temporary:
                write_atomic(temporary / WEIGHTS_FILE, weights)
                write_atomic(temporary / CONFIG_FILE, description)

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> MultiScaleVQVAE:
        """The tokenizer saved in `folder`, in eval mode, its parameters frozen.

        Raises:
            UserError: when the folder holds no tokenizer, a file is damaged, or the weights are not those that
                config.json describes.
        """
        folder = Path(folder)
        config, schedule, fingerprint = _read_description(folder)
        with torch.device("meta"):
            model = cls(config, schedule)
        try:
            model.load_state_dict(load_file(folder / WEIGHTS_FILE), assign=True)
        except FileNotFoundError:
            raise UserError(f"{folder} has no {WEIGHTS_FILE}; give the folder of a trained tokenizer") from None
        except (OSError, SafetensorError, RuntimeError) as err:
            raise UserError(
                f"{folder / WEIGHTS_FILE} is damaged or of another architecture ({err}); train or copy it again"
            ) from err
        if model.fingerprint != fingerprint:
            raise UserError(
                f"the weights in {folder} have fingerprint {model.fingerprint}, but its {CONFIG_FILE} says "
                f"{fingerprint}: the two files are not of the same tokenizer; train or copy the folder again"
            )
        return model.to(device).eval().requires_grad_(False)


def _read_description(folder: Path) -> tuple[TokenizerConfig, ScaleSchedule, str]:
    path = folder / CONFIG_FILE
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
        if tree["format"] != FORMAT:
            raise UserError(f"{path} is of format {tree['format']}; this version reads format {FORMAT}")
        config = TokenizerConfig.model_validate(tree["tokenizer"])
        return config, ScaleSchedule(tuple(tree["patch_nums"])), str(tree["fingerprint"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no tokenizer (no {CONFIG_FILE}); give the folder that training wrote"
        ) from None
    except UserError:
        raise
    except (OSError, ValidationError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"{path} is damaged ({type(err).__name__}: {err}); train or copy the tokenizer again") from err


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)
