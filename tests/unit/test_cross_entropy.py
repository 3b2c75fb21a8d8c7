"""The cross-entropy kernel under Triton's interpreter, and which cross-entropy a head takes."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hmar_mega.model import cross_entropy as choice
from hmar_mega.model import hmar
from hmar_mega.model.hmar import Head
from hmar_mega.model.initialize import Initializer
from hmar_mega.model.layers_torch import TorchLayers

pytest.importorskip("triton", reason="the kernels need Triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu has these for GPUs", allow_module_level=True)

from cross_entropy_checks import INTERPRETED_TOLERANCE, check_against_float64

from hmar_mega.kernels import cross_entropy as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "columns"), [((3, 5), 64), ((2, 3), 4096), ((4,), 3), ((2, 2), 1000)])
def test_losses_and_gradient(shape: tuple[int, ...], columns: int, dtype: torch.dtype):
    check_against_float64(shape, columns, dtype, 2.0, "cpu", INTERPRETED_TOLERANCE[dtype])


def test_rows_longer_than_a_block_are_walked_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", 64)
    check_against_float64((3, 2), 200, torch.float32, 20.0, "cpu", 1e-5)


def test_impossible_columns_and_targets(monkeypatch: pytest.MonkeyPatch):
    """−inf among the logits is probability 0, also where a whole block of them is; a target beyond them costs +inf."""
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", 4)
    logits = torch.randn(4, 10)
    logits[:, :5] = float("-inf")
    targets = torch.tensor([5, 9, 0, 10])
    found = kernels.cross_entropy(logits, targets)
    torch.testing.assert_close(found[:2], F.cross_entropy(logits[:2], targets[:2], reduction="none"))
    assert found[2:].tolist() == [float("inf")] * 2
    spoiled = torch.where(torch.arange(10) == 7, torch.tensor(float("nan")), logits[:2])
    assert kernels.cross_entropy(spoiled, targets[:2]).isnan().all()


def test_what_was_overwritten_is_not_used_again():
    logits, targets = torch.randn(3, 8, requires_grad=True), torch.tensor([0, 3, 7])
    losses = kernels.cross_entropy(logits * 1.0, targets).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward()
    scaled = logits * 2.0
    squares = scaled.square().sum()  # needs `scaled` itself
    both = squares + kernels.cross_entropy(scaled, targets).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), "not torch.float64"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32), "torch.int32"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), "one row for each target"),
        (torch.zeros(4, 2).t(), torch.zeros(2, dtype=torch.int64), "must be contiguous"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(logits: Tensor, targets: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        kernels.cross_entropy(logits, targets)


@pytest.mark.parametrize(
    ("given", "fused", "said"),
    [
        (("cuda", torch.bfloat16, 1), True, "own kernel (one read"),
        (("cuda", torch.float64, 1), False, "torch's, on float32 logits (the own kernel does not take torch.float64)"),
        (("cuda", torch.bfloat16, 2), False, "vocabulary-parallel one (the codebook is split over 2 ranks)"),
        (("cpu", torch.bfloat16, 1), False, "needs a CUDA GPU, not cpu"),
    ],
)
def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture, given: tuple, fused: bool, said: str):
    choice.takes_fused.cache_clear()
    with caplog.at_level(logging.INFO):
        assert [choice.takes_fused(*given) for _ in range(2)] == [fused, fused]
    assert [said in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("rows", [3, 40])
def test_a_head_gives_the_same_with_the_kernel(monkeypatch: pytest.MonkeyPatch, rows: int):
    """Losses and every gradient, in chunks that are recomputed and in one piece."""
    monkeypatch.setattr(hmar, "LOGITS_CHUNK_BYTES", 4 * 2 * 48 * rows)
    results = []
    for fused in (False, True):
        monkeypatch.setattr(hmar, "takes_fused", lambda *given, fused=fused: fused)
        generator = torch.Generator().manual_seed(0)
        head = Head("head", 8, 48, TorchLayers(), Initializer(0, 0.3))
        x, cond = (torch.randn(*n, 8, generator=generator, requires_grad=True) for n in ((10, 2), (2,)))
        losses = head(x, cond, torch.randint(48, (10, 2), generator=generator))
        wanted = (x, cond, *head.parameters())
        results.append((losses, *torch.autograd.grad((losses * torch.rand(10, 2, generator=generator)).sum(), wanted)))
    torch.testing.assert_close(results[1], results[0])
