"""Training on 1, 2, 4, 8 GPUs of one host: throughput, MFU, efficiency, memory and traffic beside the plan's.

    python benchmarks/scaling.py --out scaling                                   # all GPUs there are
    python benchmarks/scaling.py --out scaling --gpus 1,2 --models d24-256:16 --layouts data,tensor2
    python benchmarks/scaling.py --out scaling --page                            # table and plot of what was measured
    python benchmarks/scaling.py --out /tmp/scaling --device cpu --tiny --gpus 1,2   # whether the script itself works

The work a GPU stays the same (weak scaling): NAME:BATCH is images a GPU and step. Every case runs in processes of its
own, one a GPU, on random tokens, and is kept in OUT/cases: what is there is not measured again, so that a run that was
stopped goes on, and cases of several runs come into one table. Like all training here it leaves NVLink multicast off
(NCCL_NVLS_ENABLE=0) unless that is set. Efficiency is the rate by that of one GPU times their number.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import describe, laps, machine, markdown_table, peak_memory
from plan_memory import TINY, batches, cluster_of

from hmar_mega.files import write_atomic

#: Layouts by name: GPUs that one model copy takes, settings, and micro-batches a step.
LAYOUTS: dict[str, tuple[int, list[str], int]] = {
    "data": (1, [], 1),
    "zero2": (1, ["parallel.zero_stage=2"], 1),
    "zero3": (1, ["parallel.zero_stage=3"], 1),
    "tensor2": (2, ["parallel.tensor_parallel=2"], 1),
    "sequence2": (2, ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"], 1),
    "sequence2-fp8": (
        2, ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "precision.fp8=linears"], 1,
    ),
    "sequence4": (4, ["parallel.tensor_parallel=4", "parallel.sequence_parallel=true"], 1),
    "pipeline2": (2, ["parallel.pipeline_parallel=2"], 8),
    "pipeline2-virtual2": (2, ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=2"], 8),
    "pipeline4": (4, ["parallel.pipeline_parallel=4"], 16),
}  # fmt: skip

#: Untimed steps before timed ones.
WARM_UP_STEPS = 4

#: How long processes may take to end after the first of them failed, in seconds.
GRACE = 10.0


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, one case after the other; then write the page and the plot."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.worker is not None:
        _work(**json.loads(args.worker))
        return
    if args.device == "cuda" and not args.page and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny shows whether the script works")
    cases = Path(args.out) / "cases"
    cases.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for case in [] if args.page else planned_cases(args, parser):
        file = cases / f"{case['name']}.json"
        if file.exists() and "failed" not in json.loads(file.read_text(encoding="utf-8")):
            print(f"{case['name']}: measured already", flush=True)
            continue
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over: the same command goes on with {case['name']}", flush=True)
            break
        row = run_case(case, args)
        write_atomic(file, json.dumps(row, indent=1) + "\n")
        print(live_line(row), flush=True)
    print(write_page(Path(args.out)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="cases, table and plot")
    parser.add_argument(
        "--models", default="d24-256:16,d30-256:8,d24-512:4", metavar="NAME:BATCH,…",
        help="configurations of configs/train and images a GPU and step (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--gpus", metavar="N,…", help="numbers of GPUs (default: 1, 2, 4 … of this host)")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of these (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting, of all")
    parser.add_argument("--steps", type=int, default=15, help="timed steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no case after so many")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one case (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="measure nothing, write table and plot anew")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two layers and tiny batches")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def planned_cases(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """Every model on every number of GPUs in every layout that divides it; one GPU first, to which others compare."""
    there = torch.cuda.device_count() if args.device == "cuda" else 2
    powers = [2**i for i in range(4) if 2**i <= there]
    counts = powers if args.gpus is None else _numbers(args.gpus, parser)
    if args.device == "cuda" and max(counts) > there:
        parser.error(f"--gpus {args.gpus}: this host has {there}")
    names = [name.strip() for name in args.layouts.split(",")]
    if unknown := [name for name in names if name not in LAYOUTS]:
        parser.error(f"--layouts: {unknown[0]!r} is none of {', '.join(LAYOUTS)}")
    cases = []
    for model in args.models.split(","):
        config, colon, batch = model.strip().partition(":")
        if not colon or not batch.isdigit() or int(batch) < 1:
            parser.error(f"--models: {model!r} is not NAME:BATCH, such as d24-256:16")
        for world in sorted(counts):
            for name in names:
                size, settings, accumulation = LAYOUTS[name]
                # one GPU has nothing to cut but for ZeRO's own cost
                if world % size or (world == 1 and name not in ("data", "zero3")):
                    continue
                cases.append(_case(config, 2 if args.tiny else int(batch), world, name, settings, accumulation, args))
    return cases


def _case(
    config: str, batch: int, world: int, layout: str, settings: list[str], accumulation: int, args: argparse.Namespace
) -> dict[str, Any]:
    data = world // LAYOUTS[layout][0]
    images = batch * world
    micro = max(1, images // data // accumulation)
    overrides = [
        *((*TINY, "model.depth=4") if args.tiny else ()), f"data.global_batch_size={micro * data * accumulation}",
        f"data.micro_batch_size={micro}", *settings, *args.set,
    ]  # fmt: skip
    name = re.sub(r"[^\w.-]+", "-", "_".join([f"{config}-b{batch}", f"gpus{world}", layout, *args.set]))
    return {
        "name": name, "config": f"train/{config}", "model": f"{config}:{batch}", "gpus": world, "layout": layout,
        "overrides": overrides, "settings": args.set,
    }  # fmt: skip


def _numbers(text: str, parser: argparse.ArgumentParser) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        parser.error(f"--gpus {text}: numbers with commas between them, such as 1,2,4")
    return [int(part) for part in parts]


def run_case(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Start the processes of a case and wait; a case that fails keeps the end of what its first failed rank printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        worker = json.dumps({"case": case, "steps": args.steps, "result": str(result)})
        logs, processes = [], []
        for rank in range(case["gpus"]):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case["gpus"]),
                "LOCAL_WORLD_SIZE": str(case["gpus"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            environment.setdefault("NCCL_NVLS_ENABLE", "0")
            if args.device == "cpu":
                environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            log = Path(folder) / f"rank{rank}.log"
            logs.append(log)
            with log.open("w") as out:
                command = [sys.executable, __file__, "--out", args.out, "--worker", worker]
                processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
        failed = _wait(processes, args.timeout)
        if failed is None:
            measured: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return case | measured
        text = logs[failed].read_text(encoding="utf-8", errors="replace").strip()
        print(text[-3000:], file=sys.stderr, flush=True)
        last = text.splitlines()[-1][:300] if text else f"exit status {processes[failed].returncode}"
        return case | {"failed": f"rank {failed}: {last}"}


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout: float) -> int | None:
    """The first rank that failed or did not end in time; None when all ended well. Nothing runs afterwards."""
    deadline = time.monotonic() + timeout
    failed = None
    try:
        while any(process.poll() is None for process in processes):
            bad = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
            if bad and failed is None:
                failed, deadline = bad[0], min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                running = next(rank for rank, process in enumerate(processes) if process.poll() is None)
                return running if failed is None else failed
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ended = [rank for rank, process in enumerate(processes) if process.returncode]
    return failed if failed is not None else (ended[0] if ended else None)


def _work(case: dict[str, Any], steps: int, result: str) -> None:
    """One rank of a case; the first one writes what was measured."""
    from communication import SentBytes

    from hmar_mega.config_io import load_config
    from hmar_mega.engine import Engine
    from hmar_mega.flops import device_peak, train_flops_per_image
    from hmar_mega.objective import Objective
    from hmar_mega.parallel.dims import parallel_world
    from hmar_mega.planning.layout import Layout
    from hmar_mega.schedules import Schedule
    from hmar_mega.tokenizer.model import MultiScaleVQVAE
    from hmar_mega.train import build_parallel_model

    config = load_config(case["config"], case["overrides"])
    with parallel_world(config) as dims:
        device, layout = dims.device, Layout.of(config, case["gpus"])
        torch.manual_seed(0)
        tokenizer = MultiScaleVQVAE(config.tokenizer, config.schedule.scales).to(device).eval()
        objective = Objective(config, tokenizer.quantizer, device)
        model = build_parallel_model(config, dims).to(device)
        engine = Engine(model, config, dims, Schedule.of(config, 100 * config.data.global_batch_size))
        model.train()
        norms = [float(engine.train_step(batches(config, layout, n), objective)[0]) for n in range(WARM_UP_STEPS)]
        if not all(0 < norm < float("inf") for norm in norms):
            raise SystemExit(f"gradient norms of the first steps: {norms}; what does not train is not timed")
        with SentBytes() as sent:
            engine.train_step(batches(config, layout, WARM_UP_STEPS), objective)
        given = [batches(config, layout, WARM_UP_STEPS + 1 + n) for n in range(steps)]
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        timing = laps(lambda number: engine.train_step(given[number], objective), steps, device)
        mine = {"peak": peak_memory(device) or 0, "sent": sum(sent.by_group.values()), "median": timing.median}
        most = {key: max(values) for key, values in _of_all_ranks(mine).items()}
        if dims.rank:
            return
        rate = 1e3 * config.data.global_batch_size / most["median"]
        flops, peak = rate * train_flops_per_image(config), device_peak(device)
        found = {
            "machine": machine(device), "timing": vars(timing), "step_ms": most["median"], "images_per_s": rate,
            "tflops_per_gpu": flops / case["gpus"] / 1e12, "mfu": peak and flops / case["gpus"] / peak,
            "peak_bytes": most["peak"] or None, "sent_bytes": most["sent"], **planned(config, layout, device),
        }  # fmt: skip
        write_atomic(Path(result), json.dumps(found))


def planned(config: Any, layout: Any, device: torch.device) -> dict[str, float]:
    """What `hmar-mega plan` says of the case: ms, bytes of memory, bytes sent."""
    from hmar_mega.planning.cluster import load_cluster
    from hmar_mega.planning.layouts import calibration, plan_layout
    from hmar_mega.planning.workload import Workload

    name = cluster_of(device)
    node = {"h100": "h100-8x1", "h200": "h200"}.get(name, name)
    cluster = load_cluster(node).resized(layout.world)
    plan = plan_layout(Workload.of(config, cluster.device), layout, cluster, calibration())
    sent = plan.cost.tensor_bytes + plan.cost.pipeline_bytes + plan.cost.data_bytes
    return {"planned_ms": 1e3 * plan.cost.step, "planned_bytes": plan.memory.training, "planned_sent": sent}


def _of_all_ranks(mine: dict[str, float]) -> dict[str, list[float]]:
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {key: [value] for key, value in mine.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {key: [one[key] for one in everyone] for key in mine}


def live_line(row: dict[str, Any]) -> str:
    """One case while the script runs."""
    if "failed" in row:
        return f"{row['name']}: failed: {row['failed']}"
    return (
        f"{row['name']}: {row['step_ms']:.1f} ms, {row['images_per_s']:.1f} img/s, planned {row['planned_ms']:.1f} ms"
        + (f", peak {row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else "")
    )


def write_page(out: Path) -> str:
    """`scaling.md`, `scaling.json` and, with two sizes or more, `scaling.png` of all cases measured so far; the page.

    Raises:
        SystemExit: when nothing was measured yet.
    """
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((out / "cases").glob("*.json"))]
    if not rows:
        raise SystemExit(f"{out}/cases holds no measured case yet")
    rows.sort(key=lambda row: (row["model"], row["settings"], row["gpus"], list(LAYOUTS).index(row["layout"])))
    alone = {_series(row): row["images_per_s"] for row in rows if row["gpus"] == 1 and row["layout"] == "data"
             and "failed" not in row}  # fmt: skip
    for row in rows:
        if "failed" not in row and (one := alone.get(_series(row))):
            row["efficiency"] = row["images_per_s"] / row["gpus"] / one
    machines = sorted({describe(row["machine"]) for row in rows if "failed" not in row})
    header = [
        "model, images a GPU", "GPUs", "layout", "ms", "planned", "÷", "img/s", "MFU", "efficiency", "peak GB",
        "planned", "MB sent", "planned",
    ]  # fmt: skip
    text = "\n".join(machines) + "\n\n" + markdown_table(header, [_cells(row) for row in rows]) + "\n"
    write_atomic(out / "scaling.md", text)
    write_atomic(out / "scaling.json", json.dumps({"rows": rows}, indent=1) + "\n")
    if len({row["gpus"] for row in rows if "efficiency" in row}) > 1:
        plot(rows, out / "scaling.png")
    return text


def _series(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["model"], *row["settings"])


def _cells(row: dict[str, Any]) -> list[str]:
    label = " ".join([row["model"], *row["settings"]])
    head = [label, str(row["gpus"]), row["layout"]]
    if "failed" in row:
        return [*head, f"failed: {row['failed']}".replace("|", "¦"), *["–"] * 9]
    peak = row["peak_bytes"]
    return [
        *head, f"{row['step_ms']:.1f}", f"{row['planned_ms']:.1f}", f"{row['planned_ms'] / row['step_ms']:.2f}",
        f"{row['images_per_s']:.1f}", f"{row['mfu']:.1%}" if row["mfu"] else "–",
        f"{row['efficiency']:.1%}" if "efficiency" in row else "–", f"{peak / 1e9:.1f}" if peak else "–",
        f"{row['planned_bytes'] / 1e9:.1f}", f"{row['sent_bytes'] / 1e6:.1f}", f"{row['planned_sent'] / 1e6:.1f}",
    ]  # fmt: skip


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Images a second over GPUs, a panel a model, a line a layout, beside perfect scaling of one GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = sorted({_series(row) for row in rows if "efficiency" in row})
    figure, panels = pyplot.subplots(1, len(series), figsize=(5 * len(series), 4), squeeze=False, layout="constrained")
    for axes, model in zip(panels[0], series, strict=True):
        mine = [row for row in rows if _series(row) == model and "efficiency" in row]
        one = next(row for row in mine if row["gpus"] == 1 and row["layout"] == "data")["images_per_s"]
        counts = sorted({row["gpus"] for row in mine})
        axes.plot(counts, [one * count for count in counts], color="0.7", linestyle="--", label="one GPU × GPUs")
        for name in LAYOUTS:
            points = [(row["gpus"], row["images_per_s"]) for row in mine if row["layout"] == name]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(title=" ".join(model), xlabel="GPUs", ylabel="images a second", xticks=counts)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
