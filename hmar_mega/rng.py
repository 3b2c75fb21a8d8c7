"""Counter-based random numbers: Philox4x32-10 in plain torch integer arithmetic.

Every draw of the project that must not depend on rank, batch, order or device (label drop, masks, drop-path, sampling)
is a pure function of (seed, position, purpose). Source of the generator: Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a stream of numbers is for; streams of different purposes are independent."""

    LABEL_DROP = 1
    MASK_RATIO = 2
    MASK_POSITION = 3
    DROP_PATH = 4
    CODEBOOK_RENEWAL = 8
    CODEBOOK_START = 9
    TRUNCATION = 10
    CROP = 32
    EPOCH_ORDER = 33
    SHARD_ORDER = 34
    SPLIT_ORDER = 35
    STORED_CROP = 36
    CROP_CHOICE = 37
    SAMPLE_VIEW = 38
    GROUP_ORDER = 40
    SUBSTITUTE = 41
    SAMPLE = 4096  #: one stream a (scale, pass): SAMPLE·(scale + 1) + pass
    SMOOTH = 1 << 30  #: added to a pass's SAMPLE stream: the Gumbel noise of its tokens, one position a token


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: (…, 4) int64, each word in [0, 2³²).
        key: (…, 2) int64, each word in [0, 2³²), broadcast against `counter`.

    Returns:
        (…, 4) int64 words in [0, 2³²).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        product0, product1 = c0 * _M0, c2 * _M1  # int64 wraps; the 64 bits are those of the unsigned product
        high0, high1 = (product0 >> 32) & _LOW, (product1 >> 32) & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _LOW, high0 ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def uniform(seeds: Tensor, positions: Tensor, purpose: int | Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of each row's (seed, position, purpose).

    Args:
        seeds, positions: int64, non-negative, broadcast to (B,).
        purpose: the stream, see `Purpose`; below 2³². One number, or (B,) int64, one a row.
        count: numbers a row.

    Returns:
        (B, count) float32 on the device of `positions`; a longer row starts with the shorter one's numbers.
    """
    seeds, positions = torch.broadcast_tensors(seeds, positions)
    block = torch.arange((count + 3) // 4, device=positions.device)
    shape = (positions.shape[0], block.shape[0])
    if isinstance(purpose, Tensor):
        streams = purpose[:, None].expand(shape)
    else:
        streams = torch.full(shape, int(purpose), device=positions.device)
    counter = torch.stack(
        [
            block.expand(shape),
            streams,
            (positions & _LOW)[:, None].expand(shape),
            ((positions >> 32) & _LOW)[:, None].expand(shape),
        ],
        dim=-1,
    )
    key = torch.stack([seeds & _LOW, (seeds >> 32) & _LOW], dim=-1)[:, None]
    words = philox4x32(counter, key).flatten(1)[:, :count]
    return (words >> 8).to(torch.float32) * 2.0**-24
