"""Measured kernel times and whole steps, with where each was measured: what predictions stand on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
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

#: (heads, tokens, pairs of a head, ms of a layer): forward and backward of the own attention kernels, head dim 64,
#: bf16, in profiled training steps of d16 (batch 64) and d24 (batch 32) at 256 px on an H100.
OWN_ATTENTION = ((64 * 16, 680, 110_468, 13.4 / 16), (32 * 24, 680, 110_468, 15.3 / 24))

#: Rates of that H100: matrix product in TFLOP/s, as above, and copy in GB/s, read plus written.
OWN_ATTENTION_GPU = (778.0, 3027.0)

#: Elements a channel and position that the own attention reads and writes: packed projection in and output out; both,
#: the output's gradient in, and the projection's gradient out.
OWN_ATTENTION_TRAFFIC = (4, 8)

#: Share of the copy rate at which the fused kernels of AdaLN, residuals and GELU move their bytes: profiled steps as
#: above, 22.5 ms for 16 layers of d16 (0.92) and 27.8 ms for 24 of d24 (0.84).
FUSED_REACH = 0.88


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


def own_attention_seconds(flops: float, size: float, tflops: float, gb_per_s: float, backward: bool) -> float:
    """Time of the own attention kernels of one layer: of moving their bytes and of their products, one after the other,
    times what the measured shapes took by that.

    Args:
        flops: forward FLOPs, 4·D a pair and head.
        size: bytes of the attention's output.
        tflops, gb_per_s: matrix-product and copy rate of the GPU.
        backward: the backward pass.
    """
    moved = size * OWN_ATTENTION_TRAFFIC[backward] / (gb_per_s * 1e9)
    products = flops * (BACKWARD_WORK if backward else 1.0) / (tflops * 1e12)
    return (moved + products) * _own_attention_factor()


@cache
def _own_attention_factor() -> float:
    """Measured time by that of bytes and products at full rate: the median of the measured shapes."""
    tflops, gb_per_s = OWN_ATTENTION_GPU
    ratios = []
    for heads, tokens, pairs, milliseconds in OWN_ATTENTION:
        moved = 2 * 64 * heads * tokens * sum(OWN_ATTENTION_TRAFFIC) / (gb_per_s * 1e9)
        products = 4 * 64 * heads * pairs * (1 + BACKWARD_WORK) / (tflops * 1e12)
        ratios.append(milliseconds * 1e-3 / (moved + products))
    return median(ratios)


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


MEASURED_ON = (
    "GPU-busy time of profiled steps on one H100, torch 2.11.0+cu130, own kernels, before CUDA graphs, the own "
    "cross-entropy and AdamW in one pass"
)

#: Steps of this repository's engine; predictions are multiplied by the median of measured / predicted.
STEPS = tuple(
    MeasuredStep(
        name,
        (
            f"data.global_batch_size={batch}",
            f"data.micro_batch_size={batch}",
            "precision.compute=bf16",
            "optim.impl=torch",
        ),
        "h100",
        batch / seconds,
        MEASURED_ON,
    )
    for name, batch, seconds in (("train/d16-256", 64, 0.1515), ("train/d24-256", 32, 0.2138))
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
                row["config"],
                (*row["overrides"], *_older(row["overrides"])),
                row["cluster"],
                float(row["images_per_s"]),
                str(path.name),
            )
            for row in rows
            if row.get("images_per_s")
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as err:
        raise UserError(
            f"cannot read calibration {path}: {type(err).__name__} {err}; give a file that "
            "benchmarks/plan_memory.py wrote"
        ) from None


def _older(overrides: list[str]) -> tuple[str, ...]:
    """Files that name no optimizer are of a version that had torch's alone."""
    return () if any(o.startswith("optim.impl=") for o in overrides) else ("optim.impl=torch",)


def time_factor(ratios: list[float]) -> float:
    """The factor on predicted compute time: median of measured / predicted; 1 without measurements."""
    return median(ratios) if ratios else 1.0
