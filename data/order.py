"""Which sample stands at which position of the training stream: pure functions of (seed, position)."""

from __future__ import annotations

import threading

import numpy as np
import torch

from hmar_mega.rng import Purpose, philox4x32

_LOW = 0xFFFFFFFF


def permutation(count: int, seed: int, stream: int, purpose: int) -> np.ndarray:
    """A permutation of 0 … count−1, (count,) int64, a pure function of all four arguments.

    Items are sorted by 63 bits of Philox each, equal ones by number, so that neither the machine nor the version of
    numpy or torch can change the order (numpy promises no stable stream for its `Generator`).
    """
    blocks = torch.arange((count + 1) // 2)  # a block of Philox gives four words, a sort key takes two
    counter = torch.empty(blocks.shape[0], 4, dtype=torch.int64)
    counter[:, 0] = blocks
    counter[:, 1] = purpose
    counter[:, 2] = stream & _LOW
    counter[:, 3] = stream >> 32
    words = philox4x32(counter, torch.tensor([seed & _LOW, seed >> 32])).reshape(-1, 2)[:count]
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True).numpy()


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
                if self.shuffle:
                    order = permutation(self.num_samples, self.seed, epoch, Purpose.EPOCH_ORDER)
                else:
                    order = np.arange(self.num_samples)
                # Read-ahead touches two epochs at an edge; older ones are not needed again.
                recent = dict(list(self._epochs.items())[-1:])
                self._epochs = {**recent, epoch: order}
            return self._epochs[epoch]
