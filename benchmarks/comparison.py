"""VAR beside HMAR, one change after the other: block-causal → block-diagonal → loss weights → masked prediction.

    hmar-mega data demo fashion-mnist fashion
    python benchmarks/comparison.py --data fashion --out out --seed 0 --minutes 9          # one GPU
    python benchmarks/comparison.py --data out/prepared --out out --seed 1 --steps 2000    # another seed, as many steps
    python benchmarks/comparison.py --data digits --out out --device cpu --tiny            # does the script work?

DATA has image shards in train/ and val/, or is what `--only prepare` left in OUT/prepared: a few files to carry. The
same command goes on where it was cut off or its minutes ended: each variant's run from its last checkpoint, and what is
measured is not measured again. All seeds are merged into OUT: table.md, comparison.json, comparison.png, grids.png;
report.html is about the runs of this seed.
benchmarks/README.md says what is fair about it.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from comparison_data import held_out, is_prepared, prepare, write_shards
from comparison_figures import write_pages
from comparison_measure import (
    FINAL_SEED,
    Judge,
    draw,
    guidance_sweep,
    mask_sweep,
    sampling_times,
    settings_of,
)
from comparison_variants import CPU, GPU, TINY, VARIANTS, Variant
from PIL import Image

from hmar_mega.config import Config
from hmar_mega.config_io import config_to_yaml, load_config
from hmar_mega.evaluation.commands import RESULT_FILE
from hmar_mega.files import write_atomic
from hmar_mega.inference import open_model
from hmar_mega.interrupts import REQUEUE_STATUS, Interrupts, Stop
from hmar_mega.launchers.outcome import checkpoint_state
from hmar_mega.metrics import read_metrics
from hmar_mega.run_report import report
from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.tokenizer.train import train_tokenizer

log = logging.getLogger("comparison")

#: Steps that a rate is measured over, after as many that compile and pick algorithms.
CALIBRATION_STEPS = 40

#: Images of a variant in grids.png: classes in turn.
GRID_IMAGES = 20

#: Left for a stopped run to save, and for the pages, in seconds.
RESERVE = 30.0

OUT_OF_TIME = "the minutes are over: start the same command again to go on"


class TimeUp(Exception):
    """The minutes are over."""


def main(arguments: list[str] | None = None) -> None:
    """Prepare, train, measure and write, as far as the minutes reach."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu --tiny shows whether the script works")
    args.end = time.monotonic() + 60 * args.minutes - RESERVE
    args.work = args.work or args.out / "work"
    wanted = [name.strip() for name in args.only.split(",") if name.strip()]
    if strange := [name for name in wanted if name not in (*VARIANTS, "prepare")]:
        raise SystemExit(f"--only: {strange[0]!r} is none of prepare, {', '.join(VARIANTS)}")
    prepared = _prepared(args)
    if wanted == ["prepare"]:
        return
    seed = _Seed(args, prepared)
    try:
        seed.run(wanted)
    except TimeUp:
        log.warning(OUT_OF_TIME)
    finally:
        write_pages(args.out, args.work / "results", args.merge)
        seed.report(wanted)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="image shards in train/ and val/, or prepared")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, of all seeds")
    parser.add_argument("--work", type=Path, help="folder of runs and token shards (default: OUT/work)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop cleanly after them (default: %(default)s)")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, or prepare (default: %(default)s)")
    parser.add_argument("--budget", choices=("steps", "minutes"), default="steps", help="what all variants share")
    parser.add_argument("--steps", type=int, help="of a next-scale variant (default: as VAR does in --seconds)")
    parser.add_argument("--seconds", type=float, default=55.0, help="of a next-scale variant (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="trained folder (default: one is trained)")
    parser.add_argument("--tokenizer-config", default="tokenizer/fashion-32", help="(default: %(default)s)")
    parser.add_argument("--tokenizer-steps", type=int, help="of its training (default: the configuration's)")
    parser.add_argument("--images", type=int, metavar="N", help="prepare so many training and held-out images at most")
    parser.add_argument("--held-out", type=int, metavar="N", help="compare with so many held-out images (default: all)")
    parser.add_argument("--count", type=int, default=5000, help="images of a variant's figures (default: %(default)s)")
    parser.add_argument("--sweep-count", type=int, default=1000, help="images a setting (default: %(default)s)")
    parser.add_argument("--bootstrap", type=int, default=20, help="replicates (default: %(default)s)")
    parser.add_argument("--network", default="efficientnet-lite0", help="of features (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of all variants")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="comparison.json of other machines")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, trained in this process")
    return parser


