"""Models for other runtimes: `hmar-mega export MODEL OUT --format torch-export|onnx|aoti`, loaded back and compared.

| format | what is written | runs in |
|---|---|---|
| `torch-export` | `decoder.pt2`, `generate.pt2`: programs of torch.export, traced on the CPU | torch |
| `onnx` | `decoder.onnx` | any ONNX runtime |
| `aoti` | `decoder.pt2`, compiled by AOTInductor for one kind of device | torch, also from C++ |

The decoder turns f̂ (B, Z, h, w) float32 into images (B, 3, R, R) float32 in [0, 1], for any B. `generate` is the whole
of sampling in one program of fixed batch and settings, the model's own: labels (B,) and seeds (B,) int64 to tokens
(B, N) and images, with the tokens that `ImageModel.generate` draws. Its loops over scales, passes and layers are
unrolled: tracing takes time and memory in proportion to depth × passes. Everything is float32, but for 8-bit weights.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hmar_mega.errors import UserError
from hmar_mega.files import new_folder
from hmar_mega.inference.packed import PackedHMAR, PackedState, why_not_packed
from hmar_mega.inference.pipeline import ImageModel
from hmar_mega.inference.sampler import SampleSettings, sample_scales
from hmar_mega.precision import exact_float32
from hmar_mega.tokenizer.model import MultiScaleVQVAE
from hmar_mega.versions import installed_versions

log = logging.getLogger(__name__)

Runtime = Literal["torch-export", "onnx", "aoti"]

#: Largest difference of a pixel in [0, 1] between a written program and the model.
TOLERANCE = 1e-3

#: Batches that a decoder is compared at, beside the one of `TRACED` that it was traced with.
COMPARED, TRACED = (1, 3), 2

DESCRIPTION_FILE = "export.json"

#: Packages that log every step of an optimization.
TALKATIVE = ("onnx_ir", "onnxscript")

Run = Callable[..., Any]


class DecoderProgram(nn.Module):
    """f̂ (B, Z, h, w) → images (B, 3, R, R) in [0, 1]."""

    def __init__(self, tokenizer: MultiScaleVQVAE) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = tokenizer.post_quant_conv, tokenizer.decoder

    def forward(self, f_hat: Tensor) -> Tensor:
        """Decode."""
        pixels: Tensor = self.decoder(self.post_quant_conv(f_hat))
        return pixels.clamp(-1, 1).add(1).mul(0.5)


class GenerateProgram(nn.Module):
    """Labels (B,) and seeds (B,) int64 → tokens (B, N) int64 and images (B, 3, R, R) in [0, 1]."""

    def __init__(self, model: ImageModel, settings: SampleSettings) -> None:
        super().__init__()
        self.model, self.tokenizer, self.settings = model.model, model.tokenizer, settings
        self.packed = PackedHMAR(model.model, kernels=False)
        self.decode = DecoderProgram(model.tokenizer)

    def forward(self, labels: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and decode."""
        state = PackedState(self.packed, self.tokenizer.quantizer, labels, seeds, self.settings)
        tokens, f_hat = sample_scales(state)
        return tokens, self.decode(f_hat)


@dataclass(frozen=True)
class Exported:
    """One written program.

    Attributes:
        file: its name.
        inputs, outputs: name → what it is.
        max_error: largest difference of a pixel from the model, on inputs drawn anew.
    """

    file: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    max_error: float


def deploy(model: ImageModel, out: Path, runtime: Runtime, batch: int = 1) -> dict[str, Exported]:
    """Write a model's programs into a new folder, with what they are in `export.json`.

    Args:
        model: on the CPU, or for `aoti` on the device to compile for; its decoder's format is not looked at.
        batch: of `generate`.

    Returns:
        What was written, by program.

    Raises:
        UserError: when `out` exists, a package or compiler is missing, PyTorch cannot export the model, or a program
            that was loaded back does not give the model's images. Then nothing is left.
    """
    if runtime not in get_args(Runtime) or batch < 1:
        raise UserError(f"format {runtime!r}, batch {batch}: formats are {', '.join(get_args(Runtime))}, batches ≥ 1")
    _check_tools(runtime)
    with new_folder(out) as temporary, torch.no_grad(), exact_float32():
        done = {"decoder": _export_decoder(model, temporary, runtime)}
        if runtime == "torch-export":
            reason = why_not_packed(model.model)
            if reason is None:
                done["generate"] = _export_generate(model, temporary, batch)
            else:
                log.warning("generate is left out, the decoder alone is exported: %s", reason)
        described = {
            "format": runtime, "device": model.device.type, "programs": {n: asdict(one) for n, one in done.items()},
            "classes": model.settings.get("classes"), "num_classes": model.num_classes,
            "patch_nums": list(model.schedule.patch_nums), "versions": installed_versions(),
        }  # fmt: skip
        (temporary / DESCRIPTION_FILE).write_text(json.dumps(described, indent=1) + "\n")
    return done


