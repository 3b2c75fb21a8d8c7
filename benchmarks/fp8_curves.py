"""Loss curves of a small model in bf16 and in FP8, on the same data, beside another seed in bf16: is FP8 within noise?

    python benchmarks/fp8_curves.py --out curves                       # 500 steps of each, on a GPU
    python benchmarks/fp8_curves.py --out curves --runs "bf16,bf16 seed 1,fp8 attention" --steps 2000
    python benchmarks/fp8_curves.py --out curves --device cpu --steps 5          # does the script work?

Every run is a process of its own with the engine that `hmar-mega train` uses; they run side by side, so times say
nothing. Tokens are made up, but can be learned: a token is that of the same place in the map before, or that of a
corner of it, which attention has to fetch, or one that its class prefers. Writes curves.json, curves.md and curves.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import describe, machine, markdown_table
from torch import Tensor

from hmar_mega.files import write_atomic
from hmar_mega.scales import ScaleSchedule

#: Settings of each run, and the attention backend while training where it is not that of the settings.
RUNS: dict[str, tuple[list[str], str | None]] = {
    "bf16": ([], None),
    "bf16 seed 1": (["run.seed=1"], None),
    "fp8 attention": ([], "triton_fp8"),
    "fp8 linears": (["precision.fp8=linears"], None),
    "fp8 linears and attention": (["precision.fp8=linears_and_attention"], None),
}

#: 256 px, whose last map has 256 tokens: the fewest that attend in FP8.
MODEL = [
    "model.depth=4", "model.width=256", "model.heads=4", "model.num_classes=10", "model.mask_layers=1",
    "model.gamma_init=0.1", "model.drop_path_rate=0", "tokenizer.codebook_size=256", "tokenizer.base_channels=32",
    "data.global_batch_size=32", "data.micro_batch_size=32", "optim.base_lr=8e-3", "optim.epochs=1",
    "optim.warmup_epochs=0.1",
]  # fmt: skip
TINY = [
    "model.depth=1", "model.width=64", "model.heads=2", "schedule.patch_nums=[1,2,16]",
    "schedule.mask_schedule=null", "data.global_batch_size=2", "data.micro_batch_size=2", "optim.base_lr=0.128",
]  # fmt: skip

#: A point of the table is the mean of so many steps.
WINDOW = 50


def main(arguments: list[str] | None = None) -> None:
    """Train every run, then write the curves and how far they are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the three files")
    parser.add_argument("--runs", default=",".join(RUNS), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=len(RUNS), help="runs side by side (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny model, interpreted")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker is not None:
        print(json.dumps(train(args.worker, args.steps, args.device)))
        return
    names = [name.strip() for name in args.runs.split(",")]
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"--runs: {unknown[0]!r} is none of {', '.join(RUNS)}")
    if args.out is None or names[0] != "bf16":
        parser.error("--out is needed, and bf16 must be the first of --runs: the others are compared with it")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --steps 5 shows whether the script works")
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda name: run_worker(name, args.steps, args.device), names))
    runs = dict(zip(names, found, strict=True))
    results = {"machine": machine(torch.device(args.device)), "steps": args.steps, "runs": runs}
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "curves.json", json.dumps(results) + "\n")
    write_atomic(args.out / "curves.md", page(results) + "\n")
    plot(results, args.out / "curves.png")
    print(page(results))


def run_worker(name: str, steps: int, device: str) -> dict[str, Any]:
    """A run in a process of its own; one that fails keeps the end of what it printed."""
    environment = dict(os.environ)
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", name, "--steps", str(steps), "--device", device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: {done.stderr[-3000:]}", file=sys.stderr, flush=True)
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1].removeprefix("[rank0]: ")[:300] if lines else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(name: str, steps: int, device: str) -> dict[str, Any]:
    """Losses and gradient norms of one run in this process, and the heads' learned scales at its end."""
    from hmar_mega.config_io import load_config
    from hmar_mega.engine import Engine
    from hmar_mega.fp8_attention import largest_scales
    from hmar_mega.model.hmar import HMAR
    from hmar_mega.objective import Objective
    from hmar_mega.parallel.dims import parallel_world
    from hmar_mega.probe import require_kernels
    from hmar_mega.schedules import Schedule
    from hmar_mega.tokenizer.model import MultiScaleVQVAE
    from hmar_mega.train import build_parallel_model

    settings, backend = RUNS[name]
    sizes = [*MODEL, *(TINY if device == "cpu" else [])]
    if device == "cuda" or name.startswith("fp8"):  # bf16 runs need not be interpreted
        sizes.append("model.attention.backend=triton")
    config = load_config("train/d8-256", [*sizes, *settings])
    batch = config.data.global_batch_size
    with parallel_world(config) as dims:
        require_kernels(config)
        torch.manual_seed(0)
        tokenizer = MultiScaleVQVAE(config.tokenizer, config.schedule.scales).to(dims.device).eval()
        objective = Objective(config, tokenizer.quantizer, dims.device)
        model = build_parallel_model(config, dims).to(dims.device)
        assert isinstance(model, HMAR)
        if backend is not None:
            model.training_backend = backend  # type: ignore[assignment]
        engine = Engine(model, config, dims, Schedule.of(config, steps * batch))
        model.train()
        losses, norms = [], []
        for step in range(steps):
            given = make_batch(config.schedule.scales, config.tokenizer.codebook_size, batch, step)
            norm, scored = engine.train_step([given], objective)
            losses.append(scored[0].loss.detach().mean())
            norms.append(norm)
        return {
            "loss": torch.stack(losses).tolist(), "grad_norm": norms, "largest_scales": largest_scales(engine),
        }  # fmt: skip


