"""How well an order mixes: distances of consecutive samples in the store, and classes of batches beside pure chance.

    python benchmarks/mixing.py

A store sorted by class is the hard case: an order that stays among neighbours then gives batches of few classes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from common import markdown_table

from hmar_mega.data.order import GroupedOrder, Order, SampleOrder


@dataclass(frozen=True)
class Mixing:
    """Of one epoch.

    Attributes:
        distance: mean distance of consecutive samples in the store by the size of the set; 1/3 for a random order.
        balance: variance of a class's count in a batch by what drawing without replacement gives (hypergeometric), the
            mean over batches and classes; 1 for a random order, more where batches have too few classes.
        shards: shards that a thousand consecutive samples come from, the mean.
    """

    distance: float
    balance: float
    shards: float


def measure_mixing(order: Order, labels: np.ndarray, shard_of: np.ndarray, batch: int) -> Mixing:
    """The mixing of the first epoch of `order`.

    Args:
        labels, shard_of: (n,) of every sample, as stored.
    """
    count = order.num_samples
    samples = order.sample_indices(0, count)
    distance = np.abs(np.diff(samples)).mean() / count
    classes = int(labels.max()) + 1
    batches = labels[samples[: count // batch * batch]].reshape(-1, batch)
    counts = np.stack([np.bincount(row, minlength=classes) for row in batches])
    share = np.bincount(labels, minlength=classes) / count
    expected = batch * share * (1 - share) * (count - batch) / (count - 1)
    balance = (((counts - batch * share) ** 2).mean(axis=0) / expected).mean()
    spans = shard_of[samples[: count // 1000 * 1000]].reshape(-1, 1000)
    shards = np.mean([len(np.unique(span)) for span in spans])
    return Mixing(float(distance), float(balance), float(shards))


def main() -> None:
    """Print a table for a set of ImageNet's size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--shard", type=int, default=1024, help="samples of a shard")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=768)
    parser.add_argument("--groups", type=int, nargs="*", default=[4, 16, 64, 256])
    args = parser.parse_args()
    shard_of = np.arange(args.samples) // args.shard
    sizes = np.bincount(shard_of).tolist()
    by_class = np.arange(args.samples) * args.classes // args.samples
    mixed = np.random.RandomState(0).permutation(by_class)
    orders: dict[str, Order] = {"as stored": SampleOrder(args.samples, 0, shuffle=False)}
    orders |= {f"groups of {group}": GroupedOrder(sizes, 0, group) for group in args.groups}
    orders["global"] = SampleOrder(args.samples, 0)
    rows = []
    for name, order in orders.items():
        hard, usual = (measure_mixing(order, labels, shard_of, args.batch) for labels in (by_class, mixed))
        figures = f"{hard.distance:.3f}", f"{usual.balance:.3f}", f"{hard.balance:.3g}", f"{hard.shards:.0f}"
        rows.append((name, *figures))
    header = ("order", "distance", "balance, store mixed", "balance, store by class", "shards in 1000 samples")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
