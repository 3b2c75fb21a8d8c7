"""When attention through Transformer Engine pays, in bf16 and in FP8: device and host time, CUDA graphs, errors.

    python benchmarks/te_attention.py --out benchmarks/results/te_attention
    python benchmarks/te_attention.py --rows 0,2 --out /tmp/te                 # some of the rows

Host time is what one forward and backward take until Python has the device's work queued, with an empty queue; device
time is of CUDA events around many calls. Where the host takes longer, the device waits, unless the calls are in a CUDA
graph, whose times stand in a column of their own. Errors are relative to float32 on the first sample. Writes
OUT.json and OUT.md, and prints them with a verdict: FP8 pays in a row where the slower of its two times beats those of
both bf16 backends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmar_mega.model.attention import scale_block_attention
from hmar_mega.precision import exact_float32
from hmar_mega.probe import look_at_machine
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule

#: (resolution, batch, heads, head dim). Head dim 64 is that of published models; with 128 the heads are half as many.
ROWS = [
    (256, 64, 16, 64), (256, 64, 8, 128), (512, 16, 24, 64), (512, 16, 12, 128), (1024, 4, 24, 64), (1024, 4, 12, 128),
]  # fmt: skip

BACKENDS = ("sdpa", "te", "te_fp8")

CALLS = 30


def main() -> None:
    """Measure the rows and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="file name without its ending")
    parser.add_argument("--rows", help="numbers of the rows to run, such as 0,1,3 (default: all)")
    args = parser.parse_args()
    chosen = range(len(ROWS)) if args.rows is None else [int(number) for number in args.rows.split(",")]
    machine = look_at_machine()
    results = [measure_row(*ROWS[number]) for number in chosen]
    text = report(results)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tree = {"gpu": machine.gpu, "transformer_engine": machine.transformer_engine, "cudnn": machine.cudnn}
    Path(f"{args.out}.json").write_text(json.dumps({**tree, "torch": torch.__version__, "rows": results}, indent=1))
    head = f"{machine.gpu}, torch {torch.__version__}, TE {machine.transformer_engine}, cuDNN {machine.cudnn}"
    Path(f"{args.out}.md").write_text(f"# Attention through Transformer Engine\n\n{head}\n\n{text}\n")


def measure_row(resolution: int, batch: int, heads: int, head_dim: int) -> dict[str, Any]:
    """Every backend on one problem."""
    schedule = ScaleSchedule(PATCH_NUMS[resolution])
    generator = torch.Generator().manual_seed(0)
    shape = (schedule.num_tokens, batch, 3, heads, head_dim)
    qkv = torch.randn(shape, generator=generator).cuda().bfloat16().requires_grad_()
    q_scale = torch.full((heads,), 4.0, device="cuda", requires_grad=True)
    gradient = torch.randn(schedule.num_tokens, batch, heads * head_dim, generator=generator).cuda().bfloat16()
    row: dict[str, Any] = {"resolution": resolution, "batch": batch, "heads": heads, "head_dim": head_dim}
    for backend in BACKENDS:

        def forward(qkv: Tensor, q_scale: Tensor, backend: str = backend) -> Tensor:
            return scale_block_attention(qkv, q_scale, schedule, "block_diagonal", backend)  # type: ignore[arg-type]

        row[backend] = {
            **times(forward, qkv, q_scale, gradient),
            "graph_ms": graphed(forward, qkv, q_scale, gradient),
            "errors": errors(forward, qkv, q_scale, gradient, schedule),
        }
    return row


def times(forward: Callable[..., Tensor], qkv: Tensor, q_scale: Tensor, gradient: Tensor) -> dict[str, float]:
    """Milliseconds of a forward and a backward: of the device with a full queue, of the host with an empty one."""
    found: dict[str, list[float]] = {"forward_ms": [], "backward_ms": [], "host_forward_ms": [], "host_backward_ms": []}
    for call in range(CALLS + 5):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        if call % 2:  # work in front of the calls hides the host's time from the device's
            torch.cuda._sleep(40_000_000)
        began = time.perf_counter()
        marks[0].record()
        out = forward(qkv, q_scale)
        middle = time.perf_counter()
        marks[1].record()
        out.backward(gradient)
        end = time.perf_counter()
        marks[2].record()
        torch.cuda.synchronize()
        qkv.grad = q_scale.grad = None
        if call < 5:
            continue
        if call % 2:
            found["forward_ms"].append(marks[0].elapsed_time(marks[1]))
            found["backward_ms"].append(marks[1].elapsed_time(marks[2]))
        else:
            found["host_forward_ms"].append((middle - began) * 1e3)
            found["host_backward_ms"].append((end - middle) * 1e3)
    return {key: statistics.median(values) for key, values in found.items()}