def _check_tools(runtime: Runtime) -> None:
    if runtime == "onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as err:
            raise UserError(f"the onnx format needs a package ({err}): pip install 'hmar-mega[export]'") from None
    elif runtime == "aoti" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError("the aoti format compiles C++, and there is no compiler: install g++, or use torch-export")


def _export_decoder(model: ImageModel, folder: Path, runtime: Runtime) -> Exported:
    program = DecoderProgram(model.tokenizer).eval()
    path = folder / ("decoder.onnx" if runtime == "onnx" else "decoder.pt2")
    sample = (_latents(model, TRACED),)
    shapes = ({0: torch.export.Dim("batch", min=1, max=2**16)},)
    with _explained(f"the decoder as {runtime}"):
        if runtime == "onnx":
            torch.onnx.export(
                program, sample, path, input_names=["f_hat"], output_names=["images"], dynamic_shapes=shapes,
                dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
        else:
            exported = torch.export.export(program, sample, dynamic_shapes=shapes)
            if runtime == "aoti":
                torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
            else:
                torch.export.save(exported, path)
        run = load_program(path, runtime)
        error = 0.0
        for size in (TRACED, *COMPARED):
            f_hat = _latents(model, size)
            error = max(error, _difference(run(f_hat), program(f_hat)))
    _check(path.name, error)
    z, grid, side = model.tokenizer.config.latent_channels, model.schedule.grid, model.tokenizer.resolution
    return Exported(
        path.name, {"f_hat": f"float32 (B, {z}, {grid}, {grid})"}, {"images": f"float32 (B, 3, {side}, {side})"}, error
    )


def _export_generate(model: ImageModel, folder: Path, batch: int) -> Exported:
    program, path = GenerateProgram(model, model.sample_settings()).eval(), folder / "generate.pt2"

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randint(model.num_classes, (batch,)), torch.randint(2**62, (batch,))

    program(*draw())  # what is computed once and kept is computed from values, not while tracing
    with _explained("sampling as torch-export"):
        torch.export.save(torch.export.export(program, draw(), strict=False), path)
        run = load_program(path, "torch-export")
        labels, seeds = draw()
        tokens, images = run(labels, seeds)
    wanted_tokens, wanted = program(labels, seeds)
    plain = model.generate(labels, seed=seeds)
    if not torch.equal(tokens, wanted_tokens):
        share = float((tokens == wanted_tokens).float().mean())
        raise UserError(f"{path.name}, loaded back, draws only {share:.1%} of the model's tokens; nothing was written")
    error = max(_difference(images, wanted), _difference(images, plain))
    _check(path.name, error)
    side, count = model.tokenizer.resolution, model.schedule.num_tokens
    return Exported(
        path.name, {"labels": f"int64 ({batch},)", "seeds": f"int64 ({batch},)"},
        {"tokens": f"int64 ({batch}, {count})", "images": f"float32 ({batch}, 3, {side}, {side})"}, error,
    )  # fmt: skip


def load_program(path: Path, runtime: Runtime) -> Run:
    """A written program as a function of tensors."""
    if runtime == "torch-export":
        return torch.export.load(path).module()
    if runtime == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*given: Tensor) -> Tensor:
        feed = {one.name: tensor.cpu().numpy() for one, tensor in zip(session.get_inputs(), given, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def _latents(model: ImageModel, batch: int) -> Tensor:
    grid, channels = model.schedule.grid, model.tokenizer.config.latent_channels
    return torch.randn(batch, channels, grid, grid, device=model.device)


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Largest |difference|; infinite for another shape or anything that is not finite."""
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found.cpu() - wanted.cpu()).abs().max())


def _check(name: str, error: float) -> None:
    if not error <= TOLERANCE:
        raise UserError(
            f"{name}, loaded back, gives images that are up to {error:.1e} off the model's (allowed: {TOLERANCE:.0e}); "
            "nothing was written"
        )


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say in one line what PyTorch's exporters say in many, and nothing of what they do on the way."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except UserError:
        raise
    except Exception as err:  # every exporter has its own kinds, some of them private
        log.debug("%s", what, exc_info=True)
        lines = str(err).strip().splitlines() or [type(err).__name__]
        raise UserError(f"PyTorch {torch.__version__} cannot export {what}: {lines[0][:300]}") from err
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
