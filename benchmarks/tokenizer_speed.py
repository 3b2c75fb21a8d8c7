"""Images a second of the tokenizer on one GPU: training, encoding, decoding; formats, channels last, torch.compile.

    python benchmarks/tokenizer_speed.py --json speed.json --markdown speed.md
    python benchmarks/tokenizer_speed.py --config tokenizer/emoji-64 --batch 64
    python benchmarks/tokenizer_speed.py --device cpu --tiny                     # whether the script itself works

Random images and weights: the work does not depend on them. `benchmarks/README.md` says how to read what is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    Clock,
    add_output_options,
    describe,
    laps,
    machine,
    markdown_table,
    measure_limits,
    peak_memory,
    reason,
    write_results,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.precision import exact_float32
from hmar_mega.tokenizer.losses import psnr, reconstruction_loss
from hmar_mega.tokenizer.model import MultiScaleVQVAE

#: Steps that compile and pick algorithms, and timed ones.
WARM_UP, TIMED = 4, 10

#: A model that a CPU runs.
TINY = (
    "tokenizer.base_channels=8", "tokenizer.norm_groups=4", "tokenizer.channel_mult=[1, 1, 2]",
    "schedule.resolution=16", "schedule.patch_nums=[1, 2, 4]", "tokenizer.codebook_size=64",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How convolutions run."""

    name: str
    bf16: bool
    channels_last: bool
    compiled: bool


WAYS = (
    Way("float32", bf16=False, channels_last=False, compiled=False),
    Way("bf16", bf16=True, channels_last=False, compiled=False),
    Way("bf16, channels last", bf16=True, channels_last=True, compiled=False),
    Way("bf16, channels last, compiled", bf16=True, channels_last=True, compiled=True),
)


def main(arguments: list[str] | None = None) -> None:
    """Time every part in every way; one that fails says why, and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tokenizer/published-256", help="configuration (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images at once (default: %(default)s)")
    parser.add_argument("--ways", type=int, default=len(WAYS), help="only the first so many (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model at 16 px")
    parser.add_argument("--tokenizer", type=Path, help="a trained one, to see what decoding in bf16 costs")
    add_output_options(parser)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny shows whether the script works")
    device = torch.device(args.device)
    config = load_config(args.config, [*(TINY if args.tiny else ()), *args.set])
    limits = measure_limits(Clock(device))
    results: dict[str, Any] = {"machine": machine(device), "limits": limits, "batch": args.batch, "rows": []}
    print(describe(results["machine"], limits), flush=True)
    flops = count_flops(config)
    for way in WAYS[: args.ways]:
        for part in ("train", "encode", "decode"):
            row: dict[str, Any] = {"part": part, "way": way.name}
            try:
                row |= measure(config, way, part, args.batch, device)
                row["tflops"] = flops[part] * row["images_per_second"] / 1e12
                row["of_limit"] = row["tflops"] / limits.matmul_tflops
            except Exception as err:
                row["error"] = reason(err)
            results["rows"].append(row)
            print(line(row), flush=True)
            write_results(args, results, page(results))
    results["bf16_decoding_db"] = bf16_error(config, args.tokenizer, args.batch, device)
    write_results(args, results, page(results))
    print(f"\n{page(results)}")


def new_model(config: Config, device: torch.device) -> MultiScaleVQVAE:
    """An untrained tokenizer, always the same."""
    torch.manual_seed(0)
    return MultiScaleVQVAE(config.tokenizer, config.schedule.scales).to(device)


def count_flops(config: Config) -> dict[str, float]:
    """FLOPs an image of convolutions and products: encoding with the search for codes, decoding, a training step."""
    with torch.device("meta"):
        model = MultiScaleVQVAE(config.tokenizer, config.schedule.scales)
        images = torch.empty(1, 3, model.resolution, model.resolution)
        f = torch.empty(1, config.tokenizer.latent_channels, model.schedule.grid, model.schedule.grid)

    def count(call: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        return float(counter.get_total_flops())

    search = 2.0 * model.schedule.num_tokens * config.tokenizer.codebook_size * config.tokenizer.latent_channels
    encoder, decoder = count(lambda: model.latent(images)), count(lambda: model.decoder(model.post_quant_conv(f)))
    return {"encode": encoder + search, "decode": decoder, "train": 3 * (encoder + decoder) + search}


def measure(config: Config, way: Way, part: str, batch: int, device: torch.device) -> dict[str, Any]:
    """Images a second and peak memory of one part, from `laps` of `TIMED` calls that follow each other."""
    model = new_model(config, device)
    step = (
        train_step(model, config, way, batch, device) if part == "train" else inference(model, way, part, batch, device)
    )
    for number in range(WARM_UP):
        step(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    timing = laps(step, TIMED, device)
    memory = peak_memory(device)
    return {"ms": timing.median, "images_per_second": 1e3 * batch / timing.median, "peak_gb": memory and memory / 1e9}


def random_images(model: MultiScaleVQVAE, way: Way, batch: int, device: torch.device) -> Tensor:
    """(B, 3, R, R) in [−1, 1], laid out as the way says."""
    images = torch.rand(batch, 3, model.resolution, model.resolution, device=device) * 2 - 1
    return images.contiguous(memory_format=torch.channels_last) if way.channels_last else images


def compiled(model: MultiScaleVQVAE, way: Way) -> None:
    """As `tokenizer.train.compile` does, where the way says so."""
    if way.compiled:
        model.encoder.compile()
        model.decoder.compile()


def train_step(
    model: MultiScaleVQVAE, config: Config, way: Way, batch: int, device: torch.device
) -> Callable[[int], object]:
    """Forward, loss of pixels and codes, backward and AdamW; weights keep their layout, as in training."""
    train = config.tokenizer.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=train.betas, fused=device.type == "cuda" or None)
    images = random_images(model, way, batch, device)
    compiled(model, way)

    def step(number: int) -> None:
        with nullcontext() if way.bf16 else exact_float32():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=way.bf16):
                rebuilt, quantized = model(images)
                loss, _ = reconstruction_loss(rebuilt.float(), images, train.l1_weight, train.l2_weight)
            (loss + quantized.loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference(model: MultiScaleVQVAE, way: Way, part: str, batch: int, device: torch.device) -> Callable[[int], object]:
    """Encoding to tokens (the encoder in the way's format, the search in float32), or decoding from latents."""
    model = model.eval().requires_grad_(False)
    images = random_images(model, way, batch, device)
    with torch.no_grad():
        f_hat = model.quantizer.f_hat(model.encode(images))
    if way.channels_last:  # weights too: of images alone nothing would stay after the first normalisation
        model.to(memory_format=torch.channels_last)
        f_hat = f_hat.contiguous(memory_format=torch.channels_last)
    compiled(model, way)

    @torch.no_grad()
    def step(number: int) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=way.bf16):
            if part == "decode":
                model.decode(f_hat)
            elif way.bf16:
                model.quantizer.encode(model.latent(images))
            else:
                model.encode(images)

    return step


