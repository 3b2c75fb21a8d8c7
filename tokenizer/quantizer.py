"""The multi-scale residual quantizer: a latent map to K token maps and back (VAR, arXiv 2404.02905, algorithms 1, 2).

One codebook and a few φ convolutions are shared by all scales. Axes: B batch, Z latent channels, h × w the full latent
grid (p_K × p_K), K scales, p_k² tokens at scale k, N = Σ p_k² tokens in all, V codes, R rows of a flattened map. All
arithmetic is float32, whatever autocast says, and never TF32: a token id must not depend on the precision around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmar_mega.errors import UserError
from hmar_mega.precision import exact_float32
from hmar_mega.resample import area_down, bicubic_up
from hmar_mega.scales import ScaleSchedule

#: Rows compared with the codebook at once: bounds the (rows, V) distance matrix to 256 MB at V = 4096.
ROWS_AT_ONCE = 16384


@dataclass(frozen=True)
class QuantizerOutput:
    """What one training forward pass gives.

    Attributes:
        f_hat: (B, Z, h, w) float32 quantized latent, of the scales kept; its gradient passes straight through to f.
        tokens: (B, N) int64.
        loss: scalar float32, see `MultiScaleQuantizer.forward`.
        rows: for each scale the (B·p_k², Z) float32 vectors that were looked up, without gradient.
    """

    f_hat: Tensor
    tokens: Tensor
    loss: Tensor
    rows: tuple[Tensor, ...]


class MultiScaleQuantizer(nn.Module):
    """Shared codebook (V, Z) and shared φ convolutions, φ(h) = (1 − ratio)·h + ratio·conv3×3(h).

    Args:
        codebook_size: V.
        latent_channels: Z.
        schedule: the scales; the latent grid is p_K × p_K.
        num_phi: φ convolutions shared by the K scales, see `ScaleSchedule.phi_index`.
        phi_ratio: share of the convolution in φ.
        using_znorm: nearest code by cosine instead of L2.
        beta: weight of the commitment term.
        code_channels: d < Z: the codebook is (V, d) and a learned (Z, d) matrix spreads its codes over Z channels, a
            codebook of rank d. Default Z, without that matrix.
    """

    ema_vocab_hit: Tensor

    def __init__(
        self,
        codebook_size: int,
        latent_channels: int,
        schedule: ScaleSchedule,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        using_znorm: bool = False,
        beta: float = 0.25,
        code_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.phi_ratio = phi_ratio
        self.using_znorm = using_znorm
        self.beta = beta
        self.phi_of_scale = schedule.phi_index(num_phi)
        self.latent_channels = latent_channels
        self.embedding = nn.Embedding(codebook_size, code_channels or latent_channels)
        if code_channels is not None:
            self.expand = nn.Linear(code_channels, latent_channels, bias=False)
            nn.init.orthogonal_(self.expand.weight)
        self.phi = nn.ModuleList(nn.Conv2d(latent_channels, latent_channels, 3, padding=1) for _ in range(num_phi))
        # How often each scale used each code, a moving average that training keeps (usage is a record, not a weight).
        self.register_buffer("ema_vocab_hit", torch.zeros(schedule.num_scales, codebook_size))

    @torch.no_grad()
    def nearest(self, z_rows: Tensor) -> Tensor:
        """The code nearest to each row, in L2, or in cosine with `using_znorm`; ties go to the lower index.

        Args:
            z_rows: (R, Z), any float dtype.

        Returns:
            (R,) int64 in [0, V).
        """
        with torch.autocast(z_rows.device.type, enabled=False), exact_float32():
            codes = self.codebook.detach()
            if self.using_znorm:
                codes = F.normalize(codes, dim=-1)
                offset = codes.new_zeros(codes.shape[0])
            else:
                offset = codes.square().sum(-1)
            # |z − e|² without |z|², which is the same for every code; under cosine only −z·e/|e| remains.
            parts = [
                torch.addmm(offset, rows, codes.T, beta=1, alpha=-2).argmin(-1)
                for rows in z_rows.float().split(ROWS_AT_ONCE)
            ]
        return torch.cat(parts)

    def scale_features(self, scale: int, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """What one scale adds to f̂: φ_k(upsampled codes).

        Args:
            scale: 0-based k.
            tokens: (B, p_k²) int64.
            keep: (B, p_k²) bool; codes where it is False are zeroed *before* upsampling and φ, so that nothing of them
                reaches their neighbours. None keeps all.

        Returns:
            (B, Z, h, w) float32.
        """
        with torch.autocast(tokens.device.type, enabled=False), exact_float32():
            codes = self._spread(self.embedding(tokens))
            if keep is not None:
                codes = torch.where(keep[..., None], codes, codes.new_zeros(()))
            return self.code_features(scale, codes)

    def code_features(self, scale: int, codes: Tensor) -> Tensor:
        """φ_k(up(·)) of any vectors in place of a scale's codes: (B, p_k², Z) → (B, Z, h, w) float32."""
        side, grid = self.schedule.patch_nums[scale], self.schedule.grid
        with torch.autocast(codes.device.type, enabled=False), exact_float32():
            up = bicubic_up(codes.transpose(1, 2).unflatten(2, (side, side)), grid)
            weight, bias = self.phi[self.phi_of_scale[scale]].parameters()
            mixed = F.conv2d(up, weight.float(), bias.float(), padding=1)
            return (1 - self.phi_ratio) * up + self.phi_ratio * mixed

    @property
    def codebook(self) -> Tensor:
        """The codes as they stand in the latent, (V, Z) float32."""
        with torch.autocast(self.embedding.weight.device.type, enabled=False), exact_float32():
            return self._spread(self.embedding.weight)

    @torch.no_grad()
    def stored(self, codes: Tensor) -> Tensor:
        """What the codebook holds for codes (n, Z): themselves, or the nearest of its rank, (n, d) float32."""
        if self.embedding.embedding_dim == self.latent_channels:
            return codes.float()
        with torch.autocast(codes.device.type, enabled=False), exact_float32():
            return codes.float() @ torch.linalg.pinv(self.expand.weight.float()).T

    def _spread(self, codes: Tensor) -> Tensor:
        """Codes (…, d) to (…, Z) float32."""
        if self.embedding.embedding_dim == self.latent_channels:
            return codes.float()
        return F.linear(codes.float(), self.expand.weight.float())

    @torch.no_grad()
    def encode(self, f: Tensor) -> Tensor:
        """Residual encoding of (B, Z, h, w) to tokens (B, N) int64; float32, without gradient.

        Raises:
            UserError: when f is not a p_K × p_K map of Z channels.
        """
        return torch.cat([tokens for _, tokens, _ in self._walk(f)], dim=1)

    def f_hat(self, tokens: Tensor) -> Tensor:
        """The quantized latent of (B, N) tokens: Σ_k φ_k(up(codes)), (B, Z, h, w) float32.

        Raises:
            UserError: when the number of tokens is not N.
        """
        if tokens.shape[-1] != self.schedule.num_tokens:
            raise UserError(
                f"{tokens.shape[-1]} tokens a sample do not fit patch_nums={self.schedule.patch_nums}, which has "
                f"{self.schedule.num_tokens}; encode the images with this tokenizer"
            )
        f_hat = self.scale_features(0, tokens[:, self.schedule.span(0)])
        for k in range(1, self.schedule.num_scales):
            f_hat = f_hat + self.scale_features(k, tokens[:, self.schedule.span(k)])
        return f_hat

    def forward(self, f: Tensor, kept: Tensor | None = None) -> QuantizerOutput:
        """Quantize f (B, Z, h, w) for training.

        loss = mean over scales of β·mse(sg(f̂_k), f) + mse(f̂_k, sg(f)), where f̂_k sums the features of scales 1…k and
        sg stops the gradient: the first term moves the encoder, the second the codebook and φ.

        Args:
            kept: (B,) int64, how many of the first scales make up a sample's f̂; the loss counts all scales
                nevertheless. Default all.

        Raises:
            UserError: when f is not a p_K × p_K map of Z channels.
        """
        f = f.float()
        fixed = f.detach()
        f_hat = torch.zeros_like(fixed)
        truncated = torch.zeros_like(fixed)
        loss = fixed.new_zeros(())
        all_rows, all_tokens = [], []
        for k, (rows, tokens, features) in enumerate(self._walk(fixed)):
            f_hat = f_hat + features
            if kept is not None:
                truncated = truncated + features.detach() * (kept > k)[:, None, None, None]
            loss = loss + self.beta * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, fixed)
            all_rows.append(rows)
            all_tokens.append(tokens)
        straight_through = f + ((f_hat if kept is None else truncated) - f).detach()
        return QuantizerOutput(
            straight_through, torch.cat(all_tokens, dim=1), loss / self.schedule.num_scales, tuple(all_rows)
        )

    def _walk(self, f: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Residual encoding scale by scale: (looked-up rows (B·p_k², Z), tokens (B, p_k²), features (B, Z, h, w))."""
        channels, grid = self.latent_channels, self.schedule.grid
        if f.shape[1:] != (channels, grid, grid):
            raise UserError(
                f"latent of shape {tuple(f.shape)} does not fit this quantizer: it must be (B, {channels}, {grid}, "
                f"{grid}) for patch_nums={self.schedule.patch_nums}; check the image size against schedule.resolution"
            )
        residual = f.detach().float()
        for k, side in enumerate(self.schedule.patch_nums):
            rows = area_down(residual, side).flatten(2).transpose(1, 2).reshape(-1, channels)
            tokens = self.nearest(rows).view(f.shape[0], side * side)
            features = self.scale_features(k, tokens)
            residual = residual - features.detach()
            yield rows, tokens, features
