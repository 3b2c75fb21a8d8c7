"""`hmar-mega demo`: the whole pipeline on real digits, through the commands a cluster run uses.

Each step prints the command it runs, so that any of them can be run again by hand. Training goes through torchrun, two
gloo processes with tensor parallelism 2, Megatron-core layers and DeepSpeed ZeRO-1. The settings are configs/demo.yaml.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from sklearn.svm import SVC
from torch import Tensor

from hmar_mega.config_io import load_config
from hmar_mega.data.images import ImageStream, image_grid
from hmar_mega.data.order import SampleOrder
from hmar_mega.data.reader import ShardReader
from hmar_mega.errors import UserError
from hmar_mega.files import cannot_write, write_atomic
from hmar_mega.inference import ImageModel, edit_images, load_model
from hmar_mega.report import DEMANDED_ACCURACY, DemoFigures, write_report
from hmar_mega.versions import installed_versions

#: Says that a folder was made by a demo and may be replaced by the next.
MARKER = ".hmar-mega-demo"
SAMPLES_PER_CLASS = 50
GRID_PER_CLASS = 10
NUM_CLASSES = 10


def run_demo(out: Path, processes: int = 2, overwrite: bool = False) -> int:
    """Run every step into the new folder `out`; returns the exit status: 0, or 1 when the samples are not readable.

    Raises:
        UserError: when `out` exists, or a step fails.
    """
    if out.is_dir() and any(out.iterdir()):
        if not overwrite or not (out / MARKER).is_file():
            whose = "holds a demo" if (out / MARKER).is_file() else "exists and was not made by a demo"
            can = " or replace it with --overwrite (make demo ARGS=--overwrite)" if whose == "holds a demo" else ""
            raise UserError(f"{out} {whose}; choose another --out{can}")
        shutil.rmtree(out)
    load_config("demo", [f"parallel.tensor_parallel={processes}"])  # a number that does not fit is refused here
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(out, err) from None
    write_atomic(out / MARKER, "made by hmar-mega demo\n")
    steps = _Steps()
    with steps.watch_memory():
        _train_everything(out, processes, steps)
        with steps.timed("sampling and reading"):
            figures, images = _judge(out, steps)
    figures_done = DemoFigures(
        **figures, seconds=steps.seconds, peak_memory_bytes=steps.peak_memory, versions=installed_versions()
    )
    page = write_report(out, out / "tokenizer", out / "next_scale", out / "masked", figures_done, images)
    passed = figures_done.accuracy >= DEMANDED_ACCURACY
    steps.console.print(
        f"\n[bold]{figures_done.accuracy:.1%}[/bold] of {figures_done.num_samples} samples are read as the class asked "
        f"for (at least {DEMANDED_ACCURACY:.0%} demanded) · {sum(steps.seconds.values()):.0f} s · "
        f"{steps.peak_memory / 2**30:.1f} GiB\nreport: {page}"
    )
    return 0 if passed else 1


def _train_everything(out: Path, processes: int, steps: _Steps) -> None:
    mega = [sys.executable, "-m", "hmar_mega"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    images, tokens, tokenizer = out / "images", out / "tokens", out / "tokenizer"
    steps.run("image shards", [*mega, "data", "demo", "digits", str(images)])
    steps.run(
        "tokenizer",
        [
            *(*mega, "tokenizer", "train", "demo", "--out", str(tokenizer)),
            *(f"data.images={images / 'train'}", f"data.images_val={images / 'val'}"),
        ],
    )
    with steps.timed("token shards"):
        for part in ("train", "val"):
            whole = ["--augment", "none"]
            steps.call([*mega, "data", "encode", str(images / part), str(tokenizer), str(tokens / part), *whole])
    common = [f"data.train={tokens / 'train'}", f"data.val={tokens / 'val'}", f"tokenizer.path={tokenizer}"]
    common.append(f"parallel.tensor_parallel={processes}")
    train = [*torchrun, "-m", "hmar_mega", "train"]
    steps.run("stage 1, next-scale", [*train, "demo", f"run.dir={out / 'next_scale'}", *common])
    steps.run(
        "stage 2, masked",
        [*train, "demo_masked", f"run.dir={out / 'masked'}", f"run.init_from={out / 'next_scale'}", *common],
    )
    steps.run("export", [*mega, "export", str(out / "masked"), str(out / "model")])


def _judge(out: Path, steps: _Steps) -> tuple[dict[str, object], dict[str, Path]]:
    """Draw samples and edits, and let a classifier trained on the real images read them."""
    model = load_model(out / "model", device="cpu")
    train, train_labels = _all_images(out / "images" / "train", model)
    val, val_labels = _all_images(out / "images" / "val", model)
    reader = SVC(C=10.0).fit(_pixels(train), train_labels)
    labels = [c for c in range(NUM_CLASSES) for _ in range(SAMPLES_PER_CLASS)]
    samples = model.generate(labels, seed=0)
    right = reader.predict(_pixels(samples)) == np.array(labels)
    rebuilt = model.to_images(model.tokenizer.quantizer.f_hat(model.tokenizer.encode(val * 2 - 1)))
    shown = [c * SAMPLES_PER_CLASS + i for c in range(NUM_CLASSES) for i in range(GRID_PER_CLASS)]
    images = {"Samples, a row a class": out / "samples.png", "Inpainting": out / "edited.png"}
    image_grid(samples[shown], GRID_PER_CLASS, out / "samples.png", value_range=(0.0, 1.0))
    _inpainting_grid(model, val, val_labels, out / "edited.png")
    caption = "Inpainting: a held-out digit; its lower half removed; three ways to fill it in"
    images[caption] = images.pop("Inpainting")
    steps.console.print(f"samples: {out / 'samples.png'} · edits: {out / 'edited.png'}")
    return {
        "accuracy": float(right.mean()),
        "per_class": tuple(right.reshape(NUM_CLASSES, -1).mean(1).tolist()),
        "num_samples": len(labels),
        "classifier_accuracy": float(reader.score(_pixels(val), val_labels)),
        "reconstruction_accuracy": float(reader.score(_pixels(rebuilt), val_labels)),
        "val_psnr": float(-10 * torch.log10((rebuilt - val).square().mean())),
    }, images


def _inpainting_grid(model: ImageModel, images: Tensor, labels: np.ndarray, path: Path) -> None:
    """A column a class: original, what is kept (the rest grey), and three fillings."""
    first = [int(np.argmax(labels == c)) for c in range(NUM_CLASSES)]
    originals = images[first]
    mask = torch.zeros(1, 1, *originals.shape[-2:], dtype=torch.bool)
    mask[..., originals.shape[-2] // 2 :, :] = True
    rows = [originals, torch.where(mask, 0.5, originals)]
    rows += [edit_images(model, originals, mask, list(range(NUM_CLASSES)), seed=100 * s) for s in range(3)]
    image_grid(torch.cat(rows), NUM_CLASSES, path, value_range=(0.0, 1.0))


def _all_images(shards: Path, model: ImageModel) -> tuple[Tensor, np.ndarray]:
    """Every image of a folder of shards, (n, 3, R, R) in [0, 1], and its class."""
    reader = ShardReader(shards, "images")
    resolution = model.schedule.grid * model.tokenizer.config.downsample
    stream = ImageStream(reader, SampleOrder(len(reader), 0, shuffle=False), resolution, "none", 0)
    labels = np.array([reader.read_image(i).label for i in range(len(reader))])
    return stream.batch(0, len(reader)).add(1).mul(0.5), labels


def _pixels(images: Tensor) -> np.ndarray:
    return images.mean(1).flatten(1).numpy()


class _Steps:
    """Runs the steps one after the other, with their commands shown, their times and the memory of all processes."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.seconds: dict[str, float] = {}
        self.peak_memory = 0

    def run(self, name: str, command: list[str]) -> None:
        """Run one command as a step of its own."""
        with self.timed(name):
            self.call(command)

    def call(self, command: list[str]) -> None:
        """Run one command; UserError when it fails."""
        shown = shlex.join(["python" if part == sys.executable else part for part in command])
        self.console.print(f"[dim]$ {shown.replace('python -m hmar_mega', 'hmar-mega')}[/dim]", soft_wrap=True)
        # two threads or processes fill two cores; spinning ones are ruinous where other work shares them: 81 s instead
        # of 18 s, measured
        env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        if "torch.distributed.run" in command:
            env.setdefault("OMP_NUM_THREADS", "1")
        status = subprocess.run(command, check=False, env=env).returncode
        if status:
            raise UserError(f"the demo stopped: `{shown}` ended with status {status}; its message stands above")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Announce a step and record how long it took."""
        self.console.print(f"\n[bold]{len(self.seconds) + 1}. {name}[/bold]")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    @contextmanager
    def watch_memory(self, every: float = 0.5) -> Iterator[None]:
        """Keep the largest sum of resident memory of this process and its children."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(every):
                self.peak_memory = max(self.peak_memory, _resident_memory())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _resident_memory() -> int:
    """Unique resident bytes of this process and all its children; one that ends meanwhile counts nothing."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
