"""Quantizing a model: `hmar-mega quantize MODEL OUT --to int8`, or `load_model(DIR, quantize="int8")`.

Int8 weights need nothing but the weights. FP8 inputs need a scale a linear, which is measured: the model draws images
in its own number format with its own sampling settings, and the largest input of every linear, times `MARGIN`, is what
the scale lets e4m3 represent. Larger ones are cut off. Nothing else of the model is touched.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from hmar_mega.checkpoint.export import DTYPES
from hmar_mega.checkpoint.sources import LATEST, ExportReader
from hmar_mega.errors import UserError
from hmar_mega.files import new_folder
from hmar_mega.inference.graphs import ImageSampler
from hmar_mega.inference.opening import open_model
from hmar_mega.inference.options import class_names
from hmar_mega.inference.pipeline import QUANTIZED_FORMAT, ImageModel, image_seeds
from hmar_mega.inference.sampler import generate_tokens
from hmar_mega.model.layers_quantized import PARTS, Format, Part, linears_of, quantize_linears
from hmar_mega.progress import track

log = logging.getLogger(__name__)

#: What is quantized unless it is asked otherwise: all but the heads, a small share of the weights that stands right
#: before the draw.
DEFAULT_PARTS: tuple[Part, ...] = ("blocks", "adaln")

#: Room above the largest input that calibration saw. It costs one of e4m3's fifteen binades, at the small end.
MARGIN = 2.0

#: Images that calibration draws, classes in turn, and how many at once.
CALIBRATION_IMAGES, BATCH = 32, 16


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The images that are drawn to measure inputs: classes, and the first one's seed."""

    labels: tuple[int, ...]
    seed: int = 0

    @classmethod
    def of(cls, count: int, classes: Sequence[int], seed: int = 0) -> Calibration:
        """`count` images, their classes evenly among `classes`.

        Raises:
            UserError: for no images.
        """
        if count < 1:
            raise UserError(f"--calibrate {count}: FP8 scales are measured on at least 1 image")
        if count < len(classes):
            return cls(tuple(classes[i * len(classes) // count] for i in range(count)), seed)
        return cls(tuple(classes[i % len(classes)] for i in range(count)), seed)


def quantized(
    model: ImageModel,
    to: Format,
    parts: tuple[Part, ...] = DEFAULT_PARTS,
    calibration: Calibration | None = None,
    advance: Callable[[int], None] | None = None,
) -> ImageModel:
    """Quantize a float model in place.

    Args:
        parts: see `layers_quantized.PARTS`.
        calibration: for fp8; default `CALIBRATION_IMAGES` of the classes evenly.
        advance: told of the images as they are drawn.

    Returns:
        The model itself; its `settings` say what was done.

    Raises:
        UserError: for a model that is quantized already or has weights that are not finite, and for formats, parts,
            classes and seeds that do not exist.
    """
    check_choice(to, parts)
    refuse_quantized(model)
    wrong = [name for name, p in model.model.named_parameters() if not bool(p.isfinite().all())]
    if wrong:
        raise UserError(f"{wrong[0]} has values that are infinite or NaN: this model can neither be sampled nor scaled")
    ranges: dict[str, Tensor] = {}
    done: dict[str, Any] | None = None
    if to == "fp8":
        calibration = calibration or Calibration.of(CALIBRATION_IMAGES, range(model.num_classes))
        ranges = {name: MARGIN * amax for name, amax in input_amax(model, parts, calibration, advance).items()}
        done = {"labels": list(calibration.labels), "seed": calibration.seed, "margin": MARGIN}
        log.info("fp8: inputs of %d linears measured on %d images", len(ranges), len(calibration.labels))
    quantize_linears(model.model, to, parts, ranges)
    description = {"to": to, "parts": list(parts), "calibration": done}
    model.settings = {**model.settings, "format": QUANTIZED_FORMAT, "quantization": description}
    model.sampler = ImageSampler(model.model, model.decoder, model.sampler.graphs)
    return model


def check_choice(to: str, parts: Sequence[str]) -> None:
    """UserError for formats or parts that there are not."""
    if to not in ("int8", "fp8"):
        raise UserError(f"models are quantized to int8 (weights) or fp8 (weights and activations), not to {to!r}")
    wrong = [part for part in parts if part not in PARTS]
    if wrong or not parts:
        raise UserError(f"parts {', '.join(parts)!r}: choose one or several of {', '.join(PARTS)}, separated by commas")


def refuse_quantized(model: ImageModel) -> None:
    """UserError for a model that is quantized already."""
    if (before := model.settings.get("quantization")) is not None:
        raise UserError(
            f"this model is quantized already, to {before['to']} ({', '.join(before['parts'])}); quantize the one that "
            "it was made of"
        )


@torch.inference_mode()
def input_amax(
    model: ImageModel, parts: Sequence[str], calibration: Calibration, advance: Callable[[int], None] | None = None
) -> dict[str, Tensor]:
    """The largest |input| of each linear, () float32, over all passes of the drawn images.

    Where no pass of the model's own schedule asks the mask branch, the images are drawn a second time with two passes a
    scale.
    """
    labels = model.check_labels(calibration.labels)
    seeds = image_seeds(calibration.seed, len(labels)).to(model.device)
    schedules = [model.sample_settings()]
    if model.model.has_mask_branch and all(len(passes) == 1 for passes in schedules[0].mask_schedule):
        counts = model.schedule.scale_lengths
        twice = tuple((n,) if n == 1 else (n // 2, n - n // 2) for n in counts)
        schedules.append(dataclasses.replace(schedules[0], mask_schedule=twice))
    amax = {name: torch.zeros((), device=model.device) for name in linears_of(model.model, tuple(parts))}
    with ExitStack() as stack:
        for name, linear in linears_of(model.model, tuple(parts)).items():
            stack.callback(linear.register_forward_pre_hook(_watch(name, amax)).remove)
        for start in range(0, len(labels), BATCH):
            own, own_seeds = labels[start : start + BATCH], seeds[start : start + BATCH]
            for settings in schedules:
                generate_tokens(model.model, model.tokenizer.quantizer, own, own_seeds, settings)
            if advance is not None:
                advance(len(own))
    return amax


def _watch(name: str, amax: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        amax[name] = torch.maximum(amax[name], given[0].abs().amax().float())

    return hook


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of model.safetensors before and after, and the number format of what was not quantized."""

    before: int
    after: int
    rest: str


def quantize_folder(
    source: Path,
    out: Path,
    to: Format,
    parts: tuple[Part, ...] = DEFAULT_PARTS,
    calibrate: int = CALIBRATION_IMAGES,
    classes: str | None = None,
    seed: int = 0,
    names_file: Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    ema: bool = False,
    checkpoint: str = LATEST,
    tokenizer_folder: Path | None = None,
    show_progress: bool = True,
) -> Sizes:
    """Write the quantized model of an exported model or a run as a model folder of its own.

    Args:
        source: exported model or run directory.
        out: new folder.
        to, parts: see `quantized`.
        calibrate, classes, seed: how many images fp8 is calibrated on, their classes (numbers or names, separated by
            commas; default all, evenly), and the seed of the first.
        names_file: of class names; default the model's own.
        dtype: `fp32`, `bf16` or `fp16`, of what is not quantized; default as it is stored.
        device: to calibrate on.
        ema, checkpoint, tokenizer_folder: see `open_model`.

    Raises:
        UserError: see `quantized` and `open_model`; for an output that exists or cannot be written.
    """
    check_choice(to, parts)
    with new_folder(out) as temporary:
        model = open_model(source, device, ema=ema, checkpoint=checkpoint, tokenizer_folder=tokenizer_folder)
        refuse_quantized(model)
        stored = _stored_dtype(source)
        before = sum(p.numel() * stored.itemsize for p in model.model.parameters())
        if to == "int8":
            quantized(model, to, parts)
        else:
            names = class_names(names_file, model.settings.get("classes"), model.num_classes)
            chosen = range(model.num_classes) if classes is None else names.numbers(classes)
            calibration = Calibration.of(calibrate, chosen, seed)
            with track("calibrating on images", calibrate, show_progress) as tally:
                quantized(model, to, parts, calibration, tally.advance)
        rest = DTYPES[dtype] if dtype is not None else stored
        tensors = _tensors(model.model, rest)
        try:
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as err:
            raise UserError(f"cannot write {out}: {err}; choose a folder with space left") from None
        model.tokenizer.save(temporary / "tokenizer")
        (temporary / "config.json").write_text(json.dumps(model.settings, indent=1))
        after = sum(tensor.nbytes for tensor in tensors.values())
    return Sizes(before, after, next(name for name, value in DTYPES.items() if value == rest))


def _stored_dtype(source: Path) -> torch.dtype:
    """Of an export's weights; checkpoints hold float32."""
    if not (source / "model.safetensors").is_file():
        return torch.float32
    return ExportReader(source).read("pos_start").dtype


def _tensors(model: nn.Module, rest: torch.dtype) -> dict[str, Tensor]:
    """Everything that is saved, in main memory: parameters in `rest`, 8-bit weights and scales as they are."""
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        changes = name in parameters and not name.endswith("log_scale")
        tensors[name] = tensor.detach().cpu().to(rest if changes else tensor.dtype).contiguous()
    return tensors
