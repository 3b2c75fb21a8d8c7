"""The demo's report: one page, report.html, that says what was trained, how well, how fast, and how to do it again.

The page needs no network and no script: images and curves are inside it.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmar_mega import report_plots
from hmar_mega.files import write_atomic
from hmar_mega.report_page import bars, comparison, element, facts, page, picture, sheet, wrap
from hmar_mega.report_runs import Stage, read_stage, read_tokenizer

#: The share of samples that an independent classifier must label as the class asked for.
DEMANDED_ACCURACY = 0.85

#: Classes in the command that draws samples.
SHOWN_CLASSES = 10

TITLE = "From a folder of images to an image generator"


@dataclass(frozen=True)
class DemoFigures:
    """What the demo measured.

    Attributes:
        accuracy: share of samples that the classifier labels as the class asked for.
        per_class: the same for the samples of each class.
        num_samples: samples judged.
        classifier_accuracy: of the classifier on held-out real images.
        reconstruction_accuracy: of the classifier on held-out images after encoding and decoding.
        val_psnr: of the tokenizer on held-out images, dB.
        seconds: wall time of each stage, in the order they ran.
        peak_memory_bytes: the most memory in use.
        versions: of the packages used.
    """

    accuracy: float
    per_class: tuple[float, ...]
    num_samples: int
    classifier_accuracy: float
    reconstruction_accuracy: float
    val_psnr: float
    seconds: dict[str, float]
    peak_memory_bytes: int
    versions: dict[str, str]


def write_report(
    out: Path, tokenizer: Path, stage1: Path, stage2: Path, figures: DemoFigures, images: dict[str, Path]
) -> Path:
    """Write report.html.

    Args:
        out: the demo's folder; commands on the page expect the exported model in out/model.
        tokenizer: folder of the trained tokenizer.
        stage1, stage2: run directories of next-scale and masked training.
        figures: what was measured.
        images: caption → image file, in the order to show.

    Returns:
        Path of the page.

    Raises:
        UserError: when one of the folders or images is missing or unreadable, or `out` cannot be written.
    """
    tokenizer_metrics, tokenizer_rows = read_tokenizer(tokenizer)
    first, second = read_stage(stage1), read_stage(stage2)
    sections = [
        element("h1", TITLE),
        element("p", _lead(first, second, tokenizer_metrics, figures), "lead"),
        _headline(figures),
        *_figures(figures, tokenizer_metrics),
        *_pictures(images, tokenizer, first),
        *_curves(tokenizer_rows, first, second, figures),
        *_models(first, second, tokenizer_metrics),
        *_machine(figures, second),
        *_commands(out, first, second),
    ]
    path = out / "report.html"
    write_atomic(path, page("hmar_mega demo report", sections))
    return path


def _lead(first: Stage, second: Stage, tokenizer: Mapping[str, Any], figures: DemoFigures) -> str:
    config, side = first.config, first.config.schedule.resolution
    return (
        f"On this machine a multi-scale tokenizer ({tokenizer['parameters']:,} parameters) and a "
        f"{config.model.depth}-block HMAR transformer ({second.parameters:,}) were trained from scratch on "
        f"{side} × {side} images of {config.model.num_classes} classes, exported, and asked for "
        f"{figures.num_samples:,} new images; all in {duration(sum(figures.seconds.values()))}."
    )


def _headline(figures: DemoFigures) -> str:
    good = figures.accuracy >= DEMANDED_ACCURACY
    demanded = f"{DEMANDED_ACCURACY:.0%}".replace("%", " %")
    verdict = f"✓ at least the {demanded} demanded" if good else f"✗ below the {demanded} demanded"
    left = (
        element("div", percent(figures.accuracy), "figure")
        + element("div", f"of {figures.num_samples:,} samples show the class asked for, by a classifier's judgement")
        + element("div", verdict, f"verdict {'good' if good else 'poor'}")
    )
    right = bars(
        [
            (name, share, percent(share))
            for name, share in (
                ("samples", figures.accuracy),
                ("real images, encoded and decoded", figures.reconstruction_accuracy),
                ("real images", figures.classifier_accuracy),
            )
        ],
        mark=DEMANDED_ACCURACY,
    )
    note = f"How often the classifier finds the right class; it never saw these images. The line is at {demanded}."
    return wrap("section", wrap("div", left) + wrap("div", right + element("p", note, "note")), "headline")


def _figures(figures: DemoFigures, tokenizer: Mapping[str, Any]) -> list[str]:
    table = facts(
        {
            "samples of the class asked for": f"{percent(figures.accuracy)} of {figures.num_samples:,}",
            "classifier on held-out real images": percent(figures.classifier_accuracy),
            "… after encoding and decoding": percent(figures.reconstruction_accuracy),
            "tokenizer PSNR, held-out": f"{figures.val_psnr:.2f} dB",
            "codes used at each scale": ", ".join(f"{100 * u:.0f} %" for u in tokenizer["usage"]),
            "wall time": duration(sum(figures.seconds.values())),
            "peak memory": memory(figures.peak_memory_bytes),
        }
    )
    classes = bars(
        [(f"class {i}", share, percent(share)) for i, share in enumerate(figures.per_class)], DEMANDED_ACCURACY
    )
    per_class = element("h3", "Samples of each class that show it") + classes
    return [element("h2", "Figures"), wrap("div", table + wrap("div", per_class), "columns")]


def _pictures(images: Mapping[str, Path], tokenizer: Path, stage: Stage) -> list[str]:
    scales = len(stage.patch_nums)
    partial = ["scale 1 alone", *(f"scales 1–{k}" for k in range(2, scales))]
    reconstructions = sheet(
        tokenizer / "reconstructions.png",
        "Held-out images through the tokenizer: what the token maps of the first scales, and of all, can say.",
        ["original", f"all {scales} scales", *partial],
    )
    return [
        element("h2", "What the model draws"),
        wrap("div", "\n".join(picture(path, caption) for caption, path in images.items()), "pictures"),
        element("h2", "What the tokenizer keeps"),
        reconstructions,
    ]


def _curves(tokenizer_rows: report_plots.Rows, first: Stage, second: Stage, figures: DemoFigures) -> list[str]:
    weighting = first.config.stage.loss_weights
    label1 = "training, mean of tokens" if weighting == "uniform" else "training, scales weighted"
    codes = first.config.tokenizer.codebook_size
    return [
        element("h2", "Learning curves"),
        element("h3", "Tokenizer"),
        report_plots.tokenizer_curves(tokenizer_rows, first.patch_nums, figures.val_psnr),
        element("h3", "Stage 1: next-scale prediction"),
        report_plots.stage_curves(
            first.rows, first.patch_nums, "Stage 1", label1, (f"blind guess, ln {codes}", math.log(codes))
        ),
        element("h3", "Stage 2: masked prediction"),
        report_plots.stage_curves(second.rows, second.patch_nums, "Stage 2", "training, mean of samples"),
        element(
            "p",
            "Training hides the label of some images, validation never does. Stage 2 counts masked tokens only, and "
            "the first scale is never masked.",
            "note",
        ),
    ]


def _models(first: Stage, second: Stage, tokenizer: Mapping[str, Any]) -> list[str]:
    model, codec, scales = first.config.model, first.config.tokenizer, first.config.schedule.scales
    transformer_facts = facts(
        {
            "parameters": f"{second.parameters:,} ({first.parameters:,} without the mask branch)",
            "depth, width, heads": f"{model.depth}, {model.resolved_width}, {model.resolved_heads}",
            "blocks of the mask branch": str(second.config.model.resolved_mask_layers),
            "scales": ", ".join(f"{p}×{p}" for p in scales.patch_nums),
            "tokens an image": f"{scales.num_tokens:,}",
            "attention": model.attention.pattern.replace("_", "-"),
            "passes of sampling": str(sum(len(entry) for entry in second.config.schedule.resolved_mask_schedule)),
        }
    )
    tokenizer_facts = facts(
        {
            "parameters": f"{tokenizer['parameters']:,}",
            "codebook": f"{codec.codebook_size:,} codes of {codec.latent_channels} channels",
            "pixels a latent cell": f"{codec.downsample} × {codec.downsample}",
            "channels of each level": ", ".join(str(codec.base_channels * m) for m in codec.channel_mult),
            "optimizer steps": f"{tokenizer['steps']:,}",
            "images seen": f"{tokenizer['num_images_seen']:,}",
            "fingerprint": tokenizer["fingerprint"],
        }
    )
    left = wrap("div", element("h3", "Transformer") + transformer_facts)
    right = wrap("div", element("h3", "Tokenizer") + tokenizer_facts)
    columns = [_stage_facts(stage) for stage in (first, second)]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    return [
        element("h2", "Models"),
        wrap("div", left + right, "columns"),
        element("h2", "Training of the transformer"),
        comparison(["Stage 1: next scale", "Stage 2: masked"], rows),
    ]


def _stage_facts(stage: Stage) -> dict[str, str]:
    config, train, val = stage.config, stage.of_kind("train"), stage.of_kind("val")
    steps, optim = stage.rows[-1]["step"], config.optim
    rate = optim.base_lr * config.data.global_batch_size / 256
    best = min(val, key=lambda row: row["all_scales"], default=None)
    speeds = [row["images_per_second"] for row in train]
    processes = "1 process" if stage.processes == 1 else f"{stage.processes} processes"
    return {
        "optimizer steps": f"{steps:,}",
        "images seen": f"{steps * config.data.global_batch_size:,} (batches of {config.data.global_batch_size:,})",
        "learning rate": f"{rate:.3g}, falling to {rate * optim.final_ratio:.2g} over {optim.epochs:g} epochs",
        "parameters trained": f"{stage.trained_parameters:,}",
        "run on": f"{processes} ({stage.versions['device']}), tensor-parallel {config.parallel.tensor_parallel}, "
        f"{config.precision.compute}",
        "speed, median": f"{statistics.median(speeds):,.0f} images/s" if speeds else "not recorded",
        "last training loss": f"{train[-1]['loss']:.4f} nats per token" if train else "not recorded",
        "best validation loss": "not recorded"
        if best is None
        else f"{best['all_scales']:.4f} nats per token, at step {best['step']:,}",
        "source revision": _short_revision(stage.versions["revision"]),
    }


def _machine(figures: DemoFigures, stage: Stage) -> list[str]:
    total = sum(figures.seconds.values())
    longest = max(figures.seconds.values(), default=0.0) or 1.0
    times = bars([(name, seconds / longest, duration(seconds)) for name, seconds in figures.seconds.items()])
    left = wrap("div", element("h3", f"Time: {duration(total)}") + times)
    right = wrap("div", element("h3", "Versions") + facts(figures.versions))
    return [element("h2", "Time and versions"), wrap("div", left + right, "columns")]


def _commands(out: Path, first: Stage, second: Stage) -> list[str]:
    """Command lines that run as they stand, from the directory the demo ran in."""
    markup = [
        element("h2", "Again, by hand"),
        element("p", "Each line runs as it stands, from the folder the demo was started in.", "note"),
    ]
    for title, lines in commands(out, first, second).items():
        markup += [element("p", title, "step"), wrap("pre", "".join(element("code", line) for line in lines))]
    return markup


def commands(out: Path, first: Stage, second: Stage) -> dict[str, list[str]]:
    """What to run, title → command lines."""
    model, config = str(out / "model"), first.config
    classes = ",".join(str(c) for c in range(min(SHOWN_CLASSES, config.model.num_classes)))
    wanted, side = config.model.num_classes - 1, config.schedule.resolution
    draw_mask = (
        f'from PIL import Image; m = Image.new("L", ({side}, {side})); '
        f'm.paste(255, (0, {side // 2}, {side}, {side})); m.save("mask.png")'
    )
    sample, edit = ["hmar-mega", "sample", model], ["hmar-mega", "edit", model, "image.png", "--mask", "mask.png"]
    again1, again2 = f"{out}-again/stage1", f"{out}-again/stage2"
    return {
        "Samples of every class, a row each": [
            shlex.join([*sample, "--classes", classes, "--count", "10", "--out", "samples.png"])
        ],
        f"An image of class 0, and its lower half drawn anew as class {wanted}": [
            shlex.join([*sample, "--classes", "0", "--count", "1", "--out", "image.png"]),
            shlex.join(["python", "-c", draw_mask]),
            shlex.join([*edit, "--class", str(wanted), "--out", "edited.png"]),
        ],
        "Both training stages and the export": [
            _train_command(first, [f"run.dir={again1}"]),
            _train_command(second, [f"run.dir={again2}", f"run.init_from={again1}"]),
            shlex.join(["hmar-mega", "export", again2, f"{out}-again/model"]),
        ],
        "Everything, from the images to this page": [
            shlex.join(["hmar-mega", "demo", "--out", f"{out}-again-all", "--processes", str(second.processes)])
        ],
    }


def _train_command(stage: Stage, settings: Sequence[str]) -> str:
    start = ["hmar-mega"]
    if stage.processes > 1:
        start = ["torchrun", "--standalone", "--nproc-per-node", str(stage.processes), "-m", "hmar_mega"]
    return shlex.join([*start, "train", str(stage.folder / "config.yaml"), *settings])


def percent(share: float) -> str:
    """0.934 → `93.4 %`."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """8.24 → `8.2 s`, 75 → `1 min 15 s`, 3700 → `1 h 02 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(size: int) -> str:
    """Bytes as MiB or, from one on, GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _short_revision(revision: str) -> str:
    commit, plus, changes = revision.partition("+")
    return commit[:12] + plus + changes