def _prepared(args: argparse.Namespace) -> Path:
    """The folder of prepared data; makes it, and a tokenizer, where they are missing."""
    if is_prepared(args.data):
        return Path(args.data)
    if not (args.data / "train" / "index.json").is_file():
        raise SystemExit(f"{args.data} has neither image shards in train/ and val/ nor prepared data")
    out = (args.out if args.only == "prepare" else args.work) / "prepared"
    if is_prepared(out):
        return out
    tokenizer = args.tokenizer
    if tokenizer is None:
        tokenizer = args.work / "tokenizer"
        words = [f"data.images={args.data / 'train'}", f"data.images_val={args.data / 'val'}", "eval.grid_count=0"]
        if args.tokenizer_steps is not None:
            words.append(f"tokenizer.train.steps={args.tokenizer_steps}")
        if args.tiny:
            words += [
                "schedule.resolution=16", "schedule.patch_nums=[1,2,4]", "tokenizer.base_channels=8",
                "tokenizer.norm_groups=4", "tokenizer.latent_channels=4", "tokenizer.codebook_size=32",
                "tokenizer.train.batch_size=8", "tokenizer.train.init_images=16", "eval.num_samples=16",
            ]  # fmt: skip
        with _Deadline(args.end) as interrupts:
            metrics = train_tokenizer(load_config(args.tokenizer_config, words), tokenizer, interrupts=interrupts)
        if metrics is None:
            raise SystemExit(OUT_OF_TIME)
    prepare(args.data, tokenizer, out, torch.device(args.device), args.images)
    return out


class _Deadline:
    """Asks a run in this process to save and stop when the time is up."""

    def __init__(self, end: float) -> None:
        self._end, self._interrupts = end, Interrupts()

    def __enter__(self) -> Interrupts:
        self._timer = threading.Timer(max(0.0, self._end - time.monotonic()), self._ask)
        self._timer.daemon = True
        self._timer.start()
        return self._interrupts

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _ask(self) -> None:
        self._interrupts.requested = Stop.REQUEUE


