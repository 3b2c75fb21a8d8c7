"""Where the time of a training step goes: kernels of a torch profiler trace, by name and in groups."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import markdown_table

from hmar_mega.files import write_atomic

#: Group → parts of kernel names, lower case. The first group that matches takes a kernel: attention before matrix
#: products (both are made with CUTLASS), copies and the optimizer before the elementwise kernels that carry them out.
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "attn", "flash", "fmha", "sdpa", "scale_block"),
    "optimizer": ("multi_tensor_apply", "adam", "lpnorm", "foreach"),
    "loss": ("softmax", "nll_loss", "cross_entropy", "logsumexp"),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "_mm_", "wgmma"),
    "copy": ("memcpy", "memset", "copy_kernel", "catarraybatched", "transpose", "fillfunctor"),
    "convolution": ("conv", "cudnn", "upsample", "avg_pool", "interpolate"),
    "norm and elementwise": (
        "layer_norm", "layernorm", "norm", "elementwise", "reduce_kernel", "triton_", "modulate", "gelu", "index",
    ),
}  # fmt: skip

#: Trace categories that are work of the GPU.
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Kernels:
    """GPU work of a trace.

    Attributes:
        by_name: kernel → (calls, milliseconds).
        busy, span: milliseconds in which any kernel ran, and from the first one's start to the last one's end.
    """

    by_name: dict[str, tuple[int, float]]
    busy: float
    span: float

    def groups(self) -> dict[str, float]:
        """Milliseconds of each group, largest first."""
        totals: dict[str, float] = defaultdict(float)
        for name, (_, spent) in self.by_name.items():
            totals[group_of(name)] += spent
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def group_of(kernel: str) -> str:
    """The group of `GROUPS` that a kernel's name belongs to, or `other`."""
    lower = kernel.lower()
    return next((group for group, parts in GROUPS.items() if any(part in lower for part in parts)), "other")


def kernels_of(events: Iterable[dict[str, Any]]) -> Kernels:
    """The GPU work among the events of a Chrome trace, whose times are microseconds."""
    calls: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    spans = []
    for event in events:
        if event.get("cat") in GPU_WORK and event.get("ph") == "X":
            calls[event["name"]] += 1
            spent[event["name"]] += event["dur"] / 1e3
            spans.append((event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3))
    spans.sort()
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return Kernels({name: (calls[name], spent[name]) for name in calls}, busy, end - spans[0][0] if spans else 0.0)


def profile_steps(step: Callable[[int], object], count: int, folder: Path, name: str) -> dict[str, Any]:
    """Trace `count` steps into FOLDER/NAME.json and write what they spent to FOLDER/NAME.md.

    Returns:
        Milliseconds a step: of the groups, busy and span; all zero where there is no GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{name}.json"
    with torch.profiler.profile() as profiler:
        for number in range(count):
            step(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    kernels = kernels_of(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
    write_atomic(folder / f"{name}.md", kernel_page(kernels, count, name))
    return {
        "groups": {group: spent / count for group, spent in kernels.groups().items()},
        "busy": kernels.busy / count,
        "span": kernels.span / count,
        "steps": count,
    }


def kernel_page(kernels: Kernels, steps: int, name: str, longest: int = 40) -> str:
    """Groups and the `longest` kernels by time, in milliseconds a step."""
    total = sum(spent for _, spent in kernels.by_name.values()) or 1.0
    groups = [[g, f"{spent / steps:.3f}", f"{spent / total:.1%}"] for g, spent in kernels.groups().items()]
    ranked = sorted(kernels.by_name.items(), key=lambda item: -item[1][1])[:longest]
    rows = [
        [f"{spent / steps:.3f}", f"{spent / total:.1%}", f"{calls / steps:.0f}", group_of(kernel), f"`{kernel[:120]}`"]
        for kernel, (calls, spent) in ranked
    ]
    idle = 1 - kernels.busy / kernels.span if kernels.span else 0.0
    return "\n\n".join(
        [
            f"# {name}: GPU time of {steps} steps",
            f"{kernels.busy / steps:.2f} ms busy of {kernels.span / steps:.2f} ms a step; idle {idle:.1%}.",
            markdown_table(["group", "ms a step", "share"], groups),
            markdown_table(["ms a step", "share", "calls a step", "group", "kernel"], rows) + "\n",
        ]
    )
