"""How the benchmarks measure and print: clocks, what this machine reaches at best, tables and result files.

Times are in milliseconds; rates in TFLOP/s (10¹² a second) and GB/s (10⁹ a second).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmar_mega.files import write_atomic

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: Written before every timed call, so that it finds nothing of its inputs in the cache. Several times any GPU's L2
#: (50 MB on an H100); writing it also takes the GPU longer than the host needs to queue a kernel behind it.
FLUSH_BYTES = 2**28

#: Untimed calls before timed ones: they compile, allocate and pick algorithms.
WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Times of repeated calls: median, 10th and 90th percentile, and how many there were."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """Raises ValueError for no times at all."""
        if not times:
            raise ValueError("no times were taken")
        ordered = sorted(times)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


class Clock:
    """Times calls on one device, each with a cold cache.

    Args:
        device: CUDA events are used on a GPU, the host's clock elsewhere.
        budget: milliseconds that the calls of one measurement may take together; there are 10 to 50 of them.
    """

    def __init__(self, device: torch.device, budget: float = 150.0) -> None:
        self.device, self.budget = device, budget
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.cuda else 1, dtype=torch.int8, device=device)

    def time(self, call: Callable[[Any], object], prepare: Callable[[], Any] = lambda: None) -> Timing:
        """Time `call(prepare())`, the time of `prepare` apart."""
        for _ in range(WARM_UP):
            call(prepare())
        typical = statistics.median(self._times(call, prepare, 3))
        count = min(50, max(10, int(self.budget / max(typical, 1e-3))))
        return Timing.of(self._times(call, prepare, count))

    def _times(self, call: Callable[[Any], object], prepare: Callable[[], Any], count: int) -> list[float]:
        return self._cuda_times(call, prepare, count) if self.cuda else self._host_times(call, prepare, count)

    def _cuda_times(self, call: Callable[[Any], object], prepare: Callable[[], Any], count: int) -> list[float]:
        events = []
        for _ in range(count):
            given = prepare()
            self._flush.zero_()
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            call(given)
            ended.record()
            events.append((started, ended))
        torch.cuda.synchronize(self.device)
        return [started.elapsed_time(ended) for started, ended in events]

    def _host_times(self, call: Callable[[Any], object], prepare: Callable[[], Any], count: int) -> list[float]:
        times = []
        for _ in range(count):
            given = prepare()
            started = time.perf_counter()
            call(given)
            times.append(1e3 * (time.perf_counter() - started))
        return times


def laps(step: Callable[[int], object], count: int, device: torch.device) -> Timing:
    """Times of `count` steps that follow each other without a pause, as in training."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for number in range(count):
            step(number)
            marks.append(time.perf_counter())
        return Timing.of([1e3 * (after - before) for before, after in pairwise(marks)])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for number in range(count):
        step(number)
        events[number + 1].record()
    torch.cuda.synchronize(device)
    return Timing.of([before.elapsed_time(after) for before, after in pairwise(events)])


def peak_memory(device: torch.device) -> int | None:
    """Bytes that the run needed since the last reset of the peak; None without a GPU.

    CUDA graphs keep their activations' memory between replays, when none of it counts as allocated: it is added.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) + idle_graph_memory(torch.cuda.memory_snapshot())


def idle_graph_memory(segments: Sequence[dict[str, Any]]) -> int:
    """Bytes of `torch.cuda.memory_snapshot()` that lie in the pools of CUDA graphs, allocated to no tensor."""
    own = [segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in own)


@dataclass(frozen=True)
class Limits:
    """What this machine reached in this run: a large matrix product in bf16, and a copy, reads and writes counted."""

    matmul_tflops: float
    copy_gbps: float

    def floor(self, flops: float, moved_bytes: float) -> tuple[float, str]:
        """The least time that so much work can take, and which of the two binds it: `FLOPs` or `bytes`."""
        compute, memory = flops / (self.matmul_tflops * 1e9), moved_bytes / (self.copy_gbps * 1e6)
        return (compute, "FLOPs") if compute > memory else (memory, "bytes")


def measure_limits(clock: Clock) -> Limits:
    """Time 8192³ in bf16 and a copy of 1 GiB; on a CPU, where it only has to run, 256³ in float32 and 1 MiB."""
    size, length, dtype = (8192, 2**29, torch.bfloat16) if clock.cuda else (256, 2**18, torch.float32)
    # random numbers: a GPU draws less power, and clocks higher, on constant ones
    left, right = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    product = clock.time(lambda _: left @ right).median
    source = torch.randn(length, device=clock.device, dtype=dtype)
    target = torch.empty_like(source)
    copy = clock.time(lambda _: target.copy_(source)).median
    return Limits(2 * size**3 / product / 1e9, 2 * source.nbytes / copy / 1e6)


def relative_error(given: Tensor, truth: Tensor) -> float:
    """‖given − truth‖ / ‖truth‖ in float32; infinite where `given` is not finite."""
    difference = (given.detach().float() - truth.detach()).norm() / truth.detach().norm()
    return float(difference) if difference.isfinite() else float("inf")


def reason(error: BaseException) -> str:
    """One line that says why something could not run."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


def machine(device: torch.device) -> dict[str, str]:
    """The device and the versions that a figure depends on."""
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
    for package in ("triton", "transformer-engine"):
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = "not installed"
    return about


def describe(about: dict[str, str], limits: Limits | None = None) -> str:
    """`machine` and `measure_limits` in one line."""
    text = ", ".join(about["device"] if key == "device" else f"{key} {value}" for key, value in about.items())
    if limits is None:
        return text
    return (
        f"{text}; measured limits: matrix product {limits.matmul_tflops:.3g} TFLOP/s, copy {limits.copy_gbps:.0f} GB/s"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; raises ValueError for a row of another length than the header."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells under {len(header)} headings: {row}")
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--markdown`."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything measured as JSON")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the tables as Markdown")


def write_results(args: argparse.Namespace, results: dict[str, Any], page: str) -> None:
    """Write the files that `add_output_options` asked for."""
    if args.json is not None:
        write_atomic(args.json, json.dumps(results, indent=1, default=_plain) + "\n")
    if args.markdown is not None:
        write_atomic(args.markdown, page + "\n")


def choices(text: str, allowed: Sequence[str], option: str, parser: argparse.ArgumentParser) -> list[str]:
    """A comma-separated option of which every part must be one of `allowed`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in allowed:
            parser.error(f"{option}: {part!r} is none of {', '.join(allowed)}")
    return parts


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Timing | Limits) else str(value)