@torch.no_grad()
def bf16_error(config: Config, folder: Path | None, batch: int, device: torch.device) -> float:
    """PSNR in dB between images decoded in float32 and in bf16: how far apart the two are, not how good."""
    model = MultiScaleVQVAE.load(folder, device) if folder is not None else new_model(config, device).eval()
    tokens = torch.randint(model.config.codebook_size, (batch, model.schedule.num_tokens), device=device)
    f_hat = model.quantizer.f_hat(tokens)
    exact = model.decode(f_hat)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        return round(psnr(model.decode(f_hat).float(), exact), 2)


def line(row: dict[str, Any]) -> str:
    """A measurement as soon as it is there."""
    if "error" in row:
        return f"{row['part']:7} {row['way']:32} {row['error']}"
    return f"{row['part']:7} {row['way']:32} {row['images_per_second']:9.1f} images/s  {row['tflops']:7.2f} TFLOP/s"


def page(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = []
    for row in results["rows"]:
        if "error" in row:
            rows.append([row["part"], row["way"], row["error"], "", "", "", ""])
            continue
        memory = f"{row['peak_gb']:.1f}" if row["peak_gb"] is not None else "–"
        rows.append(
            [
                row["part"], row["way"], f"{row['ms']:.1f}", f"{row['images_per_second']:.1f}", f"{row['tflops']:.2f}",
                f"{row['of_limit']:.1%}", memory,
            ]
        )  # fmt: skip
    heads = ["part", "way", "ms", "images/s", "TFLOP/s", "of the measured product", "peak GB"]
    text = (
        f"{describe(results['machine'], results['limits'])}; batch {results['batch']}\n\n{markdown_table(heads, rows)}"
    )
    if "bf16_decoding_db" in results:
        text += f"\n\nPSNR between images decoded in bf16 and in float32: {results['bf16_decoding_db']:.1f} dB"
    return text


if __name__ == "__main__":
    main()
