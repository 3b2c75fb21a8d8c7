"""Scale-block attention, forward and backward: ours, the rivals on this machine, and what the machine allows.

    python benchmarks/attention.py --json attention.json --markdown attention.md
    python benchmarks/attention.py --shapes 256 --pattern block_diagonal --rivals flex,varlen --backends triton
    python benchmarks/attention.py --external their_kernel.py        # a file with attention(q, k, v, schedule, pattern)
    python benchmarks/attention.py --device cpu --shapes tiny --dtype fp32         # whether the script itself works

Ours takes the packed, unnormalised projection and includes normalisation and scale. A rival is timed twice: `alone`, on
normalised q, k and v laid out as it likes them, and `whole`, from the packed projection to the block's output, with a
compiled normalisation in front. Everything is compared with float32 before it is timed, and not timed if it is wrong.
benchmarks/README.md says how to read what is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from attention_table import PARTS, live_line, page
from common import (
    DTYPES,
    Clock,
    Limits,
    Timing,
    add_output_options,
    choices,
    describe,
    machine,
    measure_limits,
    reason,
    relative_error,
    write_results,
)  # fmt: skip
from rivals import (
    RIVALS,
    Problem,
    Rival,
    Unavailable,
    compile_once,
    compiled_normalised,
    external,
    normalised,
    whole,
)  # fmt: skip
from torch import Tensor

from hmar_mega.model.attention import Backend, scale_block_attention
from hmar_mega.scales import PATCH_NUMS, Pattern, ScaleSchedule


@dataclass(frozen=True)
class Row:
    """A shape of the table.

    Attributes:
        published: forward and backward milliseconds of the published implementation's Triton kernels in fp16 after
            their autotuning, on an H100 80GB (torch 2.11, triton 3.6), or None. Measured elsewhere: for orientation.
    """

    shape: str
    pattern: Pattern
    batch: int
    heads: int
    published: tuple[float, float] | None = None

    @property
    def schedule(self) -> ScaleSchedule:
        """The scales of `shape`."""
        resolution = self.shape.removesuffix("-small")
        return ScaleSchedule((1, 2, 3, 4) if resolution == "tiny" else PATCH_NUMS[int(resolution)])


ROWS = [
    Row("256", "block_diagonal", 64, 16, (0.217, 1.030)),
    Row("256-small", "block_diagonal", 4, 24, (0.108, 0.687)),
    Row("512", "block_diagonal", 16, 24, (0.555, 2.299)),
    Row("1024", "block_diagonal", 4, 24, (1.920, 7.394)),
    Row("256", "block_causal", 64, 16, (0.368, 1.456)),
    Row("512", "block_causal", 16, 24, (1.046, 3.815)),
    Row("1024", "block_causal", 4, 24, (4.172, 15.60)),
    Row("tiny", "block_diagonal", 2, 2),
    Row("tiny", "block_causal", 2, 2),
]
SHAPES = tuple(dict.fromkeys(row.shape for row in ROWS))
HEAD_DIM = 64

#: Largest relative error that is still taken for right: of the output, of the gradient of the projection and of that of
#: the scales. q and k rounded to bf16 alone give 0.003 to 0.01.
TOLERANCE = {
    torch.float32: (1e-4, 1e-4, 1e-3),
    torch.float16: (0.01, 0.02, 0.02),
    torch.bfloat16: (0.03, 0.06, 0.06),
}

#: The same with products in FP8, gradients of `te_fp8` included.
FP8_TOLERANCE = (0.12, 0.25, 0.25)

#: Largest dense float32 matrix of logits that the reference holds at a time.
REFERENCE_BYTES = 2**30

#: q, k, v packed; the scales of the queries; the gradient of the output, contiguous.
Inputs = tuple[Tensor, Tensor, Tensor]


def main(arguments: list[str] | None = None) -> None:
    """Measure the rows one by one, print each figure when it is there, and the tables at the end."""
    parser = _parser()
    args = parser.parse_args(arguments)
    rows = _chosen_rows(args, parser)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    clock, started = Clock(device, args.budget), time.perf_counter()
    about, limits = machine(device), measure_limits(clock)
    print(describe(about, limits), flush=True)
    results: dict[str, Any] = {"machine": about, "limits": vars(limits), "dtype": args.dtype, "rows": []}
    for row in rows:
        problem = Problem(row.schedule, row.pattern, row.batch, row.heads, HEAD_DIM, dtype, device)
        measured = {
            "shape": row.shape, "pattern": row.pattern, "tokens": row.schedule.num_tokens, "batch": row.batch,
            "heads": row.heads, "head_dim": HEAD_DIM, "published": row.published,
            "floor": floors(problem, limits), "contenders": [],
        }  # fmt: skip
        results["rows"].append(measured)
        print(f"\n{row.shape} {row.pattern}: N {row.schedule.num_tokens}, B {row.batch}, H {row.heads}", flush=True)
        try:
            for found in measure_row(problem, clock, args):
                measured["contenders"].append(found)
                print(live_line(found), flush=True)
        except torch.AcceleratorError as err:
            print(f"the device is lost ({reason(err)}): leave the last contender out", file=sys.stderr)
            break
        finally:
            results["seconds"] = time.perf_counter() - started
            write_results(args, results, page(results))
    print(f"\n{page(results)}\n\n{results['seconds']:.0f} s in all")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = [name for name in get_args(Backend) if name not in ("auto", "reference")]
    parser.add_argument("--shapes", default="256,256-small,512,1024", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--pattern", default="block_diagonal,block_causal", help="(default: %(default)s)")
    parser.add_argument("--backends", default=",".join(own), help="ours; none: '' (default: %(default)s)")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="none: '' (default: %(default)s)")
    parser.add_argument("--external", type=Path, action="append", default=[], metavar="PATH", help="a rival's file")
    parser.add_argument(
        "--q-scale", type=float, nargs=2, default=(2.0, 16.0), metavar=("LOW", "HIGH"),
        help="of the heads' scales; FP8 heads of ours are those below 10 (default: 2 16)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="launch every call from the host: no CUDA graphs")
    parser.add_argument("--eager-normalisation", action="store_true", help="do not compile what stands before a rival")
    parser.add_argument("--budget", type=float, default=150.0, help="milliseconds a measurement (default: %(default)s)")
    add_output_options(parser)
    return parser


def _chosen_rows(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Row]:
    """The rows that the options name; also checks `--backends` and `--rivals`."""
    shapes = choices(args.shapes, SHAPES, "--shapes", parser)
    patterns = choices(args.pattern, get_args(Pattern), "--pattern", parser)
    args.backends = choices(args.backends, get_args(Backend), "--backends", parser)
    args.rivals = choices(args.rivals, list(RIVALS), "--rivals", parser)
    names = [*args.rivals, *(path.name for path in args.external)]
    if len(set(names)) < len(names):
        parser.error(f"two rivals of one name among {', '.join(names)}; rename a file of --external")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --shapes tiny shows whether the script works")
    rows = [row for row in ROWS if row.shape in shapes and row.pattern in patterns]
    if not rows:
        parser.error(f"no row has --shapes {args.shapes} with --pattern {args.pattern}")
    return rows


def floors(problem: Problem, limits: Limits) -> dict[str, dict[str, Any]]:
    """Least milliseconds of each part, by the work it cannot avoid.

    Forward reads q, k, v and writes the output, and multiplies QKᵀ and PV: 4·D FLOPs a pair. Backward reads q, k, v,
    the output and its gradient, writes three gradients, and makes five such products.
    """
    schedule, element = problem.schedule, torch.finfo(problem.dtype).bits // 8
    flops = 4.0 * schedule.attended_pairs(problem.pattern) * problem.batch * problem.heads * problem.head_dim
    moved = 4.0 * problem.elements * element
    forward, backward = limits.floor(flops, moved), limits.floor(2.5 * flops, 2 * moved)
    named = {"forward": forward, "backward": backward, "both": (forward[0] + backward[0], backward[1])}
    return {part: {"ms": ms, "bound": bound} for part, (ms, bound) in named.items()}


def make_inputs(problem: Problem, low: float, high: float) -> Inputs:
    """Standard normal projection and output gradient, query scales from `low` to `high` (training starts at 4)."""
    tokens, shape = problem.schedule.num_tokens, (problem.batch, 3, problem.heads, problem.head_dim)
    noise = torch.Generator(problem.device).manual_seed(0)
    qkv = torch.randn(tokens, *shape, generator=noise, device=problem.device, dtype=problem.dtype).requires_grad_()
    q_scale = torch.linspace(low, high, problem.heads, device=problem.device).requires_grad_()
    width = problem.heads * problem.head_dim
    grad = torch.randn(
        tokens, problem.batch, width, generator=noise, device=problem.device, dtype=problem.dtype
    )  # fmt: skip
    compile_once(qkv, q_scale)
    return qkv, q_scale, grad


def reference(problem: Problem, inputs: Inputs) -> Inputs:
    """Output and gradients of the projection and of the scales, float32 throughout, some heads at a time."""
    qkv, q_scale, grad = (x.detach() for x in inputs)
    out, d_qkv = torch.empty_like(grad, dtype=torch.float32), torch.empty_like(qkv, dtype=torch.float32)
    d_scale = torch.zeros_like(q_scale)
    size = max(1, REFERENCE_BYTES // (4 * problem.schedule.num_tokens**2))
    out_heads, grad_heads = (x.unflatten(-1, (problem.heads, problem.head_dim)) for x in (out, grad))
    for sample in range(problem.batch):
        for first in range(0, problem.heads, size):
            heads, one = slice(first, first + size), slice(sample, sample + 1)
            leaf = qkv[:, one, :, heads].float().requires_grad_()
            scale = q_scale[heads].clone().requires_grad_()
            part = scale_block_attention(leaf, scale, problem.schedule, problem.pattern, "reference")
            d_leaf, d_part = torch.autograd.grad(
                part, (leaf, scale), grad_heads[:, one, heads].flatten(2).float()
            )  # fmt: skip
            out_heads[:, one, heads] = part.detach().view_as(out_heads[:, one, heads])
            d_qkv[:, one, :, heads] = d_leaf
            d_scale[heads] += d_part
    return out, d_qkv, d_scale


def measure_row(problem: Problem, clock: Clock, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Every contender of a row, ours first; one that fails says why and the others go on.

    Raises:
        torch.AcceleratorError: when a contender has left the device unusable.
    """
    inputs = make_inputs(problem, *args.q_scale)
    truth = reference(problem, inputs)
    builders = {name: RIVALS[name] for name in args.rivals}
    builders |= {path.name: external(path.resolve()) for path in args.external}
    eager = args.eager_normalisation or not clock.cuda
    normalise = normalised if eager else compiled_normalised()
    contenders = [(name, "ours") for name in args.backends] + [(name, "rival") for name in builders]
    for name, kind in contenders:
        found: dict[str, Any] = {"name": name, "kind": kind}
        try:
            if kind == "ours":
                check_and_time(found, ours(problem, name), inputs, truth, clock, args.eager)
            else:
                rival = builders[name](problem)
                check_and_time(found, whole(rival, normalise), inputs, truth, clock, args.eager)
                if "whole" in found:
                    found["alone"], _ = time_alone(rival, inputs, clock, args.eager)
        except Unavailable as err:
            found["failed"] = f"cannot run: {err}"
        except Exception as err:  # whatever a rival raises must not end the others
            found["failed"] = f"failed: {reason(err)}"
        yield found
        if clock.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def ours(problem: Problem, backend: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A backend of `scale_block_attention` on the packed projection."""

    def run(qkv_NB3HD: Tensor, q_scale_H: Tensor) -> Tensor:
        return scale_block_attention(qkv_NB3HD, q_scale_H, problem.schedule, problem.pattern, backend)

    return run


def check_and_time(
    found: dict[str, Any], run: Callable[[Tensor, Tensor], Tensor], inputs: Inputs, truth: Inputs, clock: Clock,
    eager: bool,
) -> None:  # fmt: skip
    """Note `error`, and then `whole` times or, where an error is too large, why there are none (`failed`)."""
    qkv, q_scale, grad = inputs
    out = run(qkv, q_scale)
    given = (out.detach(), *torch.autograd.grad(out, (qkv, q_scale), grad))
    del out
    found["error"] = {
        name: relative_error(x, right) for name, x, right in zip(("out", "qkv", "scale"), given, truth, strict=True)
    }
    tolerance = FP8_TOLERANCE if found["name"].endswith("fp8") else TOLERANCE[qkv.dtype]
    limits = dict(zip(("out", "qkv", "scale"), tolerance, strict=True))
    wrong = [f"{name} {found['error'][name]:.2g} > {limit:.2g}" for name, limit in limits.items()
             if not found["error"][name] <= limit]  # fmt: skip
    if wrong:
        found["failed"] = f"wrong, not timed: relative error {', '.join(wrong)}"
        return
    found["whole"], why = times(run, (qkv, q_scale), (grad,), clock, eager)
    if why:
        found["launched"] = why


def time_alone(rival: Rival, inputs: Inputs, clock: Clock, eager: bool) -> tuple[dict[str, Timing], str | None]:
    """The attention alone, on tensors that are contiguous as the rival takes them."""
    with torch.no_grad():
        arranged = rival.arrange(*normalised(inputs[0], inputs[1], rival.order))
        leaves = tuple(x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in arranged)
    # with gradients, as it was called before: a compiled rival would be compiled once more for calls without
    grads = tuple(torch.randn_like(out) for out in rival.attend(*leaves))
    return times(rival.attend, leaves, grads, clock, eager)


def times(
    run: Callable[..., Tensor | tuple[Tensor, ...]], leaves: tuple[Tensor, ...], grads: tuple[Tensor, ...],
    clock: Clock, eager: bool,
) -> tuple[dict[str, Timing], str | None]:  # fmt: skip
    """Forward as in training, backward alone, and both; and why they were launched from the host, if they were.

    On a GPU passes are captured and replayed as CUDA graphs, as training does: the host's time is no part of them.
    Launched, every backward pass has an autograd graph of its own, made before its clock starts: some rivals free what
    they saved.
    """
    why = "--eager" if eager else None
    if clock.cuda and not eager:
        try:
            forward, backward_ = capture(run, leaves, grads)
        except Exception as err:  # whatever a rival raises: it is timed without
            why = reason(err)
            torch.cuda.synchronize()
        else:
            replays = {
                "forward": (lambda _: forward.replay(), lambda: None),
                "backward": (lambda _: backward_.replay(), forward.replay),
                "both": (lambda _: (forward.replay(), backward_.replay()), lambda: None),
            }
            return {part: clock.time(*replays[part]) for part in PARTS}, None

    def backward(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grads)

    calls = {
        "forward": (lambda _: run(*leaves), lambda: None),
        "backward": (backward, lambda: run(*leaves)),
        "both": (lambda _: backward(run(*leaves)), lambda: None),
    }
    return {part: clock.time(*calls[part]) for part in PARTS}, why


def capture(
    run: Callable[..., Tensor | tuple[Tensor, ...]], leaves: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
    """Forward and backward pass as CUDA graphs over one memory pool."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(run(*leaves), leaves, grads)
    torch.cuda.current_stream().wait_stream(side)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        out = run(*leaves)
    with torch.cuda.graph(backward, pool=forward.pool()):
        kept = torch.autograd.grad(out, leaves, grads)
    forward.kept = (out, kept)  # type: ignore[attr-defined]  # what replays write stays allocated
    return forward, backward


if __name__ == "__main__":
    main()
