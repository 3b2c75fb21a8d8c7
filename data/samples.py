"""The samples of one or more folders numbered through, and how a rank's share of a batch is read from them.

`SampleSet.load_share` is what reader threads and processes run: it reads patiently, and puts other samples in the place
of damaged ones, as the policy says.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hmar_mega.data.damage import Damage, DamagePolicy, Lost
from hmar_mega.data.images import Augment, crop_pixels, decode_sample
from hmar_mega.data.patience import read_patiently
from hmar_mega.data.reader import ShardReader
from hmar_mega.data.tokens import choose_crops
from hmar_mega.rng import Purpose, uniform

#: Other samples that are tried in the place of a damaged one.
SUBSTITUTES = 16


@dataclass(frozen=True)
class Pixels:
    """How images become squares: see `image_to_tensor`. `random` crops by stream position, else at the centre."""

    resolution: int
    augment: Augment
    random: bool


@dataclass(frozen=True)
class Request:
    """Samples to read: those at stream positions `start`, `start + 1`, …

    Attributes:
        seed: of the run.
        epochs: of each sample's own set, by which one of its stored crops is chosen; None: always the first.
    """

    start: int
    samples: tuple[int, ...]
    seed: int
    epochs: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Share:
    """What was read for a request of b samples.

    Attributes:
        values: tokens (b, N) int64, or images (b, 3, R, R) uint8.
        labels: (b,) int64.
        keys: of the samples read.
        lost: positions that got another sample than theirs.
    """

    values: np.ndarray
    labels: np.ndarray
    keys: tuple[str, ...]
    lost: tuple[Lost, ...]


@dataclass(frozen=True)
class _Item:
    sample: int
    place: tuple[float, float]
    crop: int


@dataclass(frozen=True)
class _Loaded:
    value: np.ndarray
    label: int
    key: str


class SampleSet:
    """Several folders of one kind, their samples numbered through; can be sent to other processes.

    Args:
        readers: with the same policy and classes.
        pixels: how images become arrays; None for token shards.
    """

    def __init__(self, readers: Sequence[ShardReader], pixels: Pixels | None = None) -> None:
        if any((reader.kind == "images") != (pixels is not None) for reader in readers):
            raise ValueError(f"pixels={pixels} does not go with folders of {[reader.kind for reader in readers]}")
        self.readers = tuple(readers)
        self.pixels = pixels
        self._starts = [0, *itertools.accumulate(len(reader) for reader in readers)]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def policy(self) -> DamagePolicy:
        """What to do about damage."""
        return self.readers[0].policy

    @property
    def lost(self) -> dict[str, tuple[int, str]]:
        """Shards that cannot be used, by path: how many samples each has, and what is wrong with it."""
        return {str(r.folder / name): what for r in self.readers for name, what in r.lost.items()}

    def close(self) -> None:
        """Close the files."""
        for reader in self.readers:
            reader.close()

    def load_share(self, request: Request, closed: threading.Event | None = None) -> Share:
        """Read the samples of a request.

        Args:
            closed: raises `patience.Closed` once set.

        Raises:
            Damage: for a sample that cannot be read under `stop`; under `skip` when none in its place can be either.
        """
        chosen = zip(request.samples, self._places(request), self._crops(request), strict=True)
        items = [_Item(sample, place, crop) for sample, place, crop in chosen]
        found = self._read(items, closed)
        lost = []
        for number, damage in enumerate(found):
            if isinstance(damage, Damage):
                if self.policy.on_damage == "stop":
                    raise damage
                position = request.start + number
                substitute, found[number] = self._substitute(items[number], position, request.seed, damage, closed)
                lost.append(Lost(position, items[number].sample, substitute, damage.kind, str(damage)))
        loaded = [one for one in found if isinstance(one, _Loaded)]
        return Share(
            np.stack([one.value for one in loaded]),
            np.array([one.label for one in loaded], np.int64),
            tuple(one.key for one in loaded),
            tuple(lost),
        )

    def _places(self, request: Request) -> list[tuple[float, float]]:
        if self.pixels is None or not self.pixels.random:
            return [(0.5, 0.5)] * len(request.samples)
        positions = torch.arange(request.start, request.start + len(request.samples))
        drawn = uniform(torch.tensor(request.seed), positions, Purpose.CROP, 2)
        return [(u, v) for u, v in drawn.tolist()]

    def _crops(self, request: Request) -> list[int]:
        """Which stored crop each token sample shows."""
        stored = [1 if r.index.tokens is None else r.index.tokens.crops for r in self.readers]
        crops = np.zeros(len(request.samples), np.int64)
        if max(stored) == 1 or request.epochs is None:
            return crops.tolist()
        samples, epochs = np.array(request.samples), np.array(request.epochs)
        folders = np.searchsorted(self._starts, samples, side="right") - 1
        for folder, count in enumerate(stored):
            size = len(self.readers[folder])
            for epoch in np.unique(epochs[folders == folder]).tolist():
                mine = (folders == folder) & (epochs == epoch)
                own = samples[mine] - self._starts[folder]
                crops[mine] = choose_crops(count, request.seed, size, epoch * size, own)
        return crops.tolist()

    def _substitute(
        self, item: _Item, position: int, seed: int, damage: Damage, closed: threading.Event | None
    ) -> tuple[int, _Loaded]:
        """Another sample of the same folder, drawn by (seed, position): the first of several that can be read."""
        folder = self._folder_of(item.sample)
        first, count = self._starts[folder], len(self.readers[folder])
        drawn = uniform(torch.tensor(seed), torch.tensor([position]), Purpose.SUBSTITUTE, SUBSTITUTES)[0]
        for number in (drawn.double() * count).long().tolist():
            found = self._read([_Item(first + number, item.place, item.crop)], closed)[0]
            if isinstance(found, _Loaded):
                return first + number, found
        raise Damage(f"{damage}; none of {SUBSTITUTES} others in its place could be read either", damage.kind)

    def _read(self, items: Sequence[_Item], closed: threading.Event | None) -> list[_Loaded | Damage]:
        return read_patiently(self._load, items, self.policy, self._stalled, self._try_again, closed)

    def _load(self, item: _Item) -> _Loaded:
        folder = self._folder_of(item.sample)
        reader, number = self.readers[folder], item.sample - self._starts[folder]
        if self.pixels is None:
            tokens = reader.read_tokens(number, item.crop)
            return _Loaded(tokens.tokens, tokens.label, tokens.key)
        sample = reader.read_image(number)
        image = decode_sample(sample)
        value = crop_pixels(image, self.pixels.resolution, self.pixels.augment, [item.place])[0]
        return _Loaded(value, sample.label, sample.key)

    def _folder_of(self, sample: int) -> int:
        return bisect.bisect_right(self._starts, sample) - 1

    def _stalled(self, item: _Item) -> Damage:
        folder = self._folder_of(item.sample)
        return self.readers[folder].stalled(item.sample - self._starts[folder])

    def _try_again(self) -> None:
        for reader in self.readers:
            reader.try_again()
