"""The kernels of 8-bit linears under Triton's interpreter, beside float64 and beside torch's own rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels need Triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu has these for GPUs", allow_module_level=True)

from kernel_checks import poisoned_memory, relative

from hmar_mega.kernels import quantized_linear
from hmar_mega.kernels.quantized_linear import LARGE_TILE, TILES, Tile, int8_linear, round_to_e4m3, tile_for

#: Rounding of the result; the interpreter cuts bfloat16 off.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("rows", "channels", "inner"), [(3, 24, 40), (40, 20, 64)])
def test_int8_linear_is_that_of_float64(
    dtype: torch.dtype, rows: int, channels: int, inner: int, monkeypatch: pytest.MonkeyPatch
):
    """Several tiles, none of which divides the sides but in the second shape the inner one; with bias and GELU."""
    tile = Tile(16, 16, 32, 4, 2)
    monkeypatch.setattr(quantized_linear, "tile_for", lambda rows, dtype: tile)
    x, bias = torch.randn(rows, 1, inner).to(dtype), torch.randn(channels).to(dtype)
    weight = torch.randint(-127, 128, (channels, inner), dtype=torch.int8)
    scale = torch.rand(channels) / 100
    exact = x.double() @ (weight.double() * scale.double()[:, None]).t()
    with poisoned_memory():
        found = int8_linear(x, weight, scale)
        biased, curved = (int8_linear(x, weight, scale, bias, gelu) for gelu in (False, True))
    assert found.dtype == dtype
    assert found.shape == (rows, 1, channels)
    assert relative(found, exact) < TOLERANCE[dtype]
    assert relative(biased, exact + bias.double()) < TOLERANCE[dtype]
    assert relative(curved, F.gelu(exact + bias.double(), approximate="tanh")) < TOLERANCE[dtype]


def test_tiles_grow_with_rows():
    assert [tile_for(rows, torch.bfloat16) for rows in (1, 16, 17, 64, 65)] == [
        TILES[0][1], TILES[0][1], TILES[1][1], TILES[2][1], LARGE_TILE,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_inputs_are_rounded_to_e4m3_as_torch_rounds(dtype: torch.dtype):
    """From numbers that become 0 to such that are cut off; ties go to even."""
    x, scale = torch.randn(3, 1000) * 10 ** torch.empty(3, 1000).uniform_(-5, 3), torch.tensor(0.25)
    x[0, :6] = torch.tensor([0.25 * 17, 0.25 * 19, 112.0, 1e5, -1e5, 2.0**-12])
    x = x.to(dtype)
    wanted = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    with poisoned_memory():
        found = round_to_e4m3(x, scale)
    assert torch.equal(found.float(), wanted.float())  # the interpreter has no -0
    assert found[0, :4].float().tolist() == [16.0, 20.0, 448.0, 448.0]


@pytest.mark.parametrize(
    ("x", "weight", "told"),
    [
        (torch.zeros(2, 8), torch.zeros(4, 6, dtype=torch.int8), r"\(2, 8\)"),
        (torch.zeros(2, 8), torch.zeros(4, 8), "int8"),
        (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.int8), "float64"),
        (torch.zeros(8, 2).t(), torch.zeros(4, 8, dtype=torch.int8), "contiguous"),
    ],
)
def test_what_the_kernel_does_not_take(x: torch.Tensor, weight: torch.Tensor, told: str):
    with pytest.raises(ValueError, match=told):
        int8_linear(x, weight, torch.ones(4))
