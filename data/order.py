"""Which sample stands at which position of the training stream: pure functions of (seed, position)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from hmar_mega.rng import Purpose, philox4x32

_LOW = 0xFFFFFFFF


def permutation(count: int, seed: int, stream: int, purpose: int) -> np.ndarray:
    """A permutation of 0 … count−1, (count,) int64, a pure function of all four arguments.

    Items are sorted by 63 bits of Philox each, equal ones by number, so that neither the machine nor the version of
    numpy or torch can change the order (numpy promises no stable stream for its `Generator`).
    """
    return torch.argsort(torch.from_numpy(_sort_keys(count, seed, stream, purpose)), stable=True).numpy()


def _sort_keys(count: int, seed: int, stream: int, purpose: int) -> np.ndarray:
    """63 random bits for each of `count` items, (count,) int64."""
    blocks = torch.arange((count + 1) // 2)  # a block of Philox gives four words, a sort key takes two
    counter = torch.empty(blocks.shape[0], 4, dtype=torch.int64)
    counter[:, 0] = blocks
    counter[:, 1] = purpose
    counter[:, 2] = stream & _LOW
    counter[:, 3] = stream >> 32
    words = philox4x32(counter, torch.tensor([seed & _LOW, seed >> 32])).reshape(-1, 2)[:count]
    return ((words[:, 0] << 31) | (words[:, 1] >> 1)).numpy()


class Order(Protocol):
    """What stands at every position of an endless stream of samples."""

    num_samples: int  #: of the set: the length of an epoch
    seed: int

    def epoch(self, position: int) -> int:
        """The epoch that `position` falls into."""
        ...

    def sample_indices(self, start: int, count: int) -> np.ndarray:
        """The samples at positions `start` … `start + count − 1`, (count,) int64."""
        ...

    def epochs(self, start: int, count: int) -> np.ndarray:
        """At the same positions, how often each sample's own set was gone through before, (count,) int64."""
        ...


class SampleOrder:
    """The order in which a run sees a set of samples.

    A position counts the images seen in the run. Epoch = position // num_samples, and inside epoch e the samples come
    in a permutation that is a pure function of (seed, e), each sample once; without `shuffle` they come as stored.

    Args:
        num_samples: samples of the set, at least one.
        seed: non-negative, below 2⁶³.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: an order needs at least one sample")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self._epochs: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def epoch(self, position: int) -> int:
        """The epoch that `position` falls into."""
        return position // self.num_samples

    def epochs(self, start: int, count: int) -> np.ndarray:
        """The epochs of positions `start` … `start + count − 1`, (count,) int64."""
        return np.arange(start, start + count) // self.num_samples

    def sample_index(self, position: int) -> int:
        """The sample at `position`, in [0, num_samples)."""
        return int(self.sample_indices(position, 1)[0])

    def sample_indices(self, start: int, count: int) -> np.ndarray:
        """The samples at positions `start` … `start + count − 1`, (count,) int64, across the edges of epochs."""
        parts = []
        position, end = start, start + count
        while position < end:
            epoch, within = divmod(position, self.num_samples)
            taken = min(end - position, self.num_samples - within)
            parts.append(self._epoch_order(epoch)[within : within + taken])
            position += taken
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            epoch = 0  # one and the same order for all
        with self._lock:
            if epoch not in self._epochs:
                order = self._shuffled(epoch) if self.shuffle else np.arange(self.num_samples)
                # Read-ahead touches two epochs at an edge; older ones are not needed again.
                recent = dict(list(self._epochs.items())[-1:])
                self._epochs = {**recent, epoch: order}
            return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        return permutation(self.num_samples, self.seed, epoch, Purpose.EPOCH_ORDER)


class GroupedOrder(SampleOrder):
    """An order that stays within a few shards at a time, for page caches and disk caches smaller than the set.

    In every epoch the shards come in another order, cut into groups of `group_shards`; a group's samples are all
    permuted together before the next group's begin. All ranks are in the same group, since positions are global.
    Consecutive samples are about a third of a group apart in the order of its shards, against a third of the set.

    Args:
        shard_sizes: samples of every shard, in the order of the store.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, group_shards: int) -> None:
        super().__init__(sum(shard_sizes), seed)
        if group_shards < 1:
            raise ValueError(f"group_shards={group_shards}: a group has at least one shard")
        self._shard_of = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
        self._shards = len(shard_sizes)
        self._group_shards = group_shards

    def _shuffled(self, epoch: int) -> np.ndarray:
        place = np.empty(self._shards, np.int64)
        place[permutation(self._shards, self.seed, epoch, Purpose.GROUP_ORDER)] = np.arange(self._shards)
        group = place[self._shard_of] // self._group_shards
        keys = _sort_keys(self.num_samples, self.seed, epoch, Purpose.EPOCH_ORDER)
        return np.lexsort((keys, group))  # stable: equal keys by number


