"""The fused sampling kernel and the normalisation of q and k, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu has these for GPUs", allow_module_level=True)

import kernel_checks  # noqa: F401 (mends the interpreter)
import numpy as np
from sampling_checks import TRUNCATIONS, check_distribution, check_same_tokens

from hmar_mega.inference.sampler import truncate
from hmar_mega.kernels import sampling
from hmar_mega.kernels.qk_norm import normalise_qk_
from hmar_mega.model.attention import split_normalised
from hmar_mega.rng import uniform


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time is that of its operations, whatever their size."""
    monkeypatch.setattr(sampling, "PER_PROGRAM", 2**17)
    torch.manual_seed(0)


@pytest.mark.parametrize(("top_k", "top_p"), TRUNCATIONS)
def test_same_numbers_draw_the_plain_paths_tokens(top_k: int, top_p: float):
    """Guided, with a codebook that is no power of two; no number of these lies near a step."""
    logits, numbers = 3 * torch.randn(7, 2 * 3, 100), torch.rand(3, 7)
    assert check_same_tokens(logits, numbers, 1.3, top_k, top_p) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codebooks_of_4096_in_16_bits(dtype: torch.dtype):
    """Many logits of 16 bits are equal: all that are as likely as the last one are kept."""
    logits, numbers = (2 * torch.randn(3, 4, 4096)).to(dtype), torch.rand(4, 5)[:, 1:4]
    assert check_same_tokens(logits, numbers, 0.0, 900, 0.99) == 0


def test_equal_impossible_and_signed_zero_logits():
    logits = torch.zeros(5, 2, 12)
    logits[1, :, 3:] = float("-inf")
    logits[2, :, ::2] = -0.0  # as large as 0: top-k 1 keeps all
    logits[3, :, 4:8] = 90.0
    logits[4, :, 11] = -200.0  # too unlikely for float32
    numbers = torch.tensor([[0.0, 0.5, 0.95, 0.3, 1 - 2.0**-24], [0.99, 0.0, 0.0, 1 - 2.0**-24, 0.2]])
    for top_k, top_p in ((0, 1.0), (1, 1.0), (3, 0.5), (4, 1.0)):
        assert check_same_tokens(logits, numbers, 0.0, top_k, top_p) == 0
    tokens, _ = sampling.sample_tokens(torch.full((1, 1, 12), float("nan")), torch.rand(1, 1), 0.0, 0, 1.0)
    assert tokens.item() == 11  # a token of the codebook in any case: nothing is read outside it


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 0.9)])
def test_tokens_are_drawn_with_their_probabilities(top_k: int, top_p: float):
    """Chi-square of 100 000 draws."""
    row = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.9, -3.0, 1.5])
    numbers = uniform(torch.tensor(5), torch.arange(1), 99, 100_000)[0]
    exact = truncate(row.double(), top_k, top_p).softmax(0).numpy()
    assert np.count_nonzero(exact) == (7 if top_k == 0 else 4)
    check_distribution(row, numbers, exact, top_k, top_p)


@pytest.mark.parametrize(
    ("logits", "numbers", "told"),
    [
        (torch.zeros(2, 3, 8), torch.zeros(2, 2), "n, 2B, V"),
        (torch.zeros(3, 2, 8).transpose(0, 1), torch.zeros(3, 2), "contiguous"),
        (torch.zeros(2, 3, 8, dtype=torch.float64), torch.zeros(3, 2), "float64"),
        (torch.zeros(1, 1, 20_000), torch.zeros(1, 1), "16384"),
    ],
)
def test_what_the_kernel_does_not_take(logits: torch.Tensor, numbers: torch.Tensor, told: str):
    with pytest.raises(ValueError, match=told):
        sampling.sample_tokens(logits, numbers, 0.0, 0, 1.0)


@pytest.mark.parametrize("width", [64, 24])
def test_q_and_k_are_normalised_in_place(width: int):
    qkv, scale = torch.randn(5, 2, 3, 4, width) * 10, torch.tensor([1.0, 4.0, 30.0, 100.0])
    qkv[0, 0, :, 0] = 0.0
    wanted = split_normalised(qkv, scale)
    found = normalise_qk_(qkv.clone(), scale)
    torch.testing.assert_close(tuple(found.permute(2, 1, 3, 0, 4)), wanted, rtol=2e-6, atol=1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        normalise_qk_(qkv.transpose(0, 1), scale)
