"""The whole training step on one GPU: forward, backward, clipping and AdamW; ours and a rival in plain torch.

    python benchmarks/training.py --rival --json training.json --markdown training.md
    python benchmarks/training.py --models d16-256:64 --recompute selective --backend sdpa --profile profiles
    python benchmarks/training.py --models d24-256:32 --fp8 linears --micro-batches 4 --set optim.impl=torch
    python benchmarks/training.py --device cpu --tiny --rival                      # whether the script itself works

Ours is the engine as `hmar-mega train` builds it, on random tokens that are on the GPU already; the inputs of teacher
forcing are made from them in every step, as in training. The rival, `plain_model.py`, is given the same inputs. Each
runs in a process of its own, is not timed unless its first loss is that of an untrained model, and one that fails does
not end the others. benchmarks/README.md says how to read what is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Timing, add_output_options, describe, laps, machine, markdown_table, peak_memory, write_results
from plan_memory import TINY

#: Untimed steps before timed ones.
WARM_UP_STEPS = 5

#: Traced with --profile.
PROFILED_STEPS = 3

#: Bytes a parameter that mixed-precision training with Adam must hold: 16-bit weights and gradients with float32
#: masters and two moments, or float32 weights, gradients and two moments.
STATE_BYTES = 16

#: Milliseconds, images a second, TFLOP/s and peak GB of the published implementation (fp16, dense-mask attention) by
#: model and batch, on an H100 80GB with torch 2.11. Measured elsewhere: for orientation.
PUBLISHED = {
    "d16-256:64": (334, 192, 165, 45.1),
    "d24-256:32": (432, 74.2, 211, 59.5),
    "d30-256:16": (403, 39.7, 219, 65.8),
}


def main(arguments: list[str] | None = None) -> None:
    """Run every model, ours and then the rival, each in its own process; print the table."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.worker is not None:
        print(json.dumps(measure(**json.loads(args.worker))))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny shows whether the script works")
    results: dict[str, Any] = {"machine": machine(torch.device(args.device)), "rows": []}
    print(describe(results["machine"]), flush=True)
    for model in args.models.split(","):
        for who in ("ours", "rival") if args.rival else ("ours",):
            row = run_worker(model, who, args, parser)
            results["rows"].append(row)
            print(live_line(row), flush=True)
            write_results(args, results, page(results))
    print(f"\n{page(results)}")
    if args.profile is not None:
        print(
            f"\nkernels by group: {args.profile}/*.md; timelines for Perfetto: {args.profile}/*.json\n"
            f"with Nsight Systems instead of torch's profiler:\n  {nsys_command(sys.argv[1:])}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default=",".join(PUBLISHED), metavar="NAME:BATCH,…",
        help="configurations of configs/train and their micro-batch sizes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step (default: %(default)s)")
    parser.add_argument("--rival", action="store_true", help="time the plain-torch model too")
    parser.add_argument("--fp8", help="precision.fp8 of ours")
    parser.add_argument("--recompute", help="parallel.recompute of ours")
    parser.add_argument("--backend", help="model.attention.backend of ours")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting, of both")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="then trace three steps into DIR")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one process (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two layers and tiny batches")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_output_options(parser)
    return parser


