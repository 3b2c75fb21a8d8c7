"""Position and level embeddings for another schedule, such as 512 px fine-tuning of a 256 px model; pure functions.

Positions: a new scale takes the p × p grid of the old scale whose side is nearest in ratio (of two equally near the
larger one), resized bicubically, corners not aligned; with anti-aliasing where it shrinks. Scales of a side that the
old schedule has are copied exactly. A p × p map covers the whole image in both schedules, so equal sides mean equal
places.

Levels: linear interpolation over the relative size p_k / p_K, which says how fine a scale is within its schedule: the
last scale stays the last. Sizes below the smallest old one take its embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hmar_mega.scales import ScaleSchedule


def source_scale(side: int, old: ScaleSchedule) -> int:
    """0-based scale of `old` that a new scale of p = `side` takes its positions from."""
    return min(range(old.num_scales), key=lambda k: (abs(math.log(old.patch_nums[k] / side)), -old.patch_nums[k]))


def resize_positions(pos_1NC: Tensor, old: ScaleSchedule, new: ScaleSchedule) -> Tensor:
    """(1, N_old, C) → (1, N_new, C), of the same dtype."""
    parts = []
    for side in new.patch_nums:
        k = source_scale(side, old)
        own = old.patch_nums[k]
        grid = pos_1NC[:, old.span(k)]
        if own != side:
            image = grid.float().transpose(1, 2).unflatten(2, (own, own))
            image = F.interpolate(image, size=(side, side), mode="bicubic", antialias=side < own)
            grid = image.flatten(2).transpose(1, 2).to(pos_1NC.dtype)
        parts.append(grid)
    return torch.cat(parts, dim=1)


def resize_levels(level_KC: Tensor, old: ScaleSchedule, new: ScaleSchedule) -> Tensor:
    """(K_old, C) → (K_new, C), of the same dtype."""
    known = [p / old.grid for p in old.patch_nums]
    rows = []
    for side in new.patch_nums:
        wanted = side / new.grid
        k = sum(size <= wanted for size in known) - 1
        if k < 0 or k == len(known) - 1 or known[k] == wanted:
            rows.append(level_KC[max(k, 0)])
            continue
        share = (wanted - known[k]) / (known[k + 1] - known[k])
        rows.append(torch.lerp(level_KC[k].float(), level_KC[k + 1].float(), share).to(level_KC.dtype))
    return torch.stack(rows)
