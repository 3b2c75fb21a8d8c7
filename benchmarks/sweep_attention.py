"""Times the attention kernels under many launch configurations: where the numbers of `plan_for` come from.

    python benchmarks/sweep_attention.py [--rows 256,512] [--out sweep.json]

Prints forward and backward medians in ms, best first, after checking each configuration against a float32 reference on
one sample. `--warm I N` only compiles every N-th configuration, from the I-th, so that several processes can fill
Triton's cache side by side.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from triton.testing import do_bench

import hmar_mega.kernels.scale_block_attention as kernels
from hmar_mega.kernels import tiles
from hmar_mega.kernels.scale_block_attention import Launch, Plan
from hmar_mega.kernels.scale_block_fp8 import FP8_BELOW
from hmar_mega.model.attention import scale_block_attention as reference
from hmar_mega.scales import PATCH_NUMS, ScaleSchedule

ROWS = {
    "256": (256, 64, 16, "block_diagonal"),
    "256-small": (256, 4, 24, "block_diagonal"),
    "512": (512, 16, 24, "block_diagonal"),
    "1024": (1024, 4, 24, "block_diagonal"),
    "256-causal": (256, 64, 16, "block_causal"),
    "512-causal": (512, 16, 24, "block_causal"),
    "1024-causal": (1024, 4, 24, "block_causal"),
}

FORWARD = [
    (64, 64, 4, 2, True, None), (64, 64, 4, 3, True, 128), (64, 64, 4, 2, False, None), (64, 64, 4, 3, False, None),
    (64, 64, 4, 4, False, None), (64, 64, 4, 3, False, 128), (128, 64, 8, 3, False, None), (128, 64, 4, 2, False, None),
    (128, 64, 4, 3, False, None), (128, 128, 8, 2, False, None), (64, 128, 4, 2, False, None),
    (64, 128, 4, 2, False, 168), (64, 32, 4, 3, False, None), (64, 32, 4, 3, True, None),
]  # fmt: skip
BACKWARD = [
    (64, 64, 4, 2, None), (64, 64, 4, 3, None), (64, 64, 4, 2, 168), (64, 64, 4, 3, 168), (64, 32, 4, 2, None),
    (64, 32, 4, 3, None), (64, 32, 4, 3, 168), (128, 64, 8, 2, None), (128, 64, 8, 3, None), (128, 32, 8, 3, None),
    (64, 128, 8, 2, None), (128, 32, 4, 2, None),
]  # fmt: skip
#: Forward with FP8 products, every head of the table's scale, with the pass before.
FP8 = [
    (64, 64, 4, 2, None), (64, 64, 4, 3, None), (64, 64, 4, 4, None), (64, 64, 4, 3, 128), (128, 64, 8, 2, None),
    (128, 64, 8, 3, None), (128, 64, 4, 3, None), (64, 128, 4, 2, None), (128, 128, 8, 2, None), (128, 128, 8, 3, None),
]  # fmt: skip


def plans(group: int) -> dict[str, Plan]:
    """Every configuration by a name of its own: forward ones, both halves at once, and the halves apart."""
    base = Launch(64, 64, 4, 2, group)
    other = Launch(64, 64, 4, 2, group - 1)  # never equal to the half that is looked at
    found = {}
    for block, inner, warps, stages, inline, registers in FORWARD:
        name = f"F {block} {inner} {warps}w {stages}s r{registers} {'inline' if inline else 'apart'}"
        found[name] = Plan(Launch(block, inner, warps, stages, group, registers), inline, base, base)
    for block, inner, warps, stages, registers in BACKWARD:
        own = Launch(block, inner, warps, stages, group, registers)
        name = f"{block} {inner} {warps}w {stages}s r{registers}"
        found[f"B both {name}"] = Plan(base, True, own, own)
        found[f"B keys {name}"] = Plan(base, True, own, other)
        found[f"B queries {name}"] = Plan(base, True, other, own)
    for block, inner, warps, stages, registers in FP8:
        name = f"FP8 {block} {inner} {warps}w {stages}s r{registers}"
        found[name] = Plan(base, False, base, base, Launch(block, inner, warps, stages, group, registers))
    return found


def align(plan: Plan) -> None:
    """Let scales start in rows where a step of the FP8 kernel may start."""
    tiles.ALIGNMENT = max(64, plan.fp8.inner)
    for table in (tiles.key_tables, tiles.query_tables):
        table.cache_clear()


def measure(row: str, group: int, kinds: list[str], warm: tuple[int, int] | None) -> list[dict[str, object]]:
    """One row of the table under every plan."""
    resolution, batch, heads, pattern = ROWS[row]
    schedule = ScaleSchedule(PATCH_NUMS[resolution])
    qkv = torch.randn(schedule.num_tokens, batch, 3, heads, 64, device="cuda", dtype=torch.bfloat16)
    scale = torch.full((heads,), 4.0, device="cuda")
    d_out = torch.randn(schedule.num_tokens, batch, heads, 64, device="cuda", dtype=torch.bfloat16)
    found, causal = [], pattern == "block_causal"
    one = qkv[:, :1].contiguous()
    truth = reference(one.float(), scale, schedule, pattern, "sdpa")
    wanted = {name: plan for name, plan in plans(group).items() if name.split()[0] in kinds}
    for number, (name, plan) in enumerate(wanted.items()):
        if warm is not None and number % warm[1] != warm[0]:
            continue
        kernels.plan_for = lambda *_, plan=plan: plan
        align(plan)
        fp8_below = FP8_BELOW if name.startswith("FP8") else 0.0
        forward = partial(kernels._forward, q_scale=scale, patch_nums=list(schedule.patch_nums), causal=causal,
                          fp8_below=fp8_below)  # fmt: skip
        try:
            out, rows = forward(one)
            error = float((out.flatten(2).float() - truth).norm() / truth.norm())
            out, rows = forward(qkv)
            arguments = (d_out, qkv, scale, out, rows, list(schedule.patch_nums), causal)
            kernels._backward(*arguments)
            torch.cuda.synchronize()
            if warm is not None:
                continue
            if not name.startswith("B"):
                call = partial(forward, qkv)
            else:
                parts = kernels._backward_launches(plan)
                timed = {"both": parts, "keys": parts[:1], "queries": parts[-1:]}[name.split()[1]]
                kernels._backward_launches = lambda _, timed=timed: timed
                call = partial(kernels._backward, *arguments)
            ms = do_bench(call, warmup=20, rep=60, return_mode="median")
            found.append({"row": row, "group": group, "name": name, "ms": ms, "error": error})
        except Exception as problem:  # a configuration that does not fit the machine is a result
            if warm is None:
                found.append({"row": row, "group": group, "name": name, "problem": str(problem)[:100]})
        finally:
            kernels._backward_launches = ORIGINAL
    return found


ORIGINAL = kernels._backward_launches


def main() -> None:
    """Measure the rows that are asked for and print the best configurations of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--groups", default="8")
    parser.add_argument("--kinds", default="F,FP8,B", help="forward, forward in FP8, backward (default: %(default)s)")
    parser.add_argument("--warm", type=int, nargs=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--best", type=int, default=4)
    args = parser.parse_args()
    found = []
    for row in args.rows.split(","):
        for group in map(int, args.groups.split(",")):
            found += measure(row, group, args.kinds.split(","), tuple(args.warm) if args.warm else None)
            if args.warm:
                continue
            here = [f for f in found if f["row"] == row and f["group"] == group]
            for kind in ("F ", "FP8", "B both", "B keys", "B queries"):
                ranked = sorted((f for f in here if f["name"].startswith(kind) and "ms" in f), key=lambda f: f["ms"])
                print(row, group, " | ".join(f"{f['name']} {f['ms']:.3f}" for f in ranked[: args.best]), flush=True)
            for f in here:
                if "problem" in f or f["error"] > 0.02:
                    print("  !", f, flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
