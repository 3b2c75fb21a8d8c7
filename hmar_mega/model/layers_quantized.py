"""Linears whose weights are int8 or e4m3 with a scale for each output channel, in place of a finished model's own.

Weights: w ≈ scale·q with scale = max|w|/127 (int8, symmetric) or max|w|/448 (e4m3) over the channel's inputs, q rounded
to the nearest, ties to even. `Int8Linear` multiplies inputs in their own format with q, which every format holds
exactly, and the sum with scale. `Fp8Linear` rounds inputs to e4m3 too, after dividing them by `input_scale`, one number
a linear that was measured beforehand: e4m3 is a floating-point format, as precise at a hundredth of its range as at its
end, so that smoothing by channel (arXiv 2211.10438), which int8 inputs need, has little to win. Sums are float32.
For inference only. Axes: K inputs, N output channels.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache, cached_property
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmar_mega.model.elementwise import bias_gelu

log = logging.getLogger(__name__)

Format = Literal["int8", "fp8"]
Part = Literal["blocks", "adaln", "head"]

#: What can be quantized: the four linears of blocks, read in every pass; the modulation, read once an image; the heads.
PARTS: tuple[Part, ...] = ("blocks", "adaln", "head")
_ENDINGS: dict[str, Part] = {
    "attn.qkv": "blocks", "attn.proj": "blocks", "ffn.fc1": "blocks", "ffn.fc2": "blocks", "ada_lin": "adaln",
    "head.linear": "head",
}  # fmt: skip

E4M3_MAX = 448.0

#: Rows up to which int8 weights go through the kernel on a GPU; above they are brought to the input's format once and
#: multiplied by cuBLAS, which reads and writes five bytes a weight. Where the two meet if the kernel reaches six tenths
#: of cuBLAS's rate: reckoned for an H100, not measured (`benchmarks/quantization.py` does).
KERNEL_ROWS = 1024

#: Ones for FP8 products, which want a scale for each row of the input: more rows get their own. Products of torch
#: before 2.5 read scales up to the next multiple of 256 rows.
_MOST_ONES = 2**18


class QuantizedLinear(nn.Module):
    """A `LinearLayer` with 8-bit weights; `Int8Linear` or `Fp8Linear`.

    Buffers `weight` (N, K) and `weight_scale` (N,) float32; parameter `bias` (N,) or None.
    """

    dtype: torch.dtype
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=self.dtype, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))
        self.register_parameter("bias", bias)

    @classmethod
    def like(cls, linear: nn.Linear) -> QuantizedLinear:
        """One for the weights of `linear`, which are still to come; its bias is that of `linear`."""
        return cls(linear.out_features, linear.in_features, linear.bias, linear.weight.device)

    def forward(self, x: Tensor, bias: Tensor | None = None, *, apart: bool = False) -> Any:
        """As `LinearLayer`; (…, K) → (…, N) in x's format."""
        if apart:
            return self.product(x, None), self.bias
        return self.product(x, self.bias if bias is None else bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU(x·Wᵀ + bias), tanh form."""
        return bias_gelu(self.product(x, None), self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias."""
        raise NotImplementedError

    def float_weight(self) -> Tensor:
        """The weights that are meant, (N, K) float32."""
        return self.weight.float() * self.weight_scale[:, None]


class Int8Linear(QuantizedLinear):
    """Int8 weights, inputs as they are."""

    dtype = torch.int8

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias; on a GPU by the kernel up to `KERNEL_ROWS`, above by cuBLAS."""
        return self._product(x, bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU(x·Wᵀ + bias), in the same launch where the kernel runs."""
        if self._in_kernel(x):
            return self._product(x, self.bias, gelu=True)
        return super().gelu(x)

    def _product(self, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        if self._in_kernel(x):
            from hmar_mega.kernels.quantized_linear import int8_linear

            return int8_linear(x.contiguous(), self.weight, self.weight_scale, bias, gelu)
        if x.is_cuda:
            weight = torch.empty_like(self.weight, dtype=x.dtype)
            return F.linear(x, torch.mul(self.weight, self.weight_scale[:, None], out=weight), bias)
        precise = torch.promote_types(x.dtype, torch.float32)
        return _scaled(F.linear(x.to(precise), self.weight.to(precise)), self.weight_scale, bias, x.dtype)

    def _in_kernel(self, x: Tensor) -> bool:
        return x.is_cuda and has_triton() and x.numel() <= KERNEL_ROWS * x.shape[-1]


class Fp8Linear(QuantizedLinear):
    """Weights and inputs in e4m3; buffer `input_scale` () float32 for all inputs."""

    dtype = torch.float8_e4m3fn
    input_scale: Tensor

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__(out_features, in_features, bias, device)
        self.register_buffer("input_scale", torch.empty((), dtype=torch.float32, device=device))

    @cached_property
    def output_scale(self) -> Tensor:
        """Of the sums, (N,) float32; computed once, when the scales have their values and stay where they are."""
        return self.weight_scale * self.input_scale

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias: FP8 products where this GPU has them for such inputs, else the same numbers in float32."""
        scale = self.output_scale
        if native_fp8(x.device, x.dtype, *self.weight.shape):
            from hmar_mega.kernels.quantized_linear import round_to_e4m3

            rounded = round_to_e4m3(x.contiguous(), self.input_scale)
            return fp8_product(rounded, self.weight, scale, bias)
        precise = torch.promote_types(x.dtype, torch.float32)
        rounded = e4m3(x.to(precise) / self.input_scale)
        return _scaled(F.linear(rounded.to(precise), self.weight.to(precise)), scale, bias, x.dtype)


def _scaled(sums: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = sums * scale
    return (out if bias is None else out + bias).to(dtype)


_KINDS: dict[Format, type[QuantizedLinear]] = {"int8": Int8Linear, "fp8": Fp8Linear}


def linears_of(model: nn.Module, parts: tuple[str, ...] = PARTS) -> dict[str, nn.Module]:
    """The linears of the given parts by name, quantized or not, in the model's order."""
    found = {}
    for name, module in model.named_modules():
        part = next((part for ending, part in _ENDINGS.items() if name.endswith(ending)), None)
        if part in parts and isinstance(module, nn.Linear | QuantizedLinear):
            found[name] = module
    return found


def replace_linears(model: nn.Module, to: Format, parts: tuple[str, ...]) -> None:
    """Put quantized linears without values in the place of the model's own, for weights that are to be read."""
    for name, linear in linears_of(model, parts).items():
        model.set_submodule(name, _KINDS[to].like(cast(nn.Linear, linear)))


@torch.no_grad()
def quantize_linears(model: nn.Module, to: Format, parts: tuple[str, ...], input_amax: dict[str, Tensor]) -> None:
    """Quantize the model's linears in place, one after the other.

    Args:
        input_amax: for fp8, the largest |input| that each linear is to represent, () float32, by name.
    """
    for name, linear in linears_of(model, parts).items():
        assert isinstance(linear, nn.Linear)
        new = _KINDS[to].like(linear)
        new.weight, new.weight_scale = quantize_weight(linear.weight, to)
        if isinstance(new, Fp8Linear):
            # a linear that only ever saw zeros: any scale will do
            amax = input_amax[name].to(linear.weight.device, torch.float32)
            new.input_scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
        model.set_submodule(name, new)


def quantize_weight(weight_NK: Tensor, to: Format) -> tuple[Tensor, Tensor]:
    """(N, K) → q (N, K) int8 or float8_e4m3fn, and scale (N,) float32; a channel of zeros has scale 1."""
    weight = weight_NK.float()
    scale = weight.abs().amax(1) / (127 if to == "int8" else E4M3_MAX)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    ratio = weight / scale[:, None]
    return (ratio.round().clamp(-127, 127).to(torch.int8) if to == "int8" else e4m3(ratio)), scale


def e4m3(x: Tensor) -> Tensor:
    """Cut off at ±448 and rounded to the nearest e4m3."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def fp8_product(x: Tensor, weight_NK: Tensor, scale_N: Tensor, bias: Tensor | None) -> Tensor:
    """scale·(x·Wᵀ) + bias of e4m3 (…, K) and (N, K), in bf16: torch's row-wise scaled product."""
    flat = x.view(-1, x.shape[-1])
    ones = _ones(x.device) if len(flat) <= _MOST_ONES else torch.ones(len(flat), device=x.device)
    out = torch._scaled_mm(
        flat, weight_NK.t(), scale_a=ones[: len(flat), None], scale_b=scale_N[None], bias=bias,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return out.view(*x.shape[:-1], -1)


@cache
def _ones(device: torch.device) -> Tensor:
    return torch.ones(_MOST_ONES, device=device)


@cache
def has_triton() -> bool:
    """Whether the kernels can run; says once where they cannot."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        log.info("int8 weights are brought to the input's format before every product: Triton is not installed")
    return found


@cache
def native_fp8(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> bool:
    """Whether such a linear runs on the GPU's FP8 products; says once for each reason where it does not."""
    reason = _why_not_native(device, dtype, out_features, in_features)
    if reason is not None:
        _say_emulated(reason)
    return reason is None


def _why_not_native(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> str | None:
    if device.type != "cuda":
        return f"FP8 products need a CUDA GPU, not {device.type}"
    if dtype != torch.bfloat16:
        return f"row-wise scaled FP8 products give bf16, not {str(dtype).removeprefix('torch.')}"
    if out_features % 16 or in_features % 16:
        return f"FP8 products need sides that 16 divides, not {in_features} × {out_features}"
    if not has_triton():
        return "inputs are rounded by a kernel, and Triton is not installed"
    return _fp8_fault(device)


@cache
def _fp8_fault(device: torch.device) -> str | None:
    """What is wrong with this GPU's row-wise scaled products, tried on few and odd numbers of rows; None: nothing."""
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize_weight(torch.randn(96, 64, generator=generator).to(device), "fp8")
    bias = torch.randn(96, generator=generator).to(device, torch.bfloat16)
    for rows in (1, 5, 300):
        x = e4m3(torch.randn(rows, 64, generator=generator).to(device) * 100)
        truth = (x.double() @ weight.double().t()) * scale.double() + bias.double()
        try:
            error = float((fp8_product(x, weight, scale, bias).double() - truth).norm() / truth.norm())
        except RuntimeError as err:
            return f"this GPU has none ({str(err).strip().splitlines()[0]})"
        if not error < 1e-2:
            return f"this GPU's are {error:.1e} off for {rows} rows"
    return None


@cache
def _say_emulated(reason: str) -> None:
    log.info("FP8 is emulated in float32, with the same numbers and without its speed: %s", reason)
