"""Scale schedules: which token maps a model predicts, in which order, and how they lie in the sequence.

A schedule is a tuple `patch_nums = (p_1 … p_K)`. Scale k is a p_k × p_k map of tokens flattened row-major; the
sequence is the concatenation of all scales, N = Σ p_k² tokens long. Everything here is pure and imports nothing of
ours: training, evaluation, sampling, sharding and kernels take their offsets, masks and weights from this one place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # commands that read a configuration need no tensor, and torch takes seconds to import
    import torch
    from torch import Tensor

Pattern = Literal["block_diagonal", "block_causal"]

#: Published schedules by image resolution, for a tokenizer that downsamples 16× (SPEC of VAR and HMAR).
PATCH_NUMS: dict[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}

#: HMAR's multi-pass sampling schedules: the entries for the first scales; every later scale is one pass.
MASK_SCHEDULES: dict[int, tuple[tuple[int, ...], ...]] = {
    256: ((1,), (1, 3), (1, 1, 2, 5)),
    512: ((1,), (1, 3), (1, 1, 2, 5), (5, 11)),
    1024: ((1,), (1, 3), (1, 1, 2, 5), (3, 5, 8)),
}


@dataclass(frozen=True)
class ScaleSchedule:
    """The scales of a model: `patch_nums`, strictly increasing, starting at 1, at least two of them.

    Raises:
        ValueError: when `patch_nums` breaks one of these rules.
    """

    patch_nums: tuple[int, ...]

    def __post_init__(self) -> None:
        nums = tuple(self.patch_nums)
        object.__setattr__(self, "patch_nums", nums)
        if (
            len(nums) < 2
            or nums[0] != 1
            or any(b <= a for a, b in pairwise(nums))
            or not all(isinstance(p, int) for p in nums)
        ):
            raise ValueError(
                f"patch_nums={nums} is not a legal schedule: it must have at least two scales, start at 1 and "
                f"increase strictly, for example (1, 2, 4) or {PATCH_NUMS[256]}"
            )

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.patch_nums)

    @cached_property
    def scale_lengths(self) -> tuple[int, ...]:
        """Tokens per scale, p_k²."""
        return tuple(p * p for p in self.patch_nums)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """K + 1 positions: scale k occupies `offsets[k] : offsets[k + 1]`."""
        return (0, *np.cumsum(self.scale_lengths).tolist())

    @property
    def num_tokens(self) -> int:
        """N = Σ p_k²."""
        return self.offsets[-1]

    @property
    def grid(self) -> int:
        """Side of the last (full resolution) token map, p_K."""
        return self.patch_nums[-1]

    def span(self, scale: int) -> slice:
        """The positions of `scale` (0-based) in the sequence."""
        return slice(self.offsets[scale], self.offsets[scale + 1])

    def level_ids(self, device: torch.device | str | None = None) -> Tensor:
        """The 0-based scale of every position, (N,) int64."""
        import torch

        lengths = torch.tensor(self.scale_lengths, device=device)
        return torch.repeat_interleave(
            torch.arange(self.num_scales, device=device), lengths, output_size=self.num_tokens
        )

    def cu_seqlens(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """Cumulative lengths of every (sample, scale) for variable-length attention, (batch·K + 1,) int32."""
        import torch

        lengths = torch.tensor(self.scale_lengths, dtype=torch.int32, device=device).repeat(batch)
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])

    def attended_pairs(self, pattern: Pattern = "block_diagonal") -> int:
        """Query-key pairs of one sample and head: Σ p_k⁴, or Σ p_k²·offset_{k+1} when block-causal."""
        if pattern == "block_diagonal":
            return sum(n * n for n in self.scale_lengths)
        return sum(n * end for n, end in zip(self.scale_lengths, self.offsets[1:], strict=True))

    def attention_mask(self, pattern: Pattern, device: torch.device | str | None = None) -> Tensor:
        """Dense (N, N) bool mask, True where query (row) may attend to key (column). For references and tests only."""
        level = self.level_ids(device)
        if pattern == "block_diagonal":
            return level[:, None] == level[None, :]
        return level[:, None] >= level[None, :]

    def phi_index(self, num_phi: int = 4) -> tuple[int, ...]:
        """Which shared φ convolution each scale uses (VAR's `PhiPartiallyShared`).

        Scale s of K takes the φ whose tick is nearest to s/(K−1), by argmin in float64: at K = 10 two
        scales tie but for rounding, so float32 gives other numbers. With one φ all scales share it.
        """
        if num_phi < 1:
            raise ValueError(f"num_phi={num_phi}: at least one φ convolution is needed")
        if num_phi == 4:
            ticks = np.linspace(1 / 12, 11 / 12, 4)
        else:
            ticks = np.linspace(1 / (2 * num_phi), 1 - 1 / (2 * num_phi), num_phi)
        at = np.arange(self.num_scales) / (self.num_scales - 1)
        return tuple(int(np.argmin(np.abs(ticks - s))) for s in at)

    def check_fits(self, resolution: int, downsample: int) -> None:
        """Raise ValueError unless p_K · downsample = resolution."""
        if self.grid * downsample != resolution:
            raise ValueError(
                f"patch_nums={self.patch_nums} ends at {self.grid}, which with downsample={downsample} makes "
                f"{self.grid * downsample} px images, not resolution={resolution}; "
                + (f"end patch_nums at {resolution // downsample} or " if resolution % downsample == 0 else "")
                + f"set resolution={self.grid * downsample}"
            )


def token_weights(schedule: ScaleSchedule, kind: Literal["uniform", "lognormal"]) -> Tensor:
    """Per-token weights of the next-scale loss, (N,) float32 with sum 1.

    `uniform` is VAR's 1/N. `lognormal` is HMAR's (arXiv 2506.04421, loss re-weighting): the weight of scale k is
    w_k ∝ pdf_normal((p_{K+1−k}/p_K − mean)/std) with mean and std (ddof 1) of the ratios p_k/p_K, Σ w_k = 1, spread
    evenly over its p_k² tokens.
    """
    import torch

    if kind == "uniform":
        return torch.full((schedule.num_tokens,), 1.0 / schedule.num_tokens)
    lengths = torch.tensor(schedule.scale_lengths)
    per_token = torch.from_numpy(lognormal_scale_weights(schedule)) / lengths
    return torch.repeat_interleave(per_token, lengths).float()


def lognormal_scale_weights(schedule: ScaleSchedule) -> np.ndarray:
    """HMAR's weight of each scale, (K,) float64 with sum 1; see `token_weights`."""
    ratios = np.array(schedule.patch_nums, dtype=np.float64) / schedule.grid
    z = (ratios[::-1] - ratios.mean()) / ratios.std(ddof=1)
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    weights: np.ndarray = density / density.sum()
    return weights


def mask_schedule_for(
    schedule: ScaleSchedule, given: Sequence[Iterable[int]] | None = None
) -> tuple[tuple[int, ...], ...]:
    """The number of tokens each sampling pass keeps, one tuple a scale, each summing to p_k².

    Args:
        given: entries for the first scales; the scales beyond them are one pass each. None takes the published
            schedule where `schedule` is a published one, and the same idea (scales 2 and 3 in steps) elsewhere.

    Raises:
        ValueError: when an entry is not positive, does not sum to p_k², or there are more entries than scales.
    """
    if given is None:
        known = {PATCH_NUMS[r]: MASK_SCHEDULES[r] for r in PATCH_NUMS}
        given = known.get(schedule.patch_nums, _steps_for_small_scales(schedule))
    entries = [tuple(int(a) for a in e) for e in given]
    if len(entries) > schedule.num_scales:
        raise ValueError(f"mask_schedule has {len(entries)} entries for {schedule.num_scales} scales; drop the surplus")
    entries += [(n,) for n in schedule.scale_lengths[len(entries) :]]
    for k, (entry, length) in enumerate(zip(entries, schedule.scale_lengths, strict=True), 1):
        if not entry or min(entry) < 1 or sum(entry) != length:
            raise ValueError(
                f"mask_schedule entry {list(entry)} of scale {k} must be positive numbers that sum to "
                f"{length} (its {schedule.patch_nums[k - 1]}×{schedule.patch_nums[k - 1]} tokens)"
            )
    return tuple(entries)


def _steps_for_small_scales(schedule: ScaleSchedule) -> list[tuple[int, ...]]:
    """Scale 2 in two passes (1/4, 3/4) and scale 3 in two (1/3, 2/3): the published idea for unpublished schedules."""
    entries: list[tuple[int, ...]] = [(1,)]
    for k, share in ((1, 4), (2, 3)):
        if k < schedule.num_scales:
            length = schedule.scale_lengths[k]
            first = max(1, round(length / share))
            entries.append((first, length - first))
    return entries
