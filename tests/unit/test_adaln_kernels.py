"""The fused elementwise kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import poisoned_memory, relative
from torch import Tensor

from hmar_mega.model.elementwise import LAYER_NORM_EPS

triton = pytest.importorskip("triton")
from hmar_mega.kernels.adaln import AdaLN, BiasGelu  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

#: (N, B, C): neither rows nor columns fill their tiles, several chunks of positions, and one sample alone.
SIZES = [(37, 3, 48), (9, 1, 130)] if DEVICE == "cpu" else [(37, 3, 48), (680, 5, 1536), (2240, 1, 1920)]


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]


def compare(outputs: list[Tensor], given: list[Tensor], truths: list[Tensor], exact: list[Tensor]) -> None:
    """Outputs, and gradients from random incoming ones that are not contiguous."""
    limit = TOLERANCE[outputs[0].dtype]
    incoming = [torch.randn(*o.shape[:-1], 2 * o.shape[-1], device=DEVICE)[..., ::2].to(o.dtype) for o in outputs]
    with poisoned_memory():
        found = torch.autograd.grad(outputs, given, incoming, allow_unused=True)
    wanted = torch.autograd.grad(truths, exact, [g.double() for g in incoming], allow_unused=True)
    for output, truth in zip(outputs, truths, strict=True):
        assert relative(output, truth) <= limit
    for gradient, truth in zip(found, wanted, strict=True):
        assert (gradient is None) == (truth is None)
        if truth is not None:
            assert gradient is not None and gradient.dtype == outputs[0].dtype
            assert relative(gradient, truth) <= limit


@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["norm", "gate", "gate and norm", "gate without bias, and norm"])
def test_adaln(kind: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """x', h and every gradient; γ, scale and shift are strided parts of one tensor, as the block cuts them."""
    tokens, batch, width = size
    given = leaves((tokens, batch, width), (tokens, batch, width), (width,), (batch, 6 * width), dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in given]

    def parts(x: Tensor, y: Tensor, bias: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        gamma, _, scale, _, shift, _ = modulation.chunk(6, dim=-1)
        return x, y if "gate" in kind else None, None if "without" in kind else bias, gamma, scale, shift

    x, y, bias, gamma, scale, shift = parts(*given)
    with poisoned_memory():
        if kind == "norm":
            outputs = [AdaLN.apply(x, None, None, None, scale, shift, LAYER_NORM_EPS)[1]]
        elif kind == "gate":
            outputs = [AdaLN.apply(x, y, bias, gamma, None, None, LAYER_NORM_EPS)[0]]
        else:
            outputs = list(AdaLN.apply(x, y, bias, gamma, scale, shift, LAYER_NORM_EPS))
    x, y, bias, gamma, scale, shift = parts(*exact)
    if y is not None:
        x = x + gamma * (y if bias is None else y + bias)
    normed = F.layer_norm(x, (width,), eps=LAYER_NORM_EPS) * (1 + scale) + shift
    truths = {"norm": [normed], "gate": [x]}.get(kind, [x, normed])
    compare(outputs, given, truths, exact)


@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bias_gelu(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """GELU with the bias in it, where it saturates too."""
    given = leaves(size, size[-1:], dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in given]
    with poisoned_memory():
        outputs = [BiasGelu.apply(given[0] * 4, given[1])]
    compare(outputs, given, [F.gelu(exact[0] * 4 + exact[1], approximate="tanh")], exact)