def run_worker(model: str, who: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """One measurement in a process of its own; one that fails keeps the end of what it printed."""
    name, colon, batch = model.strip().partition(":")
    if not colon or not batch.isdigit() or int(batch) < 1:
        parser.error(f"--models: {model!r} is not NAME:BATCH, such as d16-256:64")
    size = 2 if args.tiny else int(batch)
    asked = {
        "precision.fp8": args.fp8, "parallel.recompute": args.recompute, "model.attention.backend": args.backend,
    }  # fmt: skip
    own = [f"{key}={value}" for key, value in asked.items() if value is not None] if who == "ours" else []
    own += args.set
    overrides = [
        *(TINY if args.tiny else []), f"data.global_batch_size={size * args.micro_batches}",
        f"data.micro_batch_size={size}", *own,
    ]  # fmt: skip
    settings = {
        "name": f"train/{name}", "overrides": overrides, "who": who, "steps": args.steps,
        "profile": None if args.profile is None else str(args.profile),
    }  # fmt: skip
    environment = dict(os.environ)
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    row: dict[str, Any] = {
        "model": f"{name}:{batch}", "batch": size, "micro_batches": args.micro_batches, "who": who, "settings": own,
        "published": None if args.tiny else PUBLISHED.get(f"{name}:{batch}"),
    }  # fmt: skip
    command = [sys.executable, __file__, "--worker", json.dumps(settings)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=args.timeout
        )
    except subprocess.TimeoutExpired:
        return row | {"failed": f"took more than {args.timeout:.0f} s; raise --timeout"}
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
        lines = done.stderr.strip().splitlines()
        return row | {"failed": lines[-1][:300] if lines else f"exit status {done.returncode}"}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row | measured | {"timing": Timing(**measured["timing"])}


def measure(name: str, overrides: list[str], who: str, steps: int, profile: str | None) -> dict[str, Any]:
    """Times, rate and memory of one model in this process.

    Raises:
        SystemExit: when losses or gradients are not those of a model that trains.
    """
    from hmar_mega.config_io import load_config
    from hmar_mega.flops import device_peak, train_flops_per_image
    from hmar_mega.objective import Objective
    from hmar_mega.parallel.dims import parallel_world
    from hmar_mega.tokenizer.model import MultiScaleVQVAE

    config = load_config(name, overrides)
    count = steps + WARM_UP_STEPS + PROFILED_STEPS
    with parallel_world(config) as dims:
        device = dims.device
        torch.manual_seed(0)
        tokenizer = MultiScaleVQVAE(config.tokenizer, config.schedule.scales).to(device).eval()
        objective = Objective(config, tokenizer.quantizer, device)
        given = [make_batches(config, number, device) for number in range(count)]
        start = start_ours if who == "ours" else start_rival
        train_step, model = start(config, dims, objective)
        first_loss = check([train_step(batches) for batches in given[:WARM_UP_STEPS]], config.tokenizer.codebook_size)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        timing = laps(lambda number: train_step(given[WARM_UP_STEPS + number]), steps, device)
        peak_bytes = peak_memory(device)
        images, parameters = config.data.global_batch_size, sum(p.numel() for p in model.parameters())
        rate = 1e3 * images / timing.median
        flops, peak = rate * train_flops_per_image(config), device_peak(device)
        found = {
            "config": name, "overrides": overrides, "parameters": parameters, "timing": vars(timing),
            "images_per_s": rate, "tflops": flops / 1e12, "mfu": None if peak is None else flops / peak,
            "peak_bytes": peak_bytes, "first_loss": first_loss,
        }  # fmt: skip
        if profile is not None:
            from profiles import profile_steps

            label = f"{name.removeprefix('train/')}-{who}"
            found["profile"] = profile_steps(
                lambda number: train_step(given[WARM_UP_STEPS + steps + number]), PROFILED_STEPS, Path(profile), label
            )
        return found


#: One optimizer step on its micro-batches: gradient norm and mean loss, perhaps still on their way on the device.
TrainStep = Callable[[list[Any]], tuple[Any, Any]]


def start_ours(config: Any, dims: Any, objective: Any) -> tuple[TrainStep, torch.nn.Module]:
    """The engine around the model, as training builds both."""
    from hmar_mega.engine import Engine
    from hmar_mega.schedules import Schedule
    from hmar_mega.train import build_parallel_model

    model = build_parallel_model(config, dims).to(dims.device)
    engine = Engine(model, config, dims, Schedule.of(config, 100 * config.data.global_batch_size))
    model.train()

    def train_step(batches: list[Any]) -> tuple[Any, Any]:
        norm, scored = engine.train_step(batches, objective)
        return norm, torch.stack([scores.loss.detach().mean() for scores in scored]).mean()

    return train_step, model


def start_rival(config: Any, dims: Any, objective: Any) -> tuple[TrainStep, torch.nn.Module]:
    """The plain model, compiled on a GPU, and its optimizer."""
    from plain_model import PlainModel, PlainTrainer

    torch.set_float32_matmul_precision("high")  # of the few products that autocast leaves in float32
    with dims.device:
        model = PlainModel(config)
    model.to(dims.device).reset()
    if dims.device.type == "cuda":
        model.compile_parts()
    trainer = PlainTrainer(model, config, lr=config.optim.base_lr)
    return lambda batches: trainer.train_step(batches, objective), model


def make_batches(config: Any, step: int, device: torch.device) -> list[Any]:
    """The micro-batches of a step, on the device: random tokens and classes, consecutive stream positions."""
    from types import SimpleNamespace

    noise = torch.Generator().manual_seed(step)
    size, tokens = config.data.micro_batch_size, config.schedule.scales.num_tokens
    count = config.data.global_batch_size // size
    found = []
    for number in range(count):
        first = (step * count + number) * size
        given = {
            "tokens": torch.randint(0, config.tokenizer.codebook_size, (size, tokens), generator=noise),
            "labels": torch.randint(0, config.model.num_classes, (size,), generator=noise),
            "positions": torch.arange(first, first + size),
        }
        on_device = {key: value.to(device) for key, value in given.items()}
        found.append(SimpleNamespace(**on_device, keys=[str(first + i) for i in range(size)]))
    return found


def check(steps: list[tuple[Any, Any]], codebook_size: int) -> float:
    """The first loss; refuses to time what does not train.

    Raises:
        SystemExit: when a gradient norm or loss of `steps` is not finite, or the first loss not about ln V.
    """
    pairs = [(float(norm), float(loss)) for norm, loss in steps]
    expected = math.log(codebook_size)
    if not all(math.isfinite(x) for pair in pairs for x in pair) or min(norm for norm, _ in pairs) <= 0:
        raise SystemExit(f"not finite, or no gradient: (norm, loss) of the first steps {pairs}")
    if abs(pairs[0][1] - expected) > 0.1 * expected:
        raise SystemExit(f"an untrained model has loss {expected:.2f}, this one {pairs[0][1]:.2f}")
    return pairs[0][1]


def live_line(row: dict[str, Any]) -> str:
    """One measurement while the script runs."""
    label = f"{row['model']} × {row['micro_batches']} {row['who']:5}"
    if "failed" in row:
        return f"{label} failed: {row['failed']}"
    timing = row["timing"]
    text = f"{label} {timing.median:.1f} ms [{timing.low:.1f}–{timing.high:.1f}], {row['images_per_s']:.1f} img/s"
    text += f", {row['tflops']:.0f} TFLOP/s, first loss {row['first_loss']:.4f}"
    return text + (f", peak {row['peak_bytes'] / 1e9:.2f} GB" if row["peak_bytes"] else "")


def page(results: dict[str, Any]) -> str:
    """The table, and what the profile says, as Markdown."""
    rows = results["rows"]
    rival_rates = {row["model"]: row["images_per_s"] for row in rows if row["who"] == "rival" and "failed" not in row}
    cells = [_cells(row, rival_rates.get(row["model"])) for row in rows]
    header = [
        "model, batch × micro-batches", "who", "ms (10–90 %)", "img/s", "TFLOP/s", "MFU", "peak GB",
        f"− {STATE_BYTES} B/parameter", "first loss", "× rival", "published ms, img/s, TFLOP/s, GB",
    ]  # fmt: skip
    sections = [f"{describe(results['machine'])}. Medians of whole steps.", markdown_table(header, cells)]
    profiled = [row for row in rows if "profile" in row and row["profile"]["groups"]]
    for row in profiled:
        about = row["profile"]
        sections.append(f"{row['model']} {row['who']}: {about['busy']:.1f} ms busy of {about['span']:.1f} ms a step")
        sections.append(
            markdown_table(["group", "ms a step"], [[group, f"{ms:.2f}"] for group, ms in about["groups"].items()])
        )
    return "\n\n".join(sections)


def _cells(row: dict[str, Any], rival_rate: float | None) -> list[str]:
    label = f"{row['model']} × {row['micro_batches']}" + "".join(f" {text}" for text in row["settings"])
    who = row["who"] if row["who"] == "ours" else "plain torch"
    published = " / ".join(map(str, row["published"])) if row["published"] else "–"
    if "failed" in row:
        return [label, who, f"failed: {row['failed']}".replace("|", "¦"), *["–"] * 7, published]
    timing, peak = row["timing"], row["peak_bytes"]
    memory = ["–", "–"]
    if peak:
        memory = [f"{peak / 1e9:.2f}", f"{(peak - STATE_BYTES * row['parameters']) / 1e9:.2f}"]
    return [
        label, who, f"{timing.median:.1f} ({timing.low:.1f}–{timing.high:.1f})", f"{row['images_per_s']:.1f}",
        f"{row['tflops']:.0f}", "–" if row["mfu"] is None else f"{row['mfu']:.1%}", *memory,
        f"{row['first_loss']:.4f}", f"{row['images_per_s'] / rival_rate:.2f}" if rival_rate else "–", published,
    ]  # fmt: skip


def nsys_command(arguments: list[str]) -> str:
    """The same run under Nsight Systems, without torch's profiler."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] != "--profile":
            kept.append(argument)
        skip = argument == "--profile"
    options = "--trace=cuda,nvtx,cublas --output training"
    return shlex.join(["nsys", "profile", *options.split(), "python", "benchmarks/training.py", *kept])


if __name__ == "__main__":
    main()
