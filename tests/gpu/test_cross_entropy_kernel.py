"""The Triton cross-entropy kernel on a GPU: against float64, beside torch's, compiled, and in a head."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("spread", [0.5, 5.0])
@pytest.mark.parametrize("columns", [64, 1000, 4096, 20_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_losses_and_gradient(dtype: torch.dtype, columns: int, spread: float) -> None:
    """Within the format's rounding, into poisoned memory, from a gradient that is not contiguous."""
    from cross_entropy_checks import TOLERANCE, check_against_float64

    limit = 2e-5 if dtype == torch.float32 and spread > 1 else TOLERANCE[dtype]
    check_against_float64((37, 5), columns, dtype, spread, "cuda", limit)


def test_compiled() -> None:
    """One node of torch.compile's graph, whose overwriting changes nothing around it."""
    from hmar_mega.kernels.cross_entropy import cross_entropy

    weight = torch.randn(512, 64, device="cuda", requires_grad=True)
    x, targets = torch.randn(33, 64, device="cuda"), torch.randint(512, (33,), device="cuda")

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return cross_entropy(x @ weight.T, targets).mean()

    wanted = torch.autograd.grad(loss(weight), weight)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(weight), weight)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("chunk", [2**27, 2**20])
def test_a_head_takes_it_and_holds_no_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Losses and gradients of a bfloat16 head beside torch's; with chunks, memory stays below the whole logits."""
    from hmar_mega.model import hmar
    from hmar_mega.model.initialize import Initializer
    from hmar_mega.model.layers_torch import TorchLayers

    monkeypatch.setattr(hmar, "LOGITS_CHUNK_BYTES", chunk)
    rows, batch, width, columns = 680, 4, 64, 4096
    head = hmar.Head("head", width, columns, TorchLayers(), Initializer(0, 0.3)).to("cuda", torch.bfloat16)
    x, cond = (
        torch.randn(*n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in ((rows, batch), (batch,))
    )
    targets = torch.randint(columns, (rows, batch), device="cuda")
    leaves = (x, cond, *head.parameters())
    results = []
    torch.autograd.grad(head(x[:1], cond, targets[:1]).sum(), leaves)  # cuBLAS takes its workspaces
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(hmar, "takes_fused", lambda *given: False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses = head(x, cond, targets)
        results.append((losses.detach(), *torch.autograd.grad(losses.mean(), leaves)))
        used = torch.cuda.max_memory_allocated() - before
        if fused and chunk == 2**20:
            assert used < rows * batch * columns * 2 / 2, "as much as half of the bfloat16 logits was held at once"
    for ours, torchs in zip(*results, strict=True):
        assert (ours.double() - torchs.double()).norm() <= 3e-2 * torchs.double().norm()
