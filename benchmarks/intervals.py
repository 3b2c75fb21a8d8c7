"""What an interval of FID costs: CPU seconds of a bootstrap replicate by three ways, which must agree.

    python benchmarks/intervals.py --images 1000,5000 --markdown intervals.md
    python benchmarks/intervals.py --images 60 --dims 24 --replicates 2          # does the script work?

`sqrtm`: SciPy's root of the product of covariances. `covariance`: the replicate's covariance, and the eigenvalues
between the roots of the reference. `resampled`: as `hmar-mega evaluate` does it. Features are made up.
CPU time, not wall time, so that a machine shared with others tells the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from common import describe, machine, markdown_table

from hmar_mega.evaluation.distances import FrechetReference, bootstrap_weights
from hmar_mega.files import write_atomic

#: Largest relative difference between the ways that is still rounding.
AGREE = 1e-4


def main(arguments: list[str] | None = None) -> None:
    """Time every way on each number of images, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="1000,5000", help="numbers of images (default: %(default)s)")
    parser.add_argument("--dims", type=int, default=1280, help="features of an image (default: %(default)s)")
    parser.add_argument("--reference", type=int, default=10_000, help="images of the reference (default: %(default)s)")
    parser.add_argument("--replicates", type=int, default=8, help="replicates to average over (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the table")
    args = parser.parse_args(arguments)
    lines = [line for images in args.images.split(",") for line in measure(int(images), args)]
    heads = ["images", "way", "CPU s a replicate", "FID of the first replicate"]
    about = f"{args.dims} dims, {torch.get_num_threads()} threads, {describe(machine(torch.device('cpu')))}"
    page = f"{about}\n\n{markdown_table(heads, lines)}"
    if args.markdown is not None:
        write_atomic(args.markdown, page + "\n")
    print(page)


def measure(images: int, args: argparse.Namespace) -> list[list[str]]:
    """Rows of one number of images; SystemExit when the ways disagree."""
    random = np.random.default_rng(0)
    mixing = random.normal(size=(args.dims, args.dims)) * np.exp(-np.arange(args.dims) / 200)[:, None]
    real = (random.normal(size=(args.reference, args.dims)) @ mixing).astype(np.float32)
    fake = (random.normal(size=(images, args.dims)) @ mixing + 0.1).astype(np.float32)
    mean, covariance = moments(real)
    reference = FrechetReference(mean, covariance)
    weights = bootstrap_weights(images, args.replicates)[1:]
    repeated = [np.repeat(fake, counts.astype(int), axis=0) for counts in weights]

    def by_root(values: np.ndarray) -> float:
        own_mean, own = moments(values)
        root = scipy.linalg.sqrtm(covariance @ own).real
        return float(((mean - own_mean) ** 2).sum() + np.trace(covariance + own - 2 * root))

    ways: dict[str, Callable[[], Any]] = {
        "sqrtm": lambda: [by_root(values) for values in repeated[:1]],
        "covariance": lambda: [reference.distance(*moments(values)) for values in repeated],
        "resampled": lambda: reference.resampled(lambda: [fake], weights, fake.mean(0)).tolist(),
    }
    found, lines = {}, []
    for name, way in ways.items():
        started = time.process_time()
        found[name] = way()
        seconds = (time.process_time() - started) / len(found[name])
        lines.append([f"{images:,}", name, f"{seconds:.2f}", f"{found[name][0]:.6f}"])
    for name, values in found.items():
        if abs(values[0] / found["covariance"][0] - 1) > AGREE:
            raise SystemExit(f"{name} gives {values[0]}, the eigenvalues {found['covariance'][0]}: one is wrong")
    return lines


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D), float64."""
    return values.mean(0, dtype=np.float64), np.cov(values, rowvar=False, dtype=np.float64)


if __name__ == "__main__":
    main()
