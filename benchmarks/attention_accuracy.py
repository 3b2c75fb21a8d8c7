"""Errors of the own attention kernels by number format and learned scale, against float64.

    python benchmarks/attention_accuracy.py --json accuracy.json --markdown accuracy.md
    python benchmarks/attention_accuracy.py --device cpu --shapes tiny          # in Triton's interpreter, minutes

Inputs are standard normal, lengths of q and k vary by orders of magnitude, and one head has each scale. `fp8` makes the
products of every head up to a scale of 39 in FP8, as training does up to `scale_block_fp8.FP8_BELOW` alone. Errors
‖x − truth‖/‖truth‖ are those of tokens that see at least 256 keys, at which FP8 is used; that of the scale's gradient
is relative to the root of its rows' summed squares, since its terms cancel.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from common import DTYPES, add_output_options, choices, describe, machine, markdown_table, write_results

from hmar_mega.scales import PATCH_NUMS, Pattern, ScaleSchedule

Q_SCALES = (1.0, 4.0, 8.0, 9.9, 14.0, 20.0, 41.5, 100.0)
FORMATS = (*DTYPES, "fp8")
SHAPES = {"tiny": (1, 16, 17), **{str(resolution): patch_nums for resolution, patch_nums in PATCH_NUMS.items()}}
PARTS = ("out", "dq", "dk", "dv", "ds")


def main(arguments: list[str] | None = None) -> None:
    """Measure shape by shape and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="256,512,1024", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--patterns", default="block_diagonal", help="also: block_causal")
    parser.add_argument("--formats", default=",".join(FORMATS), help="(default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    add_output_options(parser)
    args = parser.parse_args(arguments)
    shapes = choices(args.shapes, list(SHAPES), "--shapes", parser)
    patterns: list[Any] = choices(args.patterns, ("block_diagonal", "block_causal"), "--patterns", parser)
    formats = choices(args.formats, FORMATS, "--formats", parser)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --shapes tiny runs in Triton's interpreter")
    results: dict[str, Any] = {"machine": machine(torch.device(args.device)), "head_dim": args.head_dim, "rows": []}
    for shape in shapes:
        for pattern in patterns:
            for number_format in formats:
                found = errors(ScaleSchedule(SHAPES[shape]), pattern, number_format, args.head_dim, args.device)
                results["rows"].append({"shape": shape, "pattern": pattern, "format": number_format, "errors": found})
                write_results(args, results, page(results))
    print(page(results))


def errors(
    schedule: ScaleSchedule, pattern: Pattern, number_format: str, head_dim: int, device: str
) -> list[dict[str, float] | None]:
    """Errors of `PARTS` at each of `Q_SCALES`; None where FP8 has no kernel."""
    from hmar_mega.kernels.scale_block_attention import scale_block_attention as own
    from hmar_mega.kernels.scale_block_fp8 import FP8_BELOW_LIMIT
    from hmar_mega.kernels.tiles import FP8_KEYS
    from hmar_mega.model.attention import scale_block_attention

    dtype = torch.bfloat16 if number_format == "fp8" else DTYPES[number_format]
    tokens, heads = schedule.num_tokens, len(Q_SCALES)
    noise = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, 1, 3, heads, head_dim, generator=noise)
    qkv[:, :, :2] *= 10 ** (2 * torch.rand(tokens, 1, 2, heads, 1, generator=noise) - 1)
    qkv = qkv.to(device, dtype).requires_grad_()
    q_scale = torch.tensor(Q_SCALES, device=device, requires_grad=True)
    incoming = torch.randn(tokens, 1, heads * head_dim, generator=noise).to(device, dtype)
    out = own(qkv, q_scale, schedule, pattern, FP8_BELOW_LIMIT if number_format == "fp8" else 0.0)
    given = (out, *torch.autograd.grad(out, (qkv, q_scale), incoming))
    seen = torch.tensor(schedule.scale_lengths)
    large = (seen.cumsum(0) if pattern == "block_causal" else seen)[schedule.level_ids()] >= FP8_KEYS

    found: list[dict[str, float] | None] = []
    for head, scale in enumerate(Q_SCALES):
        if number_format == "fp8" and scale >= FP8_BELOW_LIMIT:
            found.append(None)
            continue
        columns = slice(head * head_dim, (head + 1) * head_dim)
        exact = qkv.detach()[:, :, :, head : head + 1].double().requires_grad_()
        exact_scale = q_scale.detach()[head : head + 1].double().requires_grad_()
        truth = scale_block_attention(exact, exact_scale, schedule, pattern, "sdpa")
        wanted = torch.autograd.grad(truth, (exact, exact_scale), incoming[..., columns].double())
        pairs = [(given[0][..., columns], truth)]
        pairs += [(given[1][:, :, part, head], wanted[0][:, :, part, 0]) for part in range(3)]
        row = {name: relative(x[large], y[large]) for name, (x, y) in zip(PARTS, pairs, strict=False)}
        along = wanted[0][:, :, 0, 0].norm(dim=-1) * exact[:, :, 0, 0].norm(dim=-1)
        row["ds"] = float((given[2][head].double() - wanted[1][0]).abs() / (along.norm() / scale))
        found.append(row)
    return found


def relative(given: torch.Tensor, truth: torch.Tensor) -> float:
    """‖given − truth‖ / ‖truth‖ in float64; NaN where anything is NaN."""
    return float((given.detach().double() - truth.detach()).norm() / truth.detach().norm())


def page(results: dict[str, Any]) -> str:
    """A table for each shape and pattern: a row a scale, a column a format."""
    sections = [f"{describe(results['machine'])}; head dim {results['head_dim']}. Errors of {' / '.join(PARTS)}."]
    for shape, pattern in dict.fromkeys((row["shape"], row["pattern"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["shape"], row["pattern"]) == (shape, pattern)]
        cells = [[f"{s:g}", *(_cell(row["errors"][i]) for row in rows)] for i, s in enumerate(Q_SCALES)]
        sections += [f"{shape} {pattern}", markdown_table(["scale", *(row["format"] for row in rows)], cells)]
    return "\n\n".join(sections)


def _cell(row: dict[str, float] | None) -> str:
    return "–" if row is None else " / ".join(f"{row[part]:.1e}" for part in PARTS)


if __name__ == "__main__":
    main()
