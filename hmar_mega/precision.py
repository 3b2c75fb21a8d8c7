"""Number formats: where float32 must really be float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Turn off TF32, the 10-bit-mantissa mode that CUDA convolutions use for float32 by default.

    Token ids come from nearest-neighbour decisions and images are compared pixel by pixel: neither may depend on the
    device or the batch. Does nothing on a CPU.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
