"""8-bit linears on a GPU: kernel, cuBLAS and FP8 products beside float64; quantized models as CUDA graphs."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 20, 60, 300, 2000])
@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_linears_are_those_of_float64(to: str, rows: int) -> None:
    """bf16, every tile of the kernel, above `KERNEL_ROWS` by cuBLAS; rounding of the result is all that is left."""
    from kernel_checks import relative

    from hmar_mega.model.layers_quantized import e4m3, native_fp8, quantize_linears

    if to == "fp8" and not native_fp8(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, 640, 576):
        pytest.skip("this GPU has no row-wise scaled FP8 products")
    holder = torch.nn.ModuleDict({"ada_lin": torch.nn.Linear(576, 640, device="cuda")})
    quantize_linears(holder, to, ("adaln",), {"ada_lin": torch.tensor(3.0)})  # type: ignore[arg-type]
    layer = holder["ada_lin"]
    layer.bias = torch.nn.Parameter(layer.bias.bfloat16(), requires_grad=False)
    x = torch.randn(rows, 1, 576, device="cuda", dtype=torch.bfloat16)
    inputs = x.double() if to == "int8" else e4m3(x.float() / layer.input_scale).double() * layer.input_scale.double()
    exact = inputs @ layer.float_weight().double().t() + layer.bias.double()
    assert relative(layer(x), exact) < 5e-3
    assert relative(layer.gelu(x), torch.nn.functional.gelu(exact, approximate="tanh")) < 8e-3


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_quantized_images_as_graphs_are_the_plain_paths(to: str) -> None:
    """float32, in which both paths give the same tokens; then bf16, in which the graph must repeat itself."""
    from helpers import PASSES, tiny_config, tiny_hmar, tiny_tokenizer

    from hmar_mega.inference.decoding import ImageDecoder
    from hmar_mega.inference.graphs import ImageSampler
    from hmar_mega.inference.sampler import SampleSettings, generate_tokens
    from hmar_mega.model.layers_quantized import PARTS, linears_of, quantize_linears

    config = tiny_config()
    settings = SampleSettings(1.5, 0, 0.9, PASSES, 0.7)
    labels, seeds = torch.tensor([0, 3, 4], device="cuda"), torch.tensor([7, 0, 2**40], device="cuda")
    tokenizer = tiny_tokenizer(config).cuda()
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_hmar(config).cuda().to(dtype)
        for block in (*model.blocks.values(), *model.mask_blocks.values()):
            block.attn.log_scale.data = block.attn.log_scale.data.float()
        quantize_linears(model, to, PARTS, {name: torch.tensor(50.0) for name in linears_of(model)})  # type: ignore[arg-type]
        sampler = ImageSampler(model.requires_grad_(False), ImageDecoder(tokenizer))
        tokens, images = sampler(labels, seeds, settings)
        assert sampler.why_not(3, settings) is None
        again, same = sampler(labels, seeds, settings)
        assert torch.equal(tokens, again)
        assert torch.equal(images, same)
        if dtype == torch.float32:
            wanted, _ = generate_tokens(model, tokenizer.quantizer, labels, seeds, settings)
            assert torch.equal(tokens, wanted)
