"""Resampling of square feature maps, for tokenizer, training and sampling alike: bicubic up and area down.

Bicubic enlargement is linear and separable, M·x·Mᵀ, and computed as these two small matrix products: torch's own kernel
gives every thread one output pixel and walks it over all channels of all samples, which leaves a GPU idle at these
sizes, and its gradient is not deterministic there. The matrices are made once per pair of sizes, in float64. Area
averages stay with torch, whose kernel costs no more than the products would (benchmarks/NOTES.md). Axes: B batch, Z
channels, p × p the small map, h × w the large one.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hmar_mega.precision import exact_float32

#: Of the cubic convolution kernel (Keys 1981), as `torch.nn.functional.interpolate` has it.
BICUBIC_A = -0.75


def bicubic_up(x_BZpp: Tensor, size: int) -> Tensor:
    """Enlarge square maps bicubically, corners not aligned, edges repeated, as `F.interpolate` does.

    Args:
        x_BZpp: (B, Z, p, p), any float dtype and strides.

    Returns:
        (B, Z, size, size) contiguous float32, whatever autocast says and never TF32; x itself when it has that size.

    Raises:
        ValueError: when the maps are not square.
    """
    batch, channels, height, width = x_BZpp.shape
    if height != width:
        raise ValueError(f"maps of {height} × {width} cannot be enlarged to {size} × {size}: they must be square")
    if width == size:
        return x_BZpp
    weights = _bicubic_matrix(width, size, x_BZpp.device)
    with torch.autocast(x_BZpp.device.type, enabled=False), exact_float32():
        rows = (x_BZpp.float().reshape(-1, width) @ weights.T).view(batch * channels, height, size)
        out = torch.bmm(weights.expand(batch * channels, size, height), rows)
    return out.view(batch, channels, size, size)


def area_down(x_BZhw: Tensor, size: int) -> Tensor:
    """Average (B, Z, h, w) over areas to (B, Z, size, size); x itself when it already has that size."""
    return x_BZhw if x_BZhw.shape[-2:] == (size, size) else F.interpolate(x_BZhw, size=(size, size), mode="area")


def bicubic_weights(given: int, wanted: int) -> NDArray[np.float64]:
    """(wanted, given) float64 of one axis: centres at (i + ½)·given/wanted − ½, four neighbours, edges clamped."""
    centre = (np.arange(wanted) + 0.5) * given / wanted - 0.5
    first = np.floor(centre).astype(np.int64)
    weights = np.zeros((wanted, given))
    for neighbour in range(-1, 3):
        distance = np.abs(centre - first - neighbour)
        near = ((BICUBIC_A + 2) * distance - (BICUBIC_A + 3)) * distance**2 + 1
        far = BICUBIC_A * (((distance - 5) * distance + 8) * distance - 4)
        columns = np.clip(first + neighbour, 0, given - 1)
        np.add.at(weights, (np.arange(wanted), columns), np.where(distance <= 1, near, far))
    return weights


@cache
def _bicubic_matrix(given: int, wanted: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept for calls that differentiate, whoever comes first
        return torch.from_numpy(bicubic_weights(given, wanted).astype(np.float32)).to(device)
