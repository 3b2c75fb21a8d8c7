"""The discriminator of tokenizer training: PatchGAN with hinge loss, R1 or LeCam, and an optimizer of its own.

Sources: PatchGAN, arXiv 1611.07004; hinge loss, arXiv 1705.02894; R1, arXiv 1801.04406, equation 9; LeCam, arXiv
2104.03310, equations 3 and 4; the adaptive weight, arXiv 2012.09841, equation 7. Axes: B batch, R image side, h × w the
map of patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hmar_mega.config_tokenizer import AdversarialConfig, TokenizerTrainConfig

#: Weight of the past in LeCam's averages of the discriminator's answers.
LECAM_DECAY = 0.99

#: Largest adaptive weight.
MOST_ADAPTIVE = 1e4


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: `layers` 4×4 convolutions that halve the map, one that does not, and the verdict.

    Norms are GroupNorm, which keeps no averages and needs no synchronisation between processes.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**n, 8) for n in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            parts += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, widths[n]),
                nn.LeakyReLU(0.2),
            ]
        parts.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.model = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [−1, 1] to (B, 1, h, w): positive where a patch seems real."""
        return self.model(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½·mean max(0, 1 − D(x)) + ½·mean max(0, 1 + D(x̂))."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def lecam_penalty(real: Tensor, fake: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """mean (D(x) − ᾱ_fake)² + mean (D(x̂) − ᾱ_real)², ᾱ the averages of the past: keeps the two from running apart."""
    return (real - average_fake).square().mean() + (fake - average_real).square().mean()


def r1_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """½·mean over samples of |∇ₓ Σ D(x)|² at real images, differentiable."""
    images = images.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return 0.5 * slope.square().sum((1, 2, 3)).mean()


def adaptive_weight(other: Tensor, adversarial: Tensor, reconstruction: Tensor) -> Tensor:
    """‖∇ other‖ / ‖∇ adversarial‖ at the reconstruction, at most `MOST_ADAPTIVE`, without gradient.

    VQGAN takes the gradients at the decoder's last layer, which costs two passes back through the decoder where it is
    compiled; the reconstruction is one convolution further.
    """
    ours, theirs = (torch.autograd.grad(loss, reconstruction, retain_graph=True)[0] for loss in (other, adversarial))
    return (ours.norm() / (theirs.norm() + 1e-4)).clamp(0, MOST_ADAPTIVE).detach()


class Adversary:
    """The discriminator while it trains: the tokenizer's loss from it, its own step, and what a checkpoint keeps.

    Args:
        seed: of its first weights, the same in every process.
        autocast: number format of its convolutions.
    """

    def __init__(
        self, train: TokenizerTrainConfig, seed: int, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        self.config: AdversarialConfig = train.adversarial
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = PatchDiscriminator(self.config.channels, self.config.layers).to(device)
        self.device, self.autocast = device, autocast
        self.lr_ratio = 1.0 if self.config.lr is None else self.config.lr / train.lr
        self.clip, self.skipped = train.clip, 0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=train.lr, betas=(0.5, 0.9), weight_decay=0.0)
        for parameter in self.model.parameters():  # as after no step, so that every checkpoint has all of it
            zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        self.averages = torch.zeros(2, device=device)  #: of D at real images and at reconstructions

    def learns(self, step: int) -> bool:
        """Whether it takes a step of its own after `step`: from half of `start` on, to know something by then."""
        return step >= self.config.start // 2

    def speaks(self, step: int) -> bool:
        """Whether the tokenizer hears it at `step`."""
        return step >= self.config.start

    def tokenizer_loss(self, reconstruction: Tensor) -> Tensor:
        """−mean D(x̂), through which no gradient reaches the discriminator's weights."""
        self.model.requires_grad_(False)
        with self._format():
            answer = self.model(reconstruction)
        self.model.requires_grad_(True)
        return -answer.float().mean()

    def train_step(self, batches: Sequence[tuple[Tensor, Tensor]], lr: float) -> dict[str, float]:
        """One step of the discriminator on (images, reconstructions) of every micro-batch; collective.

        Args:
            lr: that of the tokenizer's step.

        Returns:
            `discriminator` (hinge loss) and its mean answers `real` and `fake`, over all processes.
        """
        sums = torch.zeros(3, device=self.device)
        for images, fakes in batches:
            with self._format():
                both = self.model(torch.cat([images, fakes.detach()])).float()
            real, fake = both.chunk(2)
            loss = hinge_loss(real, fake)
            sums += torch.stack([loss.detach(), real.detach().mean(), fake.detach().mean()]) / len(batches)
            if self.config.regularisation == "lecam":
                average_real, average_fake = self.averages.clone()
                loss = loss + self.config.regularisation_weight * lecam_penalty(real, fake, average_real, average_fake)
            if self.config.regularisation == "r1":  # a second derivative: in float32
                loss = loss + self.config.regularisation_weight * r1_penalty(self.model, images.float())
            (loss / len(batches)).backward()
        self._average_over_processes(sums)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.clip))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr * self.lr_ratio
            self.optimizer.step()
            self.averages.lerp_(sums[1:], 1 - LECAM_DECAY)
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        return dict(zip(("discriminator", "real", "fake"), sums.tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Everything that decides how it goes on, by name: views of float32 tensors."""
        tensors = {"discriminator.averages": self.averages}
        for name, parameter in self.model.named_parameters():
            tensors[f"discriminator.{name}"] = parameter.data
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"discriminator.{name}.{key}"] = value
        return tensors

    def _format(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _average_over_processes(self, sums: Tensor) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([sums, *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        flat /= world
        sums.copy_(flat[:3])
        at = 3
        for gradient in gradients:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()
