"""What 16-bit sampling costs in accuracy: the fast path in each format beside float32 on the plain path.

    python benchmarks/sampling_accuracy.py MODEL [--count 32] [--device cuda] [--json OUT] [--markdown OUT]

MODEL is an exported model. Columns: `draws`, the share of tokens drawn alike, pass for pass, from float32's own f̂ (one
step's rounding); `tokens`, the share alike at the end of a whole image, where one other token changes all that follow;
`images`, those whose tokens are all alike; PSNR in dB (peak 1) of the decoder alone, on the same f̂, and of those
images.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, add_output_options, describe, machine, markdown_table, write_results
from torch import Tensor

from hmar_mega.inference import ImageModel, load_model
from hmar_mega.inference.decoding import ImageDecoder
from hmar_mega.inference.graphs import ImageProgram
from hmar_mega.inference.packed import PackedState
from hmar_mega.inference.sampler import generate_tokens


def main(arguments: list[str] | None = None) -> None:
    """Compare fp32, bf16 and fp16 of the fast path with the plain path in float32; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--device")
    add_output_options(parser)
    args = parser.parse_args(arguments)
    truth = reference(args.model, args.count, args.device)
    rows = [compare(args.model, name, args.device, truth) for name in DTYPES]
    about = machine(truth["labels"].device)
    table = markdown_table(
        ["precision", "draws alike", "tokens alike", "images alike", "decoder PSNR dB", "image PSNR dB"],
        [
            [row["precision"], *(f"{row[k]:.2%}" for k in ("draws", "tokens", "images")),
             *(f"{row[k]:.1f}" for k in ("decoder_psnr", "image_psnr"))]
            for row in rows
        ],
    )  # fmt: skip
    print(f"{describe(about)}\n\n{table}")
    write_results(args, {"machine": about, "count": args.count, "rows": rows}, table)


@torch.inference_mode()
def reference(folder: Path, count: int, device: str | None) -> dict[str, Any]:
    """Tokens, f̂ after every scale and images of the plain path in float32."""
    model = load_model(folder, device, graphs=False)
    labels = model.check_labels([i % model.num_classes for i in range(count)])
    seeds = torch.arange(count, device=model.device)
    f_hats: list[Tensor] = []
    tokens, f_hat = generate_tokens(
        model.model, model.tokenizer.quantizer, labels, seeds, model.sample_settings(), on_features=f_hats.append
    )
    return {
        "labels": labels, "seeds": seeds, "tokens": tokens, "f_hats": f_hats, "images": model.to_images(f_hat),
    }  # fmt: skip


def compare(folder: Path, name: str, device: str | None, truth: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    dtype = DTYPES[name]
    return {"precision": name, **agreement(load_model(folder, device, dtype, dtype), truth)}


@torch.inference_mode()
def agreement(model: ImageModel, truth: dict[str, Any]) -> dict[str, float]:
    """What a model on the fast path has in common with `reference`."""
    settings, labels, seeds = model.sample_settings(), truth["labels"], truth["seeds"]
    program = ImageProgram(model.model, ImageDecoder(model.tokenizer, model.decoder.dtype))
    tokens, sampled = program(labels, seeds, settings)
    same = tokens == truth["tokens"]
    alike = same.all(1)
    pixels = program.decoder(truth["f_hats"][-1])
    single = [scale for scale, counts in enumerate(settings.mask_schedule) if len(counts) == 1]
    hits, total = 0, 0
    state = PackedState(program.packed, model.tokenizer.quantizer, labels, seeds, settings)
    for scale in single:
        state.f_hat = truth["f_hats"][scale - 1] if scale else None
        drawn, _, _ = state.sample(scale, "next_scale", state.strengths[scale], 0)
        wanted = truth["tokens"][:, model.schedule.span(scale)]
        hits, total = hits + int((drawn == wanted).sum()), total + wanted.numel()
    return {
        "draws": hits / total, "tokens": float(same.float().mean()),
        "images": float(alike.float().mean()), "decoder_psnr": psnr(pixels, truth["images"]),
        "image_psnr": psnr(sampled[alike], truth["images"][alike]) if bool(alike.any()) else math.nan,
    }  # fmt: skip


def psnr(found: Tensor, truth: Tensor) -> float:
    """dB, peak 1; infinite where nothing differs."""
    error = float((found - truth).square().mean())
    return -10 * math.log10(error) if error else math.inf


if __name__ == "__main__":
    main()
