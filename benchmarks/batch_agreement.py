"""How far an image depends on the batch it is sampled in: token agreement in float32 and bf16, and the cost of none.

    python benchmarks/batch_agreement.py MODEL [--count 64] [--device cuda]

Random numbers never depend on the batch, so what differs is rounding. `batch_invariant=True` removes it by running one
image at a time; the last column is what that costs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmar_mega.inference import ImageModel, load_model
from hmar_mega.inference.pipeline import image_seeds
from hmar_mega.inference.sampler import generate_tokens


def main() -> None:
    """Compare batches of `count` with single images, and print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--device")
    args = parser.parse_args()
    rows = [
        measure(load_model(args.model, args.device, dtype), args.count) for dtype in (torch.float32, torch.bfloat16)
    ]
    print(f"{'dtype':10} {'tokens equal':>13} {'images equal':>13} {'batched img/s':>14} {'one by one':>11}")
    for row in rows:
        print(
            f"{row['dtype']:10} {row['tokens_equal']:13.4%} {row['images_equal']:13.2%} "
            f"{row['batched']:14.1f} {row['single']:11.1f}"
        )
    print(json.dumps({"count": args.count, "device": str(rows[0]["device"]), "rows": rows}))


def measure(model: ImageModel, count: int) -> dict[str, Any]:
    """Agreement of one batch with single images, and both rates (medians of three)."""
    labels = model.check_labels([i % model.num_classes for i in range(count)])
    seeds = image_seeds(0, count).to(model.device)
    settings = model.sample_settings()
    codes = model.tokenizer.quantizer

    def batched() -> Tensor:
        return generate_tokens(model.model, codes, labels, seeds, settings)[0]

    def single() -> Tensor:
        parts = [
            generate_tokens(model.model, codes, labels[i : i + 1], seeds[i : i + 1], settings)[0] for i in range(count)
        ]
        return torch.cat(parts)

    same = batched() == single()
    return {
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "device": str(model.device),
        "tokens_equal": float(same.float().mean()),
        "images_equal": float(same.all(dim=1).float().mean()),
        "batched": count / _median_seconds(batched),
        "single": count / _median_seconds(single),
    }


def _median_seconds(work: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work().sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


if __name__ == "__main__":
    main()
