"""Features of many images in chunks on disk: shared by processes, resumable, the same for any number of processes.

    ROOT/NETWORK-DIGEST-IMAGES-500/000000.npz …   pooled (n, D), spatial (n, S), log_probabilities (n, C) float32

The folder's name says which network saw which images in chunks of how many, so that features of others are never taken
for them, and images that were mended are looked at again. Chunk c belongs to process c mod n. A chunk is written whole
or not at all; statistics are merged in the chunks' order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmar_mega.errors import UserError
from hmar_mega.evaluation.images import NPZ_ERRORS, ImageSource
from hmar_mega.evaluation.networks import FeatureNetwork, Features
from hmar_mega.files import open_atomic
from hmar_mega.inference.storage import write_npz
from hmar_mega.progress import track

#: Images of a file of features.
CHUNK = 500


@dataclass(frozen=True)
class Extraction:
    """Features of `source` by `network`, in a folder of their own in `root`."""

    source: ImageSource
    network: FeatureNetwork
    root: Path
    batch_size: int = 50
    chunk_size: int = CHUNK

    def run(self, part: int = 0, parts: int = 1) -> None:
        """Make this part's missing chunks.

        Raises:
            UserError: when the folder cannot be written, an image cannot be used, or a feature is not finite.
        """
        own = range(part, self._chunks, parts)
        missing = [chunk for chunk in own if not self._path(chunk).exists()]
        total, left = (sum(self._span(c)[1] - self._span(c)[0] for c in chunks) for chunks in (own, missing))
        with track(f"features of {self.source.path}", total, part == 0, total - left) as tally:
            for chunk in missing:
                start, stop = self._span(chunk)
                pieces = []
                for at in range(start, stop, self.batch_size):
                    end = min(at + self.batch_size, stop)
                    pieces.append(self._features(at, end))
                    tally.advance(end - at)
                with open_atomic(self._path(chunk)) as file:
                    write_npz(file, _joined(pieces))

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of every chunk, in order; UserError when one is missing or damaged."""
        for chunk in range(self._chunks):
            path, (start, stop) = self._path(chunk), self._span(chunk)
            try:
                with np.load(path, allow_pickle=False) as stored:
                    arrays = {name: stored[name] for name in stored.files}
                if len(arrays["pooled"]) != stop - start:
                    raise ValueError(f"{len(arrays['pooled'])} features for {stop - start} images")
            except NPZ_ERRORS as err:
                raise UserError(f"{path} is damaged ({err}); remove it and run the command again") from None
            yield arrays

    def _features(self, start: int, stop: int) -> Features:
        features = self.network.extract(torch.tensor(self.source.read(start, stop)))
        for values in (features.pooled, features.spatial, features.log_probabilities):
            if values is not None and not bool(values.isfinite().all()):
                bad = int((~values.isfinite().all(1)).nonzero()[0])
                raise UserError(
                    f"{self.network.label} gives features that are not finite for image {start + bad} of "
                    f"{self.source.path}; check its weights and that image"
                )
        return features

    @property
    def _chunks(self) -> int:
        return -(-len(self.source) // self.chunk_size)

    def _span(self, chunk: int) -> tuple[int, int]:
        return chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, len(self.source))

    @property
    def folder(self) -> Path:
        """Where the chunks are."""
        name = f"{self.network.name}-{self.network.digest}-{self.source.fingerprint}-{self.chunk_size}"
        return self.root / name

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.npz"


def _joined(pieces: list[Features]) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "pooled": torch.cat([p.pooled for p in pieces]).numpy(),
        "spatial": torch.cat([p.spatial for p in pieces]).numpy(),
    }
    logs = [p.log_probabilities for p in pieces if p.log_probabilities is not None]
    if logs:
        arrays["log_probabilities"] = torch.cat(logs).numpy()
    return arrays
