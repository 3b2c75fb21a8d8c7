"""The planned peak of activations against a forward and backward pass of a full-size model, traced with fake tensors:
every operation runs for real on tensors without memory, and what is alive is counted by storage. The own kernels run
as far as their launches, which is where all their tensors are made."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hmar_mega.config import Config
from hmar_mega.config_io import load_config
from hmar_mega.model import elementwise, hmar
from hmar_mega.planning.activations import activation_bytes
from hmar_mega.planning.layout import Layout
from hmar_mega.planning.workload import Workload

#: d16 and d24 at 256 px in the batches of the GPU measurements, with fewer layers, which only repeat.
CASES = {
    "none": ("train/d16-256", 64, "cpu", []),
    "selective": ("train/d16-256", 64, "cpu", ["parallel.recompute=selective"]),
    "full": ("train/d16-256", 64, "cpu", ["parallel.recompute=full"]),
    "fp32": ("train/d16-256", 16, "cpu", ["precision.compute=fp32"]),
    "wide": ("train/d24-512", 8, "cpu", []),
    "kernels": ("train/d16-256", 64, "cuda", []),
    "kernels_selective": ("train/d16-256", 64, "cuda", ["parallel.recompute=selective"]),
    "kernels_full": ("train/d16-256", 64, "cuda", ["parallel.recompute=full"]),
    "kernels_sdpa": ("train/d24-512", 8, "cuda", ["model.attention.backend=sdpa"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_is_that_of_a_traced_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 3 %; the last line of the pass, the cross-entropy of whole logits, included."""
    name, batch, device, overrides = CASES[case]
    monkeypatch.setattr(hmar, "LOGITS_CHUNK_BYTES", 2**62)  # one chunk, never computed again
    if device == "cuda":
        overrides = ["model.attention.backend=triton", "parallel.cuda_graphs=false", *overrides]
        trace_kernels(monkeypatch)
    model = load_config(name).model
    shape = ["model.depth=6", f"model.width={model.resolved_width}", f"model.heads={model.resolved_heads}"]
    sizes = [f"data.global_batch_size={batch}", f"data.micro_batch_size={batch}"]
    config = load_config(name, [*shape, *sizes, *overrides])
    planned = sum(activation_bytes(Workload.of(config, device), Layout.of(config, 1), 0, chunk=None))
    assert planned == pytest.approx(traced_peak(config), rel=0.03)


def trace_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the own kernels for tensors of any device, without launching them."""
    adaln = pytest.importorskip("hmar_mega.kernels.adaln", reason="the kernels need Triton")

    class Unlaunched:
        def __getitem__(self, programs: object) -> Any:
            return lambda *args, **kwargs: None

    for name in ("adaln_forward_kernel", "adaln_backward_kernel", "gelu_forward_kernel", "gelu_backward_kernel"):
        monkeypatch.setattr(adaln, name, Unlaunched())
    monkeypatch.setattr(elementwise, "fused", lambda device, dtype: True)
    monkeypatch.setattr(hmar, "takes_fused", lambda device, dtype, tensor_parallel: True)


class LiveBytes(TorchDispatchMode):
    """Counts the storages of what operations return, while they live, but for those of `own` tensors."""

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in own}
        self.total = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.total += self.live[key]
            self.peak = max(self.peak, self.total)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.total -= self.live.pop(key, 0)


def traced_peak(config: Config) -> int:
    """Bytes alive at most during a pass, parameters and accumulated gradients apart."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision.compute]
    scales, batch = config.schedule.scales, config.data.global_batch_size
    vocabulary, latents = config.tokenizer.codebook_size, config.tokenizer.latent_channels
    with torch.device("meta"):
        model = hmar.HMAR(config.model, scales, vocabulary, latents)
    model.set_recompute(config.parallel.recompute)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
            for key, buffer in list(module._buffers.items()):
                module._buffers[key] = None if buffer is None else torch.zeros(buffer.shape, dtype=buffer.dtype)
        for parameter in model.parameters():  # as an optimizer that takes gradients one by one
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        labels, given = torch.zeros(batch, dtype=torch.long), torch.randn(batch, scales.num_tokens - 1, latents)
        targets = torch.zeros(batch, scales.num_tokens, dtype=torch.long)
        drop_path = torch.ones(config.model.depth, 2, batch)
        with LiveBytes(list(model.parameters())) as counted:
            model(labels, given, drop_path=drop_path, targets_BN=targets).mean().backward()
    return counted.peak