class _Seed:
    """All variants of one seed and budget."""

    def __init__(self, args: argparse.Namespace, prepared: Path) -> None:
        self.args, self.prepared = args, prepared
        self.device = torch.device(args.device)
        self.tokens = args.work / "tokens"
        self.runs = args.work / f"{args.budget}-seed{args.seed}"
        self.results = args.work / "results"
        write_shards(prepared, self.tokens)
        with np.load(prepared / "tokens.npz") as stored:
            self.images, self.classes = len(stored["train"]), len(stored["classes"])
        self._judge: Judge | None = None

    def run(self, wanted: list[str]) -> None:
        """Train, measure and, where there are masks, sweep one variant after the other. Raises TimeUp."""
        for name in wanted:
            if name not in VARIANTS or not VARIANTS[name].shown:
                continue
            known = self._result(name)
            if known is None:
                self._train(name)
                self._measure(name)
            if VARIANTS[name].masked and "mask_sweep" not in (known or {}):
                self._sweep(name)
            if known is None:
                write_pages(self.args.out, self.results, self.args.merge)

    def _path(self, name: str) -> Path:
        folder: Path = self.results / f"{self.args.budget}-seed{self.args.seed}"
        return folder / f"{name}.json"

    def _result(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        return json.loads(path.read_text()) if path.is_file() else None

    def _check_time(self, needed: float = 0.0) -> None:
        if time.monotonic() + needed > self.args.end:
            raise TimeUp

    # ------------------------------------------------------------------------------------------------------ training

    def _config(self, name: str, steps: int, folder: Path, changes: dict[str, Any] | None = None) -> Config:
        variant, args = VARIANTS[name], self.args
        common = TINY if args.tiny else GPU if self.device.type == "cuda" else CPU
        model = MultiScaleVQVAE.load(self.prepared / "tokenizer", torch.device("cpu"))
        batch = common["data.global_batch_size"]
        given = dict(text.split("=", 1) for text in args.set)
        batch = int(given.get("data.global_batch_size", batch))
        settings = common | variant.settings | {
            "model.num_classes": self.classes, "schedule.resolution": model.resolution,
            "schedule.patch_nums": list(model.schedule.patch_nums), "tokenizer.path": str(self.prepared / "tokenizer"),
            "data.train": str(self.tokens / "train"), "data.val": str(self.tokens / "val"), "run.seed": args.seed,
            "run.dir": str(folder), "optim.epochs": (steps - 0.5) * batch / self.images,
            "optim.warmup_epochs": 0.05 * steps * batch / self.images, "optim.max_steps": steps,
            "checkpoint.interval": max(1, steps // 2), "checkpoint.keep_last": 1, "eval.interval": max(1, steps // 4),
            "eval.grid_count": GRID_IMAGES, "eval.cfg_scale": 1.5, "eval.top_k": 0, "eval.top_p": 0.96,
            "logging.interval": max(1, steps // 40), "logging.tensorboard": False,
        }  # fmt: skip
        if variant.start is not None:
            settings["run.init_from"] = str(self.runs / variant.start)
        written = {key: json.dumps(value) for key, value in settings.items()}
        return load_config(None, [f"{key}={value}" for key, value in (written | given | (changes or {})).items()])

    def _train(self, name: str) -> None:
        """Train a variant, and first what it starts from. Raises TimeUp when it was stopped; it goes on next time."""
        variant = VARIANTS[name]
        if variant.start is not None:
            self._train(variant.start)
        folder = self.runs / name
        if checkpoint_state(folder).get("finished"):
            return
        self._check_time()
        steps = self._steps(name)
        log.info("%s: %d steps", name, steps)
        if not self._start(self._config(name, steps, folder)):
            raise TimeUp

    def _start(self, config: Config) -> bool:
        """Run `hmar-mega train`, in this process when tiny; whether it came to its end."""
        folder = Path(str(config.run.dir))
        if self.args.tiny:
            from hmar_mega.train import train_from_config

            with _Deadline(self.args.end) as interrupts:
                train_from_config(config, interrupts)
            return interrupts.agreed is Stop.NONE
        self._free()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")
        write_atomic(file, config_to_yaml(config))
        process = subprocess.Popen([sys.executable, "-m", "hmar_mega", "train", str(file)])
        try:
            status = process.wait(max(1.0, self.args.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGUSR1)
            status = process.wait()
        if status not in (0, REQUEUE_STATUS):
            raise SystemExit(f"training in {folder} ended with status {status}; its message stands above")
        return status == 0

    def _steps(self, name: str) -> int:
        """Steps of a run by the budget; a rate is measured once and kept, so that a resumed run keeps its schedule."""
        variant, args = VARIANTS[name], self.args
        if args.budget == "steps" and args.steps is not None:
            return max(1, round(variant.share * args.steps))
        measured = name if args.budget == "minutes" else "var"
        path = self.runs / "plan.json"
        plan: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        if measured not in plan:
            plan[measured] = self._rate(measured)
            write_atomic(path, json.dumps(plan, indent=1) + "\n")
        return max(1, round(variant.share * args.seconds * plan[measured]))

    def _rate(self, name: str) -> float:
        """Steps a second of a variant."""
        folder = self.runs / f"{name}-calibration"
        few = {"logging.interval": CALIBRATION_STEPS, "eval.num_samples": 16, "eval.grid_count": 0}
        config = self._config(name, 2 * CALIBRATION_STEPS, folder, few)
        if not self._start(config):
            raise TimeUp
        rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
        rate: float = rows[-1]["images_per_second"] / config.data.global_batch_size
        log.info("%s: %.1f steps a second", name, rate)
        return rate

    # ----------------------------------------------------------------------------------------------------- measuring

    @property
    def judge(self) -> Judge:
        """Opened when first needed: it looks at all held-out images."""
        if self._judge is None:
            batch = 16 if self.args.tiny else 250
            self._judge = Judge.of(held_out(self.prepared)[: self.args.held_out], self.args.network, self.device, batch)
        return self._judge

    def _measure(self, name: str) -> None:
        self._check_time()
        args, variant, folder = self.args, VARIANTS[name], self.runs / name
        model = self._open(folder)
        by_cfg = guidance_sweep(model, self.judge, args.sweep_count)
        cfg = float(min(by_cfg, key=lambda key: by_cfg[key]))
        self._check_time()
        settings = settings_of(model, cfg)
        images = draw(model, settings, args.count, FINAL_SEED, self.judge.batch)
        result = {
            "variant": name, "label": variant.label, "seed": args.seed, "budget": args.budget, "cfg": cfg,
            "network": self.judge.network.label, "count": args.count, "fid_by_cfg": by_cfg,
            "figures": self.judge.figures(images, args.bootstrap), "training": self._training(name),
            "sampling": sampling_times(model, settings, self.judge.batch), "machine": machine(self.device),
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "passes": sum(len(entry) for entry in settings.mask_schedule),
        }  # fmt: skip
        grid = self._path(name).with_suffix(".png")
        grid.parent.mkdir(parents=True, exist_ok=True)
        strip = draw(model, settings_of(model, 1.5), GRID_IMAGES, FINAL_SEED, GRID_IMAGES)  # for all the same guidance
        Image.fromarray(np.concatenate(list(strip), axis=1)).save(grid)
        write_atomic(self._path(name), json.dumps(result, indent=1) + "\n")
        write_atomic(folder / RESULT_FILE, json.dumps(self._as_evaluation(result)) + "\n")
        log.info("%s: FID %.2f at guidance %g", name, result["figures"]["FID"]["value"], cfg)

    def _as_evaluation(self, result: dict[str, Any]) -> dict[str, Any]:
        """As `hmar-mega evaluate` would write it, for the report."""
        network = self.judge.network
        measures = [{"name": name, **figure, "note": ""} for name, figure in result["figures"].items()]
        return {
            "network": network.name, "network_digest": network.digest, "reference": "the held-out images",
            "images": result["count"], "measures": measures,
        }  # fmt: skip

    def report(self, wanted: list[str]) -> None:
        """`hmar-mega report` of the runs that are measured, as OUT/report.html."""
        measured = [name for name in wanted if name in VARIANTS and self._result(name) is not None]
        folders = [self.runs / name for name in measured if (self.runs / name / RESULT_FILE).is_file()]
        if folders:
            report(folders, self.args.out / "report.html")

    def _sweep(self, name: str) -> None:
        self._check_time()
        result = self._result(name)
        assert result is not None, "sweeps follow measuring"
        model = self._open(self.runs / name)
        result["mask_sweep"] = mask_sweep(model, self.judge, self.args.sweep_count, result["cfg"])
        write_atomic(self._path(name), json.dumps(result, indent=1) + "\n")

    def _open(self, folder: Path) -> Any:
        model = open_model(folder, self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        model.sampler.graphs = False  # capturing each setting of a sweep would take longer than sampling
        return model

    def _training(self, name: str) -> dict[str, Any]:
        """What the run, and what it started from, cost, and how well it predicts."""
        found: dict[str, Any] = {"steps": 0, "images": 0, "seconds": 0.0}
        run: str | None = name
        while run is not None:
            variant: Variant = VARIANTS[run]
            rows = read_metrics(self.runs / run)
            train = [row for row in rows if row["kind"] == "train"]
            rates = [row["images_per_second"] for row in train[1:]] or [train[-1]["images_per_second"]]
            rate = statistics.median(rates)
            found["steps"] += train[-1]["step"]
            found["images"] += train[-1]["images"]
            found["seconds"] += train[-1]["images"] / rate  # of training alone: starts and saves cost all alike
            if run == name:
                found["images_per_second"] = rate
                found["peak_memory_bytes"] = max(row["peak_memory_bytes"] for row in train)
                found["validation"] = [row for row in rows if row["kind"] == "val"][-1]
            run = variant.start
        return found

    def _free(self) -> None:
        """Give the GPU's cached memory to the run that is started."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
