"""Measured kernel times and whole steps, with where each was measured: what predictions stand on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from hmar_mega.errors import UserError


@dataclass(frozen=True)
class AttentionRow:
    """One measured shape of SDPA called once a scale.

    Attributes:
        heads: batch · heads.
        scales: K, number of calls.
        pairs: Σ p_k⁴ of one head.
        forward_ms, backward_ms: medians.
    """

    tokens: int
    heads: int
    scales: int
    pairs: int
    forward_ms: float
    backward_ms: float

    @property
    def flops_per_call(self) -> float:
        """Forward FLOPs of an average scale: 4·D a pair."""
        return 4 * 64 * self.heads * self.pairs / self.scales


#: H100 80GB HBM3, bf16, torch 2.11.0+cu130, head dim 64, medians of CUDA-event timings of SDPA called scale by scale:
#: from the attention measurements this project was designed on.
ATTENTION = (
    AttentionRow(680, 4 * 24, 10, 110_468, 0.612, 1.206),
    AttentionRow(680, 64 * 16, 10, 110_468, 0.571, 1.454),
    AttentionRow(2240, 16 * 24, 10, 1_522_100, 0.600, 2.120),
    AttentionRow(9451, 4 * 24, 14, 24_587_383, 1.598, 4.532),
)

#: bf16 matrix product of the same GPU and run, TFLOP/s: other GPUs' attention is taken to scale with theirs.
ATTENTION_GPU_TFLOPS = 778.0

#: The smallest measured time of one call, ms, forward and backward: starting it, slicing, and the launch behind it.
CALL_FLOOR_MS = (0.0571, 0.1206)

#: Work of the backward pass by that of the forward pass: five matrix products for two.
BACKWARD_WORK = 2.5


#: ((rows, in, out), ms of TE's FP8 linear, ms of bf16's), forward and backward, of the same GPU, with TE 2.11.0: from
#: the measurements this project was designed on. Weights were converted in every call, training does it once a step.
FP8_LINEARS = (
    ((43520, 1024, 4096), 1.53, 1.66),
    ((21760, 1536, 6144), 1.61, 1.95),
    ((10880, 1920, 7680), 1.63, 1.50),
)

#: Time of an FP8 linear by that of a bf16 one, smallest, median and largest. The median is what plans take.
FP8_LINEAR_LEAST, FP8_LINEAR_TIME, FP8_LINEAR_MOST = sorted(fp8 / bf16 for _, fp8, bf16 in FP8_LINEARS)


def attention_seconds(flops: float, calls: int, tflops: float, backward: bool) -> float:
    """Time of the scale-by-scale attention of one layer.

    The achieved rate is interpolated over the logarithm of the work of a call between the measured shapes; no call is
    faster than the fastest measured one.

    Args:
        flops: forward FLOPs of all calls, 4·D a pair and head.
        calls: scales.
        tflops: bf16 matrix-product rate of the GPU.
        backward: the backward pass.
    """
    if flops <= 0:
        return 0.0
    # the first row is all launches: it gives the floor, not a rate
    points = sorted((row.flops_per_call, _achieved(row, backward)) for row in ATTENTION[1:])
    rate = _interpolate(math.log(flops / calls), [(math.log(work), speed) for work, speed in points])
    work = flops * (BACKWARD_WORK if backward else 1.0)
    floor = calls * CALL_FLOOR_MS[backward] * 1e-3
    return max(floor, work / (rate * tflops / ATTENTION_GPU_TFLOPS))


def _achieved(row: AttentionRow, backward: bool) -> float:
    work = row.flops_per_call * row.scales
    return work * BACKWARD_WORK / (row.backward_ms * 1e-3) if backward else work / (row.forward_ms * 1e-3)


def _interpolate(at: float, points: list[tuple[float, float]]) -> float:
    if at <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[-1][1]


@dataclass(frozen=True)
class MeasuredStep:
    """A whole training step that was timed on one GPU.

    Attributes:
        config: packaged configuration.
        overrides: settings that win over it, batch included.
        cluster: the packaged cluster with the GPU.
        images_per_s: median.
        source: where and when.
    """

    config: str
    overrides: tuple[str, ...]
    cluster: str
    images_per_s: float
    source: str


MEASURED_ON = "one H100, torch 2.11.0+cu130, attention sdpa (benchmarks/results/plan_memory.md)"

#: Steps of this repository's engine; predictions are multiplied by the median of measured / predicted.
STEPS = tuple(
    MeasuredStep(name, (*settings, "precision.compute=bf16"), "h100", images, MEASURED_ON)
    for name, settings, images in (
        ("train/d16-256", ("data.global_batch_size=64", "data.micro_batch_size=64"), 167.6),
        ("train/d16-256", ("data.global_batch_size=64", "data.micro_batch_size=64", "parallel.recompute=full"), 135.4),
        (
            "train/d16-256",
            ("data.global_batch_size=64", "data.micro_batch_size=64", "parallel.recompute=selective"),
            155.8,
        ),
        (
            "train/d24-256",
            ("data.global_batch_size=32", "data.micro_batch_size=32", "parallel.recompute=selective"),
            63.4,
        ),
        ("train/d24-512", ("data.global_batch_size=8", "data.micro_batch_size=8"), 19.3),
    )
)


def read_steps(path: Path) -> tuple[MeasuredStep, ...]:
    """Steps from the JSON file that benchmarks/plan_memory.py writes.

    Raises:
        UserError: when the file is not one.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return tuple(
            MeasuredStep(
                row["config"], tuple(row["overrides"]), row["cluster"], float(row["images_per_s"]), str(path.name)
            )
            for row in rows
            if row.get("images_per_s")
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as err:
        raise UserError(
            f"cannot read calibration {path}: {type(err).__name__} {err}; give a file that "
            "benchmarks/plan_memory.py wrote"
        ) from None


def time_factor(ratios: list[float]) -> float:
    """The factor on predicted compute time: median of measured / predicted; 1 without measurements."""
    return median(ratios) if ratios else 1.0