def graphed(forward: Callable[..., Tensor], qkv: Tensor, q_scale: Tensor, gradient: Tensor) -> float | str:
    """Milliseconds of forward and backward in a CUDA graph, or why there is none."""
    try:
        call = torch.cuda.make_graphed_callables(forward, (qkv, q_scale))
        for _ in range(3):
            call(qkv, q_scale).backward(gradient)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            call(qkv, q_scale).backward(gradient)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / CALLS * 1e3
    except RuntimeError as err:
        return str(err).strip().split("\n")[0]
    finally:
        qkv.grad = q_scale.grad = None


def errors(
    forward: Callable[..., Tensor], qkv: Tensor, q_scale: Tensor, gradient: Tensor, schedule: ScaleSchedule
) -> dict[str, float]:
    """Relative errors of output, dq, dk and dv of the first sample's first two heads against float32."""
    part = qkv.detach()[:, :1, :, :2].clone().requires_grad_()
    exact = part.detach().float().requires_grad_()
    head_dim = qkv.shape[-1]
    back = gradient[:, :1, : 2 * head_dim]
    out = forward(part, q_scale.detach()[:2])
    out.backward(back)
    outputs = []
    with exact_float32():
        for scale in range(schedule.num_scales):  # one at a time: no N × N mask at 1024 px
            rows = schedule.span(scale)
            alone = ScaleSchedule((1, schedule.patch_nums[scale])) if scale else ScaleSchedule((1, 2))
            padded = torch.cat([torch.zeros_like(exact[:1]), exact[rows]]) if scale else exact[:5]
            result = scale_block_attention(padded, q_scale.detach()[:2], alone, "block_diagonal", "reference")
            outputs.append(result[1:] if scale else result[:1])
        whole = torch.cat(outputs)
        whole.backward(back.float())
    assert part.grad is not None
    assert exact.grad is not None
    pairs = {"output": (out, whole)}
    pairs |= {name: (part.grad[:, :, i], exact.grad[:, :, i]) for i, name in enumerate(("dq", "dk", "dv"))}
    return {name: float((a.float() - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


def report(rows: list[dict[str, Any]]) -> str:
    """A table and, for every row, whether FP8 pays."""
    lines = [
        "| row | backend | forward ms | backward ms | host ms | both in a CUDA graph, ms | errors out dq dk dv |",
        "|---|---|---|---|---|---|---|",
    ]
    verdicts = []
    for row in rows:
        name = f"{row['resolution']} px, B {row['batch']}, H {row['heads']}, D {row['head_dim']}"
        for backend in BACKENDS:
            found = row[backend]
            graph = found["graph_ms"]
            graph = f"{graph:.2f}" if isinstance(graph, float) else f"none: {graph[:60]}"
            wrong = " ".join(f"{value:.3f}" for value in found["errors"].values())
            lines.append(
                f"| {name} | {backend} | {found['forward_ms']:.2f} | {found['backward_ms']:.2f} | "
                f"{found['host_forward_ms']:.2f} / {found['host_backward_ms']:.2f} | {graph} | {wrong} |"
            )
        verdicts.append(f"- {name}: {verdict(row)}")
    return "\n".join([*lines, "", *verdicts])


def verdict(row: dict[str, Any]) -> str:
    """FP8 against the faster of the bf16 backends, with and without the host's time."""
    device = {b: row[b]["forward_ms"] + row[b]["backward_ms"] for b in BACKENDS}
    host = {b: row[b]["host_forward_ms"] + row[b]["host_backward_ms"] for b in BACKENDS}
    paced = {b: max(device[b], host[b]) for b in BACKENDS}
    rival = min(("sdpa", "te"), key=lambda b: device[b])
    pays = "pays" if paced["te_fp8"] < min(paced["sdpa"], paced["te"]) else "does not pay"
    return (
        f"FP8 {pays}: {device['te_fp8']:.2f} ms on the device and {host['te_fp8']:.2f} ms of the host, {rival} "
        f"{device[rival]:.2f} and {host[rival]:.2f}"
    )


if __name__ == "__main__":
    main()