def make_batch(schedule: ScaleSchedule, vocabulary: int, batch: int, step: int) -> Any:
    """The images of a step, the same in every run: tokens as the head of this file says."""
    noise = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 10, (batch,), generator=noise)
    maps: list[Tensor] = []
    for side in schedule.patch_nums:
        shape = (batch, side, side)
        preferred = (labels[:, None, None] * 17 + torch.randint(0, 8, shape, generator=noise) ** 2) % vocabulary
        tokens = preferred
        if maps:
            before = maps[-1]
            rows = torch.arange(side) * before.shape[1] // side
            choice = torch.rand(shape, generator=noise)
            tokens = torch.where(choice < 0.5, before[:, rows][:, :, rows], preferred)
            tokens = torch.where(choice > 0.75, before[:, :1, :1], tokens)
        maps.append(tokens)
    positions = torch.arange(step * batch, (step + 1) * batch)
    return SimpleNamespace(
        tokens=torch.cat([m.flatten(1) for m in maps], dim=1), labels=labels, positions=positions,
        keys=[str(p) for p in positions.tolist()],
    )  # fmt: skip


def page(results: dict[str, Any]) -> str:
    """Mean losses along the way, and of the second half the mean difference to bf16, beside that of another seed."""
    runs, steps = results["runs"], results["steps"]
    width = min(WINDOW, steps)
    ends = sorted({width, *(steps * part // 4 for part in (1, 2, 3, 4) if steps * part // 4 >= width)})
    base = runs["bf16"].get("loss")
    rows = []
    for name, run in runs.items():
        if "failed" in run:
            rows.append([name, *["–"] * (len(ends) + 2), f"failed: {run['failed']}".replace("|", "¦")])
            continue
        means = [sum(run["loss"][end - width : end]) / width for end in ends]
        apart, largest = ["–"], max(run["largest_scales"].values())
        if base is not None and name != "bf16":
            half = [a - b for a, b in zip(run["loss"], base, strict=True)][steps // 2 :]
            apart = [f"{sum(half) / len(half):+.4f}"]
        rows.append([name, *(f"{m:.4f}" for m in means), *apart, f"{largest:.1f}", ""])
    header = ["run", *(f"loss to step {end}" for end in ends), "second half − bf16", "largest scale", ""]
    about = f"{describe(results['machine'])}. {steps} steps; losses are means of {width} steps in nats."
    return f"{about}\n\n{markdown_table(header, rows)}"


def plot(results: dict[str, Any], path: Path) -> None:
    """The loss of each run, and below it the difference to bf16, both as running means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    base = results["runs"]["bf16"].get("loss")
    for name, run in results["runs"].items():
        if "failed" in run:
            continue
        above.plot(running_mean(run["loss"]), label=name, linewidth=1)
        if base is not None:
            below.plot(running_mean([a - b for a, b in zip(run["loss"], base, strict=True)]), linewidth=1)
    above.set(ylabel="loss (nats)", title=f"{results['machine']['device']}, running means of up to {WINDOW // 2} steps")
    above.legend()
    below.set(ylabel="loss − bf16", xlabel="step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def running_mean(values: list[float]) -> list[float]:
    """Each value's mean with up to `WINDOW`/2 − 1 before it."""
    starts = [max(0, i + 1 - WINDOW // 2) for i in range(len(values))]
    return [sum(values[start : i + 1]) / (i + 1 - start) for i, start in enumerate(starts)]


if __name__ == "__main__":
    main()
