"""How well `hmar-mega plan` predicts memory and time of one GPU: real steps of the engine beside the plan.

    python benchmarks/plan_memory.py --out benchmarks/results/plan_memory
    python benchmarks/plan_memory.py --device cpu --tiny --out /tmp/plan        # whether the script itself works

Every row runs in a process of its own: the engine as training builds it, with the whole tokenizer on the device, and
random tokens. Before timing, losses and gradients must be finite, the first loss that of an untrained model, and
weights and optimizer states exactly as planned. Then at least ten steps are timed one by one, and
the peak of memory is read over them (`common.peak_memory`). Writes FOLDER/plan_memory.json, which
`hmar-mega plan --calibration` reads, and FOLDER/plan_memory.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import peak_memory
from torch import Tensor

#: (configuration, settings): what the default run measures, for a GPU of 80 GB.
ROWS: list[tuple[str, list[str]]] = [
    ("train/d16-256", ["data.global_batch_size=64", "data.micro_batch_size=64"]),
    ("train/d16-256", ["data.global_batch_size=64", "data.micro_batch_size=64", "parallel.recompute=selective"]),
    ("train/d16-256", ["data.global_batch_size=64", "data.micro_batch_size=64", "parallel.recompute=full"]),
    ("train/d16-256", ["data.global_batch_size=64", "data.micro_batch_size=16"]),
    ("train/d16-256", ["data.global_batch_size=32", "data.micro_batch_size=32", "parallel.zero_stage=2"]),
    ("train/d16-256", ["data.global_batch_size=32", "data.micro_batch_size=32", "parallel.zero_stage=3"]),
    ("train/d16-256", ["data.global_batch_size=16", "data.micro_batch_size=16", "precision.compute=fp32"]),
    ("train/d16-256", ["data.global_batch_size=32", "data.micro_batch_size=32", "stage.name=masked"]),
    ("train/d24-256", ["data.global_batch_size=32", "data.micro_batch_size=32", "parallel.recompute=selective"]),
    ("train/d24-512", ["data.global_batch_size=8", "data.micro_batch_size=8"]),
    ("train/d30-256", ["data.global_batch_size=16", "data.micro_batch_size=16", "parallel.recompute=full"]),
    ("train/d36-s-512", ["data.global_batch_size=4", "data.micro_batch_size=4", "parallel.recompute=full"]),
]

#: What makes a row small enough for two CPU cores.
TINY = [
    "model.depth=2", "model.width=64", "model.heads=4", "model.num_classes=10", "model.mask_layers=1",
    "schedule.resolution=64", "schedule.patch_nums=[1,2,4]", "schedule.mask_schedule=null",
    "tokenizer.base_channels=32", "tokenizer.codebook_size=128", "data.global_batch_size=4", "data.micro_batch_size=2",
]  # fmt: skip


def main() -> None:
    """Run the rows, each in its own process, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two layers and tiny batches")
    parser.add_argument("--steps", type=int, default=12, help="timed steps a row (default: %(default)s)")
    parser.add_argument("--rows", help="numbers of the rows to run, such as 0,1,3 (default: all)")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 10:
        parser.error("--steps must be at least 10")
    if args.row is not None:
        print(json.dumps(measure(*json.loads(args.row), steps=args.steps)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = ROWS if args.rows is None else [ROWS[int(i)] for i in args.rows.split(",")]
    rows = []
    for config, overrides in chosen:
        rows.append(run_row(config, [*overrides, *(TINY if args.tiny else [])], args))
        write(rows, args.out)
    print((args.out / "plan_memory.md").read_text(encoding="utf-8"))


def run_row(config: str, overrides: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """One row in a process of its own; a row that fails keeps the end of what it printed."""
    environment = dict(os.environ)
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, __file__, "--out", str(args.out), "--steps", str(args.steps)]
    command += ["--row", json.dumps([config, overrides])]
    print(f"{config} {' '.join(overrides)}", flush=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    print(done.stderr[-2000:], file=sys.stderr, flush=True)
    return {"config": config, "overrides": overrides, "failed": done.stderr.strip()[-400:]}


def measure(name: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """Steps of the real engine, and what the plan says of them."""
    from hmar_mega.config_io import load_config
    from hmar_mega.engine import Engine
    from hmar_mega.model.layers_mcore import McoreLayers
    from hmar_mega.objective import Objective
    from hmar_mega.parallel.dims import parallel_world
    from hmar_mega.planning.cluster import load_cluster
    from hmar_mega.planning.layout import Layout
    from hmar_mega.planning.layouts import calibration, plan_layout
    from hmar_mega.planning.workload import Workload
    from hmar_mega.schedules import Schedule
    from hmar_mega.tokenizer.model import MultiScaleVQVAE
    from hmar_mega.train import build_model

    config = load_config(name, overrides)
    with parallel_world(config) as dims:
        cluster_name = cluster_of(dims.device)
        work, layout = Workload.of(config, load_cluster(cluster_name).device), Layout.of(config, 1)
        plan = plan_layout(work, layout, load_cluster(cluster_name).resized(1))
        torch.manual_seed(0)
        tokenizer = MultiScaleVQVAE(config.tokenizer, config.schedule.scales).to(dims.device).eval()
        model = build_model(config, McoreLayers(config.parallel.sequence_parallel)).to(dims.device)
        engine = Engine(model, config, dims, Schedule.of(config, 100 * config.data.global_batch_size))
        objective = Objective(config, tokenizer.quantizer, dims.device)
        losses: list[Tensor] = []

        def step(number: int) -> float:
            norm, scored = engine.train_step(batches(config, layout, number), objective)
            losses.extend(scores.loss.detach().mean() for scores in scored)
            return norm

        model.train()
        norms = [step(number) for number in range(3)]
        held = held_bytes(engine)
        checks = check(config, norms, [float(loss) for loss in losses], held, plan.memory)
        cuda = dims.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for number in range(steps):
            given = batches(config, layout, 3 + number)
            started = time.perf_counter()
            engine.train_step(given, objective)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times)
        return {
            "config": name,
            "overrides": overrides,
            "cluster": cluster_name,
            "device": torch.cuda.get_device_name(dims.device) if cuda else "cpu",
            "torch": torch.__version__,
            "checks": checks,
            "peak_bytes": peak_memory(dims.device),
            "planned_bytes": plan.memory.training,
            "parts": {key: value for key, value in vars(plan.memory).items()},
            "step_s": seconds,
            "fastest_s": min(times),
            "slowest_s": max(times),
            "steps": steps,
            "images_per_s": config.data.global_batch_size / seconds,
            "planned_step_s": plan.cost.step,
            "calibrated_step_s": plan.cost.step * calibration(),
        }


def cluster_of(device: torch.device) -> str:
    """The packaged cluster whose GPU this is."""
    if device.type == "cpu":
        return "local-cpu"
    name = torch.cuda.get_device_name(device)
    known = {"H200": "h200", "H100": "h100", "A100": "a100-80g"}
    found = next((cluster for part, cluster in known.items() if part in name), None)
    if found is None:
        raise SystemExit(f"no packaged cluster describes {name!r}; add one to configs/cluster and to cluster_of")
    return found


def batches(config: Any, layout: Any, step: int) -> list[Any]:
    """The micro-batches of a step: random tokens and classes."""
    from types import SimpleNamespace

    noise = torch.Generator().manual_seed(step)
    size, tokens = layout.micro_batch, config.schedule.scales.num_tokens
    found = []
    for number in range(layout.accumulation):
        first = (step * layout.accumulation + number) * size
        found.append(
            SimpleNamespace(
                tokens=torch.randint(0, config.tokenizer.codebook_size, (size, tokens), generator=noise),
                labels=torch.randint(0, config.model.num_classes, (size,), generator=noise),
                positions=torch.arange(first, first + size),
                keys=[str(first + i) for i in range(size)],
            )
        )
    return found


def held_bytes(engine: Any) -> dict[str, int]:
    """Weights and optimizer states that the engine holds, from the storages of its tensors."""
    from hmar_mega.parallel.zero import MOMENTS, flat_masters

    masters = flat_masters(engine.zero)
    moments = [engine.zero.optimizer.state[flat][key] for flat in masters for key in MOMENTS]
    weights = []
    for parameter in engine.model.parameters():
        part = getattr(parameter, "ds_tensor", None)
        if part is not None:
            weights.append(part)
        if part is None or parameter.ds_persist:
            weights.append(parameter.data)
    return {"weights": storage_bytes(weights), "optimizer": storage_bytes([*masters, *moments])}


def storage_bytes(tensors: list[Tensor]) -> int:
    """Of the storages behind tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def check(config: Any, norms: list[float], losses: list[float], held: dict[str, int], planned: Any) -> dict[str, Any]:
    """Refuse to time a run that does not train, or whose state is not as planned; returns what was checked."""
    expected = math.log(config.tokenizer.codebook_size)
    if not all(map(math.isfinite, [*norms, *losses])):
        raise SystemExit(f"not finite: losses {losses}, gradient norms {norms}")
    if min(norms) <= 0 or abs(losses[0] - expected) > 0.1 * expected:
        raise SystemExit(f"an untrained model has loss {expected:.2f}, this one {losses[0]:.2f}; norms {norms}")
    for part, size in held.items():
        if size != getattr(planned, part):
            raise SystemExit(f"{part}: {size} bytes held, {getattr(planned, part)} planned")
    return {"first_loss": losses[0], "expected_loss": expected, "norms": norms, "exact": held}


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """The rows as JSON and as a table."""
    (out / "plan_memory.json").write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
    lines = [
        "| configuration | peak GB | planned | ratio | step ms | planned | ratio | calibrated | img/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = " ".join([row["config"], *(text for text in row["overrides"] if text not in TINY)])
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed'].splitlines()[-1]} | | | | | | | |")
            continue
        peak = row["peak_bytes"]
        memory = f"{peak / 1e9:.2f}" if peak else "–"
        ratio = f"{row['planned_bytes'] / peak:.3f}" if peak else "–"
        lines.append(
            f"| {name} | {memory} | {row['planned_bytes'] / 1e9:.2f} | {ratio} | {row['step_s'] * 1e3:.1f} | "
            f"{row['planned_step_s'] * 1e3:.1f} | {row['planned_step_s'] / row['step_s']:.2f} | "
            f"{row['calibrated_step_s'] * 1e3:.1f} | {row['images_per_s']:.1f} |"
        )
    done = [row for row in rows if "failed" not in row]
    about = f"{done[0]['device']}, torch {done[0]['torch']}, medians of {done[0]['steps']} steps" if done else "no rows"
    (out / "plan_memory.md").write_text(f"{about}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