class MixedOrder:
    """Several sets in one stream, each in its own order, in exact proportion.

    With weights w (divided by their common divisor, W their sum) position p takes set `pattern[p % W]`, a pattern that
    spreads the sets evenly. So any W positions that follow each other hold exactly w_i samples of set i, wherever they
    start, and the place within a set is known from p alone. A set is gone through once before its next epoch begins,
    whatever the others do. Samples are numbered through all sets.

    Args:
        orders: of the sets.
        weights: positive.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[int]) -> None:
        if not orders or len(orders) != len(weights) or min(weights) < 1:
            raise ValueError(f"{len(orders)} orders and weights {list(weights)}: give one positive weight a set")
        self.num_samples = sum(order.num_samples for order in orders)
        self.seed = orders[0].seed
        self._orders = tuple(orders)
        self._weights = np.array(weights) // math.gcd(*weights)
        self._starts = np.cumsum([0, *(order.num_samples for order in orders)])
        self._pattern = _even_pattern(self._weights)
        taken = self._pattern[:, None] == np.arange(len(orders))
        self._before = np.vstack([np.zeros(len(orders), np.int64), taken.cumsum(axis=0)])  # (W + 1, sets)

    def epoch(self, position: int) -> int:
        """Times that as many images were seen as all sets have together."""
        return position // self.num_samples

    def sample_indices(self, start: int, count: int) -> np.ndarray:
        """The samples at positions `start` … `start + count − 1`, (count,) int64, numbered through all sets."""
        return self._gather(
            start,
            count,
            lambda number, first, taken: self._orders[number].sample_indices(first, taken) + self._starts[number],
        )

    def epochs(self, start: int, count: int) -> np.ndarray:
        """At the same positions, how often each sample's own set was gone through before, (count,) int64."""
        return self._gather(start, count, lambda number, first, taken: self._orders[number].epochs(first, taken))

    def _gather(self, start: int, count: int, own: Callable[[int, int, int], np.ndarray]) -> np.ndarray:
        """What `own(set, its first position, how many)` gives for the sets, at the positions they take."""
        period = len(self._pattern)
        chosen = self._pattern[np.arange(start, start + count) % period]
        gathered = np.empty(count, np.int64)
        for number in range(len(self._orders)):
            first = start // period * int(self._weights[number]) + int(self._before[start % period, number])
            mine = chosen == number
            gathered[mine] = own(number, first, int(mine.sum()))
        return gathered


def _even_pattern(weights: np.ndarray) -> np.ndarray:
    """Σ w numbers of sets, (Σ w,) int64: at each place the set that is furthest behind its share, then the first."""
    total = int(weights.sum())
    counts = np.zeros(len(weights), np.int64)
    pattern = np.empty(total, np.int64)
    for place in range(total):
        pattern[place] = chosen = int(np.argmax(weights * (place + 1) - total * counts))
        counts[chosen] += 1
    return pattern
