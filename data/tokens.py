"""Token samples as bytes, and which of an image's stored crops an epoch reads.

A sample holds k crops of N token ids (k = `TokenFormat.crops`, N = Σ p_k²; each crop is the K maps of one encoding, one
after the other), stored in one of two ways, `TokenFormat.storage`:

    packed  field `tok`: crop after crop, each ⌈N·b/8⌉ bytes, b = `TokenFormat.bits` = ⌈log2 V⌉ bits an id. Id i of
            a crop is bits i·b … i·b+b−1 of its bytes read as a little-endian number: 680 ids of 12 bits are 1020 bytes
    npy     field `npy`: a NumPy array of uint16, (N,) for one crop, else (k, N): for programs that know NumPy only
"""

from __future__ import annotations

import io
import math
from typing import Literal

import numpy as np
import torch

from hmar_mega.data.index import TokenFormat
from hmar_mega.errors import UserError
from hmar_mega.rng import Purpose, uniform

Storage = Literal["packed", "npy"]

TOKEN_FIELD = "npy"
PACKED_FIELD = "tok"


def npy_bytes(array: np.ndarray) -> bytes:
    """An array in NumPy's .npy format, version 1.0."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def bits_for(codebook_size: int) -> int:
    """⌈log2 V⌉, at least 1: bits that hold every id of a codebook."""
    return max(1, (codebook_size - 1).bit_length())


class TokenCodec:
    """From the ids of a sample to its bytes and back, for one `TokenFormat`.

    Attributes:
        field: name of the sample's field that holds them.
        sample_bytes: size of that field.
    """

    def __init__(self, tokens: TokenFormat) -> None:
        self._crops, self._count = tokens.crops, sum(p * p for p in tokens.patch_nums)
        self._codes = tokens.codebook_size
        self._packed = tokens.storage == "packed"
        self._bits = tokens.bits
        if self._packed:
            if not bits_for(self._codes) <= self._bits <= 16:
                raise UserError(
                    f"token shards of {self._bits} bits an id cannot hold a codebook of {self._codes}; encode anew"
                )
            self.field = PACKED_FIELD
            self._header = b""
            self._crop_bytes = -(-self._count * self._bits // 8)
            # Ids start at the same bit of a byte again after `period` ids, which fill `stride` bytes.
            self._period = 8 // math.gcd(self._bits, 8)
            self._stride = self._period * self._bits // 8
        else:
            self.field = TOKEN_FIELD
            self._crop_bytes = 2 * self._count
            shape = (self._count,) if self._crops == 1 else (self._crops, self._count)
            self._header = npy_bytes(np.empty(shape, "<u2"))[: -2 * self._count * self._crops]
        self.sample_bytes = len(self._header) + self._crops * self._crop_bytes

    def encode(self, crops: np.ndarray) -> bytes:
        """Ids (k, N), each in [0, V), as the bytes of a sample."""
        if crops.shape != (self._crops, self._count) or crops.min() < 0 or crops.max() >= self._codes:
            raise ValueError(f"ids {crops.shape} are not ({self._crops}, {self._count}) below {self._codes}")
        ids = np.ascontiguousarray(crops, "<u2")
        if not self._packed:
            return self._header + ids.tobytes()
        bits = np.unpackbits(ids.view(np.uint8), axis=1, bitorder="little").reshape(self._crops, self._count, 16)
        rows = bits[:, :, : self._bits].reshape(self._crops, -1)
        return np.packbits(rows, axis=1, bitorder="little").tobytes()

    def decode(self, data: bytes, where: str, crop: int = 0) -> np.ndarray:
        """The ids of one crop, (N,) int64.

        Args:
            where: names the sample in messages.
            crop: in [0, k).

        Raises:
            UserError: when the bytes are not those of such a sample, or an id is not in the codebook.
        """
        if len(data) != self.sample_bytes or not data.startswith(self._header):
            crops = "" if self._crops == 1 else f"{self._crops} × "
            raise UserError(f"{where} does not hold {crops}{self._count} tokens; restore the shard or make it anew")
        if not 0 <= crop < self._crops:
            raise ValueError(f"crop={crop} of {self._crops}")
        start = len(self._header) + crop * self._crop_bytes
        tokens = self._unpack(data, start) if self._packed else np.frombuffer(data, "<u2", self._count, start)
        if tokens.max() >= self._codes:
            raise UserError(
                f"{where} has token {tokens.max()}, its codebook only {self._codes}; restore the shard or make it anew"
            )
        return tokens.astype(np.int64)

    def _unpack(self, data: bytes, start: int) -> np.ndarray:
        groups = -(-self._count // self._period)
        raw = np.zeros(groups * self._stride, np.uint32)
        raw[: self._crop_bytes] = np.frombuffer(data, np.uint8, self._crop_bytes, start)
        columns = raw.reshape(groups, self._stride).T
        ids = np.empty((groups, self._period), np.uint32)
        for column in range(self._period):
            byte, shift = divmod(column * self._bits, 8)
            value = columns[byte] >> shift
            for more in range(1, (shift + self._bits + 7) // 8):
                value = value | (columns[byte + more] << (8 * more - shift))
            ids[:, column] = value & ((1 << self._bits) - 1)
        return ids.reshape(-1)[: self._count]


def choose_crops(crops: int, seed: int, num_samples: int, start: int, samples: np.ndarray) -> np.ndarray:
    """Which stored crop each sample shows in its epoch, (b,) int64, a pure function of seed, epoch and sample.

    In epochs c·k … c·k+k−1 a sample shows each of its k crops once, in an order of its own drawn anew for every c.

    Args:
        crops: k.
        num_samples: samples of the set, and so positions of an epoch.
        start: stream position of the first of the samples, which stand one after the other.
        samples: (b,) int64.
    """
    if crops == 1:
        return np.zeros(len(samples), np.int64)
    epochs = np.arange(start, start + len(samples)) // num_samples
    cycle, within = np.divmod(epochs, crops)
    positions = torch.from_numpy(cycle * num_samples + samples)
    keys = uniform(torch.tensor(seed), positions, Purpose.CROP_CHOICE, crops).numpy()
    order = np.argsort(keys, axis=1, kind="stable")
    chosen: np.ndarray = order[np.arange(len(samples)), within]
    return chosen
